"""Decides which operation is polled next, and when at the earliest. Pure.

It has the queues and the slots of one client. `Dispatcher.next_poll` is the one place that decides whether a poll may
start now.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Final

from aiokeyless._rules.budget import FAILING_AFTER
from aiokeyless._rules.final import FINAL_POLL_TIMEOUT, RESOLUTION, Unanswered
from aiokeyless._rules.order import Alternation
from aiokeyless._rules.slots import SLOW, Slots, most_final_in_flight, most_in_flight
from aiokeyless._rules.window import Window

from .state import Poll, PolledOperation
from .timer_queue import TimerQueue

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aiokeyless._rules.budget import Budget
    from aiokeyless._rules.rate import PollRate

#: The most queued polls that one call skips, because their waits have ended or are about to.
_MOST_SKIPPED: Final = 384


class Dispatcher:
    """The polls of one client that are due, queued or in flight.

    There are `max_in_flight` slots. All polls in flight are at most `max_connections`: more would queue for a
    connection. Final polls count for the rate, but do not wait for it.
    """

    def __init__(
        self, budget: Budget, rate: PollRate, *, max_in_flight: int, max_connections: float, request_timeout: float
    ) -> None:
        self._budget = budget
        self._rate = rate
        self._max_in_flight = max_in_flight
        self._max_connections = max_connections
        self._least = min(max_in_flight, max_connections)  # there is always room for so many polls in flight
        self._request_timeout = request_timeout
        self._window = Window()
        # By `_rank`: the order in which they go if not all may start that are due.
        self._queues: tuple[TimerQueue[PolledOperation], ...] = tuple(TimerQueue() for _ in range(4))
        self._proven = self._queues[:1]
        self._untried = self._queues[1]
        self._alternation = Alternation()
        self._unproven = 0  # operations in all queues but the first
        # With the time since which each waits; first those of operations that were answered well.
        self._final_polls: tuple[deque[tuple[float, PolledOperation]], ...] = deque(), deque()
        self._final_queued: set[PolledOperation] = set()  # the operations in both
        self.final_in_flight: dict[Poll, None] = {}
        """The final polls among those in flight."""
        self.slots: Slots[Poll] = Slots(max_in_flight)
        """The slots of the ordinary polls in flight."""
        self.in_flight: dict[Poll, None] = {}
        """The polls in flight, oldest first."""
        self.cut: list[Poll] = []
        """The polls whose exchanges must be cut off, each once. Who does so removes them."""
        # The poll that was cut off to make room for another one; None once it has ended.
        self._giving_way: Poll | None = None
        self.soonest = math.inf
        """When to ask `next_poll` again: what it returned, or sooner if a poll was scheduled or has ended since."""

    # -- scheduling

    def schedule(self, polled: PolledOperation, due: float) -> None:
        """Schedule the next ordinary poll of an operation, unless one is due earlier. It follows a poll in flight."""
        if due < polled.due:
            polled.due = due
            if polled.poll is None:
                self._enqueue(polled)
                self.soonest = min(self.soonest, due)

    def unschedule(self, polled: PolledOperation) -> None:
        """Cancel the next ordinary poll of an operation."""
        self._dequeue(polled)
        polled.due = math.inf

    def queue_final_poll(self, polled: PolledOperation, since: float) -> None:
        """Queue one final poll of an operation, for all of its waits whose deadline has passed."""
        if polled not in self._final_queued:
            self._final_queued.add(polled)
            self._final_polls[polled.pending_at is None].append((since, polled))
            self.soonest = min(self.soonest, since)

    # -- polling

    def next_poll(self, now: float) -> Poll | float:
        """Start the next poll that may start now, or return the soonest time at which one may.

        That time does not foresee the end of a poll.

        1. If a final poll is queued and may start, it goes first.
        2. If all slots are taken, the oldest poll gives its slot back once it is a second old.
        3. An ordinary poll starts if it is due, and if the budget, the slots and the rate allow it. The operation that
           has been due longest goes first. While the budget is short, polls start slowly after silence, or
           operations whose last poll failed hold over a quarter of the slots, the order is that of `_rank`.
        4. If no more polls may be in flight, the oldest slow one gives way to one that is due.
        """
        found = self._next_final(now) if any(self._final_polls) else math.inf  # 1
        if isinstance(found, float):
            ordinary = self._next_ordinary(now)
            found = min(found, ordinary) if isinstance(ordinary, float) else ordinary
        if isinstance(found, float):
            self.soonest = found
        else:  # perhaps it is not the only one that may start
            is_free = any(self._final_polls) or len(self.slots) < self._max_in_flight
            self.soonest = now if is_free else self.slots.slow_at()
        return found

    def _next_ordinary(self, now: float) -> Poll | float:
        """Start the next ordinary poll, or return when one may start."""
        ready_at = max(self._rate.ready_at(now), self._budget.ready_at(now))
        self.slots.release_slow(now)
        if len(self.slots) >= self._max_in_flight:  # 2
            ready_at = max(ready_at, self.slots.slow_at())
        if self._window.limit < math.inf:
            ready_at = max(ready_at, self._window.opens_at(now, self._ordinary_starts()))
        if ready_at > now + RESOLUTION:
            return self._due_at(ready_at)
        if self._has_room(now):  # 3
            return self._next_due(now) or self._due_at(now)
        due = self._due_at(now)
        return due if due > now + RESOLUTION else self._make_room(now)  # 4

    def record_success(self, poll: Poll, now: float) -> None:
        """Record a good answer to a poll that is still in flight."""
        if self._window.limit == math.inf and now - self._budget.failing_since >= FAILING_AFTER:
            self._window.begin_anew(now)
        self._budget.record_success(now)
        if self._window.record_success(now, started_at=poll.started_at):
            self._window.adapt(now, self._ordinary_starts())

    def record_silence(self, poll: Poll, now: float) -> None:
        """Record that a poll got no answer."""
        self._window.record_silence(now, started_at=poll.started_at, answered_at=self._budget.answered_at)

    def _ordinary_starts(self) -> list[float]:
        """Return when the ordinary polls in flight started, in order."""
        return [poll.started_at for poll in self.in_flight if not poll.final]

    def _has_room(self, now: float) -> bool:
        """Return whether one more ordinary poll may be in flight."""
        in_flight = len(self.in_flight)
        if in_flight < self._least:
            return True
        if self._giving_way is not None or in_flight >= self._max_connections:
            return False
        most = most_in_flight(self._max_in_flight, now, answered_at=self._budget.answered_at)
        return in_flight - len(self.final_in_flight) < most

    def _make_room(self, now: float) -> float:
        """Cut off the oldest slow poll, one at a time. If none is slow, return when one will be."""
        if self._giving_way is None:
            for poll in self.in_flight:
                if not poll.final and not poll.is_over:
                    if poll.started_at + SLOW > now + RESOLUTION:
                        return poll.started_at + SLOW
                    self._giving_way = poll
                    self.cut_off(poll, overdue=True)
                    break
        return math.inf

    def _due_at(self, ready_at: float) -> float:
        """Return when the next ordinary poll may start, from `ready_at` on; infinity if none is scheduled."""
        return max(ready_at, min([queue.next_due() for queue in self._queues_in_use()]))

    def _next_due(self, now: float) -> Poll | None:
        """Start the ordinary poll that goes first, if one is due."""
        queues = self._queues_in_use()
        if self._unproven:
            if not (self._budget.is_short(now) or self.slots.are_held_by_failing or self._window.begins_anew):
                queues = sorted(queues, key=TimerQueue.next_due)
            elif self._alternation.count_untried(1):
                queues = (self._untried, *queues)
        for queue in queues:
            for _ in range(_MOST_SKIPPED):
                polled = queue.pop_due(now + RESOLUTION)
                if polled is None:
                    break
                self._unproven -= polled.rank > 0
                if waits := polled.active_waits():
                    poll = Poll(polled, now, waits, max(0.0, now - polled.due))
                    if queues is not self._proven:  # else there was no choice
                        self._alternation.record(untried=polled.rank == 1, others=polled.rank != 1)
                    self.slots.take(poll, now, is_retry=polled.rank > 1)
                    self._record_start(poll, now)
                    polled.poll = poll
                    polled.due = math.inf
                    return poll
                polled.due = math.inf  # its callers are gone, and leave soon
        return None

    def _queues_in_use(self) -> Sequence[TimerQueue[PolledOperation]]:
        return self._queues if self._unproven else self._proven

    def _record_start(self, poll: Poll, now: float) -> None:
        self.in_flight[poll] = None
        self._rate.record_poll(now)
        self._budget.record_poll(now)
        poll.is_renewal = self._budget.take_renewal(now)

    def _next_final(self, now: float) -> Poll | float:
        """Start the oldest queued final poll that a wait still needs, or return when one may start."""
        if len(self.in_flight) >= self._max_connections:
            return self._make_room(now)
        ready_at = max(self._rate.paused_until, self._budget.ready_at(now))
        if ready_at > now + RESOLUTION:
            # One final poll at a time. One that goes on for other waits after its two seconds does not count.
            for poll in self.final_in_flight:
                ends_at = poll.started_at + FINAL_POLL_TIMEOUT
                if not poll.is_over and ends_at > now + RESOLUTION:
                    return min(ready_at, ends_at)
        elif len(self.final_in_flight) >= most_final_in_flight(self._max_in_flight):
            return math.inf
        first, last = self._final_polls
        for _ in range(min(_MOST_SKIPPED, len(first) + len(last))):
            _, polled = (first or last).popleft()
            self._final_queued.remove(polled)
            if polled.needs_final_poll(now):
                poll = Poll(polled, now, polled.active_waits(), final=True)
                self.final_in_flight[poll] = None
                self._record_start(poll, now)
                if polled.due <= now + RESOLUTION:  # it replaces an ordinary poll that is due
                    self.unschedule(polled)
                return poll
        return now if first or last else math.inf  # in the next turn

    def why_no_final_poll(self, now: float) -> Unanswered:
        """Return why no final poll could start until now."""
        if self._rate.paused_until > now - FINAL_POLL_TIMEOUT:
            return Unanswered.PAUSE
        return Unanswered.FAILING if self._budget.is_failing else Unanswered.NO_SLOT

    def finish(self, poll: Poll, now: float) -> None:
        """Remove a poll that has ended, and schedule another one if its operation needs it."""
        del self.in_flight[poll]
        self.slots.release(poll)
        self.soonest = now
        polled = poll.polled
        if poll.final:
            del self.final_in_flight[poll]
        else:
            polled.poll = None
            if poll is self._giving_way:
                self._giving_way = None
        if not polled.live or polled.poll is not None:
            return
        if polled.due == math.inf and polled.before_deadline:
            polled.due = now  # it was cut off, or brought nothing, and a wait goes on
        if polled.due < math.inf and polled.entry is None:
            self._enqueue(polled)

    def _enqueue(self, polled: PolledOperation) -> None:
        """Put an operation into the queue that fits the result of its last poll."""
        if (rank := _rank(polled)) != polled.rank:
            self._dequeue(polled)
            polled.rank = rank
        if polled.entry is None:
            self._unproven += rank > 0
        self._queues[rank].schedule(polled, polled.due)

    def _dequeue(self, polled: PolledOperation) -> None:
        if polled.entry is not None:
            self._unproven -= polled.rank > 0
            self._queues[polled.rank].remove(polled)

    # -- cutting off

    def cut_off(self, poll: Poll, *, overdue: bool = False) -> None:
        """Mark a poll so that its exchange is cut off, once."""
        if not poll.is_over:
            poll.is_over, poll.is_overdue = True, overdue
            self.cut.append(poll)

    # -- times

    def overdue(self, now: float) -> Iterator[Poll]:
        """Yield the polls that have been in flight for longer than an exchange may take."""
        for poll in self.in_flight:
            if poll.started_at + self._request_timeout > now + RESOLUTION:
                break
            yield poll

    def overdue_at(self) -> float:
        """Return when the next poll in flight is overdue; infinity if none is in flight."""
        for poll in self.in_flight:
            if not poll.is_over:
                return poll.started_at + self._request_timeout
        return math.inf

    def lag(self, now: float) -> float:
        """Return the seconds by which the poll that has been due longest is late."""
        due = min([queue.next_due() for queue in self._queues])
        for queued in self._final_polls:
            if queued and queued[0][1].needs_final_poll(now):
                due = min(due, queued[0][0])
        return max(0.0, now - due)


def _rank(polled: PolledOperation) -> int:
    """Return the queue of an operation: 0 if it was answered well, 1 if it is untried; else its last poll failed.

    Then it is 2 if it was ever answered well, since it is not the one at fault, and 3 if not.
    """
    return 2 * (polled.failures > 0) + (polled.pending_at is None)
