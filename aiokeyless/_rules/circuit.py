"""A circuit breaker with a limit that adapts: how the service fares, and how many polls may be in flight for it.

Pure: it is told the time and what happened, and says how much room there is. It exists so that thousands of waits
do not hammer a service that is down, and do not all poll it at once when it recovers; and so that an operation
which fails by itself, or a service of which half the answers fail, costs the other waits as little as possible. Rule 4
of docs/rules.md, which has the table of its transitions.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from aiokeyless.errors import RateLimitError
from aiokeyless.events import CircuitChanged

from .backoff import MAX_PAUSE, error_delay, requested_pause

if TYPE_CHECKING:
    from collections.abc import Hashable

    from aiokeyless.errors import KeylessError

#: Operations that fail, with no good answer in between, until a circuit opens where failures are rare.
FAILURES_UNTIL_OPEN: Final = 5
#: Those among them that got a 503 with ``Retry-After``: so many are enough.
_ASKING_UNTIL_OPEN: Final = 2
#: ... and this many times the number that usually fails between two good answers: where two of three fail at random,
#: five in a row are common.
_TIMES_USUAL: Final = 7
#: Failures narrow what is in flight to this many at least; only an open circuit allows fewer.
_LEAST: Final = 4.0
#: How much of "usually" one more good answer is.
_NEWEST: Final = 1 / 8
#: What is as good as none of "usually".
_NEGLIGIBLE: Final = 0.01
#: Where few wait, the limit takes long to rise: after so many seconds half open it is closed as well, if failures are
#: rare by then, which is fewer than this between two good answers.
_PROVEN: Final = 30.0
_RARE: Final = 0.1


class CircuitState(StrEnum):
    """The states of the circuit."""

    CLOSED = "closed"
    """The service is well: all the room there is, less a little after each failure."""
    HALF_OPEN = "half_open"
    """The service answers again: few polls in flight, twice as many after each round of good answers."""
    OPEN = "open"
    """The service fails, or asked for a pause: one probe at a time, or no poll until `Circuit.retry_at`."""


class Circuit:
    """The circuit of one client or worker; it starts closed.

    A good answer lets one more poll be in flight; a failure takes away a share of them. What opens the circuit is the
    service and not an operation: different operations that fail, with no good answer since their polls started. It then
    lets one probe through at a time, on the error backoff. A rate limit's ``Retry-After`` opens it too, for that time
    and with no poll at all. Either way the next good answer makes it half open. Times are of one clock, in seconds.

    Args:
        limit: Polls that may be in flight while all is well.
        longest_poll: Seconds for which one is in flight at most.
    """

    __slots__ = (
        "_answered_at",
        "_asking",
        "_failed",
        "_full",
        "_held_until",
        "_limit",
        "_probe_at",
        "_probes",
        "_proven_after",
        "_usual",
        "is_calm",
        "since",
        "state",
    )

    def __init__(self, limit: int, *, longest_poll: float = 0.0) -> None:
        self._full = limit
        # Closed, all polls count: those that hang since before must be over, or they would leave no room for long.
        self._proven_after = max(_PROVEN, longest_poll)
        self._limit = float(limit)
        self.is_calm: bool = True
        """Whether all polls may start: nothing failed lately, so it is closed and its limit is full. Nearly always."""
        self.state: CircuitState = CircuitState.CLOSED
        """The state; an expired ``Retry-After`` counts as open until a poll succeeds."""
        self.since: float = -math.inf
        """Since when few polls start: those that started earlier say nothing about it and take no room in it."""
        self._answered_at = -math.inf  # the last good answer
        self._failed: set[Hashable] = set()  # the operations that failed since then
        self._usual = 0.0  # how many operations that were lately, at each good answer
        self._asking: set[Hashable] = set()  # the operations that got a Retry-After since then
        self._held_until = -math.inf  # by the rate limit, which no good answer lifts
        self._probes = 0  # failed ones in a row, the failure that opened the circuit included; 0: it is not probed
        self._probe_at = -math.inf

    @property
    def is_closed(self) -> bool:
        """Whether all polls in flight count, and as many may be as the service bears."""
        return self.state is CircuitState.CLOSED

    @property
    def is_probed(self) -> bool:
        """Whether it is open because polls failed, so that only probes start."""
        return self._probes > 0

    @property
    def limit(self) -> int:
        """Polls that may be in flight once polls may start at all."""
        return int(self._limit)

    def retry_at(self) -> float:
        """Return the time from which polls may start."""
        return max(self._held_until, self._probe_at)

    def room(self, now: float) -> int:
        """Return how many polls may be in flight at this time; final polls go by `limits_final_polls`."""
        return self.limit if now >= self.retry_at() else 0

    def takes_room(self, started_at: float) -> bool:
        """Return whether a poll in flight counts: while the service recovers, those from before do not."""
        return self.is_closed or started_at >= self.since

    def limits_final_polls(self, now: float) -> bool:
        """Return whether final polls start one at a time."""
        return self.is_probed or now < self.retry_at()

    def record_success(self, now: float, *, started_at: float) -> None:
        """Record an answer that is no transient failure."""
        self._answered_at = now
        if self.is_calm:
            return
        self._usual += _NEWEST * (len(self._failed) - self._usual)
        self._failed.clear()
        self._asking.clear()
        self._probes = 0
        self._probe_at = -math.inf
        if now < self._held_until:  # a final poll's answer: no reason to start others before the pause ends
            return
        if self.state is CircuitState.OPEN:
            self._enter(CircuitState.HALF_OPEN, now)
        elif not self.takes_room(started_at):
            return
        self._limit = min(self._limit + 1, self._full)
        if self._limit == self._full or self._is_proven(now):
            self._enter(CircuitState.CLOSED, now)
            if self._limit == self._full and self._usual < _NEGLIGIBLE:
                self.is_calm, self._usual = True, 0.0

    def record_error(
        self, now: float, operation: Hashable, error: KeylessError, *, started_at: float, is_probe: bool
    ) -> None:
        """Record a transient failure, and the pause that it asks for: see `record_failure` and `record_pause`.

        Args:
            now: The time.
            operation: Whose poll failed.
            error: The failure. The ``Retry-After`` of a rate limit is meant for all polls, that of a 503 for its own.
            started_at: When the failed poll started.
            is_probe: Whether it was an ordinary poll.
        """
        pause, is_rate_limit = requested_pause(error), isinstance(error, RateLimitError)
        asks_for_pause = pause > 0 and not is_rate_limit
        self.record_failure(now, operation, started_at=started_at, is_probe=is_probe, asks_for_pause=asks_for_pause)
        if pause and is_rate_limit:
            self.record_pause(now, pause)

    def record_failure(
        self, now: float, operation: Hashable, *, started_at: float, is_probe: bool, asks_for_pause: bool = False
    ) -> None:
        """Record a transient failure.

        Args:
            now: The time.
            operation: Whose poll failed.
            started_at: When the failed poll started.
            is_probe: Whether it was an ordinary poll; a final poll starts whatever the state, and paces no probe.
            asks_for_pause: Whether it was a 503 with ``Retry-After``. That time is the operation's; but where two
                operations get one, it is the service that is not available.
        """
        self.is_calm = False
        if self.is_probed:
            if is_probe and started_at >= self.since:
                self._schedule_probe(now)
            return
        if self.state is not CircuitState.OPEN:
            self._limit = max(self._limit * (1 - 1 / self._full), min(self._limit, _LEAST))
        if started_at < self._answered_at:  # the service has answered well since, so it is the operation
            return
        self._failed.add(operation)
        if asks_for_pause:
            self._asking.add(operation)
        if self._are_unusual(self._failed, FAILURES_UNTIL_OPEN) or self._are_unusual(self._asking, _ASKING_UNTIL_OPEN):
            self._enter(CircuitState.OPEN, now)
            self._schedule_probe(now)

    def record_cut(self, *, started_at: float, is_probe: bool) -> None:
        """Record a poll that was cut off, since nobody waited for it any more: that says nothing of the service.

        The next probe keeps the same distance to it, or callers that give up would send one after another.

        Args:
            started_at: When the poll started.
            is_probe: Whether it was an ordinary poll.
        """
        if self.is_probed and is_probe and started_at >= self.since:
            self._keep_distance(started_at)

    def record_pause(self, now: float, seconds: float) -> None:
        """Record the ``Retry-After`` of a rate limit, besides the failure that it came with: it is meant for all polls.

        Args:
            now: The time.
            seconds: How long it asks for; at most 120 count.
        """
        self.is_calm = False
        self._held_until = max(self._held_until, now + min(seconds, MAX_PAUSE))
        if not self.is_probed:  # a probe in flight counts on: a pause does not restart the backoff
            self._enter(CircuitState.OPEN, now)

    def _is_proven(self, now: float) -> bool:
        """Return whether it has been half open for long enough, and nearly all answers are good."""
        is_half_open = self.state is CircuitState.HALF_OPEN
        return is_half_open and now - self.since >= self._proven_after and self._usual < _RARE

    def _are_unusual(self, operations: set[Hashable], many: int) -> bool:
        """Return whether so many operations failed in a row that it is the service: `many`, where failures are rare."""
        return len(operations) >= many + int(_TIMES_USUAL * self._usual)

    def _enter(self, state: CircuitState, now: float) -> None:
        """Change the state: the one place where that happens."""
        self.state = state
        if state is CircuitState.CLOSED:
            return
        self._limit = 1.0
        self.since = now

    def _schedule_probe(self, now: float) -> None:
        self._probes += 1
        self._keep_distance(now)

    def _keep_distance(self, since: float) -> None:
        """Let the next probe start no sooner than the backoff's step after a time."""
        self._probe_at = max(self._probe_at, since + error_delay(self._probes))


