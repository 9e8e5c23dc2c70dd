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

SLOW: Final = 1.0  # seconds after which a poll in flight gives its slot back
#: Ordinary polls in flight at most, in multiples of `max_in_flight`: those that hang beside good answers, and without.
_MOST_BESIDE_GOOD: Final = 6
_MOST: Final = 2
_MOST_FINAL: Final = 4  # final polls in flight at most, likewise
#: Failures of an operation by which probes tell it from others; more make no difference.
_FAILURES_TOLD_APART: Final = 8
#: Queued polls that one call passes over because no wait needs them any more: those waits have ended, or are about to.
_PASSED_OVER: Final = 384


class Dispatcher:
    """The polls of one client that are due, queued or in flight.

    Args:
        circuit: How the service fares, and how many polls it bears.
        rate: How many polls may start in a second; final ones are counted and do not wait for it.
        max_in_flight: Slots: ordinary polls that are under way for less than a second.
        max_connections: Polls in flight at once, whatever they are: more would queue for a connection.
        request_timeout: Seconds after which a poll in flight is overdue.
    """

    def __init__(
        self,
        circuit: Circuit,
        rate: PollRate,
        *,
        max_in_flight: int,
        max_connections: float,
        request_timeout: float,
    ) -> None:
        self._circuit = circuit
        self._rate = rate
        self._max_in_flight = max_in_flight
        self._max_connections = max_connections
        self._least = min(max_in_flight, max_connections)  # polls in flight for which there is always room
        self._request_timeout = request_timeout
        # By the failures of an operation in a row, and whether it was ever answered well: in the order of probes.
        self._queues: tuple[TimerQueue[PolledOperation], ...] = tuple(
            TimerQueue() for _ in range(2 * (_FAILURES_TOLD_APART + 1))
        )
        self._proven = self._queues[:1]
        self._unproven = 0  # operations in all queues but the first
        self._retries = 0  # of these, those that failed when they were polled last
        self._slots: dict[Poll, None] = {}  # the polls that hold one, oldest first
        self._slots_of_retries = 0
        self._final_polls: deque[tuple[float, PolledOperation]] = deque()  # and since when each waits to start
        self.final_in_flight: dict[Poll, None] = {}
        """The final ones of the polls in flight."""
        self.in_flight: dict[Poll, None] = {}
        """The polls in flight, oldest first."""
        self._cut: list[Poll] = []
        self._giving_way: Poll | None = None  # it was cut off so that another poll can start; None once it has ended
        self.soonest = math.inf
        """When the next poll may start; perhaps earlier than that, never later. The end of a poll is not foreseen."""

    def __len__(self) -> int:
        """Return the number of operations for which an ordinary poll is scheduled."""
        return sum(map(len, self._queues))

    # -- what is to be polled

    def schedule(self, polled: PolledOperation, due: float) -> None:
        """Poll an operation at that time at the latest; while a poll is in flight, after it."""
        if due < polled.due:
            polled.due = due
            if polled.poll is None:
                self._enqueue(polled)

    def unschedule(self, polled: PolledOperation) -> None:
        """Take back the ordinary poll of an operation."""
        self._dequeue(polled)
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

        1. A final poll is queued and may start: it goes first.
        2. All slots are taken: the oldest poll gives its slot back once it is a second old.
        3. Ordinary polls wait for the circuit, for a slot, for one that is due, and for the rate. The operation that
           has been due longest goes first, and those that failed when they were polled last get half of the slots.
           While the circuit is open, the order is that of probes.
        4. As many polls are in flight as may be: the oldest slow one gives way to one that is due.
        """
        self.soonest = math.inf
        circuit = self._circuit
        if self._final_polls and (poll := self._next_final(now)) is not None:  # 1
            return poll
        ready_at = self._rate.ready_at(now)
        slots = self._max_in_flight if circuit.is_calm else circuit.limit
        if len(self._slots) >= slots or self._retries_wait():  # 2
            self._free_slots(now)
            if len(self._slots) >= slots:
                ready_at = max(ready_at, self._slow_at())
        if not circuit.is_calm:
            ready_at = max(ready_at, circuit.retry_at())
        if ready_at > now + RESOLUTION:
            self.soonest = min(self.soonest, self._due_at(ready_at))
            return None
        if self._has_room(now):  # 3
            poll = self._next_due(now)
            if poll is not None:  # perhaps it is not the only one that may start
                self.soonest = min(self.soonest, self._slow_at() if len(self._slots) >= slots else now)
            else:
                self.soonest = min(self.soonest, self._due_at(now))
            return poll
        due = self._due_at(now)
        if due <= now + RESOLUTION:  # 4
            self._make_room(now)
        else:
            self.soonest = min(self.soonest, due)
        return None

    def _free_slots(self, now: float) -> None:
        """Let slow polls give their slots back; those from before the circuit opened have none in it."""
        circuit = self._circuit
        while self._slots:
            poll = next(iter(self._slots))
            is_from_before = not circuit.takes_room(poll.started_at)
            if poll.started_at + SLOW > now + RESOLUTION and not is_from_before:
                return
            self._free_slot(poll)
            if circuit.state is CircuitState.OPEN and not is_from_before and not poll.counted_as_failure:
                # It may still be answered, so the backoff counts from its start: cutting it would close nothing.
                poll.counted_as_failure, at = True, poll.started_at
                circuit.record_failure(at, poll.polled.operation_id, started_at=at, is_probe=True)

    def _free_slot(self, poll: Poll) -> None:
        del self._slots[poll]
        if poll.is_retry:
            self._slots_of_retries -= 1

    def _has_room(self, now: float) -> bool:
        """Return whether one more ordinary poll may be in flight; not while one gives way."""
        in_flight = len(self.in_flight)
        if in_flight < self._least:
            return True
        if self._giving_way is not None or in_flight >= self._max_connections:
            return False
        times = _MOST_BESIDE_GOOD if now - self._circuit.answered_at <= SLOW else _MOST
        return in_flight - len(self.final_in_flight) < times * self._max_in_flight

    def _make_room(self, now: float) -> None:
        """Cut the oldest slow poll off for one that is due, or wait until a poll is slow; one is cut at a time."""
        if self._giving_way is not None:
            return
        for poll in self.in_flight:
            if not poll.final and not poll.is_over:
                if poll.started_at + SLOW > now + RESOLUTION:
                    self.soonest = min(self.soonest, poll.started_at + SLOW)
                else:
                    self._giving_way = poll
                    self.cut_off(poll, overdue=True)
                return

    def _slow_at(self) -> float:
        """Return when the oldest poll that holds a slot gives it back at the latest."""
        return next(iter(self._slots)).started_at + SLOW

    def _retries_wait(self) -> bool:
        """Return whether the operations that failed when they were polled last have their share of the slots."""
        return self._retries > 0 and self._slots_of_retries >= max(1, self._circuit.limit // 2)

    def _due_at(self, ready_at: float) -> float:
        """Return when an ordinary poll is due that may start, infinity if none is; `ready_at`: when any may start."""
        due = min((due for queue in self._open_queues() if (due := queue.next_due()) is not None), default=math.inf)
        if self._retries_wait():
            due = min(due, self._slow_at())
        return max(due, ready_at) if due < math.inf else due

    def _next_due(self, now: float) -> Poll | None:
        """Start the ordinary poll that goes first, if one is due."""
        for queue in self._by_precedence():
            for _ in range(_PASSED_OVER):
                polled = queue.pop_due(now + RESOLUTION)
                if polled is None:
                    break
                if polled.rank:
                    self._count(polled.rank, -1)
                if waits := polled.active_waits():
                    return self._start(polled, now, waits)
                polled.due = math.inf  # its callers are gone and about to leave
        return None

    def _open_queues(self) -> Sequence[TimerQueue[PolledOperation]]:
        """Return the queues of which a poll may start, in the order of probes."""
        if not self._unproven:
            return self._proven
        return self._queues if self._retries and not self._retries_wait() else self._queues[:2]

    def _by_precedence(self) -> Sequence[TimerQueue[PolledOperation]]:
        """Return the queues of which a poll may start, the one that goes first first."""
        queues = self._open_queues()
        if len(queues) == 1 or self._circuit.state is CircuitState.OPEN:
            return queues
        due = [(when, number) for number, queue in enumerate(queues) if (when := queue.next_due()) is not None]
        return [queues[number] for _, number in sorted(due)]

    def _next_final(self, now: float) -> Poll | None:
        """Start the final poll that has been queued longest and that a wait needs, or lower `soonest`."""
        if len(self.in_flight) >= self._max_connections:
            self._make_room(now)
            return None
        if self._circuit.state is CircuitState.OPEN:
            # One that hangs may go on for other waits after its two seconds: no other final poll is held up by that.
            if any(poll.is_awaited_as_final() for poll in self.final_in_flight):
                return None
        elif len(self.final_in_flight) >= _MOST_FINAL * self._max_in_flight:
            return None
        for _ in range(min(_PASSED_OVER, len(self._final_polls))):
            _, polled = self._final_polls.popleft()
            polled.final_poll_queued = False
            if polled.needs_final_poll():
                return self._start_final(polled, now)
        if self._final_polls:
            self.soonest = now  # in the next turn
        return None

    def _start(self, polled: PolledOperation, now: float, waits: list[Wait]) -> Poll:
        poll = Poll(polled, now, waits, final=False)
        self.in_flight[poll] = self._slots[poll] = None
        self._rate.record_poll(now)
        poll.lag = max(0.0, now - polled.due)
        if polled.rank > 1:
            poll.is_retry = True
            self._slots_of_retries += 1
        polled.poll = poll
        polled.due = math.inf
        return poll

    def _start_final(self, polled: PolledOperation, now: float) -> Poll:
        poll = Poll(polled, now, polled.active_waits(), final=True)
        self.in_flight[poll] = self.final_in_flight[poll] = None
        self._rate.record_poll(now)
        if polled.due <= now + RESOLUTION:  # it does for an ordinary one that is due
            self.unschedule(polled)
        return poll

    def finish(self, poll: Poll, now: float) -> None:
        """Free the place of a poll, and schedule another one if its operation needs one."""
        del self.in_flight[poll]
        self.soonest = now
        polled = poll.polled
        if poll.final:
            del self.final_in_flight[poll]
        else:
            polled.poll = None
            if poll in self._slots:
                self._free_slot(poll)
            if poll is self._giving_way:
                self._giving_way = None
        if not polled.live or polled.poll is not None:
            return
        if polled.due == math.inf and polled.before_deadline:
            polled.due = now  # it was cut off, or brought nothing, and a wait goes on
        if polled.due < math.inf and polled.entry is None:
            self._enqueue(polled)

    def _enqueue(self, polled: PolledOperation) -> None:
        """Put an operation into the queue where it belongs since its last poll."""
        rank = 2 * min(polled.failures, _FAILURES_TOLD_APART) if polled.failures else 0
        if not polled.was_seen:
            rank += 1
        if rank != polled.rank:
            self._dequeue(polled)
            polled.rank = rank
        if rank and polled.entry is None:
            self._count(rank, 1)
        self._queues[rank].schedule(polled, polled.due)
        self.soonest = min(self.soonest, polled.due)

    def _dequeue(self, polled: PolledOperation) -> None:
        if polled.entry is not None:
            self._count(polled.rank, -1)
            self._queues[polled.rank].remove(polled)

    def _count(self, rank: int, change: int) -> None:
        self._unproven += change * (rank > 0)
        self._retries += change * (rank > 1)

    # -- what is cut off

    def cut_off(self, poll: Poll, *, overdue: bool = False) -> None:
        """Let the exchange of a poll be cut off, once; overdue: since it takes longer than it may."""
        if not poll.is_over:
            poll.is_over, poll.is_overdue = True, overdue
            self._cut.append(poll)

    @property
    def has_cut(self) -> bool:
        """Whether `take_cut` has any."""
        return bool(self._cut)

    def take_cut(self) -> Sequence[Poll]:
        """Return the polls whose exchanges must be cut off, each once."""
        if not self._cut:
            return ()
        cut, self._cut = self._cut, []
        return cut

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
        for queue in self._queues:
            due = queue.next_due()
            if due is not None:
                late = max(late, now - due)
        if self._final_polls:
            since, polled = self._final_polls[0]
            if polled.needs_final_poll():
                late = max(late, now - since)
        return late
