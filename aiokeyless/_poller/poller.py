"""All the waits of one client, in memory: it starts and ends them, runs their polls and applies the results.

A wait is one slotted future. Waits for one operation share a `PolledOperation` and its polls. Workers are tasks that
take the next due poll themselves and exit when nothing is due, so that ten thousand waits due at once cost the event
loop no more than ``max_in_flight`` of them. What a result means for a wait is decided in `_rules`, which operation is
polled next in `dispatch`.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import math
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from aiokeyless._http.protocol import get_operation
from aiokeyless._rules.approval import Verdict, WaitRecord, evaluate, rejection_error, timed_out, unknown
from aiokeyless._rules.backoff import error_delay, is_transient, requested_pause
from aiokeyless._rules.circuit import Circuit
from aiokeyless._rules.outcome import YOUNG, Outcome, PollFacts, Result, poll_outcome
from aiokeyless._rules.rate import PollRate
from aiokeyless._tracing import context_without_traces
from aiokeyless.errors import (
    ApprovalTimeoutError,
    ClientClosedError,
    KeylessError,
    RateLimitError,
    RequestTimeoutError,
    TransportError,
)
from aiokeyless.models import Operation
from aiokeyless.reports import ApprovalUpdate, ClientStatistics
from aiokeyless.schedule import next_delay, record_observation, wait_adaptive

from .dispatch import MOST_DEADLINES, RESOLUTION, Dispatcher
from .explanation import Explainer, Explanation
from .packing import pack_pending
from .pauses import Pause, Pauses, next_poll
from .reporting import LATE, Reporter
from .state import Applied, Hold, Poll, PolledOperation, Wait
from .timer_queue import TimerQueue

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from anyio.streams.memory import MemoryObjectSendStream
    from tenacity.wait import wait_base

    from aiokeyless._http.transport import Transport
    from aiokeyless._listeners import Listeners
    from aiokeyless.ticket import ApprovalTicket

    from .state import WaitResult

FINAL_POLL_TIMEOUT: Final = 2.0  # seconds past the deadline for the final poll, and for repeating it where it fails
FRESH: Final = 1.0  # seconds within which nobody approves what was just created
#: Seconds after which a wait whose ticket had expired before it gets a poll with a deadline, where none could start.
EXPIRED_PATIENCE: Final = 120.0
_BATCH: Final = 128  # waits handled in one turn of the loop: a hundred thousand at once must not block it
_SKIPPED: Final = 16  # operations that nobody waits for any more, passed over in search of the next poll
_AFTER_BUG: Final = 0.1  # seconds until the timer fires again after it failed: a bug must not become a hot loop


class Poller:
    """The waits of one client.

    Args:
        transport: What sends the polls.
        schedule: When to poll, for waits that bring no schedule of their own.
        max_in_flight: Polls in flight at once.
        max_polls_per_second: Polls started in a second, of all waits together; None for as many as fit.
        listeners: Whom to tell of waits, polls and the circuit; None for nobody.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        schedule: wait_base,
        max_in_flight: int,
        max_polls_per_second: float | None = None,
        listeners: Listeners | None = None,
    ) -> None:
        self._transport = transport
        self._schedule = schedule
        self._learners = (schedule,) if isinstance(schedule, wait_adaptive) else ()
        self._loop = asyncio.get_running_loop()
        # Not the context of the caller that happened to be first: its trace and its logging variables are not ours.
        self._context = context_without_traces()
        self._reporter = Reporter(listeners, self._loop.time())
        self._circuit = Circuit(max_in_flight, longest_poll=transport.request_timeout)
        self._rate = PollRate(max_polls_per_second)
        self._dispatcher = Dispatcher(
            self._circuit, self._rate, max_in_flight=max_in_flight, request_timeout=transport.request_timeout
        )
        self._polled: dict[str, PolledOperation] = {}
        self._deadlines: TimerQueue[Wait] = TimerQueue()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf  # kept here, since uvloop's handles of what is due at once do not tell
        self._created: dict[tuple[str, datetime], float] = {}  # by id and `created_at`: a later ticket has a later one
        self._pauses = Pauses()
        self._sequence = -math.inf
        self._waiting = 0
        self._polls = 0
        self._approvals = 0
        self._timeouts = 0
        self._failures = 0
        self._explainer = Explainer(transport)
        self._leaving: deque[Wait] = deque()  # their callers are gone
        self._left = 0  # waits that left in this turn of the loop; above 0 a callback is set for the next turn
        self.closed = False
        self._ended: asyncio.Future[None] = self._loop.create_future()  # once it is closed and no wait is left

    # -- what the client calls

    def created(self, ticket: ApprovalTicket) -> None:
        """Remember on the loop's clock that the operation of a ticket was created just now."""
        now = self._loop.time()
        while self._created and now - self._created[oldest := next(iter(self._created))] > YOUNG:
            del self._created[oldest]
        self._created[ticket.operation_id, ticket.created_at] = now
        self._pauses.remove(ticket.operation_id)  # of the time before it existed

    def start(
        self,
        operation_id: str,
        *,
        ticket: ApprovalTicket | None,
        timeout: float | None,
        schedule: wait_base | None,
        may_be_missing: bool,
        updates: MemoryObjectSendStream[ApprovalUpdate] | None = None,
    ) -> Wait:
        """Start a wait; the caller must `leave` it.

        Args:
            operation_id: What to wait for.
            ticket: What is known about it; None for a bare id.
            timeout: Seconds; infinity for no end; None for what the ticket has left.
            schedule: When to poll; None for the client's.
            may_be_missing: Whether 404 counts as pending.
            updates: Where an update goes for each poll; closed when the wait ends.
        """
        now, age = self._now_and_age(ticket)
        if timeout is None:
            timeout = math.inf if ticket is None else _left(ticket, age)
        had_expired = timeout <= 0.0
        if had_expired:  # no deadline to keep: ten thousand resumed after a restart are all answered
            timeout = EXPIRED_PATIENCE
        schedule = schedule or self._schedule
        fresh = self._is_fresh(ticket, age)
        first = now + (next_delay(schedule, attempt_number=1, since_start=age) if fresh else 0.0)
        origin = now - age if age else now  # the same float twice, not two of them: there are many waits
        wait = Wait(
            self._polled_operation(operation_id, now, origin, ticket),
            self._loop,
            started_at=now,
            origin=origin,
            deadline=now + timeout,
            schedule=schedule,
            ticket=ticket,
            may_be_missing=may_be_missing,
            updates=updates,
        )
        wait.attempt += fresh
        wait.had_expired = had_expired
        self._register(wait, first)
        return wait

    def hold(
        self,
        operation_id: str,
        *,
        ticket: ApprovalTicket | None,
        seconds: float,
        schedule: wait_base | None,
        may_be_missing: bool,
    ) -> Wait:
        """Start one piece of a longer wait; the caller must `leave` it.

        Args:
            operation_id: What to wait for.
            ticket: What is known about it; None for a bare id, which has no end of its own.
            seconds: After which it ends with None; where the ticket's own time ends before, it is a wait until then.
            schedule: When to poll; None for the client's.
            may_be_missing: Whether 404 counts as pending.
        """
        now, age = self._now_and_age(ticket)
        left = math.inf if ticket is None else _left(ticket, age)
        had_expired = left <= 0.0
        schedule = schedule or self._schedule
        pause = self._pauses.find(operation_id, now)
        if had_expired:
            first, attempt = now, 1
        elif pause is not None:
            first, attempt = pause.next_poll(schedule, now), pause.attempt
        elif (polled := self._polled.get(operation_id)) is not None:
            first, attempt = next_poll(polled, schedule, 1, now), 1 + (polled.pending_at is not None)
        else:
            fresh = self._is_fresh(ticket, age)
            first = now + (next_delay(schedule, attempt_number=1, since_start=age) if fresh else 0.0)
            attempt = 1 + fresh
        origin = now - age if age else now
        wait = (Wait if left <= seconds else Hold)(
            self._polled_operation(operation_id, now, origin, ticket),
            self._loop,
            started_at=now,
            origin=origin,
            deadline=now + (seconds if had_expired else min(seconds, left)),
            schedule=schedule,
            ticket=ticket,
            may_be_missing=may_be_missing,
            updates=None,
        )
        wait.attempt = attempt
        wait.had_expired = had_expired
        self._register(wait, first)
        if pause is not None:
            self._continue(wait, pause, now)
        elif (poll := wait.polled.poll) is not None and first == math.inf:
            poll.add(wait)
        return wait

    def leave(self, wait: Wait) -> None:
        """End a wait whose caller is gone; harmless after it has ended.

        Of very many in one turn of the loop, the first ones leave at once, and the others in the next turns.
        """
        if not wait.registered:
            return
        wait.cancel()
        if self._left < _BATCH:
            self._close(wait)
        else:
            self._leaving.append(wait)
        self._left += 1
        if self._left == 1:
            self._loop.call_soon(self._leave_batch, context=self._context)

    def leave_all(self, waits: Iterable[Wait]) -> None:
        """End waits that have one caller, who is gone; as `leave` does for each."""
        left = [wait for wait in waits if wait.registered]
        for wait in left[:_BATCH]:
            self.leave(wait)
        self._leaving.extend(left[_BATCH:])

    def _leave_batch(self) -> None:
        """End some of the waits that are about to leave; called once a turn, as long as any did in the turn before."""
        batch = [self._leaving.popleft() for _ in range(min(_BATCH, len(self._leaving)))]
        self._left = len(batch)
        if batch:
            self._loop.call_soon(self._leave_batch, context=self._context)  # first, whatever is raised below
        for wait in batch:
            if wait.registered:
                wait.cancel()
                self._close(wait)

    def explain(self, wait: Wait) -> Explanation:
        """Explain a wait; the caller must `Explanation.leave` it."""
        return self._explainer.start(wait, until=wait.deadline + FINAL_POLL_TIMEOUT)

    async def aclose(self) -> None:
        """End all waits with `ClientClosedError`, and what is in flight for them.

        Once started, it completes by itself, even where the caller is cancelled; a second call waits for the first.
        """
        if not self.closed:
            self.closed = True
            self._disarm()
            self._pauses.clear()
            for poll in self._dispatcher.in_flight:
                if not poll.polled.live:  # it goes on between two holds
                    poll.stop()
            self._end_batch(wait for polled in tuple(self._polled.values()) for wait in polled.all_waits())
        await asyncio.shield(self._ended)
        while tasks := [poll.task for poll in self._dispatcher.in_flight if poll.task is not None]:
            await asyncio.wait(tasks)
        self._reporter.closed(self._loop.time())
        await self._explainer.aclose()

    def _end_batch(self, waits: Iterator[Wait]) -> None:
        """End some of the waits; the rest in callbacks, which nobody can cancel."""
        batch = tuple(itertools.islice(waits, _BATCH))
        if not batch:
            self._ended.set_result(None)
            return
        self._loop.call_soon(self._end_batch, waits, context=self._context)  # first, whatever is raised below
        for wait in batch:
            if wait.cancelled() and wait.registered:  # its caller is gone
                self._close(wait)
            self._end(
                wait,
                ClientClosedError(
                    f"the client was closed while operation {wait.polled.operation_id!r} was waited for; "
                    "check it with get_operation of another client"
                ),
            )

    def statistics(self) -> ClientStatistics:
        """Return the counts as of now."""
        now = self._loop.time()
        rate = self._rate.per_second(now)
        return ClientStatistics(
            waiting=self._waiting,
            in_flight=len(self._dispatcher.in_flight),
            polls=self._polls,
            approvals=self._approvals,
            timeouts=self._timeouts,
            transient_failures=self._failures,
            lag=self._dispatcher.lag(now),
            rate_limit=None if rate == math.inf else rate,
            circuit=self._circuit.state.value,
        )

    # -- times

    def _now_and_age(self, ticket: ApprovalTicket | None) -> tuple[float, float]:
        """Return the time and the age of a wait's operation, for a wait that starts now."""
        if self.closed:
            raise ClientClosedError("the client is closed; check the operation with get_operation of another client")
        now = self._loop.time()
        return now, self._age(ticket, now)

    def _is_fresh(self, ticket: ApprovalTicket | None, age: float) -> bool:
        """Return whether this client created the operation a moment ago: nobody approves so soon."""
        return ticket is not None and (ticket.operation_id, ticket.created_at) in self._created and age < FRESH

    def _age(self, ticket: ApprovalTicket | None, now: float) -> float:
        """Return the seconds since the operation was created: 0 for a bare id, whose clock starts with the wait."""
        if ticket is None:
            return 0.0
        created = self._created.get((ticket.operation_id, ticket.created_at))
        if created is not None:
            return now - created
        return max(0.0, (datetime.now(UTC) - ticket.created_at).total_seconds())

    # -- operations and waits

    def _register(self, wait: Wait, first: float) -> None:
        """Add a wait that starts now, and schedule its first poll and its deadline."""
        polled = wait.polled
        polled.add(wait)
        self._waiting += 1
        if wait.schedule is self._schedule and not polled.learners:
            polled.learners = self._learners  # one tuple for all, as nearly all are
        elif isinstance(wait.schedule, wait_adaptive) and wait.schedule not in polled.learners:
            polled.learners += (wait.schedule,)
        if wait.deadline < math.inf:
            self._deadlines.schedule(wait, wait.deadline)
        if first < wait.deadline or isinstance(wait, Hold):  # the next hold goes on from what this one does not reach
            self._dispatcher.schedule(polled, first)
        self._arm(wait.started_at)
        if self._reporter.listens:
            self._reporter.wait_started(wait)

    def _continue(self, wait: Wait, pause: Pause, now: float) -> None:
        """Give a hold what is known from the one before it."""
        wait.seen = pause.seen
        poll = wait.polled.poll
        if poll is not None:  # that one's, still in flight
            poll.add(wait)
        elif pause.approval is not None:
            verdict = evaluate(pause.approval, wait.polled.operation_id, wait.ticket)
            if verdict is Verdict.APPROVED:  # else its first poll meets the answer again
                self._record_observation(wait.polled, now)
                self._approve(wait, pause.approval, now)

    def _polled_operation(
        self, operation_id: str, now: float, origin: float, ticket: ApprovalTicket | None
    ) -> PolledOperation:
        polled = self._polled.get(operation_id)
        if polled is None:
            pause = self._pauses.remove(operation_id)
            if pause is not None:
                polled = pause.polled
            else:
                # A coarse clock may show a time twice.
                self._sequence = max(now, math.nextafter(self._sequence, math.inf))
                polled = PolledOperation(
                    self._sequence, operation_id, self._transport.url(get_operation(operation_id)), origin
                )
            self._polled[operation_id] = polled
        polled.origin = min(polled.origin, origin)
        if polled.observed_from is None and ticket is not None and now - origin < FRESH:
            polled.observed_from = origin
        return polled

    def _end(self, wait: Wait, outcome: WaitResult) -> None:
        """Give a wait its outcome."""
        if wait.done():  # cancelled in this turn of the loop: its caller is about to leave
            return
        wait.set_result(outcome)
        if isinstance(outcome, Operation):
            self._approvals += 1
        elif isinstance(outcome, ApprovalTimeoutError):
            self._timeouts += 1
        self._close(wait)

    def _close(self, wait: Wait) -> None:
        """Unregister a wait that has ended; the last one of an operation stops its polls."""
        polled = wait.polled
        wait.registered = False
        self._deadlines.remove(wait)
        if wait.updates is not None:
            wait.updates.close()
        polled.remove(wait)
        self._waiting -= 1
        if not polled.live:
            self._stop_polling(wait)
        wait.seen = None  # a poll in flight may keep the wait for a while
        final, wait.final = wait.final, None  # that poll has the wait
        if final is not None and final.under_way and polled.live:
            if not final.serves_any():  # those that are left have passed their deadlines, too
                final.stop()
            self._arm(self._loop.time())  # where it goes on for others, a final poll may start now
        if self._reporter.listens:
            self._reporter.wait_ended(wait, self._loop.time())

    def _stop_polling(self, last: Wait) -> None:
        """Stop the polls of an operation after its last wait; after a hold, keep what the next hold goes on from."""
        polled = last.polled
        now = self._loop.time()
        del self._polled[polled.operation_id]
        goes_on = self._pause(last, now) if isinstance(last, Hold) and not self.closed else None
        self._dispatcher.unschedule(polled)
        for poll in self._dispatcher.in_flight:
            if poll.polled is polled and poll is not goes_on:
                poll.stop()
        if not self._polled:
            self._dispatcher.clear_final_polls()
            self._disarm()
            self._arm(now)  # for a poll that goes on
        if polled.pending_at is not None:
            self._record_observation(polled, None)
            polled.observed_from = polled.pending_at  # the next hold observes it from there on

    def _pause(self, hold: Hold, now: float) -> Poll | None:
        """Keep what the next hold goes on from; return the poll in flight that is not cut off for that.

        Where a service takes longer for an answer than the holds last, each of them would cut off the poll of the one
        before it. A caller that is gone leaves nothing behind.
        """
        polled = hold.polled
        if not hold.is_paused():
            return None
        poll = polled.poll
        if poll is None:
            # None is scheduled where a final poll of a wait that has ended did for the one that was due.
            self._pauses.add(Pause(hold, polled.due if polled.due < math.inf else now, now))
        elif hold.cancelled():
            self._pauses.add(Pause(hold, now, now))
        else:
            self._pauses.add(Pause(hold, None, now))
            return poll
        return None

    def _record_observation(self, polled: PolledOperation, approved_by: float | None) -> None:
        """Give the schedules what was observed of an operation, once: approved between two polls, or still pending.

        Each client, and each piece of a longer wait, tells what it saw itself: from when on it polled, until when the
        operation was pending. An approval that was there before says nothing of when it came.
        """
        learners, polled.learners = polled.learners, ()
        if polled.observed_from is None:
            return
        since = polled.observed_from - polled.origin
        after = since if polled.pending_at is None else polled.pending_at - polled.origin
        until = None if approved_by is None else approved_by - polled.origin
        for learner in learners:
            record_observation(learner, after, until, since)

    # -- the timer

    def _arm(self, now: float) -> None:
        """Set the timer for the next event that time alone brings about; the end of a poll needs none."""
        if self.closed:
            return
        deadline = self._deadlines.next_due()
        when = max(now, min(self._dispatcher.next_event(now), math.inf if deadline is None else deadline))
        if when < self._timer_at:
            self._disarm()
            self._timer = self._loop.call_at(when, self._wake, context=self._context)
            self._timer_at = when

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._timer_at = math.inf

    def _wake(self) -> None:
        self._timer = None
        self._timer_at = math.inf
        now = self._loop.time()
        again = now + _AFTER_BUG
        try:
            for poll in self._dispatcher.overdue(now):
                poll.stop(overdue=True)
            self._expire(now)
            self._dispatch(now)
            again = now
        finally:  # what is raised goes on to the loop, which logs it; the other waits must not hang for it
            self._arm(again)

    def _expire(self, now: float) -> None:
        """Handle deadlines: at the first one a final poll is queued, at the end of its time the wait ends."""
        passed: set[PolledOperation] = set()
        for _ in range(_deadlines_in_a_turn(now, self._deadlines.next_due())):
            wait = self._deadlines.pop_due(now + RESOLUTION)
            if wait is None:
                break
            try:
                self._expire_one(wait, now, passed)
            except Exception as error:  # noqa: BLE001  # a bug: it must end the wait that it concerns, and not hang it
                self._end(wait, error)
        if passed:
            # A poll that started before the deadline does not count at the deadline; others may still need it.
            for poll in self._dispatcher.in_flight:
                if poll.under_way and poll.polled in passed and not poll.serves_any():
                    poll.stop()

    def _expire_one(self, wait: Wait, now: float, passed: set[PolledOperation]) -> None:
        if isinstance(wait, Hold):
            self._end(wait, None)
        elif not wait.deadline_passed:
            self._pass_deadline(wait)
            self._queue_final_poll(wait, wait.deadline)
            passed.add(wait.polled)
        elif now + RESOLUTION < wait.deadline + FINAL_POLL_TIMEOUT:  # the pause after a final poll that failed is over
            self._queue_final_poll(wait, now)
        else:
            self._end_unknown(wait, now)

    def _pass_deadline(self, wait: Wait) -> None:
        """Mark a wait whose deadline has passed: only a final poll counts for it now."""
        polled = wait.polled
        wait.deadline_passed = True
        polled.before_deadline -= 1
        if not polled.before_deadline:
            self._dispatcher.unschedule(polled)

    def _queue_final_poll(self, wait: Wait, due: float) -> None:
        """Queue a final poll for a wait whose deadline has passed, unless one that started since then is in flight."""
        self._deadlines.schedule(wait, wait.deadline + FINAL_POLL_TIMEOUT)
        if wait.final is None:
            self._dispatcher.queue_final_poll(wait.polled, due)

    def _end_unknown(self, wait: Wait, now: float) -> None:
        """End a wait whose final polls were not answered in time, or found no slot."""
        poll = wait.final
        if poll is not None:
            wait.error = self._no_answer(wait.polled, now - poll.started_at)
            if not poll.counted_as_failure:  # it may be the final poll of many waits
                poll.counted_as_failure = True
                self._failures += 1
                self._circuit.record_failure(now, wait.polled.operation_id, started_at=poll.started_at, is_probe=False)
                if self._circuit.state is not self._reporter.circuit:
                    self._report_circuit(wait.error, now)
        self._end(wait, unknown(wait.record(now)))

    # -- polls

    def _dispatch(self, now: float) -> None:
        """Start workers for what is due, as many as there is room for."""
        while (poll := self._next_poll(now)) is not None:
            # Not by the loop's task factory, which is the application's. An eager one would run the worker here and
            # now, in a context that is entered already: that fails, and asyncio then takes no task of the loop for the
            # current one any more. Another one may raise, or take no context.
            poll.task = asyncio.Task(self._work(poll), loop=self._loop, context=self._context)
            poll.task.add_done_callback(self._worker_gone)

    def _next_poll(self, now: float) -> Poll | None:
        """Take the next poll that may start, and none for callers that are gone and about to leave."""
        if self.closed:
            return None
        for _ in range(_SKIPPED):
            poll = self._dispatcher.next_poll(now)
            if poll is None or poll.polled.is_waited_for():
                return poll
            for wait in poll.polled.all_waits()[:_BATCH]:
                if wait.registered:
                    self._close(wait)
            self._dispatcher.finish(poll, now)
        return None  # the timer goes on with it

    async def _work(self, poll: Poll | None) -> None:
        """Run polls for as long as any may start."""
        while poll is not None:
            try:
                await self._send(poll)
            except BaseException as error:  # this task was cancelled from outside, or a hook raised GeneratorExit
                self._abandon(poll, backs_off=not isinstance(error, asyncio.CancelledError))
                raise
            now = self._loop.time()
            self._dispatcher.finish(poll, now)
            task = poll.task
            poll = self._next_poll(now)
            if poll is not None:
                poll.task = task
            self._dispatch(now)
            self._arm(now)

    def _worker_gone(self, task: asyncio.Task[None]) -> None:
        """Clean up after a worker that was cancelled from outside, perhaps before it started."""
        for poll in tuple(self._dispatcher.in_flight):
            if poll.task is task:
                self._abandon(poll)
        if self._polled:
            self._arm(self._loop.time())

    def _abandon(self, poll: Poll, *, backs_off: bool = False) -> None:
        """Free the slot of a poll whose worker ended early; a cancellation costs no wait its final poll."""
        now = self._loop.time()
        polled = poll.polled
        if backs_off:
            polled.failures += 1
            if polled.live:  # else it went on between two holds, and the second one sets its next poll
                self._dispatcher.schedule(polled, now + error_delay(polled.failures))
            self._dispatcher.finish(poll, now)
            return
        for wait in poll.waits:
            if wait.final is poll:
                wait.final = None
        self._dispatcher.finish(poll, now)
        if polled.needs_final_poll():
            self._dispatcher.queue_final_poll(polled, now)

    async def _send(self, poll: Poll) -> None:
        if poll.cut:  # the last wait left before it started
            return
        try:
            self._start_poll(poll)
            answer = await self._fetch(poll)
            now = self._loop.time()
            if self._reporter.listens:
                self._reporter.poll_ended(poll, answer, now)
            if answer is not None:
                await self._apply(poll, answer, now)
            else:  # cut off, and neither good nor bad
                self._circuit.record_cut(started_at=poll.started_at, is_probe=not poll.final)
        except Exception as error:  # noqa: BLE001  # a bug: it must end the waits that it concerns, and not poll forever
            for wait in poll.polled.active_waits():
                self._end(wait, error)

    async def _fetch(self, poll: Poll) -> Operation | KeylessError | None:
        """Do the exchange; None where it was cut off since no wait needed it any more."""
        try:
            return await self._transport.poll(poll.polled.url)
        except asyncio.CancelledError:
            assert poll.task is not None  # noqa: S101  # it runs this
            # By poll.stop(), or from outside: a cancellation from outside is not ours to swallow.
            if (poll.task.uncancel() if poll.cut else poll.task.cancelling()) > 0:
                raise
            if poll.cut:
                return self._no_answer(poll.polled, self._transport.request_timeout) if poll.overdue else None
            # This task was not cancelled: something inside the session was, such as a task of a middleware.
            path = self._transport.path(poll.polled.url)
            return TransportError(f"GET {path}: the exchange was cancelled inside the session", method="GET", path=path)
        except KeylessError as error:
            return _bare(error)
        finally:
            poll.under_way = False

    def _start_poll(self, poll: Poll) -> None:
        poll.under_way = True
        poll.started_at = self._loop.time()
        poll.waits = poll.polled.active_waits()
        self._polls += 1
        if poll.lag >= LATE or self._reporter.polls_are_late:
            self._reporter.poll_started(poll.lag, poll.started_at, waiting=self._waiting)
        for wait in poll.waits:
            wait.polls += 1
            # By the time, and not by the mark: where many deadlines pass at once, it may be still to come.
            is_final = wait.had_expired or wait.deadline <= poll.started_at + RESOLUTION
            if is_final and wait.final is None and not isinstance(wait, Hold):
                wait.final = poll

    def _no_answer(self, polled: PolledOperation, seconds: float) -> RequestTimeoutError:
        path = self._transport.path(polled.url)
        return RequestTimeoutError(f"GET {path} got no answer within {seconds:.3g} s", method="GET", path=path)

    # -- what a poll brought

    async def _apply(self, poll: Poll, answer: Operation | KeylessError, now: float) -> None:
        self._record_in_circuit(poll, answer, now)
        if self._circuit.state is not self._reporter.circuit:
            self._report_circuit(answer, now)
        active = poll.polled.active_waits()
        if not active:
            self._apply_to_pause(poll, answer, now)
            return
        applied = Applied(poll, active)
        self._apply_to_waits(applied, answer, active[:_BATCH], now)
        for start in range(_BATCH, len(active), _BATCH):
            await asyncio.sleep(0)  # very many wait for one operation: nobody else may be held up by that
            batch = [wait for wait in active[start : start + _BATCH] if not wait.done()]
            self._apply_to_waits(applied, answer, batch, self._loop.time())
        if not applied.failed:
            poll.polled.failures = 0

    def _apply_to_waits(
        self, applied: Applied, answer: Operation | KeylessError, active: list[Wait], now: float
    ) -> None:
        """Do with each of some waits what the result of the poll means for it."""
        poll, served = applied.poll, applied.served
        outcomes = [(wait, _outcome(answer, wait, applied)) for wait in active]
        if any(outcome.result is Result.APPROVED for _, outcome in outcomes):
            self._record_observation(poll.polled, now)
        pending: list[Wait] = []
        transient: list[Wait] = []
        for wait, (result, rejection) in outcomes:
            if isinstance(answer, Operation) and result is Result.APPROVED:
                self._approve(wait, answer, now)  # counts for waits that started after the poll, too
            elif wait not in served:
                continue
            elif rejection is not None:
                self._end(wait, rejection_error(rejection, _record(wait, now, answer)))
            elif result is Result.PENDING or result is Result.TIMED_OUT:
                pending.append(wait)
            elif isinstance(answer, KeylessError) and result is Result.FAILED:
                self._end(wait, copy.copy(answer) if len(served) > 1 else answer)
            else:
                transient.append(wait)
        if pending:
            self._after_pending(applied, answer, pending, now)
        if isinstance(answer, KeylessError) and transient:
            self._after_transient(applied, answer, transient, now)

    def _apply_to_pause(self, poll: Poll, answer: Operation | KeylessError, now: float) -> None:
        """Keep the result of a poll that ended between two holds, as far as it says when to poll next."""
        polled = poll.polled
        pause = self._pauses.find(polled.operation_id, now)
        if pause is None or pause.polled is not polled:
            return
        may_be_missing = poll.started_at < pause.may_be_missing_until
        facts = PollFacts(
            polled.operation_id,
            ticket=None,  # that of the next hold counts
            is_final=False,
            may_be_missing=may_be_missing,
            was_seen=pause.seen is not None,
        )
        result, _ = poll_outcome(answer, facts)
        polled.failures = polled.failures + 1 if result is Result.TRANSIENT else 0
        if result is Result.PENDING:
            polled.pending_at = poll.started_at
            pause.attempt += 1
            if isinstance(answer, Operation):
                pause.seen = pack_pending(answer)
            return
        pause.due = now
        if result is Result.TRANSIENT and isinstance(answer, KeylessError):
            pause.due += max(error_delay(polled.failures), requested_pause(answer))
        pause.approval = answer if isinstance(answer, Operation) and result is Result.APPROVED else None

    def _record_in_circuit(self, poll: Poll, answer: Operation | KeylessError, now: float) -> None:
        if isinstance(answer, KeylessError) and is_transient(answer):
            self._failures += 1
            if isinstance(answer, RateLimitError):
                self._rate.record_refusal(now, started_at=poll.started_at)
            self._circuit.record_error(
                now, poll.polled.operation_id, answer, started_at=poll.started_at, is_probe=not poll.final
            )
        else:  # a 404 about an operation that was seen, too: the service answers, and only this operation waits
            self._circuit.record_success(now, started_at=poll.started_at)

    def _report_circuit(self, answer: Operation | KeylessError | None, now: float) -> None:
        cause = answer if isinstance(answer, KeylessError) and is_transient(answer) else None
        self._reporter.circuit_changed(self._circuit.state, cause=cause, waiting=self._waiting, now=now)

    def _approve(self, wait: Wait, operation: Operation, now: float) -> None:
        wait.polls = max(wait.polls, 1)
        self._update(wait, now, operation)
        self._end(wait, operation)

    def _after_pending(self, applied: Applied, answer: Operation | KeylessError, waits: list[Wait], now: float) -> None:
        """Go on by the schedule, and end the waits whose final poll this was."""
        poll, polled = applied.poll, applied.poll.polled
        polled.pending_at = max(poll.started_at, polled.pending_at or 0.0)
        if polled.observed_from is None:
            polled.observed_from = polled.pending_at
        seen = pack_pending(answer) if isinstance(answer, Operation) else None
        going_on: list[Wait] = []
        for wait in waits:
            if isinstance(answer, KeylessError):  # a 404 that counts as pending
                wait.error = answer
            else:
                wait.seen = seen
            if wait.final is poll:
                self._update(wait, now, answer)
                self._end(wait, timed_out(wait.record(now)))
            elif not wait.deadline_passed:  # else it waits for its final poll
                going_on.append(wait)
        for wait in self._schedule_next(polled, going_on, applied.delays, now):
            self._update(wait, now, answer, due=polled.due)

    def _after_transient(self, applied: Applied, error: KeylessError, waits: list[Wait], now: float) -> None:
        """Go on by the backoff, and repeat final polls."""
        poll, polled = applied.poll, applied.poll.polled
        if not applied.failed:
            applied.failed = True
            polled.failures += 1
            self._failures += not is_transient(error)  # the others were counted
            applied.retry_at = now + max(error_delay(polled.failures), requested_pause(error))
            # Beside an ordinary poll in flight, a final one sets nothing: it could be over when that one fails.
            if polled.before_deadline and polled.poll in (None, poll):
                self._dispatcher.schedule(polled, applied.retry_at)
        again = now + max(error_delay(1), requested_pause(error))
        for wait in waits:
            wait.error = error
            if wait.final is poll:
                self._repeat_final(wait, again, now)
            else:
                due = min(polled.due, applied.retry_at)
                self._update(wait, now, error, due=max(due, self._circuit.retry_at()))

    def _repeat_final(self, wait: Wait, again: float, now: float) -> None:
        """Repeat a final poll that failed: an error at the wrong moment must not cost an approval that came in time.

        Where that is too late, as by a long ``Retry-After``, the wait ends at once: there is nothing left to wait for.
        """
        wait.final = None
        if wait.had_expired and not wait.deadline_passed:  # now it has a deadline to keep
            wait.deadline = now
            self._pass_deadline(wait)  # or the backoff's poll, too, would be final, and move the deadline once more
        if again < wait.deadline + FINAL_POLL_TIMEOUT:
            self._deadlines.schedule(wait, again)
            self._update(wait, now, wait.error, due=again)
        else:
            self._update(wait, now, wait.error)
            self._end(wait, unknown(wait.record(now)))

    def _schedule_next(
        self, polled: PolledOperation, waits: list[Wait], delays: dict[tuple[int, int], float | Exception], now: float
    ) -> list[Wait]:
        """Ask each schedule once an attempt and take the soonest delay; return the waits whose schedule answered."""
        asked = [(wait, (id(wait.schedule), wait.attempt)) for wait in waits]
        for wait, key in asked:
            if key not in delays:
                try:
                    delays[key] = next_delay(
                        wait.schedule, attempt_number=wait.attempt, since_start=now - polled.origin
                    )
                except KeylessError as error:
                    delays[key] = error
            wait.attempt += 1
        for wait, key in asked:
            delay = delays[key]
            if isinstance(delay, Exception):
                self._end(wait, copy.copy(delay))
        good = [delay for delay in delays.values() if isinstance(delay, float)]
        if good and waits:
            self._dispatcher.schedule(polled, now + min(good))
        return [wait for wait in waits if not wait.done()]

    def _update(
        self, wait: Wait, now: float, answer: Operation | KeylessError | None, *, due: float | None = None
    ) -> None:
        if wait.updates is None:
            return
        last = wait.deadline + FINAL_POLL_TIMEOUT if wait.deadline_passed else wait.deadline
        wait.updates.send_nowait(
            ApprovalUpdate(
                operation=answer if isinstance(answer, Operation) else None,
                error=answer if isinstance(answer, KeylessError) else None,
                polls=wait.polls,
                elapsed=now - wait.started_at,
                next_poll_in=None if due is None else max(0.0, min(due, last) - now),
            )
        )