class Transition(NamedTuple):
    """A change of a circuit's state.

    Attributes:
        previous: The state before.
        state: The state now.
        seconds: Seconds for which the state before lasted.
        is_outage: Whether the circuit opened for the first time since it was closed.
        outage: Where it is closed again: seconds since it opened for the first time; else None.
    """

    previous: CircuitState
    state: CircuitState
    seconds: float
    is_outage: bool
    outage: float | None

    def event(self, cause: type[KeylessError] | None, waiting: int) -> CircuitChanged:
        """Return what listeners are told of it.

        Args:
            cause: The kind of the failure that changed it; None if it was a good answer.
            waiting: Waits under way, or deliveries in flight.
        """
        return CircuitChanged(
            state=self.state.value,
            previous=self.previous.value,
            cause=None if cause is None else cause.__name__,
            waiting=waiting,
            seconds=self.seconds,
        )


class Transitions:
    """Notices how a circuit's state changes. An outage begins when it opens and ends when it is closed again.

    Between these it may go to and fro.

    Args:
        now: The time; the circuit is closed.
    """

    __slots__ = ("_opened_at", "_since", "state")

    def __init__(self, now: float) -> None:
        self.state: CircuitState = CircuitState.CLOSED
        """The state that was noticed last."""
        self._since = now
        self._opened_at: float | None = None  # the outage's beginning

    def notice(self, state: CircuitState, now: float) -> Transition:
        """Notice a state that is not the last one."""
        previous, self.state = self.state, state
        seconds, self._since = now - self._since, now
        is_outage = state is CircuitState.OPEN and self._opened_at is None
        outage = None
        if is_outage:
            self._opened_at = now
        elif state is CircuitState.CLOSED and self._opened_at is not None:
            outage, self._opened_at = now - self._opened_at, None
        return Transition(previous, state, seconds, is_outage, outage)
