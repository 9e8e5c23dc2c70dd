"""Which operation is polled next, and how many at once: the queues and the slots of one client. Pure.

It is told the time and what happened, and says what to start; the poller starts it, awaits it and reports back. Its
cases, in the order in which they are tried:

1. a final poll that waits for a slot; but every eighth slot goes to an ordinary poll that is due, so that none starves;
2. while the circuit is open: an operation that did not fail when it was polled last, the one due longest, since its
   answer tells most about the service; only where there is none, one that failed;
3. the operation that has been due longest; those that failed when they were polled last get half of the slots, so that
   a few that hang leave room for the others.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Final

from aiokeyless._rules.circuit import CircuitState

from .state import Poll, PolledOperation
from .timer_queue import TimerQueue

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aiokeyless._rules.circuit import Circuit
    from aiokeyless._rules.rate import PollRate

_FINAL_POLLS_IN_A_ROW: Final = 7
#: Deadlines that one turn of the loop handles at most, which takes several milliseconds. As many queued final polls
#: that no wait needs any more are passed over in search of the next one: they are of waits that have ended.
MOST_DEADLINES: Final = 384
#: The clocks in use round to a microsecond or better; a timer that fired within it is not early.
RESOLUTION: Final = 1e-6


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
        self._final_in_flight: dict[Poll, None] = {}
        self._final_in_a_row = 0  # started since the last ordinary poll
        self.in_flight: dict[Poll, None] = {}
        """The polls in flight, oldest first."""

    def __len__(self) -> int:
        """Return the number of operations for which an ordinary poll is scheduled."""
        return len(self._due) + len(self._retries)

    # -- what is to be polled

    def schedule(self, polled: PolledOperation, due: float) -> None:
        """Poll an operation at that time at the latest; where a poll is in flight, after it."""
        if due < polled.due:
            polled.due = due
            if polled.poll is None:
                self._enqueue(polled)

    def unschedule(self, polled: PolledOperation) -> None:
        """Take back the ordinary poll of an operation."""
        self._queue(polled).remove(polled)
        polled.due = math.inf

    def queue_final_poll(self, polled: PolledOperation, since: float) -> None:
        """Give an operation one final poll, for all of its waits whose deadline has passed."""
        if not polled.final_poll_queued:
            polled.final_poll_queued = True
            self._final_polls.append((since, polled))

    def clear_final_polls(self) -> None:
        """Forget the queued final polls: no wait is left."""
        for _, polled in self._final_polls:
            polled.final_poll_queued = False  # a hold may take it up again
        self._final_polls.clear()

    # -- what is polled

    def next_poll(self, now: float) -> Poll | None:
        """Take the next poll that may start now, and count it as in flight; None where there is none."""
        if len(self.in_flight) >= self._max_in_flight:
            return None
        room = self._circuit.room(now + RESOLUTION) - self._counted()
        # Not by the rate: where final polls take all of it for long, a wait without a deadline would never be polled.
        if self._final_in_a_row >= _FINAL_POLLS_IN_A_ROW and room > 0 and (poll := self._next_due(now)) is not None:
            return poll
        return self._next_final(now, room) or self._next_ordinary(now, room)

    def _next_final(self, now: float, room: int) -> Poll | None:
        if not self._final_polls or not self._may_start_final(now, room):
            return None
        for _ in range(min(MOST_DEADLINES, len(self._final_polls))):
            _, polled = self._final_polls.popleft()
            polled.final_poll_queued = False
            if polled.needs_final_poll():
                return self._start(polled, now, final=True)
        return None

    def _may_start_final(self, now: float, room: int) -> bool:
        if room > 0 and not self._circuit.limits_final_polls(now):
            return True
        # One that hangs may go on for other waits after its two seconds: no other final poll is held up by that.
        return not any(poll.is_awaited_as_final() for poll in self._final_in_flight)

    def _next_ordinary(self, now: float, room: int) -> Poll | None:
        if room <= 0 or self._rate.ready_at(now) > now + RESOLUTION:
            return None
        return self._next_due(now)

    def _next_due(self, now: float) -> Poll | None:
        for queue in self._queues():
            polled = queue.pop_due(now + RESOLUTION)
            if polled is not None:
                return self._start(polled, now, final=False)
        return None

    def _queues(self) -> Sequence[TimerQueue[PolledOperation]]:
        """Return the queues of which a poll may start, the one that goes first first."""
        if self._counted_retries() >= max(1, self._circuit.limit // 2):
            return (self._due,)
        retry = self._retries.next_due()
        if retry is None:
            return (self._due,)
        due = self._due.next_due()
        if due is not None and (due <= retry or self._circuit.state is CircuitState.OPEN):
            return (self._due, self._retries)
        return (self._retries, self._due)

    def finish(self, poll: Poll, now: float) -> None:
        """Free the slot of a poll, and schedule another one where its operation needs one."""
        del self.in_flight[poll]
        polled = poll.polled
        if poll.final:
            del self._final_in_flight[poll]
        else:
            polled.poll = None
            self._retries_in_flight -= poll.is_retry
        if not polled.live or polled.poll is not None:
            return
        if polled.due == math.inf and polled.before_deadline:
            polled.due = now  # it was cut off, or brought nothing, and a wait goes on
        if polled.due < math.inf and polled.entry is None:
            self._enqueue(polled)

    def overdue(self, now: float) -> Iterator[Poll]:
        """Yield the polls that have been in flight for longer than an exchange may take."""
        for poll in self.in_flight:
            if poll.started_at + self._request_timeout > now + RESOLUTION:
                break
            yield poll

    # -- times

    def next_event(self, now: float) -> float:
        """Return the time of the next event that time alone brings about: a poll is due, or one is overdue.

        The end of a poll is no such event: it is reported by `finish`.
        """
        if (
            self._final_polls
            and len(self.in_flight) < self._max_in_flight
            and self._may_start_final(now, self._circuit.room(now + RESOLUTION) - self._counted())
        ):
            return now  # a worker was cancelled, or there were very many that no wait needs any more
        when = math.inf
        for poll in self.in_flight:
            if not poll.cut:
                when = poll.started_at + self._request_timeout
                break
        if len(self.in_flight) < self._max_in_flight and self._counted() < self._circuit.limit:
            for queue in self._queues():
                due = queue.next_due()
                if due is not None:
                    when = min(when, max(due, self._circuit.retry_at(), self._rate.ready_at(now)))
        return when

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

    def _start(self, polled: PolledOperation, now: float, *, final: bool) -> Poll:
        poll = Poll(polled, now, final=final)
        self.in_flight[poll] = None
        self._rate.record_poll(now)
        if final:
            self._final_in_flight[poll] = None
            self._final_in_a_row += 1
        else:
            poll.lag = max(0.0, now - polled.due)
            polled.poll = poll
            self._final_in_a_row = 0
            poll.is_retry = polled.is_retry
            self._retries_in_flight += poll.is_retry
        if not final or polled.due <= now + RESOLUTION:  # a final poll does for an ordinary one that is due
            self.unschedule(polled)
        return poll

    def _enqueue(self, polled: PolledOperation) -> None:
        """Put an operation into the queue where it belongs since its last poll."""
        if polled.is_retry is not (polled.failures > 0):
            self._queue(polled).remove(polled)
            polled.is_retry = not polled.is_retry
        self._queue(polled).schedule(polled, polled.due)

    def _queue(self, polled: PolledOperation) -> TimerQueue[PolledOperation]:
        return self._retries if polled.is_retry else self._due