def _deadlines_in_a_turn(now: float, due: float | None) -> int:
    """Return how many deadlines one turn of the loop handles: a batch, or one for each second by which they are late.

    Where others make the turns long, there are few of them: with one batch in each, waits would end ever later. The
    number depends on nothing but the loop's clock, so that it is the same where that clock stands still within a turn.
    """
    late = 0.0 if due is None else now - due
    return int(min(_BATCH * max(1.0, late), MOST_DEADLINES))


def _outcome(answer: Operation | KeylessError, wait: Wait, applied: Applied) -> Outcome:
    """Return what the answer means for a wait; waits of which the same is known share it, and one hash of a payload."""
    poll = applied.poll
    is_young = wait.ticket is not None and poll.started_at - wait.origin < YOUNG
    facts = PollFacts(
        wait.polled.operation_id, wait.ticket, wait.final is poll, wait.may_be_missing or is_young, applied.was_seen
    )
    if len(applied.served) == 1:
        return poll_outcome(answer, facts)
    outcome = applied.outcomes.get(facts)
    if outcome is None:
        outcome = applied.outcomes[facts] = poll_outcome(answer, facts)
    return outcome


def _record(wait: Wait, now: float, answer: Operation | KeylessError) -> WaitRecord:
    record = wait.record(now)
    return record._replace(last_operation=answer) if isinstance(answer, Operation) else record


def _left(ticket: ApprovalTicket, age: float) -> float:
    """Return what a ticket has left: never more than its lifetime, also where another machine's clock is ahead."""
    return max(0.0, (ticket.expires_at - ticket.created_at).total_seconds() - age)


def _bare(error: KeylessError) -> KeylessError:
    """Strip an error of what pins frames: a wait may keep it for minutes, and their locals hold whole bodies.

    No cause either: aiohttp's have tracebacks of their own, also in attributes, and the message names them.
    """
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error
