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

from aiokeyless.events import CircuitChanged

from .backoff import MAX_PAUSE, error_delay, requested_pause

if TYPE_CHECKING:
    from collections.abc import Hashable

    from aiokeyless.errors import KeylessError, RateLimitError

#: Operations that fail, with no good answer in between, until a circuit opens where failures are rare.
FAILURES_UNTIL_OPEN: Final = 5
#: ... and this many times the number that usually fails between two good answers: where two of three fail at random,
#: five in a row are common.
_TIMES_USUAL: Final = 7
#: Failures narrow what is in flight to this many at least; only an open circuit allows fewer.
_LEAST: Final = 4.0
#: How much of "usually" one more good answer is.
_NEWEST: Final = 1 / 8
#: What is as good as none of "usually".
_NEGLIGIBLE: Final = 0.01
#: Seconds within which two operations are refused if the limit is the tenant's, and not one operation's.
_REFUSED_TOGETHER: Final = 2.0
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
        "_failed",
        "_full",
        "_held_until",
        "_limit",
        "_probe_at",
        "_probes",
        "_proven_after",
        "_refusals",
        "_usual",
        "answered_at",
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
        self.answered_at: float = -math.inf
        """When the last good answer came."""
        self._failed: set[Hashable] = set()  # the operations that failed since then
        self._usual = 0.0  # how many operations that were lately, at each good answer
        self._refusals: list[tuple[Hashable, float]] = []  # the last two operations that got a 429, and when; in order
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
        """Return how many polls may be in flight at this time, final ones apart."""
        return self.limit if now >= self.retry_at() else 0

    def takes_room(self, started_at: float) -> bool:
        """Return whether a poll in flight counts: while the service recovers, those from before do not."""
        return self.is_closed or started_at >= self.since

    def record_success(self, now: float, *, started_at: float) -> None:
        """Record an answer that is no transient failure."""
        self.answered_at = now
        if self.is_calm:
            return
        self._usual += _NEWEST * (len(self._failed) - self._usual)
        self._failed.clear()
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

    def record_refusal(
        self, now: float, operation: Hashable, error: RateLimitError, *, is_probe: bool, is_repeated: bool
    ) -> bool:
        """Record a 429, besides the failure that it is.

        If another operation got its first one a moment ago, the limit is the tenant's, and ``Retry-After`` is meant for
        all polls. Else it is the operation's own.

        Args:
            now: The time.
            operation: Whose poll was refused.
            error: The refusal.
            is_probe: Whether it was an ordinary poll. A final poll is sent during a pause, and does not extend it.
            is_repeated: Whether the poll of the operation before failed, too: so do those that are always refused.

        Returns:
            Whether the limit is the tenant's.
        """
        if is_repeated:
            return False
        self._refusals = [refusal for refusal in self._refusals if refusal[0] != operation][-1:]
        is_tenants = any(now - at <= _REFUSED_TOGETHER for _, at in self._refusals)
        self._refusals.append((operation, now))
        pause = requested_pause(error)
        if is_tenants and pause and (is_probe or now >= self._held_until):
            self.record_pause(now, pause)
        return is_tenants

    def record_failure(self, now: float, operation: Hashable, *, started_at: float, is_probe: bool) -> None:
        """Record a transient failure.

        Args:
            now: The time.
            operation: Whose poll failed.
            started_at: When the failed poll started.
            is_probe: Whether it was an ordinary poll; a final poll starts whatever the state, and paces no probe.
        """
        self.is_calm = False
        if self.is_probed:
            if is_probe and started_at >= self.since:
                self._schedule_probe(now)
            return
        if self.state is not CircuitState.OPEN:
            self._limit = max(self._limit * (1 - 1 / self._full), min(self._limit, _LEAST))
        if started_at < self.answered_at:  # the service has answered well since, so it is the operation
            return
        self._failed.add(operation)
        # So many in a row that it is the service.
        if len(self._failed) >= FAILURES_UNTIL_OPEN + int(_TIMES_USUAL * self._usual):
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
        """Hold all polls for a time.

        Args:
            now: The time.
            seconds: How long; at most 120 count.
        """
        self.is_calm = False
        self._held_until = max(self._held_until, now + min(seconds, MAX_PAUSE))
        if not self.is_probed:  # a probe in flight counts on: a pause does not restart the backoff
            self._enter(CircuitState.OPEN, now)

    def _is_proven(self, now: float) -> bool:
        """Return whether it has been half open for long enough, and nearly all answers are good."""
        is_half_open = self.state is CircuitState.HALF_OPEN
        return is_half_open and now - self.since >= self._proven_after and self._usual < _RARE

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
