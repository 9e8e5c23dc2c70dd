"""The worker's face: its arguments, its life from the first connection to the last acknowledgement, how it is stopped.

What it does while it is connected is in `serving`.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Final, Self

from aiokeyless._listeners import Listeners
from aiokeyless._validation import check_rate, check_schedule, seconds, whole_number
from aiokeyless.client import transport_of
from aiokeyless.errors import BrokerError, ConfigurationError, KeylessError
from aiokeyless.schedule import next_delay, wait_adaptive

from .exchanges import check_key
from .learned import keeper
from .logs import log
from .memory import MemoryBroker
from .nats.engine import NatsEngine
from .nats.fleet import KEYLESS
from .nats.streams import StreamSettings
from .reporting import WorkerStatistics
from .serving import STARTING, Limits, Serving

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping
    from pathlib import Path
    from types import TracebackType

    from tenacity.wait import wait_base

    from aiokeyless._http.transport import Transport
    from aiokeyless.client import KeylessClient

    from .engine import Engine, Terms
    from .event_keys import EventKeys
    from .nats.fleet import Fleet

DEFAULT_NATS_URL: Final = "nats://127.0.0.1:4222"
_PUBLISH_WITHIN: Final = 5.0  # seconds
_MARGIN: Final = 5.0  # seconds between the longest that a delivery takes and its redelivery
_EXCHANGES: Final = 3  # of one delivery at most: a create, the check whether it took effect, a poll


class ApprovalWorker:
    """Waits for approvals that a broker stores; any number of workers on any number of machines share the work.

    Each delivery of a request is one poll of its operation. While that is pending, the request goes back to NATS
    JetStream with the delay that the schedule asks for, and is delivered to any worker that is free then. Once it is
    decided, an event is published, and then the request is acknowledged.

    It is an async context manager: the worker is ready at the start of the body, and is shut down after it. Where it
    fails, the body is cancelled, and what `run` would raise is raised.

    Args:
        client: Any client. Each call is sent once, whatever its ``max_attempts``: the broker repeats what failed. The
            caller closes it, after the worker.
        broker: Address of a NATS server, or several, separated by commas; or a `MemoryBroker`, for tests. Default:
            ``nats://127.0.0.1:4222``.
        max_in_flight: Deliveries in flight at once. Default: 64.
        max_polls_per_second: Polls of this worker in a second; None for as many as fit. What is due beyond that stays
            at the broker, for this worker or another. A 429 halves it, as for a client. Default: 1000.
        schedule: When to poll: a `wait_adaptive` or any other tenacity wait strategy. Default: a `wait_adaptive`.
        learned: Where what that default schedule learns is kept: it is read at the start, and saved every minute and at
            the end. A file, of this worker alone, which is made where it is missing; or ``kv://BUCKET``, a key-value
            bucket of the broker, which the workers of a fleet share. An application that passes a `schedule` keeps that
            one's `to_json` itself. Default: nowhere; then a restart forgets it.
        grace: Seconds past the deadline for which a final poll that got no answer is repeated; 0: not at all. No wait
            may be longer than the duplicate window without it, so give it to all workers of a fleet alike. Default: 30.
        fleet: The fleet that it belongs to. Default: that of the name ``keyless``.
        event_keys: What it signs its events and claims with, so that readers and other workers believe no others.
            Default: none; then all users of the broker's account must be trusted with approvals.
        settings: Of the streams, where they do not exist yet. Default: those of `StreamSettings`.
        connect_options: Of ``nats.connect``: credentials, TLS; none of its callbacks, nor how it reconnects. Default:
            none.

    Raises:
        ConfigurationError: An argument is wrong, or `learned` is a file of something else.

    Example:
        >>> async with KeylessClient() as client:
        ...     await ApprovalWorker(client).run()
    """

    def __init__(
        self,
        client: KeylessClient,
        broker: str | MemoryBroker = DEFAULT_NATS_URL,
        *,
        max_in_flight: int = 64,
        max_polls_per_second: float | None = 1000.0,
        schedule: wait_base | None = None,
        learned: Path | str | None = None,
        grace: float = 30.0,
        fleet: Fleet = KEYLESS,
        event_keys: EventKeys | None = None,
        settings: StreamSettings | None = None,
        connect_options: Mapping[str, object] | None = None,
    ) -> None:
        longest_delivery = _EXCHANGES * client.request_timeout + _PUBLISH_WITHIN
        self._limits = Limits(
            max_in_flight=whole_number(max_in_flight, "max_in_flight"),
            max_polls_per_second=check_rate(max_polls_per_second, "max_polls_per_second"),
            longest_delivery=longest_delivery,
            ack_wait=longest_delivery + _MARGIN,
            grace=seconds(grace, "grace", zero=True),
        )
        self._client = client
        if learned is not None and schedule is not None:
            raise ConfigurationError("learned and schedule must not both be given", argument="learned")
        self._keeper = None if learned is None else keeper(learned)
        self._schedule = check_schedule(schedule) or (
            wait_adaptive() if self._keeper is None else self._keeper.schedule
        )
        next_delay(self._schedule, attempt_number=1, since_start=0.0)  # a strategy that fails is found out here
        self._event_keys = event_keys
        self._engine: Engine
        if isinstance(broker, MemoryBroker):
            self._engine = broker.engine()
        else:
            settings = settings or StreamSettings()
            if settings.duplicate_window <= self._limits.grace:  # before streams are made with it, and kept
                raise ConfigurationError(_no_time(settings.duplicate_window, self._limits.grace), argument="settings")
            self._engine = NatsEngine(
                broker,
                fleet=fleet,
                service=client.base_url,
                settings=settings,
                options=dict(connect_options or {}),
                timeout=_PUBLISH_WITHIN,
                event_keys=event_keys,
            )
        self._serving: Serving | None = None  # None until it is connected
        self._background: _Background | None = None  # the run, where the worker is a context manager
        self._stopping = False
        self._fatal: KeylessError | None = None
        self._has_run = False
        self._disconnecting = False
        self._started = asyncio.Event()  # it is ready, or has ended
        self._ended = asyncio.Event()

    @property
    def statistics(self) -> WorkerStatistics:
        """The worker at this moment."""
        if self._serving is None:
            return WorkerStatistics(is_draining=self._stopping, problems=(STARTING,))
        return self._serving.statistics()

    def stop(self) -> None:
        """Take no more deliveries, finish those in flight, and let `run` end; for a signal handler."""
        self._stopping = True
        if self._serving is not None:
            self._serving.stop()

    async def shutdown(self) -> None:
        """`stop`, and wait until the worker has ended; harmless when it has ended already, or never ran."""
        self.stop()
        if self._has_run:
            await self._ended.wait()

    async def __aenter__(self) -> Self:
        self._claim()
        self._background = _Background(self._run(), started=self._started, ended=self._ended)
        await self._background.start()
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        assert self._background is not None  # noqa: S101  # it was entered
        self.stop()
        await self._background.join()

    async def run(self) -> None:
        """Work until `stop` is called, and then until the deliveries in flight are done.

        That takes one exchange with Keyless, and at most three of them, where the answer to a create was lost.

        Raises:
            ConfigurationError: It has run already, or what it learns cannot be saved.
            BrokerError: The broker cannot be reached at the start, does not permit what a worker does, or has streams
                that are not as they should be. A broker that is away later is waited for.
            AuthenticationError: Keyless does not accept the key. Requests stay in the stream, for another worker.
            KeylessError: At the start, Keyless answers nothing that makes sense.
        """
        self._claim()
        await self._run()

    def _claim(self) -> None:
        if self._has_run:
            raise ConfigurationError("a worker runs once; make another one to go on")
        self._has_run = True

    async def _run(self) -> None:
        try:
            await self._work()
        finally:
            self._ended.set()
            self._started.set()

    async def _work(self) -> None:
        transport = transport_of(self._client).with_max_attempts(1)
        await check_key(transport)
        await self._engine.connect(on_reconnect=self._reconnected, on_loss=self._fail)
        try:
            await self._serve(transport)
        except BrokerError as error:
            self._fatal = self._fatal or error
        finally:
            self._disconnecting = True
            # Shielded, since a scope of anyio cancels each await: half a disconnection would leave tasks behind.
            await asyncio.shield(self._engine.disconnect())
        if self._fatal is not None:
            raise self._fatal

    async def _serve(self, transport: Transport) -> None:
        terms = await self._engine.prepare(ack_wait=self._limits.ack_wait)
        # A claim is kept for the duplicate window, and matters until the last repetition of a final poll.
        longest_wait = terms.longest_wait - self._limits.grace
        if longest_wait <= 0:
            raise BrokerError(_no_time(terms.longest_wait, self._limits.grace))
        async with nullcontext() if self._keeper is None else self._keeper.keeping(self._engine):
            await self._serve_on(transport, terms._replace(longest_wait=longest_wait))

    async def _serve_on(self, transport: Transport, terms: Terms) -> None:
        self._serving = Serving(
            self._engine,
            transport,
            schedule=self._schedule,
            limits=self._limits,
            terms=terms,
            event_keys=self._event_keys,
            on_fatal=self._fail,
            listeners=Listeners(self._client.listeners) if self._client.listeners else None,
        )
        if self._event_keys is None:
            log(
                logging.WARNING,
                "worker.events_unsigned",
                {"advice": "set an event key, or trust all users of the account"},
            )
        if self._stopping:
            self._serving.stop()
        await self._serving.open()
        self._started.set()
        await self._serving.serve()

    def _reconnected(self) -> None:
        if self._serving is not None:
            self._serving.reconnected()

    def _fail(self, error: KeylessError) -> None:
        """End because of something that is wrong with this worker, or with its broker, and with no request."""
        if self._fatal is None and not self._disconnecting:
            self._fatal = error
            log(logging.ERROR, "worker.unfit", {"error": str(error)})
            self.stop()


def _no_time(window: float, grace: float) -> str:
    return (
        f"the duplicate window of {window:g} s leaves no time to wait before a grace of {grace:g} s: shorten the "
        "grace, or lengthen the window"
    )


class _Background:
    """A worker's run beside the body of its ``async with``, which is cancelled where the run fails.

    As in ``asyncio.timeout``, a cancellation by anybody else, even at the same instant, stays a cancellation.
    """

    def __init__(self, run: Coroutine[object, object, None], *, started: asyncio.Event, ended: asyncio.Event) -> None:
        owner = asyncio.current_task()
        assert owner is not None  # noqa: S101  # an async with is in a task
        self._owner = owner
        self._cancelling = owner.cancelling()
        self._started = started
        self._ended = ended
        self._in_body = False
        self._cancelled_body = False
        self._task = asyncio.create_task(run)
        self._task.add_done_callback(self._run_ended)

    async def start(self) -> None:
        """Wait until the worker is ready; raise what it fails with before."""
        try:
            await self._started.wait()
        except asyncio.CancelledError:
            self._task.cancel()
            await asyncio.wait({self._task})
            raise
        if self._ended.is_set():
            await self._task
        self._in_body = True

    async def join(self) -> None:
        """Wait until the run has ended, and raise what it failed with; the caller's cancellation cancels it."""
        self._in_body = False
        if self._cancelled_body and self._owner.uncancel() > self._cancelling:
            raise asyncio.CancelledError  # the caller cancelled the body too
        await self._task

    def _run_ended(self, task: asyncio.Task[None]) -> None:
        if self._in_body and not task.cancelled() and task.exception() is not None:
            self._cancelled_body = True
            self._owner.cancel()
