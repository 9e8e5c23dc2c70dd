"""The waits of one client as a state machine. Pure: no asyncio, no task, no clock.

A driver reports events to it: a wait starts, a poll has ended with this result, a caller left, the client closes. Then
the driver does what `Machine.next_poll`, `Machine.wake_at` and `Machine.take_cut` return. The machine gives waits their
outcomes, and nothing else changes a wait, a polled operation or a poll. `_rules` decides what a result means for a
wait, and `dispatch` which operation is polled next.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import TYPE_CHECKING, Final

from aiokeyless._rules.approval import (
    Rejection,
    Verdict,
    WaitRecord,
    evaluate,
    rejection_error,
    timeout_error,
    unknown_error,
)
from aiokeyless._rules.backoff import error_delay, failures_that_count, requested_pause
from aiokeyless._rules.budget import Budget
from aiokeyless._rules.final import FINAL_POLL_TIMEOUT, RESOLUTION, STOOD_STILL, Unanswered, is_final, may_start
from aiokeyless._rules.outcome import UNEXPECTED_FOR, YOUNG, is_logged, is_service_well, is_unexpected, poll_verdict
from aiokeyless._rules.rate import PollRate
from aiokeyless._rules.slots import SLOW
from aiokeyless.errors import (
    ApprovalTimeoutError,
    AuthenticationError,
    CachedAnswerError,
    DecodeError,
    KeylessError,
    RateLimitError,
    RequestTimeoutError,
    StatusError,
)
from aiokeyless.models import Operation
from aiokeyless.reports import ApprovalUpdate, ClientStatistics
from aiokeyless.schedule import next_delay, record_observation, wait_adaptive
from aiokeyless.ticket import DefaultTimeout

from .dispatch import Dispatcher
from .state import Poll, PolledOperation, Wait, WaitPhase
from .timer_queue import TimerQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tenacity.wait import wait_base

    from aiokeyless.ticket import ApprovalTicket, WaitTimeout

    from .reporting import Reporter
    from .state import Updates, WaitResult

#: Seconds after a create within which no user approves.
FRESH: Final = 1.0
#: Seconds until a wait for an expired ticket gets a final poll with a deadline, if no poll could start before.
EXPIRED_PATIENCE: Final = 120.0
#: Waits handled in one turn of the loop. A hundred thousand at once must not block it.
BATCH: Final = 128
#: Deadlines handled in one turn of the loop at most. So many take several milliseconds.
_MOST_DEADLINES: Final = 384
#: The state of nearly all waits and answers. A name is found faster than a member of an enum.
_POLLING: Final = WaitPhase.POLLING
_PENDING: Final = Verdict.PENDING
_PAST: Final = -math.inf  # one float for all waits


class Machine:
    """The waits of one client.

    Most arguments are the client's. `max_connections` limits all polls in flight. `path_of` returns the path of an
    operation, for errors.
    """

    def __init__(
        self,
        reporter: Reporter,
        *,
        schedule: wait_base,
        max_in_flight: int,
        max_connections: float,
        max_polls_per_second: float | None,
        request_timeout: float,
        path_of: Callable[[str], str],
    ) -> None:
        self._reporter = reporter
        self._path_of = path_of
        self._schedule = schedule
        self._learners = (schedule,) if isinstance(schedule, wait_adaptive) else ()
        self._budget = Budget()
        self._rate = PollRate(max_polls_per_second)
        self._dispatcher = Dispatcher(
            self._budget,
            self._rate,
            max_in_flight=max_in_flight,
            max_connections=max_connections,
            request_timeout=request_timeout,
        )
        self._polled: dict[str, PolledOperation] = {}
        # Operations that a 503 holds, with the end of their own backoff. A good answer ends it.
        self._held: dict[PolledOperation, float] = {}
        self._refused_since = math.inf  # the first of the refusals of the key, if no poll was answered otherwise since
        self._deadlines: TimerQueue[Wait] = TimerQueue()
        self._expired_at = self._woke_at = -math.inf  # when `expire` was called last; when, after the loop stood still
        self._slept = 0.0  # seconds between these calls
        self._polls = 0
        self._approvals = 0
        self._timeouts = 0
        self._failures = 0
        self._last_error: KeylessError | None = None  # of these

    # -- what to do next

    @property
    def is_idle(self) -> bool:
        """Whether no wait is under way."""
        return not self._polled

    def next_poll(self, now: float) -> Poll | None:
        """Start the next poll that may start now; None if none may before `wake_at` or the end of a poll."""
        poll = self._dispatcher.next_poll(now)
        if not isinstance(poll, Poll):
            return None
        self._polls += 1
        self._reporter.report_lag(poll.lag, now, waiting=self._budget.waits)
        for wait in poll.waits:
            wait.polls += 1
            # By time, not by phase: if many deadlines pass at once, this one may not be handled yet.
            if wait.final_poll is None and (wait.had_expired or is_final(wait.deadline - now)):
                wait.final_poll, wait.had_final_poll = poll, True
        return poll

    def is_settled(self, until: float) -> bool:
        """Return whether the driver, after a poll has started, has nothing else to do until it wakes at `until`."""
        dispatcher = self._dispatcher
        return dispatcher.soonest >= until and self._deadlines.next_due() >= until and not dispatcher.cut

    def wake_at(self) -> float:
        """Return when time alone makes something happen: a poll may start, one is overdue, or a deadline passes."""
        return min(self._dispatcher.soonest, self._dispatcher.overdue_at(), self._deadlines.next_due())

    def take_cut(self) -> Sequence[Poll]:
        """Return the polls whose exchanges the driver must cut off, each once. It then calls `finish_poll`."""
        cut = self._dispatcher.cut
        if cut:
            self._dispatcher.cut = []
        return cut

    # -- events: waits

    def start(
        self,
        wait: Wait,
        now: float,
        operation_id: str,
        *,
        ticket: ApprovalTicket | None,
        age: float,
        is_fresh: bool,
        timeout: WaitTimeout,
        schedule: wait_base | None,
        may_be_missing: bool,
        patience: float = EXPIRED_PATIENCE,
        updates: Updates | None = None,
    ) -> None:
        """Start a wait.

        Args:
            wait: A new one, without any attribute set.
            now: The time.
            operation_id: The operation.
            ticket: Its ticket; None for a bare id.
            age: Seconds since the operation was created; 0 for a bare id, whose age is unknown.
            is_fresh: Whether this client created it less than `FRESH` seconds ago, so that no user has approved yet.
            timeout: Seconds; None for no end. The default is the rest of the ticket's lifetime. Even if clocks differ,
                it is never more than the whole lifetime.
            schedule: When to poll; None for the client's.
            may_be_missing: Whether 404 counts as pending.
            patience: Seconds until the final poll for an expired ticket, if no poll could start before.
            updates: Receives an update for each poll; closed when the wait ends.
        """
        if timeout is None:
            timeout = math.inf
        elif isinstance(timeout, DefaultTimeout):
            assert ticket is not None  # noqa: S101  # a bare id has 120 s
            timeout = (ticket.expires_at - ticket.created_at).total_seconds() - age
        had_expired = timeout <= 0.0
        schedule = schedule or self._schedule
        first = now + (next_delay(schedule, attempt_number=1, since_start=age) if is_fresh else 0.0)
        wait.started_at = now
        # If the age is 0, `now` itself: a second float for each of many waits takes memory.
        wait.origin = now - age if age else now
        wait.deadline = now + (patience if had_expired else timeout)
        wait.had_expired = had_expired
        wait.had_final_poll = False
        wait.phase = _POLLING
        wait.schedule = schedule
        wait.ticket = ticket
        wait.may_be_missing = may_be_missing
        wait.updates = updates
        wait.attempt = 1 + is_fresh
        wait.own_due = _PAST
        wait.polls = wait.number = 0
        wait.error = wait.final_poll = wait.entry = None
        wait.polled = polled = self._polled_operation(operation_id, wait)
        polled.add(wait)
        self._budget.waits += 1
        if ticket is not None and age < FRESH:
            self._add_learner(polled, schedule)
        if wait.deadline < math.inf:
            self._deadlines.schedule(wait, wait.deadline)
        if first < wait.deadline:
            self._dispatcher.schedule(polled, first)
        wait.number = self._reporter.report_wait_start(wait)

    def _polled_operation(self, operation_id: str, wait: Wait) -> PolledOperation:
        polled = self._polled.get(operation_id)
        if polled is None:
            polled = self._polled[operation_id] = PolledOperation(operation_id, wait.origin)
        elif polled.live == 1 and polled.due < math.inf:
            for alone in polled.active_waits():  # it no longer is
                alone.own_due = polled.due
        polled.origin = min(polled.origin, wait.origin)
        return polled

    def _add_learner(self, polled: PolledOperation, schedule: wait_base) -> None:
        """Let a schedule learn from a wait that began with its operation.

        From a wait that resumes later, a schedule would learn to poll too late.
        """
        if schedule is self._schedule and not polled.learners:
            polled.learners = self._learners  # nearly all operations share this tuple
        elif isinstance(schedule, wait_adaptive) and schedule not in polled.learners:
            polled.learners += (schedule,)

    def leave(self, wait: Wait, now: float) -> None:
        """End a wait whose caller is gone; harmless after it has ended."""
        if wait.phase is not WaitPhase.ENDED:
            self._close(wait, now)

    def waits(self) -> Iterator[Wait]:
        """Yield the waits that are under way now. Some may end during the iteration."""
        for polled in tuple(self._polled.values()):
            yield from tuple(polled.waits)

    def end(self, wait: Wait, outcome: WaitResult, now: float) -> None:
        """Give a wait its outcome; harmless after it has ended."""
        if wait.done():  # cancelled in this turn of the loop: its caller is about to leave
            return
        wait.set_result(outcome)
        if isinstance(outcome, Operation):
            self._approvals += 1
        elif isinstance(outcome, ApprovalTimeoutError):
            self._timeouts += 1
        self._close(wait, now)

    def _close(self, wait: Wait, now: float) -> None:
        """Unregister a wait that has ended. After the last wait for an operation, stop its polls."""
        polled = wait.polled
        polled.remove(wait)
        if not polled.before_deadline:  # the other waits want final polls only
            self._dispatcher.unschedule(polled)
        wait.phase = WaitPhase.ENDED
        self._budget.waits -= 1
        self._deadlines.remove(wait)
        if wait.updates is not None:
            wait.updates.close()
        final, wait.final_poll = wait.final_poll, None  # that poll has the wait
        if not polled.live:
            self._stop_polling(polled)
        elif final is not None and not final.serves_any():  # the other waits have passed their deadlines, too
            self._dispatcher.cut_off(final)
        self._reporter.report_wait_end(wait, now)

    def _stop_polling(self, polled: PolledOperation) -> None:
        """Stop the polls of an operation after its last wait."""
        del self._polled[polled.operation_id]
        self._held.pop(polled, None)
        if not self._polled:
            self._refused_since = math.inf  # a refusal of an hour ago is another one
        if polled.poll is not None:
            self._dispatcher.cut_off(polled.poll)
        for poll in self._dispatcher.final_in_flight:
            if poll.polled is polled:
                self._dispatcher.cut_off(poll)
        if polled.pending_at is not None:
            self._record_observation(polled, None)

    def _record_observation(self, polled: PolledOperation, approved_by: float | None) -> None:
        """Report to the schedules, once, between which times an operation was approved, or that it was pending."""
        learners, polled.learners = polled.learners, ()
        after = 0.0 if polled.pending_at is None else polled.pending_at - polled.origin
        until = None if approved_by is None else approved_by - polled.origin
        for learner in learners:
            record_observation(learner, after, until)

    # -- events: time passes

    def expire(self, now: float) -> None:
        """Handle overdue polls, and as many deadlines as one turn of the loop can bear.

        At the deadline of a wait, its final poll is queued. When the time for final polls is over, the wait ends.
        """
        for poll in self._dispatcher.overdue(now):
            self._dispatcher.cut_off(poll, overdue=True)
        due = self._deadlines.next_due()
        if now - max(due, self._expired_at) > STOOD_STILL:  # the driver was to be here at one of these times
            self._woke_at, self._slept = now, now - self._expired_at
        self._expired_at = now
        passed: set[PolledOperation] = set()
        for _ in range(_deadlines_in_a_turn(now, due)):
            wait = self._deadlines.pop_due(now + RESOLUTION)
            if wait is None:
                break
            if wait.phase is _POLLING:
                passed.add(wait.polled)
            try:
                self._expire_wait(wait, now)
            except Exception as error:  # noqa: BLE001  # a bug: it must end the wait that it concerns, and not hang it
                self.end(wait, error, now)
        if passed:
            # A poll from before a wait's deadline does not count for that wait. Other waits may still need it.
            for poll in self._dispatcher.in_flight:
                if poll.polled in passed and not poll.serves_any():
                    self._dispatcher.cut_off(poll)

    def _expire_wait(self, wait: Wait, now: float) -> None:
        """Queue the final poll of a wait, or end it."""
        late = self._woke_at - wait.deadline
        # Their end moves only if they passed unseen. Otherwise it would do so again in each long turn of the loop.
        unseen = 0.0 if wait.phase is _POLLING else FINAL_POLL_TIMEOUT
        if late > unseen + STOOD_STILL and self._slept > unseen:
            wait.deadline = self._woke_at
        if wait.phase is _POLLING:
            self._pass_deadline(wait)
            self._queue_final_poll(wait, wait.deadline)
        elif now + RESOLUTION < wait.deadline + FINAL_POLL_TIMEOUT:  # the pause after a failed one is over
            self._queue_final_poll(wait, now)
        else:
            self._end_unknown(wait, now)

    def _pass_deadline(self, wait: Wait) -> None:
        """Let only a final poll count for a wait from now on."""
        polled = wait.polled
        wait.phase = WaitPhase.FINAL
        polled.before_deadline -= 1
        if not polled.before_deadline:
            self._dispatcher.unschedule(polled)

    def _queue_final_poll(self, wait: Wait, since: float) -> None:
        """Queue a final poll for a wait whose deadline has passed, unless its final poll is in flight."""
        self._deadlines.schedule(wait, wait.deadline + FINAL_POLL_TIMEOUT)
        if wait.final_poll is None:
            self._dispatcher.queue_final_poll(wait.polled, since)

    def _end_unknown(self, wait: Wait, now: float) -> None:
        """End a wait whose final polls were not answered in time, or could not be sent."""
        poll, why, others_failure = wait.final_poll, Unanswered.FAILED, None
        if poll is None and not wait.had_final_poll:
            why = self._dispatcher.why_no_final_poll(now)
            if why is not Unanswered.NO_SLOT:  # the wait itself may have failed long ago, or never
                others_failure = self._last_error
        elif poll is not None:
            why = Unanswered.NO_ANSWER
            wait.error = self.no_answer(poll, now)
            # Once for all waits that share it, and not if it started too late to be answered.
            if not poll.is_unanswered and now - poll.started_at >= SLOW - RESOLUTION:
                poll.is_unanswered = True
                self._record_error(poll, wait.error, now)
        self.end(wait, unknown_error(_record(wait, now), why, others_failure), now)

    # -- events: a poll ends

    def finish_poll(self, poll: Poll, answer: Operation | KeylessError | None, now: float) -> BatchedResult | None:
        """Apply the result of a poll to its waits; harmless after it has ended.

        The answer is None if the poll was cut off, or its task was cancelled. If an operation has very many waits, the
        rest of the work is returned, for `apply_more` in the next turns.
        """
        dispatcher = self._dispatcher
        if poll not in dispatcher.in_flight:
            return None
        poll.is_over = True
        if answer is None and poll.is_overdue:
            answer = self.no_answer(poll, now)
        self._reporter.report_poll(poll, answer, now)
        if answer is None:  # neither good nor bad
            dispatcher.finish(poll, now)
            for wait in poll.waits:
                if wait.final_poll is poll:  # it still needs one
                    wait.final_poll = None
                    dispatcher.queue_final_poll(poll.polled, now)
            return None
        is_well = is_service_well(answer, was_seen=poll.polled.was_seen)
        if is_well:
            self._record_success(poll, now)
        elif is_well is False and isinstance(answer, KeylessError):
            self._record_error(poll, answer, now)
        else:
            self._budget.record_other()
            if isinstance(answer, CachedAnswerError):
                self._failures += 1
                self._reporter.report_unexpected(answer, now)
        if isinstance(answer, Operation) and self._apply_directly(poll, answer, now):
            dispatcher.finish(poll, now)
            return None
        is_for_all = self._is_key_revoked(answer, now)
        result = BatchedResult(poll, answer, self.waits() if is_for_all else None)
        return result if self.apply_more(result, now) else None

    def no_answer(self, poll: Poll, now: float) -> RequestTimeoutError:
        """Make the error of a poll without an answer."""
        path = self._path_of(poll.polled.operation_id)
        text = f"GET {path} got no answer within {now - poll.started_at:.3g} s"
        return RequestTimeoutError(text, method="GET", path=path)

    def _is_key_revoked(self, answer: Operation | KeylessError, now: float) -> bool:
        """Return whether all answers have refused the key for a while, so that all waits must end.

        While they do, few polls start, so a single operation has hardly any answers.
        """
        if isinstance(answer, AuthenticationError) and not answer.is_transient:
            self._refused_since = min(self._refused_since, now)
            return now - self._refused_since >= UNEXPECTED_FOR
        if isinstance(answer, StatusError | DecodeError):
            self._refused_since = math.inf
        return False

    def _record_success(self, poll: Poll, now: float) -> None:
        """Record a good answer, and let operations that a 503 holds go on after their own backoff."""
        was_failing = self._budget.is_failing
        self._refused_since = math.inf
        self._dispatcher.record_success(poll, now)
        self._rate.record_answer()
        if was_failing:
            self._reporter.notice_service(self._budget, None, now)
        if self._held:
            for polled, due in self._held.items():
                # The answer to its own poll, this one or one in flight, sets the time itself.
                if polled.before_deadline and polled.poll is None and polled is not poll.polled:
                    self._dispatcher.schedule(polled, due)
            self._held.clear()

    def _record_error(self, poll: Poll, error: KeylessError, now: float) -> None:
        """Record a transient failure in the budget and, if it is a 429, in the rate."""
        self._failures += 1
        self._last_error = error
        self._budget.record_failure(now, started_at=poll.started_at)
        if isinstance(error, RateLimitError):
            was_good = poll.polled.pending_at is not None and not poll.polled.failures
            self._rate.record_refusal(now, error, started_at=poll.started_at, is_final=poll.final, was_good=was_good)
        else:
            self._rate.record_answer()
        if is_logged(error, is_limited=self._rate.is_limited(now)):
            self._reporter.report_unexpected(error, now)
        if isinstance(error, RequestTimeoutError):
            self._dispatcher.record_silence(poll, now)
        self._reporter.notice_service(self._budget, error, now)

    def _apply_directly(self, poll: Poll, answer: Operation, now: float) -> bool:
        """Apply the usual result: pending, for one wait before its deadline. Return False if it is another one."""
        polled, wait = poll.polled, poll.waits[0]
        if (
            polled.live != 1
            or wait.done()
            or wait.phase is not _POLLING
            or wait.final_poll is not None
            or wait.updates is not None
            or evaluate(answer, polled.operation_id, wait.ticket) is not _PENDING
        ):
            return False
        polled.was_seen = True
        polled.pending_at = poll.started_at
        polled.failures = 0
        try:
            delay = next_delay(wait.schedule, attempt_number=wait.attempt, since_start=now - polled.origin)
        except KeylessError as error:
            self.end(wait, error, now)
        else:
            if wait.own_due <= poll.started_at:  # the poll was its own, not another caller's
                wait.attempt += 1
            self._dispatcher.schedule(polled, now + delay)
        return True

    def apply_more(self, result: BatchedResult, now: float) -> bool:
        """Apply a result to some of its waits; return whether there are more, for the next turn of the loop."""
        batch = result.next_batch()
        try:
            if result.is_for_all:
                self._refuse(batch, now)
            else:
                self._apply(result, batch, now)
        except Exception as error:  # noqa: BLE001  # a bug: it must end the waits that it concerns, and not poll forever
            for wait in batch:
                self.end(wait, error, now)
        if result.has_more:
            return True
        self._dispatcher.finish(result.poll, now)
        return False

    def _refuse(self, waits: list[Wait], now: float) -> None:
        """End waits because the key is refused. Each error is about the wait's own operation."""
        for wait in waits:
            path = self._path_of(wait.polled.operation_id)
            self.end(wait, AuthenticationError(status=401, method="GET", path=path), now)

    def _apply(self, result: BatchedResult, waits: list[Wait], now: float) -> None:
        """Apply a result to these waits."""
        answer, polled = result.answer, result.poll.polled
        pending: list[Wait] = []
        transient: list[Wait] = []
        for wait, verdict in [(wait, result.verdict(wait)) for wait in waits]:
            if isinstance(answer, Operation) and verdict is Verdict.APPROVED:
                self._record_observation(polled, now)
                wait.polls = max(wait.polls, 1)  # it counts for waits that started after the poll, too
                _update(wait, now, answer)
                self.end(wait, answer, now)
            elif wait not in result.served:
                continue
            elif isinstance(verdict, Rejection):
                self.end(wait, rejection_error(verdict, _record(wait, now, answer)), now)
            elif verdict is Verdict.PENDING:
                pending.append(wait)
            elif isinstance(answer, KeylessError) and verdict is Verdict.FAILED:
                self.end(wait, copy.copy(answer) if len(result.served) > 1 else answer, now)
            else:
                transient.append(wait)
        if pending:
            self._after_pending(result, pending, now)
        if isinstance(answer, KeylessError) and transient:
            self._after_transient(result, answer, transient, now)

    def _after_pending(self, result: BatchedResult, waits: list[Wait], now: float) -> None:
        """Schedule the next poll, and end the waits whose final poll this was."""
        poll, polled, answer = result.poll, result.poll.polled, result.answer
        polled.failures = 0
        polled.pending_at = max(poll.started_at, polled.pending_at or 0.0)
        polled.was_seen |= isinstance(answer, Operation)
        going_on: list[Wait] = []
        for wait in waits:
            if isinstance(answer, KeylessError):  # a 404 that counts as pending
                wait.error = answer
            if wait.final_poll is poll:
                _update(wait, now, answer)
                self.end(wait, timeout_error(_record(wait, now, answer)), now)
            elif wait.phase is _POLLING:  # else it waits for its final poll
                going_on.append(wait)
        for wait in self._schedule_next(result, going_on, now):
            _update(wait, now, answer, due=polled.due)

    def _schedule_next(self, result: BatchedResult, waits: list[Wait], now: float) -> list[Wait]:
        """Ask each schedule once per attempt, and take the shortest delay. Return the waits whose schedule worked."""
        polled, delays = result.poll.polled, result.delays
        good: list[Wait] = []
        for wait in waits:
            key = id(wait.schedule), wait.attempt
            if key not in delays:
                try:
                    delays[key] = next_delay(
                        wait.schedule, attempt_number=wait.attempt, since_start=now - polled.origin
                    )
                except KeylessError as error:
                    delays[key] = error
            delay = delays[key]
            if isinstance(delay, KeylessError):
                self.end(wait, copy.copy(delay), now)
                continue
            if wait.own_due <= result.poll.started_at:  # the poll was its own, not another caller's
                wait.own_due = now + delay
                wait.attempt += 1
            self._dispatcher.schedule(polled, now + delay)
            good.append(wait)
        return good

    def _after_transient(self, result: BatchedResult, error: KeylessError, waits: list[Wait], now: float) -> None:
        """Back off, and repeat final polls."""
        poll, polled = result.poll, result.poll.polled
        if not result.failed:
            result.failed = True
            polled.failures += 1
            if polled.failures == 1:
                polled.unexpected_since = math.inf
            if is_unexpected(error):
                polled.unexpected_since = min(polled.unexpected_since, now)
            result.retry_at = self._back_off(poll, error, now)
        is_refusal = isinstance(error, RateLimitError)
        backoff = max(error_delay(1), requested_pause(error) if is_refusal else 0.0)
        is_stuck = is_unexpected(error) and now - polled.unexpected_since >= UNEXPECTED_FOR
        for wait in waits:
            wait.error = error
            if is_stuck and wait.deadline == math.inf:
                self.end(wait, copy.copy(error), now)
            elif wait.final_poll is poll:
                self._repeat_final(wait, error, backoff, now)
            else:
                due = min(polled.due, result.retry_at)
                ready_at = max(self._rate.paused_until, self._budget.ready_at(now))
                _update(wait, now, error, due=max(due, ready_at))

    def _back_off(self, poll: Poll, error: KeylessError, now: float) -> float:
        """Schedule the next poll of an operation after a failure, and return when it is due at the latest."""
        polled, is_refusal = poll.polled, isinstance(error, RateLimitError)
        since_good = now - max(self._budget.answered_at, polled.origin)
        counted = failures_that_count(polled.failures, since_good=since_good, is_refusal=is_refusal)
        due = now + error_delay(counted)
        held_until = now + requested_pause(error)
        # While an ordinary poll is in flight, a final one sets no time: it could be over when that poll fails.
        if polled.before_deadline and polled.poll in (None, poll):
            self._held.pop(polled, None)
            if not is_refusal and held_until > due:  # until the next good answer to any poll
                self._held[polled] = due
            self._dispatcher.schedule(polled, max(due, held_until))
        return max(due, held_until)

    def _repeat_final(self, wait: Wait, error: KeylessError, backoff: float, now: float) -> None:
        """Repeat a final poll that failed; if that is too late, end the wait at once."""
        wait.final_poll = None
        if wait.had_expired and wait.phase is _POLLING:  # from now on, it has a deadline
            wait.deadline = now
            self._pass_deadline(wait)  # else the next poll would be final, too, and move the deadline again
        again_at = now + backoff
        if may_start(wait.deadline - again_at):
            self._deadlines.schedule(wait, again_at)
            _update(wait, now, error, due=again_at)
        else:
            _update(wait, now, error)
            self.end(wait, unknown_error(_record(wait, now), Unanswered.FAILED), now)

    def fail_poll(self, poll: Poll, error: Exception, now: float) -> None:
        """End the waits of a poll with an error that no exchange should raise: a bug."""
        poll.is_over = True
        for wait in poll.polled.active_waits():
            self.end(wait, error, now)
        if poll in self._dispatcher.in_flight:
            self._dispatcher.finish(poll, now)

    # -- counts

    def close(self, now: float) -> None:
        """Report that no more polls start."""
        self._reporter.report_end(self._budget, now)

    def statistics(self, now: float) -> ClientStatistics:
        """Return the counts as of now."""
        rate = self._rate.per_second(now)
        return ClientStatistics(
            waiting=self._budget.waits,
            in_flight=len(self._dispatcher.in_flight),
            polls=self._polls,
            approvals=self._approvals,
            timeouts=self._timeouts,
            transient_failures=self._failures,
            lag=self._dispatcher.lag(now),
            rate_limit=None if rate == math.inf else rate,
            is_failing=self._budget.is_failing,
        )


