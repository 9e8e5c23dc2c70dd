"""How the service fares, told by the outcomes of a client's polls, and how many polls may be in flight for it.

Pure: it is told the time and what happened, and answers how much room there is. It exists so that thousands of waits
do not hammer a service that is down, and do not fall upon it together when it comes back.
"""

from __future__ import annotations

import math
from typing import Final

from .backoff import MAX_HOLD, error_delay

FAILURES_UNTIL_DOWN: Final = 5


class Health:
    """The state of the service as one client sees it: open, opening up, down, held.

    Open: all the room there is. Down, after 5 failed polls in a row: one probe at a time, on the error pace. Held,
    after a ``Retry-After``: no polls at all. After both it opens up: few polls in flight, and twice as many after
    each round of good answers. Times are of one clock, in seconds.

    Args:
        limit: Polls that may be in flight while the service is well.
    """

    __slots__ = ("_failures", "_full", "_good", "_held_until", "_probe_at", "_probes", "limit", "since")

    def __init__(self, limit: int) -> None:
        self._full = limit
        self.limit = limit
        """Polls that may be in flight once the gate is open."""
        self.since = -math.inf
        """When the present state began: polls sent earlier say nothing about it and take no room in it."""
        self._failures = 0
        self._good = 0
        self._held_until = -math.inf
        self._probes = 0  # 0: not down
        self._probe_at = -math.inf

    @property
    def is_open(self) -> bool:
        """Whether there is all the room there is."""
        return self.limit == self._full and self._held_until == -math.inf and not self._probes

    @property
    def is_down(self) -> bool:
        """Whether only probes are sent."""
        return self._probes > 0

    def opens_at(self) -> float:
        """Return the time from which polls may be sent."""
        return max(self._held_until, self._probe_at)

    def room(self, now: float) -> int:
        """Return how many polls may be in flight at this time; final looks are asked for with `gated`."""
        return self.limit if now >= self.opens_at() else 0

    def gated(self, now: float) -> bool:
        """Whether the service is down or held, so that final looks go one at a time."""
        return self.is_down or now < self._held_until

    def good(self, now: float, *, sent_at: float) -> None:
        """Take note of an answer that is no transient failure."""
        self._failures = 0
        held = now < self._held_until  # a final look's good answer then: no reason to open up before the hold ends
        if not held:
            self._held_until = -math.inf
        if self.is_down:
            self._probes = 0
            self._probe_at = -math.inf
            self._narrow(now)
            if not held:
                self.limit = min(2, self._full)  # the probe was the first round
        elif self.limit < self._full and sent_at >= self.since and not held:
            self._good += 1
            if self._good >= self.limit:
                self.limit = min(2 * self.limit, self._full)
                self._good = 0

    def bad(self, now: float, *, sent_at: float, is_probe: bool, hold: float | None = None) -> None:
        """Take note of a transient failure.

        Args:
            now: The time.
            sent_at: When the failed poll was sent.
            is_probe: Whether it was an ordinary poll; a final look is sent in any weather and paces nothing.
            hold: Seconds for which the service wants to be left alone, where it said so.
        """
        self._failures += 1
        if hold:
            self._held_until = max(self._held_until, now + min(hold, MAX_HOLD))
            if not self.is_down:  # there its probe in flight goes on to count: a hold is no new start of the pace
                self._narrow(now)
        if self.is_down:
            if is_probe and sent_at >= self.since:
                self._pace(now)
        elif self._failures >= FAILURES_UNTIL_DOWN:
            self._narrow(now)
            self._pace(now)

    def _narrow(self, now: float) -> None:
        self.limit = 1
        self.since = now
        self._good = 0

    def _pace(self, now: float) -> None:
        self._probes += 1
        self._probe_at = now + error_delay(self._probes)
