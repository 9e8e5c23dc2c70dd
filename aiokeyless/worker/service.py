"""The worker: it takes deliveries, has the exchange done that each is for, and tells the broker what became of it.

Nothing about a wait is kept here. What is asked of Keyless lives in `exchanges`, what the service bears in
`aiokeyless._rules.circuit`; here is the intake, and the care that nothing is acknowledged before its event is stored.
"""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import msgspec
import nats.errors

from aiokeyless._rules.backoff import error_delay
from aiokeyless._rules.circuit import Circuit
from aiokeyless._validation import seconds
from aiokeyless.errors import ConfigurationError, KeylessError
from aiokeyless.schedule import next_delay, wait_adaptive

from .broker import connect, disconnect
from .claims import Claims
from .decisions import Redeliver, after_bug, invalid
from .exchanges import Exchanges
from .intake import EXPIRES, Intake
from .load_shedding import LoadShedding
from .logs import log
from .messages import (
    MESSAGE_ID,
    ROOM_FOR_EVENT,
    BrokerError,
    FailureReason,
    InvalidRequestError,
    Outcome,
    read_context,
    read_request,
)
from .streams import OUTCOMES, StreamSettings, prepare, restore_consumer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from tenacity.wait import wait_base

    from aiokeyless.client import KeylessClient

    from .decisions import Decision
    from .messages import ApprovalEvent

DEFAULT_NATS_URL: Final = "nats://127.0.0.1:4222"
_PUBLISH_WITHIN: Final = 5.0  # seconds
_LOST: Final = 0.1  # seconds after which a cancellation was lost
_MARGIN: Final = 5.0  # seconds between the longest that a delivery takes and its redelivery


class WorkerStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is doing, and its counts since it was made.

    Attributes:
        in_flight: Deliveries under way.
        deliveries: Deliveries taken.
        polls: Operations looked at.
        created: Operations created.
        approved: Events of this kind published; those that the stream had already are not counted.
        expired: Likewise.
        failed: Likewise.
        duplicates: Events that the stream had already, from a delivery whose acknowledgement was lost.
        transient_failures: Exchanges with Keyless that failed for a passing reason.
        is_ready: Whether it takes requests: the broker is there, its streams are, and the worker is not about to end.
        is_down: Whether Keyless is down, as far as this worker can tell.
        is_draining: Whether the worker is about to end.
    """

    in_flight: int
    deliveries: int
    polls: int
    created: int
    approved: int
    expired: int
    failed: int
    duplicates: int
    transient_failures: int
    is_ready: bool
    is_down: bool
    is_draining: bool


class ApprovalWorker:
    """Waits for approvals that a broker remembers; any number of workers on any number of machines share the work.

    Each delivery of a request is one look at its operation. As long as that is pending, the request goes back to
    NATS JetStream with the delay that the schedule asks for, to be delivered to whichever worker is free then. Once it
    is decided, an event is published, and then the request is acknowledged.

    Args:
        client: A client with ``max_attempts=1``: it is the broker that repeats. The caller closes it.
        nats_url: Address of a server of the broker, or several, separated by commas.
        max_in_flight: Deliveries under way at once. Default: 64.
        schedule: When to look: a `wait_adaptive` or any other tenacity wait strategy. Default: a `wait_adaptive`.
        grace: Seconds past the deadline for which a last look that got no answer is repeated; 0: not at all. Default:
            30.
        settings: Of the streams, where they are to be made.
        connect_options: Of ``nats.connect``: credentials, TLS.

    Raises:
        ConfigurationError: An argument is wrong.

    Example:
        >>> async with KeylessClient(max_attempts=1) as client:
        ...     await ApprovalWorker(client).run()
    """

    def __init__(
        self,
        client: KeylessClient,
        nats_url: str = DEFAULT_NATS_URL,
        *,
        max_in_flight: int = 64,
        schedule: wait_base | None = None,
        grace: float = 30.0,
        settings: StreamSettings | None = None,
        connect_options: Mapping[str, object] | None = None,
    ) -> None:
        if client._max_attempts != 1:  # noqa: SLF001  # of the same house
            raise ConfigurationError("client must be a KeylessClient(max_attempts=1): the broker repeats what failed")
        if type(max_in_flight) is not int or max_in_flight < 1:
            raise ConfigurationError(f"max_in_flight must be a whole number, at least 1, not {max_in_flight!r}")
        grace = seconds(grace, "grace", zero=True)
        self._nats_url = nats_url
        self._max_in_flight = max_in_flight
        self._schedule = schedule if schedule is not None else wait_adaptive()
        next_delay(self._schedule, attempt_number=1, since_start=0.0)  # a strategy that cannot say is found out here
        self._settings = settings or StreamSettings()
        self._connect_options = dict(connect_options or {})
        # A create, the look whether it is there, the look at it; and the event.
        self._longest_delivery = 3 * client._request_timeout + _PUBLISH_WITHIN  # noqa: SLF001
        self._ack_wait = self._longest_delivery + _MARGIN
        self._circuit = Circuit(max_in_flight)
        self._load_shedding = LoadShedding(self._schedule)
        self._exchanges = Exchanges(client, schedule=self._load_shedding, circuit=self._circuit, grace=grace)
        self._deliveries: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._stopping = False
        self._fatal: KeylessError | None = None
        self._has_run = False
        self._ended = False
        self._refusals = 0  # of pulls, in a row
        self._asks_from = -math.inf
        self._connection: Client  # from `run` on
        self._serving = False
        self._counts = dict.fromkeys(("deliveries", *Outcome, "duplicates"), 0)

    @property
    def statistics(self) -> WorkerStatistics:
        """The worker at this moment."""
        return WorkerStatistics(
            in_flight=len(self._deliveries),
            polls=self._exchanges.polls,
            created=self._exchanges.created,
            transient_failures=self._exchanges.failures,
            is_ready=self._serving and not self._stopping and self._connection.is_connected,
            is_down=self._circuit.is_probed,
            is_draining=self._stopping,
            **self._counts,
        )

    def stop(self) -> None:
        """Take no more deliveries, finish those under way, and end `run`; for a signal handler."""
        self._stopping = True
        self._changed.set()

    async def run(self) -> None:
        """Work until `stop` is called, and then until the deliveries under way are done.

        That takes one exchange with Keyless, and at most three of them, where the answer to a create was lost.

        Raises:
            ConfigurationError: It has run already.
            BrokerError: The broker cannot be reached at the start, does not permit what a worker does, or has streams
                that are not as they should be. A broker that is away later is waited for.
            AuthenticationError: Keyless does not take the key. Requests stay where they are, for a worker with another.
            KeylessError: At the start, Keyless answers nothing that makes sense.
        """
        if self._has_run:
            raise ConfigurationError("a worker runs once; make another one to go on")
        self._has_run = True
        await self._exchanges.check_key()
        self._connection = await connect(
            self._nats_url, self._connect_options, on_reconnect=self._reconnected, on_loss=self._end
        )
        try:
            await self._serve(self._connection)
        except BrokerError as error:
            self._fatal = self._fatal or error
        finally:
            self._ended = True
            await disconnect(self._connection)
        if self._fatal is not None:
            raise self._fatal

    def _end(self, error: KeylessError) -> None:
        """End because of something that is wrong with this worker, or with its broker, and with no request."""
        if self._fatal is None and not self._ended:
            self._fatal = error
            log(logging.ERROR, "worker.unfit", {"error": str(error)})
            self.stop()

    # -- the intake

    async def _serve(self, connection: Client) -> None:
        loop = asyncio.get_running_loop()
        self._intake = Intake(connection, deliver=self._take, ended=self._pull_ended, now=loop.time)
        self._stream = connection.jetstream(timeout=_PUBLISH_WITHIN)
        self._exchanges.claims = Claims(self._stream)
        self._largest_request = connection.max_payload - ROOM_FOR_EVENT
        self._longest_wait = await prepare(self._stream, self._settings, ack_wait=self._ack_wait)
        await self._intake.open()
        self._serving = True
        log(logging.INFO, "worker.ready", {"max_in_flight": self._max_in_flight})
        try:
            while not self._stopping:
                self._changed.clear()
                await self._ask(loop.time())
                await self._wait_for_change(loop.time())
            await self._drain(connection)
        finally:
            await self._abandon()

    async def _ask(self, now: float) -> None:
        """Ask for as many deliveries as there is room for; in batches, so not for each one that becomes free."""
        if not self._connection.is_connected or now < self._asks_from:
            return
        if self._refusals:
            await restore_consumer(self._stream, ack_wait=self._ack_wait)
        expected = self._intake.expected()
        room = self._circuit.room(now) - len(self._deliveries) - expected
        if room > 0 and (not expected or room >= self._max_in_flight // 4):
            with suppress(nats.errors.Error):  # the connection was lost at this moment: nothing was asked for
                await self._intake.ask(room)

    async def _wait_for_change(self, now: float) -> None:
        closed_for = max(self._circuit.retry_at(), self._asks_from) - now
        with suppress(TimeoutError):
            async with asyncio.timeout(closed_for if closed_for > 0 else EXPIRES):
                await self._changed.wait()

    def _pull_ended(self, refusal: str | None) -> None:
        if refusal is None:
            self._refusals = 0
        else:  # the consumer has no leader just now, or is gone
            self._refusals += 1
            self._asks_from = asyncio.get_running_loop().time() + error_delay(self._refusals)
            log(logging.WARNING, "broker.refused", {"reason": refusal})
        self._changed.set()

    def _reconnected(self) -> None:
        self._intake.forget()
        self._changed.set()

    async def _drain(self, connection: Client) -> None:
        """Finish what is under way, and hand back what comes meanwhile."""
        log(logging.INFO, "worker.draining", {"in_flight": len(self._deliveries)})
        if connection.is_connected:
            with suppress(nats.errors.Error, OSError, TimeoutError):  # what is on its way comes again by itself
                async with asyncio.timeout(_PUBLISH_WITHIN):
                    await self._intake.close()
        if self._deliveries:
            await asyncio.wait(self._deliveries, timeout=self._longest_delivery)
        log(logging.INFO, "worker.done", msgspec.structs.asdict(self.statistics))

    async def _abandon(self) -> None:
        """Leave what is still under way: the broker delivers it again."""
        while tasks := tuple(self._deliveries):
            for task in tasks:
                task.cancel()
            # nats-py waits by asyncio.wait_for, which on Python 3.11 can lose a cancellation: so it is made again.
            await asyncio.wait(tasks, timeout=_LOST)

    # -- one delivery

    def _take(self, message: Msg) -> None:
        self._refusals = 0
        # Past the loop's task factory: an eager one runs the delivery before it is counted below.
        task = asyncio.Task(self._deliver(message), loop=asyncio.get_running_loop())
        self._deliveries.add(task)
        task.add_done_callback(self._delivered)

    def _delivered(self, task: asyncio.Task[None]) -> None:
        self._deliveries.discard(task)
        self._changed.set()

    async def _deliver(self, message: Msg) -> None:
        """Do what a delivery is for. However it ends, the request is either decided or comes again."""
        self._counts["deliveries"] += 1
        try:
            decision = self._handed_back() or await self._decide(message)
            await self._settle(message, decision)
        except (nats.errors.Error, OSError) as error:
            # Nothing was acknowledged, so the broker delivers it again; an event that was stored is kept once.
            log(logging.WARNING, "delivery.unsettled", {"error": f"{type(error).__name__}: {error}"})
        except KeylessError as error:  # of this worker, not of the request
            self._end(error)
            with suppress(nats.errors.Error):  # or it comes again by itself, a little later
                await message.nak(delay=error_delay(1))

    def _handed_back(self) -> Redeliver | None:
        """Hand a delivery back that comes when there is no room for it: it was asked for in better days."""
        if self._stopping:
            return Redeliver(EXPIRES)  # not at once: it would come to this worker's own pulls, which are still there
        now = asyncio.get_running_loop().time()
        if len(self._deliveries) <= self._circuit.room(now):
            return None
        return Redeliver(max(0.0, self._circuit.retry_at() - now) + error_delay(1))

    async def _decide(self, message: Msg) -> Decision:
        metadata = message.metadata
        self._load_shedding.on_delivery(redelivered=metadata.num_delivered > 1, backlog=metadata.num_pending)
        try:
            delivery = read_request(
                message.data,
                message_id=(message.headers or {}).get(MESSAGE_ID),
                stored_at=metadata.timestamp,
                number=metadata.num_delivered,
                longest=self._longest_wait,
                largest=self._largest_request,
            )
        except InvalidRequestError as error:
            # It says nothing to tell it from others by, so it is called by its place in the stream.
            name = f"message-{metadata.stream}-{metadata.sequence.stream}-{metadata.timestamp.timestamp():.6f}"
            context = read_context(message.data)
            return invalid(
                name, metadata.num_delivered, error, context, stored_at=metadata.timestamp, now=datetime.now(UTC)
            )
        try:
            return await self._exchanges.process(delivery)
        except (KeylessError, nats.errors.Error):  # of this worker or of the broker, and not of the request
            raise
        except Exception as error:  # noqa: BLE001  # a bug: it must not come again forever
            log(logging.ERROR, "delivery.failed", {"operation_id": delivery.ticket.operation_id}, exc_info=True)
            return after_bug(delivery, error, now=datetime.now(UTC))

    async def _settle(self, message: Msg, decision: Decision) -> None:
        """Tell the broker: first the event, and only when that is stored, that the request is done."""
        if isinstance(decision, Redeliver):
            await message.nak(delay=decision.delay)
            return
        event = decision.event
        stored = await self._stream.publish(
            event.outcome.subject,
            msgspec.json.encode(event),
            stream=OUTCOMES,
            headers={MESSAGE_ID: decision.message_id},
        )
        if stored.duplicate:
            self._counts["duplicates"] += 1
        else:
            self._counts[event.outcome] += 1
            self._tell(event)
            self._teach(event)
        if event.reason == FailureReason.INVALID_REQUEST:
            await message.term()
        else:
            await message.ack()

    def _tell(self, event: ApprovalEvent) -> None:
        facts = {
            "operation_id": event.operation_id,
            "deliveries": event.deliveries,
            "seconds": round(_age(event), 3),
            "answered": event.answered,
            "reason": event.reason,
            "detail": event.detail,
        }
        level = logging.WARNING if event.outcome is Outcome.FAILED else logging.INFO
        log(level, f"approval.{event.outcome}", {name: fact for name, fact in facts.items() if fact is not None})

    def _teach(self, event: ApprovalEvent) -> None:
        """Tell the schedule when people approve. The look before was perhaps another worker's: as it must have been."""
        schedule, age = self._schedule, max(0.0, _age(event))
        if not isinstance(schedule, wait_adaptive):
            return
        try:
            if event.outcome is Outcome.APPROVED and event.deliveries > 1:
                # The first delivery created the operation, so the second was the first look.
                schedule.observe(schedule.previous_poll(age) if event.deliveries > 2 else 0.0, age)
            elif event.answered:
                schedule.observe(age, None)
        except Exception:  # noqa: BLE001  # a subclass of somebody's: what is not learned costs requests, and no more
            log(logging.ERROR, "schedule.learned_nothing", {"schedule": repr(schedule)}, exc_info=True)


def _age(event: ApprovalEvent) -> float:
    return (event.decided_at - event.requested_at).total_seconds()
