"""A circuit breaker: how the service fares, and how many polls may be in flight for it.

Pure: it is told the time and what happened, and says how much room there is. It exists so that thousands of waits
do not hammer a service that is down, and do not fall upon it together when it comes back. Rule 4 of docs/rules.md.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Final

from .backoff import error_delay

FAILURES_UNTIL_OPEN: Final = 5
MAX_PAUSE: Final = 120.0  # seconds: a Retry-After of days must not turn a wait into a sleep


class CircuitState(StrEnum):
    """The states of the circuit."""

    CLOSED = "closed"
    """The service is well: all the room there is."""
    HALF_OPEN = "half_open"
    """The service answers again: few polls in flight, twice as many after each round of good answers."""
    OPEN = "open"
    """The service fails, or asked to be left alone: one probe at a time, or no poll until `Circuit.retry_at`."""


class Circuit:
    """The circuit of one client or worker; it starts closed.

    It opens after 5 failed polls in a row, and then lets one probe through at a time, on the error backoff. A
    ``Retry-After`` opens it too, for that time and with no poll at all. Either way it is half open afterwards.
    Times are of one clock, in seconds.

    Args:
        limit: Polls that may be in flight while it is closed.
    """

    __slots__ = ("_failures", "_full", "_paused_until", "_probe_at", "_probes", "_successes", "limit", "since")

    def __init__(self, limit: int) -> None:
        self._full = limit
        self.limit: int = limit
        """Polls that may be in flight once polls may start at all."""
        self.since: float = -math.inf
        """When the present state began: polls that started earlier say nothing about it and take no room in it."""
        self._failures = 0  # in a row
        self._successes = 0  # of the present round, while half open
        self._paused_until = -math.inf
        self._probes = 0  # failed ones in a row, the failure that opened the circuit included; 0: it is not probed
        self._probe_at = -math.inf

    @property
    def state(self) -> CircuitState:
        """The state; an expired ``Retry-After`` counts as open until a poll succeeds."""
        if self._probes or self._paused_until > -math.inf:
            return CircuitState.OPEN
        return CircuitState.CLOSED if self.limit == self._full else CircuitState.HALF_OPEN

    @property
    def is_closed(self) -> bool:
        """Whether there is all the room there is."""
        return self.limit == self._full and not self._probes and self._paused_until == -math.inf

    @property
    def is_probed(self) -> bool:
        """Whether it is open because polls failed, so that only probes start."""
        return self._probes > 0

    def retry_at(self) -> float:
        """Return the time from which polls may start."""
        return max(self._paused_until, self._probe_at)

    def room(self, now: float) -> int:
        """Return how many polls may be in flight at this time; final polls go by `limits_final_polls`."""
        return self.limit if now >= self.retry_at() else 0

    def takes_room(self, started_at: float) -> bool:
        """Return whether a poll in flight counts: while the service recovers, those from before do not."""
        return self.is_closed or started_at >= self.since

    def limits_final_polls(self, now: float) -> bool:
        """Return whether final polls start one at a time."""
        return self.is_probed or now < self._paused_until

    def record_success(self, now: float, *, started_at: float) -> None:
        """Record an answer that is no transient failure."""
        self._failures = 0
        paused = now < self._paused_until  # a final poll's answer then: no reason to start others before the pause ends
        if not paused:
            self._paused_until = -math.inf
        if self.is_probed:
            self._probes = 0
            self._probe_at = -math.inf
            self._restart(now)
            if not paused:
                self.limit = min(2, self._full)  # the probe was the first round
        elif self.limit < self._full and started_at >= self.since and not paused:
            self._successes += 1
            if self._successes >= self.limit:
                self.limit = min(2 * self.limit, self._full)
                self._successes = 0

    def record_failure(self, now: float, *, started_at: float, is_probe: bool, pause: float | None = None) -> None:
        """Record a transient failure.

        Args:
            now: The time.
            started_at: When the failed poll started.
            is_probe: Whether it was an ordinary poll; a final poll starts whatever the state, and paces no probe.
            pause: Seconds for which the service asked to be left alone, where it did; at most 120 count.
        """
        self._failures += 1
        if pause:
            self._paused_until = max(self._paused_until, now + min(pause, MAX_PAUSE))
            if not self.is_probed:  # a probe in flight counts on: a pause does not restart the backoff
                self._restart(now)
        if self.is_probed:
            if is_probe and started_at >= self.since:
                self._schedule_probe(now)
        elif self._failures >= FAILURES_UNTIL_OPEN:
            self._restart(now)
            self._schedule_probe(now)

    def _restart(self, now: float) -> None:
        """Begin a new state with room for a single poll."""
        self.limit = 1
        self.since = now
        self._successes = 0

    def _schedule_probe(self, now: float) -> None:
        self._probes += 1
        self._probe_at = now + error_delay(self._probes)