class BatchedResult:
    """The result of one poll, which is applied to its waits in batches, and the state that all batches share."""

    __slots__ = (
        *("_verdicts", "_waits", "answer", "delays", "failed", "has_more", "is_for_all", "poll", "retry_at", "served"),
        "was_seen",
    )

    def __init__(self, poll: Poll, answer: Operation | KeylessError, all_waits: Iterator[Wait] | None) -> None:
        self.poll = poll
        self.answer = answer
        self.is_for_all = all_waits is not None  # it ends all waits of the client
        self._waits = all_waits or iter(poll.polled.active_waits())  # to which it was not applied yet
        self._verdicts: dict[tuple[ApprovalTicket | None, bool], Verdict | Rejection] = {}
        self.was_seen = poll.polled.was_seen  # before this poll
        # The waits that the poll is for.
        self.served = set(poll.waits)
        self.delays: dict[tuple[int, int], float | KeylessError] = {}  # by the id of the schedule and the attempt
        self.failed = False  # it was counted as a failure of the operation
        self.retry_at = math.inf  # the end of the backoff after that

    def next_batch(self) -> list[Wait]:
        """Take the waits for this turn of the loop."""
        batch = list(itertools.islice(self._waits, BATCH))
        self.has_more = len(batch) == BATCH
        return [wait for wait in batch if not wait.done()]

    def verdict(self, wait: Wait) -> Verdict | Rejection:
        """Return what the answer means for a wait. Waits with the same ticket share one payload hash."""
        poll = self.poll
        is_young = wait.ticket is not None and poll.started_at - wait.origin < YOUNG
        key = wait.ticket, wait.may_be_missing or is_young
        if key not in self._verdicts:
            self._verdicts[key] = poll_verdict(
                self.answer, poll.polled.operation_id, wait.ticket, may_be_missing=key[1], was_seen=self.was_seen
            )
        return self._verdicts[key]


