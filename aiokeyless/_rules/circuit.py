"""A circuit breaker with an adaptive limit on the polls in flight. Pure.

The caller records what happened and when, and asks how many polls may be in flight. Thanks to the circuit, thousands of
waits do not hammer a service that is down, and do not all poll it at once when it recovers. If an operation fails by
itself, or if half of the service's answers fail, that costs the other waits as little as possible. Rule 4 of
docs/rules.md; docs/explanation/circuit.md has its transitions.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from aiokeyless.events import CircuitChanged

from .backoff import MAX_PAUSE, MOST_AT_FIRST, SHORT, error_delay, requested_pause

if TYPE_CHECKING:
    from collections.abc import Hashable

    from aiokeyless.errors import KeylessError, RateLimitError

#: If failures are rare, so many operations must fail, with no good answer in between, to open the circuit.
FAILURES_UNTIL_OPEN: Final = 5
#: Otherwise, this many times the number that usually fails between two good answers must fail in addition. If two of
#: three polls fail at random, five failures in a row are common.
_TIMES_USUAL: Final = 12
#: Failures lower the limit no further than this. It is lower only after the circuit has opened.
_LEAST: Final = 4.0
#: Weight of the newest good answer in the moving average of failures.
_NEWEST: Final = 1 / 16
#: A moving average below this counts as no failures.
_NEGLIGIBLE: Final = 0.01
#: If over a third of the last forty polls were refused, the limit is the tenant's, and all polls must respect it. While
#: they respect one, a sudden onset shows that they have reached it again: more than three times as many refusals as
#: among the forty polls before. If somebody else uses up the limit, refusals come at any rate of ours.
_LAST: Final = 40
_MANY_REFUSED: Final = 14
_ONSET: Final = 3
#: With few waits, the limit takes long to rise. So the circuit also closes after so many seconds half open, if failures
#: are rare by then.
_PROVEN: Final = 30.0
#: Failures are rare if the moving average is below this.
_RARE: Final = 0.1


class CircuitState(StrEnum):
    """The states of the circuit."""

    CLOSED = "closed"
    """The service is well. The limit is full, less a little after each failure."""
    HALF_OPEN = "half_open"
    """The service answers again. Few polls may be in flight, twice as many after each round of good answers."""
    OPEN = "open"
    """The service fails, or asked for a pause. Polls go one at a time, as probes, or not before `Circuit.retry_at`."""


class Circuit:
    """The circuit of one client or worker; it starts closed.

    A good answer lets one more poll be in flight. A failure lowers that number by a share. One operation does not open
    the circuit: different operations must fail, with no good answer since their polls started. An open circuit lets one
    probe through at a time, on the error backoff. The ``Retry-After`` of a rate limit opens it too, for that time and
    with no poll at all. In both cases, the next good answer makes it half open. Times are of one clock, in seconds.

    The methods take when a poll started, and whether it is a probe: an ordinary poll. A final one starts in any state,
    also during a pause, so it delays no probe and extends no pause.
    """

    def __init__(self, limit: int) -> None:
        self._full = limit
        self._limit = float(limit)
        self.is_calm: bool = True
        """Whether nothing failed lately, so the circuit is closed and its limit is full. That is nearly always so."""
        self.state: CircuitState = CircuitState.CLOSED
        """The state; an expired ``Retry-After`` counts as open until a poll succeeds."""
        self.since: float = -math.inf
        """When it last opened or became half open. Polls from before say nothing about it and take no room in it."""
        self.answered_at: float = -math.inf
        """When the last good answer came."""
        self._failed: set[Hashable] = set()  # the operations that failed since then
        self._usual = 0.0  # the moving average of their number at a good answer
        self._refused = 0  # a bit for each of the last polls, the newest one lowest: whether it got a 429
        self._opened_at = -math.inf  # when it opened for the first time since it was closed
        self._held_until = -math.inf  # the end of a rate limit's pause, which no good answer ends
        self._probes = 0  # failed in a row, with the failure that opened the circuit; 0: it is not probed
        self._probe_at = -math.inf

    @property
    def is_closed(self) -> bool:
        """Whether the circuit is closed, so that all polls in flight count."""
        return self.state is CircuitState.CLOSED

    @property
    def is_probed(self) -> bool:
        """Whether it is open because polls failed, so that only probes start."""
        return self._probes > 0

    @property
    def limit(self) -> int:
        """Polls that may be in flight from `retry_at` on."""
        return int(self._limit)

    def retry_at(self) -> float:
        """Return the time from which polls may start."""
        return max(self._held_until, self._probe_at)

    def room(self, now: float) -> int:
        """Return how many polls may be in flight at this time, without final ones."""
        return self.limit if now >= self.retry_at() else 0

    def takes_room(self, started_at: float) -> bool:
        """Return whether a poll in flight counts. While the service recovers, polls from before do not."""
        return self.is_closed or started_at >= self.since

    def record_success(self, now: float, *, started_at: float) -> None:
        """Record an answer that is no transient failure."""
        self.answered_at = now
        if self.is_calm:
            return
        self._record_end(is_refusal=False)
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
            # While it is calm, nothing shifts the refusals out.
            if self._limit == self._full and self._usual < _NEGLIGIBLE and not self._refused:
                self.is_calm, self._usual = True, 0.0

    def record_refusal(self, now: float, error: RateLimitError, *, is_probe: bool, is_limited: bool) -> bool:
        """Respect a 429, after it was recorded as a failure. Return whether the limit is the tenant's.

        It is if many of the last polls were refused, or fewer while an earlier refusal limits the rate. Then
        ``Retry-After`` is meant for all polls. Otherwise the limit is the operation's own, or somebody else uses it up
        for a moment.
        """
        before = (self._refused >> _LAST).bit_count()
        last = self._refused.bit_count() - before
        is_tenants = last >= _MANY_REFUSED or (is_limited and last >= _ONSET + _ONSET * before)
        pause = requested_pause(error)
        if is_tenants and pause and (is_probe or now >= self._held_until):
            self.record_pause(now, pause)
        return is_tenants

    def record_failure(
        self, now: float, operation: Hashable, *, started_at: float, is_probe: bool, is_refusal: bool = False
    ) -> None:
        """Record a transient failure; `is_refusal` says that it is a 429."""
        self.is_calm = False
        self._record_end(is_refusal=is_refusal)
        if self.is_probed:
            if is_probe and started_at >= self.since:
                self._schedule_probe(now)
            return
        if self.state is not CircuitState.OPEN:
            self._limit = max(self._limit * (1 - 1 / self._full), min(self._limit, _LEAST))
        if started_at < self.answered_at:  # the service has answered well since, so it is the operation
            return
        self._failed.add(operation)
        # After so many in a row, the cause is the service.
        if len(self._failed) >= FAILURES_UNTIL_OPEN + int(_TIMES_USUAL * self._usual):
            self._enter(CircuitState.OPEN, now)
            self._schedule_probe(now)

    def record_cut(self, *, started_at: float, is_probe: bool) -> None:
        """Record a poll that was cut off because no wait needed it any more. That says nothing about the service.

        The next probe keeps the same distance to it. Otherwise, callers that leave would send one after another.
        """
        if self.is_probed and is_probe and started_at >= self.since:
            self._keep_distance(started_at)

    def record_pause(self, now: float, seconds: float) -> None:
        """Hold all polls for so many seconds; at most 120 count."""
        self.is_calm = False
        self._held_until = max(self._held_until, now + min(seconds, MAX_PAUSE))
        if not self.is_probed:  # a probe in flight still counts: a pause does not restart the backoff
            self._enter(CircuitState.OPEN, now)

    def _is_proven(self, now: float) -> bool:
        """Return whether it has been half open for long enough, and nearly all answers are good."""
        is_half_open = self.state is CircuitState.HALF_OPEN
        return is_half_open and now - self.since >= _PROVEN and self._usual < _RARE

    def _enter(self, state: CircuitState, now: float) -> None:
        """Change the state. Only this method does so."""
        if self.state is CircuitState.CLOSED:
            self._opened_at = now
        self.state = state
        if state is CircuitState.CLOSED:
            return
        self._limit = 1.0
        self.since = now

    def _schedule_probe(self, now: float) -> None:
        self._probes += 1
        self._keep_distance(now)

    def _keep_distance(self, since: float) -> None:
        """Let the next probe start no sooner than one step of the backoff after a time.

        Most outages are short, so the first probes come quickly. A service that refuses polls is not to be asked often.
        """
        is_short = since - self._opened_at <= SHORT and not self._refused & 1
        delay = error_delay(min(self._probes, MOST_AT_FIRST) if is_short else self._probes)
        self._probe_at = max(self._probe_at, since + delay)

    def _record_end(self, *, is_refusal: bool) -> None:
        self._refused = (self._refused << 1 | is_refusal) & ((1 << 2 * _LAST) - 1)


class Transition(NamedTuple):
    """A change of a circuit's state."""

    previous: CircuitState
    state: CircuitState
    seconds: float  # for which the state before lasted
    is_outage: bool  # it opened for the first time since it was closed
    outage: float | None  # if it is closed again, the seconds since it opened for the first time

    def event(self, cause: type[KeylessError] | None, waiting: int) -> CircuitChanged:
        """Return the event for listeners; its cause is the kind of the failure, None if it was a good answer."""
        return CircuitChanged(
            state=self.state.value,
            previous=self.previous.value,
            cause=None if cause is None else cause.__name__,
            waiting=waiting,
            seconds=self.seconds,
        )


class Transitions:
    """Notices how a circuit's state changes. An outage begins when it opens and ends when it is closed again.

    In between, the state may change back and forth. At first the circuit is closed.
    """

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
