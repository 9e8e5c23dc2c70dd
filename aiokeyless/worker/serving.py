"""The serving phase of a worker: it takes deliveries, processes each, and acknowledges it once its event is stored.

It keeps nothing of a wait. The exchanges with Keyless are in `exchanges`, how many there may be at once is decided by
`aiokeyless._rules.circuit`, and the life of the connection belongs to `service`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from aiokeyless._rules.backoff import error_delay
from aiokeyless._rules.circuit import Circuit, CircuitState
from aiokeyless._rules.rate import PollRate
from aiokeyless._tracing import context_without_traces
from aiokeyless._validation import is_traceparent
from aiokeyless.errors import AuthenticationError, ClientClosedError, InvalidRequestError, KeylessError
from aiokeyless.schedule import record_observation, wait_adaptive

from .decisions import Redeliver, after_bug, after_outage, after_refusal, invalid, left_of_grace, observation
from .engine import EXPIRES, EngineError, RefusedError, Sealed
from .exchanges import Exchanges, check_key
from .load_shedding import LoadShedding
from .logs import log
from .messages import ROOM_FOR_EVENT, NewerRequestError, Outcome, TooLongError, is_about, read_context, read_request
from .monitor import Monitor
from .reporting import Reporter, WorkerStatistics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tenacity.wait import wait_base

    from aiokeyless._http.transport import Transport
    from aiokeyless._listeners import Listeners

    from .decisions import Decided, Decision
    from .engine import Engine, Message, Terms
    from .event_keys import EventKeys
    from .messages import ApprovalEvent, Delivery

_UPGRADED_IN: Final = 10.0  # seconds until a request is delivered again that this worker is too old for
#: Seconds before each check of a key that was refused; when all of them were refused, the worker ends.
KEY_CHECKS: Final = (1.0, 2.0, 4.0, 8.0, 15.0)
#: What keeps a worker that has not started from being ready.
STARTING: Final = "the worker has not started yet"
#: Seconds by which a timer may fire too early, at most: after less than that, it would be too early once more. A clock
#: that stands still meanwhile, as in tests, would never get past that.
_EARLY: Final = 0.001
_LOST: Final = 0.1  # seconds after which a cancellation was lost
#: Seconds between two pulls for requests whose time is over, in a pause that a rate limit asks for. Others that come
#: with them are put off for less than that, and for longer than a pull lasts: another worker, whose circuit may be
#: closed, can take them meanwhile.
_PAUSED_PULLS: Final = 4.0
_HANDED_BACK_FOR: Final = 1.5


class Limits(NamedTuple):
    """What bounds the deliveries of a worker.

    Attributes:
        max_in_flight: Deliveries in flight at once.
        max_polls_per_second: Polls of this worker in a second; None for as many as fit.
        longest_delivery: Seconds that one takes at most.
        ack_wait: Seconds after which the broker delivers again what was not acknowledged.
        grace: Seconds past the deadline for which a final poll that got no answer is repeated.
    """

    max_in_flight: int
    max_polls_per_second: float | None
    longest_delivery: float
    ack_wait: float
    grace: float


class Serving:
    """A worker that is connected and whose streams are there.

    Args:
        engine: The broker.
        transport: What sends the exchanges, each once.
        schedule: When to poll.
        limits: What bounds the deliveries.
        terms: What the broker allows.
        event_keys: What events are signed with.
        on_fatal: Called with what is wrong with this worker, and with no request.
        listeners: Whom to tell of events; None for nobody.
    """

    def __init__(
        self,
        engine: Engine,
        transport: Transport,
        *,
        schedule: wait_base,
        limits: Limits,
        terms: Terms,
        event_keys: EventKeys | None,
        on_fatal: Callable[[KeylessError], None],
        listeners: Listeners | None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._engine = engine
        self._transport = transport
        self._key_check: asyncio.Task[None] | None = None  # while it is not known whether the key is accepted
        self._key_refusal: KeylessError | None = None  # the last one
        self._schedule = schedule
        self._limits = limits
        self._terms = terms
        self._event_keys = event_keys
        self._on_fatal = on_fatal
        self._circuit = Circuit(limits.max_in_flight, longest_poll=limits.longest_delivery)
        self._rate = PollRate(limits.max_polls_per_second)
        self._load_shedding = LoadShedding(self._loop.time)
        self._deliveries: dict[asyncio.Task[None], float] = {}  # in flight, and when each started
        # A request belongs to the trace of who submitted it, and its polls have no spans.
        self._context = context_without_traces()
        self._reporter = Reporter(listeners, engine, self._deliveries)
        self._exchanges = Exchanges(
            transport,
            engine.claims,
            schedule=schedule,
            load_shedding=self._load_shedding,
            circuit=self._circuit,
            rate=self._rate,
            grace=limits.grace,
            now=engine.now,
            reporter=self._reporter,
        )
        self._monitor = Monitor(
            engine,
            self._loop.time,
            is_paused=lambda: self._circuit.state is not CircuitState.CLOSED,
            inspected=lambda: self._reporter.inspected(self.statistics()),
        )
        self._monitoring: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._is_open = False
        self._stopping = False
        self._refusals = 0  # of pulls, in a row
        self._expiries_from = -math.inf  # while the circuit is open: the next pull for requests whose time is over
        self._pulls_from = -math.inf  # after a refusal, no pull before this time
        self._counts = dict.fromkeys(("deliveries", *Outcome, "duplicates", "unsettled"), 0)

    def statistics(self) -> WorkerStatistics:
        """Return the worker at this moment."""
        problems = tuple(self._problems())
        told = self._monitor.last
        return WorkerStatistics(
            in_flight=len(self._deliveries),
            polls=self._exchanges.polls,
            created=self._exchanges.created,
            transient_failures=self._exchanges.failures,
            waiting=told.waiting,
            backlog=told.backlog,
            oldest_age=round(told.oldest_age, 3),
            clock_ahead=round(told.clock_ahead, 3),
            lateness=round(self._monitor.lateness, 3),
            load_shedding=round(self._load_shedding.factor, 3),
            circuit=self._circuit.state.value,
            is_ready=not problems,
            problems=problems,
            is_draining=self._stopping,
            **self._counts,
        )

    def _problems(self) -> Iterator[str]:
        """Return why it is not ready, in one line each."""
        if self._stopping:
            yield "the worker is about to end"
        elif not self._is_open:
            yield STARTING
        elif not self._engine.is_connected:
            yield "there is no connection to the broker"
        else:
            yield from self._monitor.problems()
            if self._key_check is not None:
                yield f"Keyless refuses the key: {self._key_refusal}"

    def stop(self) -> None:
        """Take no more deliveries, and let `serve` end."""
        self._stopping = True
        self._changed.set()

    def reconnected(self) -> None:
        """Pull again: the pulls went with the connection that was lost."""
        self._changed.set()

    async def serve(self) -> None:
        """Process deliveries until `stop` is called, and then until those in flight are done.

        Raises:
            BrokerError: The stream is gone, or its consumer has other settings now.
        """
        try:
            while not self._stopping:
                self._changed.clear()
                await self._pull(self._loop.time())
                await self._wait_for_change(self._loop.time())
            await self._drain()
        finally:
            try:
                await self._abandon()
            finally:  # a scope of anyio cancels each await of what it ends
                self._reporter.closed(self.statistics())

    # -- the intake

    async def open(self) -> None:
        """Get ready to be delivered to."""
        await self._engine.open(deliver=self._take, ended=self._pull_ended)
        self._is_open = True
        self._monitoring = self._loop.create_task(self._monitor.run())
        log(logging.INFO, "worker.ready", {"max_in_flight": self._limits.max_in_flight})

    async def _pull(self, now: float) -> None:
        """Ask for as many deliveries as there is room for; in batches, so not for each one that becomes free."""
        if not self._engine.is_connected or now < self._pulls_from:
            return
        if self._refusals:
            await self._engine.restore()
        expected = self._engine.expected()
        room = self._room(now)
        polls = self._rate.room(now)
        room = (room if polls is None else min(room, polls)) - expected
        if room <= 0 and self._is_away(now) and now >= self._expiries_from:
            # Applications are told so in time: what is past its grace needs no exchange.
            room = self._limits.max_in_flight - len(self._deliveries) - expected
            self._expiries_from = now + (EXPIRES if self._circuit.is_probed else _PAUSED_PULLS)
        if room > 0 and (not expected or room >= self._limits.max_in_flight // 4):
            with suppress(EngineError):  # the connection was lost at this moment: nothing was asked for
                await self._engine.ask(room)

    def _is_away(self, now: float) -> bool:
        """Return whether the service is down, or asked for a longer pause than final polls are repeated for."""
        return self._circuit.is_probed or self._circuit.retry_at() - now > self._limits.grace

    def _room(self, now: float) -> int:
        """Return how many more deliveries may be in flight; negative where there are too many."""
        if self._key_check is not None:
            return -len(self._deliveries)
        return min(self._circuit.room(now) - self._counted(), self._limits.max_in_flight - len(self._deliveries))

    def _counted(self) -> int:
        """Return the deliveries in flight that take room."""
        if self._circuit.is_closed:  # all of them: asked for at each delivery, so it must not walk through the others
            return len(self._deliveries)
        return sum(self._circuit.takes_room(started_at) for started_at in self._deliveries.values())

    async def _wait_for_change(self, now: float) -> None:
        closed_for = max(self._circuit.retry_at(), self._pulls_from, self._rate.ready_at(now)) - now
        if self._is_away(now):
            closed_for = min(closed_for, EXPIRES)
        with suppress(TimeoutError):
            async with asyncio.timeout(max(closed_for, _EARLY) if closed_for > 0 else EXPIRES):
                await self._changed.wait()

    def _pull_ended(self, refusal: str | None) -> None:
        if refusal is None:
            self._refusals = 0
        else:  # the consumer has no leader just now, or is gone
            self._refusals += 1
            self._pulls_from = self._loop.time() + error_delay(self._refusals)
            log(logging.WARNING, "broker.refused", {"reason": refusal})
        self._changed.set()

    async def _drain(self) -> None:
        """Finish what is in flight, and hand back what arrives meanwhile."""
        log(logging.INFO, "worker.draining", {"in_flight": len(self._deliveries)})
        with suppress(EngineError):  # what the broker is delivering is delivered again
            await self._engine.close()
        if self._deliveries:
            await asyncio.wait(self._deliveries, timeout=self._limits.longest_delivery)
        facts = msgspec.structs.asdict(self.statistics())
        del facts["problems"]
        log(logging.INFO, "worker.done", facts)

    async def _abandon(self) -> None:
        """Leave what is still in flight: the broker delivers it again."""
        if self._key_check is not None:
            self._key_check.cancel()
        background = {self._monitoring} if self._monitoring is not None else set()
        while tasks := {*self._deliveries, *(task for task in background if not task.done())}:
            for task in tasks:
                task.cancel()
            # What waits by asyncio.wait_for, which on Python 3.11 can lose a cancellation: so it is repeated.
            await asyncio.wait(tasks, timeout=_LOST)

    # -- the key

    def _suspect_key(self, error: AuthenticationError) -> None:
        """Take no deliveries until the key was checked: one refusal may be a gateway's."""
        if self._key_check is None and not self._stopping:
            log(logging.WARNING, "keyless.key_refused", {"error": str(error)})
            self._key_refusal = error
            self._key_check = asyncio.Task(self._check_key(error), loop=self._loop)

    async def _check_key(self, error: KeylessError) -> None:
        for pause in KEY_CHECKS:
            await asyncio.sleep(pause)
            try:
                await check_key(self._transport)
            except ClientClosedError as closed:
                error = closed
                break
            except KeylessError as refusal:  # a gateway that refuses everything may say it in several ways
                error = self._key_refusal = refusal
                continue
            self._key_check = None
            self._changed.set()
            return
        self._on_fatal(error)

    # -- one delivery

    def _take(self, message: Message) -> None:
        self._refusals = 0
        self._monitor.on_delivery(message)
        # Past the loop's task factory: an eager one runs the delivery before it is counted below.
        task = asyncio.Task(self._deliver(message), loop=self._loop, context=self._context)
        self._deliveries[task] = self._loop.time()
        task.add_done_callback(self._delivered)

    def _delivered(self, task: asyncio.Task[None]) -> None:
        del self._deliveries[task]
        self._changed.set()

    async def _deliver(self, message: Message) -> None:
        self._counts["deliveries"] += 1
        started_at = self._loop.time()
        failure = await self._process(message)
        self._reporter.delivery_ended(message.number, failure, started_at=started_at)

    async def _process(self, message: Message) -> Exception | None:
        """Process a delivery. However it ends, the request is either decided or delivered again.

        Returns:
            What kept it from being settled, if anything did.
        """
        try:
            if self._stopping:
                # Not at once: it would be delivered to this worker's own pulls, which are still there.
                decision: Decision = Redeliver(EXPIRES)
            elif self._room(now := self._loop.time()) < 0:  # it was asked for before the circuit opened
                decision = self._decide_without_exchange(message, now)
            else:
                decision = await self._decide(message)
            await self._settle(message, decision)
        except EngineError as error:
            # Nothing was acknowledged, so the broker delivers it again; an event that was stored is kept once.
            self._counts["unsettled"] += 1
            if isinstance(error, RefusedError):
                self._monitor.on_refusal(error)
            log(logging.WARNING, "delivery.unsettled", {"error": str(error)})
            return error
        except KeylessError as error:  # of this worker, not of the request
            if isinstance(error, AuthenticationError):
                self._suspect_key(error)
            else:
                self._on_fatal(error)
            with suppress(EngineError):  # otherwise it is delivered again by itself, a little later
                await message.put_off(error_delay(1))
            return error
        return None

    def _decide_without_exchange(self, message: Message, now: float) -> Decision:
        """Put a delivery off; while the service is away, end a request whose final poll can be repeated no more."""
        moment = self._engine.now()
        with suppress(InvalidRequestError):
            delivery = self._read(message)
            if self._is_away(now) and left_of_grace(delivery, moment, self._limits.grace) < 0:
                return after_outage(delivery, now=moment)
        pause = max(0.0, self._circuit.retry_at() - now)
        return Redeliver(min(pause, _HANDED_BACK_FOR) + error_delay(1))

    async def _decide(self, message: Message) -> Decision:
        self._load_shedding.on_delivery(redelivered=message.number > 1, backlog=message.backlog)
        try:
            delivery = self._read(message)
        except TooLongError as error:
            return after_refusal(error.delivery, error, now=self._engine.now())
        except InvalidRequestError as error:
            waited = (self._engine.now() - message.stored_at).total_seconds()
            if isinstance(error, NewerRequestError) and waited < self._terms.longest_wait:
                log(logging.WARNING, "request.newer", {"error": str(error)})
                return Redeliver(_UPGRADED_IN)  # another worker of the fleet has been upgraded, or will be
            # It has no content to tell it from others by, so it is named by its place at the broker.
            context, now = read_context(message.data), self._engine.now()
            return invalid(message.name, message.number, error, context, stored_at=message.stored_at, now=now)
        try:
            return await self._exchanges.process(delivery)
        except (KeylessError, EngineError):  # of this worker or of the broker, and not of the request
            raise
        except Exception as error:  # noqa: BLE001  # a bug: the request must not be delivered again forever
            log(logging.ERROR, "delivery.failed", {"operation_id": delivery.ticket.operation_id}, exc_info=True)
            return after_bug(delivery, error, now=self._engine.now())

    def _read(self, message: Message) -> Delivery:
        return read_request(
            message.data,
            message_id=message.message_id,
            stored_at=message.stored_at,
            number=message.number,
            longest=self._terms.longest_wait,
            largest=self._terms.largest_message - ROOM_FOR_EVENT,
        )

    async def _settle(self, message: Message, decision: Decision) -> None:
        """Tell the broker: first the event, and only when that is stored, that the request is done."""
        if isinstance(decision, Redeliver):
            await message.put_off(decision.delay)
            return
        event = await self._with_asked(message, decision)
        if is_traceparent(message.traceparent):  # any publisher may set the header, and to anything
            event = msgspec.structs.replace(event, traceparent=message.traceparent)
        if await message.decide(self._sealed(event, decision.name)):
            self._counts[event.outcome] += 1
            _log_outcome(event)
            self._reporter.outcome_published(event)
            self._learn(decision)
        else:
            self._counts["duplicates"] += 1
        self._monitor.on_stored()

    async def _with_asked(self, message: Message, decided: Decided) -> ApprovalEvent:
        """Return the event; of one that expired, it says whether the user was asked, as far as is known.

        A request claims its operation id before it creates the operation. The claim is kept for the duplicate window,
        so a request that is older, as when no worker ran for a day, may have lost it.
        """
        event, operation_id = decided.event, decided.event.operation_id
        if event.asked is not False or operation_id is None:
            return event
        age = (self._engine.now() - message.stored_at).total_seconds()
        is_kept = age < self._terms.longest_wait + self._limits.grace
        asked = not is_kept or await self._engine.claims.is_held(operation_id, decided.name)
        return msgspec.structs.replace(event, asked=asked)

    def _sealed(self, event: ApprovalEvent, name: str) -> Sealed:
        data, keys, fleet = msgspec.json.encode(event), self._event_keys, self._engine.fleet_name
        if keys is None:
            return Sealed(event.outcome, data, name, traceparent=event.traceparent)

        def is_genuine(other: bytes, signature: str | None) -> bool:
            return keys.are_of(other, signature, fleet=fleet) and is_about(other, event)

        signature = keys.sign(data, fleet=fleet)
        return Sealed(event.outcome, data, name, signature, event.traceparent, is_genuine)

    def _learn(self, decided: Decided) -> None:
        """Tell the schedule when the user approved, or until when they had not."""
        if not isinstance(self._schedule, wait_adaptive) or self._load_shedding.is_noticeable:
            return
        observed = observation(decided, self._schedule)
        if observed is not None:
            record_observation(self._schedule, *observed)


def _log_outcome(event: ApprovalEvent) -> None:
    facts = {
        "operation_id": event.operation_id,
        "deliveries": event.deliveries,
        "seconds": round((event.decided_at - event.requested_at).total_seconds(), 3),
        "answered": event.answered,
        "asked": event.asked,
        "reason": event.reason,
        "detail": event.detail,
    }
    level = logging.WARNING if event.outcome is Outcome.FAILED else logging.INFO
    log(level, f"approval.{event.outcome}", {name: fact for name, fact in facts.items() if fact is not None})
