"""Which operation is polled next, and when at the soonest: the queues and the slots of one client. Pure.

`Dispatcher.next_poll` is the one place that decides whether a poll may start now.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Final

from aiokeyless._rules.circuit import CircuitState
from aiokeyless._rules.final import RESOLUTION

from .state import Poll, PolledOperation
from .timer_queue import TimerQueue

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aiokeyless._rules.circuit import Circuit
    from aiokeyless._rules.rate import PollRate

    from .state import Wait

_FINAL_POLLS_IN_A_ROW: Final = 7
#: Queued polls that one call passes over because no wait needs them any more: those waits have ended, or are about to.
_PASSED_OVER: Final = 384


class Dispatcher:
    """The polls of one client that are due, queued or in flight.

    Args:
        circuit: How the service fares, and how many polls it bears.
        rate: How many polls may start in a second; final ones are counted and do not wait for it.
        max_in_flight: Polls in flight at once.
        request_timeout: Seconds after which a poll in flight is overdue.
    """

    def __init__(self, circuit: Circuit, rate: PollRate, *, max_in_flight: int, request_timeout: float) -> None:
        self._circuit = circuit
        self._rate = rate
        self._max_in_flight = max_in_flight
        self._request_timeout = request_timeout
        self._due: TimerQueue[PolledOperation] = TimerQueue()
        self._retries: TimerQueue[PolledOperation] = TimerQueue()  # those that failed when they were polled last
        self._retries_in_flight = 0
        self._final_polls: deque[tuple[float, PolledOperation]] = deque()  # and since when each waits for a slot
        self._final_in_a_row = 0  # started since the last ordinary poll
        self.final_in_flight: dict[Poll, None] = {}
        """The final ones of the polls in flight."""
        self.in_flight: dict[Poll, None] = {}
        """The polls in flight, oldest first."""
        self.soonest = math.inf
        """When the next poll may start; perhaps earlier than that, never later. The end of a poll is not foreseen."""

    def __len__(self) -> int:
        """Return the number of operations for which an ordinary poll is scheduled."""
        return len(self._due) + len(self._retries)

    # -- what is to be polled

    def schedule(self, polled: PolledOperation, due: float) -> None:
        """Poll an operation at that time at the latest; while a poll is in flight, after it."""
        if due < polled.due:
            polled.due = due
            if polled.poll is None:
                self._enqueue(polled)

    def unschedule(self, polled: PolledOperation) -> None:
        """Take back the ordinary poll of an operation."""
        (self._retries if polled.is_retry else self._due).remove(polled)
        polled.due = math.inf

    def queue_final_poll(self, polled: PolledOperation, since: float) -> None:
        """Give an operation one final poll, for all of its waits whose deadline has passed."""
        if not polled.final_poll_queued:
            polled.final_poll_queued = True
            self._final_polls.append((since, polled))
            self.soonest = min(self.soonest, since)

    def clear_final_polls(self) -> None:
        """Forget the queued final polls: no wait is left."""
        self._final_polls.clear()

    def ask_again(self, now: float) -> None:
        """Note that something else than time may let a poll start now."""
        self.soonest = min(self.soonest, now)

    # -- what is polled

    def next_poll(self, now: float) -> Poll | None:
        """Start the next poll that may start now, or set `soonest` to the time at which one may.

        1. No slot is free: the end of a poll is the next event.
        2. A final poll is queued and may start: it goes first; but every eighth slot goes to an ordinary poll that is
           due, whatever the rate, so that none starves where final polls take all of it.
        3. Ordinary polls wait for the circuit, for one that is due, and for the rate. The operation that has been due
           longest goes first, and those that failed when they were polled last get half of the slots, so that a few
           that hang leave room for the others. While the circuit is open, one that did not fail goes first, since its
           answer tells most about the service.
        """
        self.soonest = math.inf
        if len(self.in_flight) >= self._max_in_flight:  # 1
            return None
        circuit = self._circuit
        ready_at = -math.inf if circuit.is_calm else circuit.retry_at()
        has_room = circuit.is_calm or self._counted() < circuit.limit
        if self._final_polls:  # 2
            may_start = has_room and ready_at <= now + RESOLUTION
            if may_start and self._final_in_a_row >= _FINAL_POLLS_IN_A_ROW:
                if (poll := self._next_due(now, now)) is not None:
                    return poll
                self.soonest = math.inf
            if (poll := self._next_final(now, has_room=may_start)) is not None:
                return poll
        if not has_room:  # 3
            return None
        return self._next_due(now, max(ready_at, self._rate.ready_at(now)))

    def _next_due(self, now: float, ready_at: float) -> Poll | None:
        """Start the ordinary poll that goes first, or lower `soonest`; `ready_at`: when any of them may start."""
        for queue in self._queues():
            if ready_at <= now + RESOLUTION:
                for _ in range(_PASSED_OVER):
                    polled = queue.pop_due(now + RESOLUTION)
                    if polled is None:
                        break
                    if waits := polled.active_waits():
                        return self._start(polled, now, waits, final=False)
                    polled.due = math.inf  # its callers are gone and about to leave
            due = queue.next_due()
            if due is not None:
                self.soonest = min(self.soonest, max(due, ready_at))
        return None

    def _queues(self) -> Sequence[TimerQueue[PolledOperation]]:
        """Return the queues of which a poll may start, the one that goes first first."""
        retry = self._retries.next_due()
        if retry is None or self._counted_retries() >= max(1, self._circuit.limit // 2):
            return (self._due,)
        due = self._due.next_due()
        if due is not None and (due <= retry or self._circuit.state is CircuitState.OPEN):
            return (self._due, self._retries)
        return (self._retries, self._due)

    def _next_final(self, now: float, *, has_room: bool) -> Poll | None:
        """Start the final poll that has been queued longest and that a wait needs, or lower `soonest`."""
        goes_alone = not has_room or self._circuit.limits_final_polls(now)
        # One that hangs may go on for other waits after its two seconds: no other final poll is held up by that.
        if goes_alone and any(poll.is_awaited_as_final() for poll in self.final_in_flight):
            if (ready_at := self._circuit.retry_at()) > now + RESOLUTION:
                self.soonest = ready_at
            return None
        for _ in range(min(_PASSED_OVER, len(self._final_polls))):
            _, polled = self._final_polls.popleft()
            polled.final_poll_queued = False
            if polled.needs_final_poll():
                return self._start(polled, now, polled.active_waits(), final=True)
        if self._final_polls:
            self.soonest = now  # in the next turn
        return None

    def _start(self, polled: PolledOperation, now: float, waits: list[Wait], *, final: bool) -> Poll:
        poll = Poll(polled, now, waits, final=final)
        self.in_flight[poll] = None
        self._rate.record_poll(now)
        if final:
            self.final_in_flight[poll] = None
            self._final_in_a_row += 1
            if polled.due <= now + RESOLUTION:  # it does for an ordinary one that is due
                self.unschedule(polled)
        else:
            poll.lag = max(0.0, now - polled.due)
            poll.is_retry = polled.is_retry
            polled.poll = poll
            polled.due = math.inf
            self._final_in_a_row = 0
            self._retries_in_flight += poll.is_retry
        return poll

    def finish(self, poll: Poll, now: float) -> None:
        """Free the slot of a poll, and schedule another one if its operation needs one."""
        del self.in_flight[poll]
        self.soonest = now
        polled = poll.polled
        if poll.final:
            del self.final_in_flight[poll]
        else:
            polled.poll = None
            self._retries_in_flight -= poll.is_retry
        if not polled.live or polled.poll is not None:
            return
        if polled.due == math.inf and polled.before_deadline:
            polled.due = now  # it was cut off, or brought nothing, and a wait goes on
        if polled.due < math.inf and polled.entry is None:
            self._enqueue(polled)

    def _enqueue(self, polled: PolledOperation) -> None:
        """Put an operation into the queue where it belongs since its last poll."""
        if polled.is_retry is not (polled.failures > 0):
            (self._retries if polled.is_retry else self._due).remove(polled)
            polled.is_retry = not polled.is_retry
        (self._retries if polled.is_retry else self._due).schedule(polled, polled.due)
        self.soonest = min(self.soonest, polled.due)

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
        late = 0.0
        for queue in (self._due, self._retries):
            due = queue.next_due()
            if due is not None:
                late = max(late, now - due)
        if self._final_polls:
            since, polled = self._final_polls[0]
            if polled.needs_final_poll():
                late = max(late, now - since)
        return late

    def _counted(self) -> int:
        """Return the polls in flight that take room."""
        if self._circuit.is_closed:  # all of them: asked for at each poll, so it must not walk through 64 of them
            return len(self.in_flight)
        return sum(self._circuit.takes_room(poll.started_at) for poll in self.in_flight)

    def _counted_retries(self) -> int:
        """Return those of operations that had failed: one that hangs since before the circuit opened keeps no probe."""
        if self._circuit.is_closed:
            return self._retries_in_flight
        return sum(poll.is_retry and self._circuit.takes_room(poll.started_at) for poll in self.in_flight)