def _deadlines_in_a_turn(now: float, due: float) -> int:
    """Return how many deadlines one turn of the loop handles: a batch, or two for each second they are late.

    Long turns are few turns. With one batch in each, waits would end later and later. The number depends only on the
    loop's clock, so it is the same if that clock does not advance within a turn.
    """
    return int(min(BATCH * max(1.0, 2.0 * (now - due)), _MOST_DEADLINES))


def _update(wait: Wait, now: float, answer: Operation | KeylessError, *, due: float | None = None) -> None:
    """Send the result of a poll to a wait that asked for updates."""
    if wait.updates is None:
        return
    last = wait.deadline if wait.phase is _POLLING else wait.deadline + FINAL_POLL_TIMEOUT
    wait.updates.send_nowait(
        ApprovalUpdate(
            operation=answer if isinstance(answer, Operation) else None,
            error=answer if isinstance(answer, KeylessError) else None,
            polls=wait.polls,
            elapsed=now - wait.started_at,
            next_poll_in=None if due is None else max(0.0, min(due, last) - now),
        )
    )


def _record(wait: Wait, now: float, answer: Operation | KeylessError | None = None) -> WaitRecord:
    """Return the record of a wait that the answer ends, for its error."""
    return WaitRecord(
        wait.polled.operation_id,
        answer if isinstance(answer, Operation) else None,
        wait.error,
        wait.polls,
        now - wait.started_at,
        wait.ticket,
    )
