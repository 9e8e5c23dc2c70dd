"""The public class of a worker: its arguments, its life from the start to the last delivery, and how to stop it.

Its work while it is connected is in `serving`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress
from types import TracebackType
from typing import Final, Self

from tenacity.wait import wait_base

from aiokeyless._http.transport import Transport
from aiokeyless._listeners import Listeners
from aiokeyless._validation import check_handler, check_rate, check_schedule, seconds, whole_number
from aiokeyless.client import KeylessClient, transport_of
from aiokeyless.errors import BrokerError, ConfigurationError, KeylessError
from aiokeyless.models import Secret
from aiokeyless.schedule import next_delay, wait_adaptive

from .broker import Broker
from .brokers import broker_for, hide_url
from .logs import log, name_client
from .messages import ApprovalRequest
from .monitoring import WorkerStatistics
from .processor import CREATES_FOR, check_key
from .serving import Limits, Serving

_SETTLED_WITHIN: Final = 5.0  # seconds
_MARGIN: Final = 5.0  # seconds between the end of the longest delivery and its repetition
_MOST_EXCHANGES: Final = 3  # of one delivery: a create, the check whether it took effect, a poll


class ApprovalWorker:
    """Waits for approvals that a broker stores; any number of workers on any number of machines share the work.

    Each delivery of a request is one poll of its operation. While the operation is pending, the worker puts the
    request off for as long as the schedule says. Then the broker delivers it to any free worker. Once it is decided,
    the broker stores the outcome and removes the request.

    The worker is an async context manager. It is ready at the start of the body, and shuts down after it. If the worker
    fails, the body is cancelled, and the error that `run` would raise is raised.

    Args:
        client: Any client. The worker sends each call once, whatever ``max_attempts`` is, because the broker repeats
            failed ones. The caller closes the client, after the worker.
        broker: An open broker, or a URL such as ``sqlite:keyless.db``. The worker opens and closes the broker of a URL.
        max_in_flight: Deliveries that have been in flight for less than a second. Slower ones have room of their own.
            By default, at most 384 are in flight, and 128 while Keyless answers none. Default: 64.
        max_polls_per_second: Polls of this worker in a second; None for as many as fit. Further due polls stay at
            the broker, for this worker or another. A 429 halves the rate, as for a client. Default: 1000.
        schedule: When to poll: a `wait_adaptive` or any other tenacity wait strategy. Default: a `wait_adaptive`.
        grace: Seconds for which a final poll that got no answer is repeated; 0: not at all. They count from the
            deadline, but only while the worker runs, its broker answers, and Keyless asks for no short pause. Give all
            workers of a broker the same. Default: 30.
        on_created: Called with the `ApprovalRequest` once its operation is created; may be async, and must not block.
            It sends your app's push notification. It runs beside the deliveries, up to `max_in_flight` calls at once,
            each within 10 s of the create. If it raises, that is logged, and the request goes on. It is seldom called
            twice for an operation, or not at all if the worker dies at that moment, and never if the phone starts the
            operation. Default: none.

    Raises:
        ConfigurationError: An argument is wrong.

    Example:
        >>> async with KeylessClient() as client:
        ...     await ApprovalWorker(client, "sqlite:keyless.db").run()
    """

    def __init__(
        self,
        client: KeylessClient,
        broker: Broker | str,
        *,
        max_in_flight: int = 64,
        max_polls_per_second: float | None = 1000.0,
        schedule: wait_base | None = None,
        grace: float = 30.0,
        on_created: Callable[[ApprovalRequest], Awaitable[object] | object] | None = None,
    ) -> None:
        hidden = hide_url(broker)
        del broker
        self._limits = Limits(
            max_in_flight=whole_number(max_in_flight, "max_in_flight"),
            max_polls_per_second=check_rate(max_polls_per_second, "max_polls_per_second"),
            longest_delivery=CREATES_FOR + _MOST_EXCHANGES * client.request_timeout + _SETTLED_WITHIN,
            grace=seconds(grace, "grace", zero=True),
        )
        self._client = client
        self._who = name_client(client.name)
        check_handler(on_created, "on_created")
        self._on_created = on_created
        self._schedule = check_schedule(schedule) or wait_adaptive()
        next_delay(self._schedule, attempt_number=1, since_start=0.0)  # a broken strategy fails here
        found = broker_for(hidden)
        if not isinstance(found, Broker):
            raise ConfigurationError("broker must be a broker or a URL, not a driver's connection", argument="broker")
        self._broker: Broker = found
        self._is_owner = isinstance(hidden, Secret)
        self._serving: Serving | None = None  # None until it is connected
        self._running: asyncio.Task[None] | None = None  # the run, if the worker is a context manager
        self._body: asyncio.Timeout  # of the context manager's body: it expires only if the run fails
        self._stopping = False
        self._fatal: KeylessError | None = None
        self._has_run = False
        self._started = asyncio.Event()  # it is ready, or has ended

    @property
    def statistics(self) -> WorkerStatistics:
        """The worker at this moment."""
        if self._serving is None:
            return WorkerStatistics(is_draining=self._stopping, problems=("the worker has not started yet",))
        return self._serving.statistics()

    def stop(self) -> None:
        """Take no more deliveries, finish those in flight, and let `run` end; for a signal handler."""
        self._stopping = True
        if self._serving is not None:
            self._serving.stop()

    async def __aenter__(self) -> Self:
        self._use_up()
        self._running = asyncio.create_task(self._work())
        self._running.add_done_callback(lambda _: self._started.set())
        try:
            await self._started.wait()
        except asyncio.CancelledError:
            self._running.cancel()
            await asyncio.wait({self._running})
            raise
        if self._running.done():
            await self._running
        self._body = await asyncio.timeout(None).__aenter__()
        self._running.add_done_callback(self._cancel_body)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._running is not None  # noqa: S101  # it was entered
        self._running.remove_done_callback(self._cancel_body)
        self.stop()
        with suppress(TimeoutError):
            await self._body.__aexit__(kind, error, traceback)
            if self._body.expired() and kind is asyncio.CancelledError:
                return  # as after any timeout, another's cancellation stays a cancellation
        await self._running

    def _cancel_body(self, running: asyncio.Task[None]) -> None:
        if not running.cancelled() and running.exception() is not None:
            self._body.reschedule(0.0)

    async def prepare(self) -> None:
        """Make or migrate what workers need at the broker, and end; for a login with more rights than a worker's.

        The broker belongs to the service of the first worker that runs, and not to this one's.

        Raises:
            ConfigurationError: It has run already.
            BrokerError: The broker cannot be reached, or something cannot be made as it must be.
        """
        self._use_up()
        async with self._broker if self._is_owner else nullcontext():
            await self._prepare_broker(service="")

    async def run(self) -> None:
        """Work until `stop` is called, and then until the deliveries in flight are done.

        That takes one exchange with Keyless, or at most three if the answer to a create was lost. Calls of `on_created`
        have up to 10 s more.

        Raises:
            ConfigurationError: It has run already.
            BrokerError: The broker cannot be reached at the start, does not permit what a worker does, or is not
                as it should be. If the broker is away later, the worker waits for it.
            AuthenticationError: Keyless does not accept the key. Requests stay at the broker, for another worker.
            KeylessError: At the start, Keyless's answer makes no sense.
        """
        self._use_up()
        await self._work()

    def _use_up(self) -> None:
        if self._has_run:
            raise ConfigurationError("a worker runs once; make another one to go on")
        self._has_run = True

    async def _work(self) -> None:
        transport = transport_of(self._client).with_max_attempts(1)
        await check_key(transport, self._who)
        if self._is_owner:
            await self._broker.open()
        try:
            await self._serve(transport)
        except BrokerError as error:
            self._fatal = self._fatal or error
        finally:
            if self._is_owner:
                # Shielded: anyio's scopes cancel each await, and half a disconnection would leave tasks behind.
                await asyncio.shield(self._broker.aclose())
        if self._fatal is not None:
            raise self._fatal

    async def _serve(self, transport: Transport) -> None:
        allowed = await self._prepare_broker(service=self._client.base_url)
        # The broker must remember a request until the last repetition of its final poll.
        longest_wait = allowed - self._limits.grace
        if longest_wait <= 0:
            raise BrokerError(
                f"the broker allows waits of {allowed:g} s, which leaves no time before a grace of "
                f"{self._limits.grace:g} s: shorten the grace, or lengthen what the broker allows"
            )
        self._serving = Serving(
            self._broker,
            transport,
            schedule=self._schedule,
            limits=self._limits,
            longest_wait=longest_wait,
            on_fatal=self._fail,
            on_created=self._on_created,
            listeners=Listeners(self._client.listeners, self._client.name),
        )
        if self._stopping:
            self._serving.stop()
        self._started.set()
        await self._serving.serve()

    async def _prepare_broker(self, *, service: str) -> float:
        lease = self._limits.longest_delivery + _MARGIN
        return await self._broker.prepare(lease=lease, service=service)

    def _fail(self, error: KeylessError) -> None:
        """End because of an error that is this worker's or its broker's, and not a request's."""
        if self._fatal is None:
            self._fatal = error
            log(logging.ERROR, "worker.unfit", {**self._who, "error": str(error)})
            self.stop()
