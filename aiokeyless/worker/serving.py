"""The serving phase of a worker: it takes deliveries, processes each, and puts it off or decides it.

It keeps no wait in memory. `processor` talks to Keyless, `aiokeyless._rules` limits the exchanges, and
`approval_worker` owns the life of the worker.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from aiokeyless._rules.backoff import error_delay
from aiokeyless._rules.budget import Budget
from aiokeyless._rules.order import Alternation
from aiokeyless._rules.rate import PollRate
from aiokeyless._rules.slots import Slots, most_in_flight
from aiokeyless._tracing import context_without_traces
from aiokeyless._validation import is_traceparent
from aiokeyless.errors import AuthenticationError, BrokerError, ClientClosedError, InvalidRequestError, KeylessError
from aiokeyless.schedule import record_observation, wait_adaptive

from .announcements import Announcements
from .broker import ExchangeResult, RefusedError, UnavailableError
from .decisions import Redeliver, after_bug, after_outage, fail, fail_unreadable, observation
from .grace import Grace
from .logs import RateLimitedLog, log
from .messages import REQUEST_VERSION, FailureReason, read_newer, read_request, read_version
from .monitoring import WorkerReporter, WorkerStatistics
from .processor import DeliveryProcessor, check_key

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from tenacity.wait import wait_base

    from aiokeyless._http.transport import Transport
    from aiokeyless._listeners import Listeners

    from .broker import Broker
    from .decisions import Decided, Decision
    from .messages import ApprovalRequest, Delivery, Message

#: Seconds before each check of a refused key. If all checks are refused, the worker ends.
KEY_CHECKS: Final = (1.0, 2.0, 4.0, 8.0, 15.0)
#: Most seconds by which a timer may fire too early. A shorter pause could end too early again. If the clock does not
#: move in between, as in tests, that would never end.
_EARLY: Final = 0.001
_LOST: Final = 0.1  # seconds after which a cancellation counts as lost
#: Seconds for which one call waits for deliveries.
TAKES_FOR: Final = 1.0
#: Most seconds for which a delivery is given back. Longer than a take lasts, so that another worker can take it.
_HANDED_BACK_FOR: Final = 1.5
#: Seconds for which a request of a later version is given back, and those since its storing in which it is.
NEWER_FOR: Final = 2.0
NEWER_KEPT_FOR: Final = 24 * 3600.0
#: Seconds after which a request is delivered again whose outcome the broker refused: much less than the lease.
_REFUSED_FOR: Final = 2.0
#: Repetitions of a put-off while the broker is away: for about half a minute. A lease is 45 s by default.
_REPETITIONS: Final = 10


class Limits(NamedTuple):
    """What bounds the deliveries of a worker."""

    max_in_flight: int
    max_polls_per_second: float | None
    longest_delivery: float  # seconds
    grace: float  # seconds


class Serving:
    """A worker at a broker that is prepared, with a transport that sends each exchange once.

    It passes an error that is the worker's or the broker's, and not a request's, to `on_fatal`.
    """

    def __init__(
        self,
        broker: Broker,
        transport: Transport,
        *,
        schedule: wait_base,
        limits: Limits,
        longest_wait: float,
        on_fatal: Callable[[KeylessError], None],
        on_created: Callable[[ApprovalRequest], object] | None,
        listeners: Listeners,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._broker = broker
        self._transport = transport
        self._key_check: asyncio.Task[None] | None = None  # while it is not known whether the key is accepted
        self._schedule = schedule
        self._limits = limits
        self._grace = Grace(limits.grace, now=broker.now())
        self._longest_wait = longest_wait
        self._claims_last = longest_wait + limits.grace  # seconds
        self._on_fatal = on_fatal
        self._budget = Budget()
        self._slots: Slots[Message] = Slots(limits.max_in_flight)
        self._alternation = Alternation()
        self._rate = PollRate(limits.max_polls_per_second)
        self._deliveries: dict[asyncio.Task[None], Message] = {}  # in flight
        # A request belongs to the trace of its submitter, and its polls have no spans.
        self._context = context_without_traces()
        self._reporter = WorkerReporter(broker, self._budget, self._deliveries, listeners=listeners, on_loss=on_fatal)
        self._processor = DeliveryProcessor(
            transport,
            broker,
            schedule=schedule,
            budget=self._budget,
            rate=self._rate,
            grace=self._grace,
            reporter=self._reporter,
        )
        self._announcements = Announcements(on_created, at_once=limits.max_in_flight)
        self._changed = asyncio.Event()
        self._taking: asyncio.Task[Sequence[Message]] | None = None
        self._unavailable = RateLimitedLog(logging.WARNING, "broker.unavailable")
        self._silences = 0  # takes in a row that the broker did not answer

    def statistics(self) -> WorkerStatistics:
        """Return the worker at this moment."""
        return self._reporter.statistics()

    def stop(self) -> None:
        """Take no more deliveries, and let `serve` end."""
        self._reporter.is_draining = True
        self._changed.set()
        if self._taking is not None:
            self._taking.cancel()  # requests that it has taken come again

    async def serve(self) -> None:
        """Process deliveries until `stop` is called, and then until those in flight are done."""
        watching = self._loop.create_task(self._reporter.watch())
        try:
            log(logging.INFO, "worker.ready", {**self._reporter.who, "max_in_flight": self._limits.max_in_flight})
            while not self._reporter.is_draining:
                self._changed.clear()
                await self._take_more(self._loop.time())
            await self._drain()
        finally:
            try:
                await self._abandon(watching)
            finally:  # anyio's scopes cancel each await
                self._reporter.report_end()

    # -- the intake

    async def _take_more(self, now: float) -> None:
        """Take as many deliveries as there is room for; without room, wait for some."""
        room = self._room(now)
        try:
            if room > 0:
                are_slow = len(self._deliveries) > self._limits.max_in_flight  # those that hang leave little room
                is_short = are_slow or self._budget.is_short(now) or self._slots.are_held_by_failing
                untried = self._alternation.count_untried(room) if is_short else None
                await self._receive(self._broker.take(room, TAKES_FOR, untried=untried), needs_exchange=True)
            else:
                # Requests past their deadline need no exchange, so applications get these outcomes in time.
                is_away = self._is_away(now) and self._key_check is None
                if is_away and (overdue := self._grace.overdue(self._broker.now())) is not None:
                    taking = self._broker.take_overdue(self._limits.max_in_flight, overdue)
                    await self._receive(taking, needs_exchange=False)
                now = self._loop.time()
                ready_at = self._ready_at(now)
                if ready_at <= now:  # the slots are held
                    ready_at = self._slots.slow_at()
                await self._pause(min(max(ready_at - now, _EARLY), TAKES_FOR))
            self._grace.record_turn(self._broker.now())
        except UnavailableError as error:
            self._silences += 1
            self._reporter.take_failure = str(error)
            self._unavailable.log({**self._reporter.who, "error": str(error)})
            await self._pause(error_delay(self._silences))

    async def _receive(self, taking: Coroutine[object, object, Sequence[Message]], *, needs_exchange: bool) -> None:
        self._taking = self._loop.create_task(taking)
        try:
            await asyncio.wait({self._taking})
        finally:
            taken, self._taking = self._taking, None
            taken.cancel()
        if taken.cancelled():  # the worker is about to end
            return
        messages = taken.result()
        if self._silences:
            log(logging.INFO, "broker.available", self._reporter.who)
        self._silences, self._reporter.take_failure = 0, None
        newer = {message for message in messages if self._is_for_newer_workers(message)}
        known = [message for message in messages if message not in newer]
        new = sum(message.is_untried for message in known)
        self._alternation.record(untried=new, others=len(known) - new)
        for message in known:
            self._take(message, needs_exchange=needs_exchange)
        if newer:
            await asyncio.gather(*(self._give_back(message, NEWER_FOR) for message in newer))

    def _is_for_newer_workers(self, message: Message) -> bool:
        """Return whether a request is of a later version, and a worker that knows it may yet come."""
        head = read_newer(message, largest_request=self._broker.largest_request)
        # While the broker still keeps claims, the outcome can say whether the user may have been asked.
        if head is None or self._age(message) >= min(NEWER_KEPT_FOR, self._claims_last - 5 * NEWER_FOR):
            return False
        self._reporter.report_newer(head)
        return True

    def _is_away(self, now: float) -> bool:
        """Return whether the service is down, hangs, or asked for pauses that are together longer than the grace."""
        is_full = len(self._deliveries) >= self._most_in_flight(now)  # of exchanges that hang
        grace, paused_for = self._grace.seconds, self._rate.paused_until - now
        is_held = paused_for > grace or (paused_for > 0 and now - self._budget.answered_at > grace)
        return is_full or is_held or self._budget.room(now) < 1

    def _ready_at(self, now: float) -> float:
        """Return when the budget and the rate let the next exchange start."""
        return max(self._budget.ready_at(now), self._rate.ready_at(now))

    def _room(self, now: float) -> int:
        """Return how many more deliveries may start an exchange now."""
        if self._key_check is not None:
            return 0
        self._slots.release_slow(now)
        slots = min(self._slots.limit - len(self._slots), self._most_in_flight(now) - len(self._deliveries))
        polls = self._rate.room(now)
        return min(slots, self._budget.room(now), slots if polls is None else polls)

    def _most_in_flight(self, now: float) -> int:
        most = most_in_flight(self._limits.max_in_flight, now, answered_at=self._budget.answered_at)
        return int(min(most, self._transport.max_connections))  # what waits for a connection looks like hanging

    async def _pause(self, seconds: float) -> None:
        """Wait for a delivery to end, or for something else that makes room."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    async def _drain(self) -> None:
        """Finish the deliveries in flight, and the calls of `on_created`."""
        log(logging.INFO, "worker.draining", {**self._reporter.who, "in_flight": len(self._deliveries)})
        if self._deliveries:
            await asyncio.wait(self._deliveries, timeout=self._limits.longest_delivery)
        await self._announcements.drain()
        facts: dict[str, object] = msgspec.to_builtins(self.statistics())
        del facts["problems"]
        log(logging.INFO, "worker.done", self._reporter.who | facts)

    async def _abandon(self, watching: asyncio.Task[None]) -> None:
        """Cancel what is still in flight; the broker repeats the deliveries."""
        if self._key_check is not None:
            self._key_check.cancel()
        while tasks := {*self._deliveries, *self._announcements.calls, *([] if watching.done() else [watching])}:
            for task in tasks:
                task.cancel()
            # On Python 3.11, asyncio.wait_for can lose a cancellation, so this loop repeats it.
            await asyncio.wait(tasks, timeout=_LOST)

    # -- the key

    def _suspect_key(self, error: AuthenticationError) -> None:
        """Take no deliveries until the key is checked. One refusal may be a gateway's."""
        if self._key_check is None and not self._reporter.is_draining:
            log(logging.WARNING, "keyless.key_refused", {**self._reporter.who, "error": str(error)})
            self._reporter.key_refusal = error
            self._key_check = asyncio.Task(self._check_key(error), loop=self._loop)

    async def _check_key(self, error: KeylessError) -> None:
        for pause in KEY_CHECKS:
            await asyncio.sleep(pause)
            try:
                await check_key(self._transport, self._reporter.who)
            except ClientClosedError as closed:
                error = closed
                break
            except KeylessError as refusal:  # a gateway that refuses everything may say it in several ways
                error = self._reporter.key_refusal = refusal
                continue
            self._key_check = self._reporter.key_refusal = None
            log(logging.INFO, "keyless.key_accepted", self._reporter.who)
            self._changed.set()
            return
        self._on_fatal(error)

    # -- one delivery

    def _take(self, message: Message, *, needs_exchange: bool) -> None:
        now = self._loop.time()
        self._reporter.report_delivery(message)
        # Not by the loop's task factory: an eager one would run the delivery before it is counted below.
        task = asyncio.Task(
            self._deliver(message, needs_exchange=needs_exchange), loop=self._loop, context=self._context
        )
        self._deliveries[task] = message
        if needs_exchange:
            self._slots.take(message, now, is_retry=message.failures > 0)
            self._budget.record_poll(now)
        task.add_done_callback(self._forget_delivery)

    def _forget_delivery(self, task: asyncio.Task[None]) -> None:
        self._slots.release(self._deliveries.pop(task))
        self._changed.set()

    async def _deliver(self, message: Message, *, needs_exchange: bool) -> None:
        started_at = self._loop.time()
        failure = await self._process(message, needs_exchange=needs_exchange)
        self._reporter.report_settlement(message.number, failure, started_at=started_at)

    async def _process(self, message: Message, *, needs_exchange: bool) -> Exception | None:
        """Decide a delivery's request, or have it delivered again. Return what kept it from being settled, if any."""
        decision: Decision = Redeliver(0.0)  # if the broker is away before there is one
        try:
            now = self._loop.time()
            # Since the take, the service may have asked for a pause, or refused the key.
            if needs_exchange and self._key_check is None and now >= self._rate.paused_until:
                decision = await self._decide(message)
            else:
                decision = self._decide_without_exchange(message, now)
            await self._settle(message, decision)
        except RefusedError as error:
            await self._give_back(message, _REFUSED_FOR)
            return error
        except UnavailableError as error:
            await self._put_off_once_back(message, decision)
            return error
        except KeylessError as error:  # the worker's or the broker's, and not the request's
            if isinstance(error, AuthenticationError):
                self._suspect_key(error)
            else:
                self._on_fatal(error)
            await self._give_back(message, error_delay(1))
            return error
        return None

    async def _put_off_once_back(self, message: Message, decision: Decision) -> None:
        """Put a delivery off as soon as the broker is back, rather than leave its request to the end of the lease."""
        if not isinstance(decision, Redeliver):
            decision = Redeliver(0.0)  # an event that was stored is kept once
        if decision.result in {ExchangeResult.FAILED, ExchangeResult.NONE}:
            return  # perhaps the broker took it, and would count it twice
        for failures in range(1, _REPETITIONS + 1):
            await asyncio.sleep(error_delay(failures))
            with suppress(UnavailableError, BrokerError):
                await self._broker.put_off(message, decision.delay, decision.result)
                return
            if self._reporter.is_draining:
                return

    async def _give_back(self, message: Message, delay: float) -> None:
        with suppress(UnavailableError, BrokerError):  # otherwise it is delivered again by itself, a little later
            await self._broker.put_off(message, delay, ExchangeResult.NONE)

    def _read(self, message: Message) -> Delivery:
        return read_request(message, longest_wait=self._longest_wait, largest_request=self._broker.largest_request)

    def _decide_without_exchange(self, message: Message, now: float) -> Decision:
        """Put a delivery off. If the service is away and the request is past its grace, decide it instead."""
        moment = self._broker.now()
        with suppress(InvalidRequestError):
            delivery = self._read(message)
            is_over = delivery.refusal is None and self._grace.left(delivery, moment) <= 0
            if is_over and self._is_away(now):
                return after_outage(delivery, self._reporter.last_failure, now=moment)
        pause = max(0.0, self._ready_at(now) - now)
        return Redeliver(min(pause, _HANDED_BACK_FOR) + error_delay(1), ExchangeResult.NONE)

    async def _decide(self, message: Message) -> Decision:
        try:
            delivery = self._read(message)
        except InvalidRequestError as error:
            self._budget.record_other()
            # A worker that knows a later version may have asked the user before it was replaced.
            is_newer = read_version(message.body) > REQUEST_VERSION
            was_asked = is_newer and await self._may_have_asked(message)
            reason = FailureReason.INTERNAL if was_asked else FailureReason.INVALID_REQUEST
            return fail_unreadable(message, error, now=self._broker.now(), reason=reason)
        if delivery.refusal is not None:
            self._budget.record_other()
            return fail(delivery, FailureReason.INVALID_REQUEST, delivery.refusal, now=self._broker.now())
        try:
            return await self._processor.process(delivery)
        except (KeylessError, UnavailableError):  # the worker's or the broker's, and not the request's
            raise
        except Exception as error:  # noqa: BLE001  # a bug: the request must not be delivered again forever
            log(logging.ERROR, "delivery.failed", {"operation_id": delivery.ticket.operation_id}, exc_info=True)
            return after_bug(delivery, error, now=self._broker.now())

    async def _settle(self, message: Message, decision: Decision) -> None:
        """Report the delivery's result to the broker."""
        if isinstance(decision, Redeliver):
            try:
                await self._broker.put_off(message, decision.delay, decision.result)
            finally:  # the operation is there, whatever the broker says
                if decision.created is not None:
                    self._reporter.report_creation(decision.created)
                    self._announcements.add(decision.created)
            return
        event = decision.event
        if event.asked is False:  # if it expired: whether the user was asked, or may have been
            event = msgspec.structs.replace(event, asked=await self._may_have_asked(message))
        if is_traceparent(message.traceparent):  # any sender may set it to anything
            event = msgspec.structs.replace(event, traceparent=message.traceparent)
        is_new = await self._broker.decide(message, event)
        self._reporter.report_outcome(event, is_new=is_new)
        if is_new:
            self._learn(decision)

    async def _may_have_asked(self, message: Message) -> bool:
        """Return whether a request's user may have been asked.

        A request claims its operation id before it creates the operation. The broker keeps the claim for as long as it
        lets a request wait. An older request, such as after a day without workers, may have lost its claim.
        """
        return self._age(message) >= self._claims_last or await self._broker.has_claim(message)

    def _age(self, message: Message) -> float:
        return (self._broker.now() - message.stored_at).total_seconds()

    def _learn(self, decided: Decided) -> None:
        """Let the schedule learn when the user approved, or until when they had not."""
        if isinstance(self._schedule, wait_adaptive) and (observed := observation(decided, self._schedule)) is not None:
            record_observation(self._schedule, *observed)
