"""How many polls may start in a second: a token bucket, and what the service's refusals make of its rate.

Pure: it is told the time and what happened, and says when the next poll may start.
"""

from __future__ import annotations

import math
from typing import Final

_BURST: Final = 1.0  # seconds of polls that may start at once after a quiet time, and of those that may be owed
_BURST_AFTER_REFUSAL: Final = 0.1  # the service may count polls over a shorter time than a second
#: Seconds after a refusal until the rate is back where it was refused: most of the way in the first few, so that a
#: service with a limit is polled close to it, and then slowly, so that it seldom has to refuse again.
_RECOVERY: Final = 20.0
_CURVE: Final = 9  # the exponent of that; an odd one
_FORGOTTEN: Final = 120.0  # seconds after which a refusal means nothing any more
#: The lowest rate that is halved: a service that refuses everything is the circuit's.
_LEAST: Final = 1.0
#: Seconds after a refusal in which further ones are about the polls before it.
_SETTLED: Final = 1.0
_ROUNDING: Final = 1e-6
#: Seconds over which polls are counted, to find the rate that was refused.
_COUNTED: Final = 1.0


class PollRate:
    """A token bucket whose rate the service's 429 halves.

    A refused rate is halved once and climbs back: to where it was within 20 s, beyond that ever faster, a thousandfold
    within about a minute. So the limit of a service is found, and polls stay just below it. Times are of one clock, in
    seconds.

    Args:
        limit: Polls a second at most; None for no limit until the service refuses.
    """

    __slots__ = (
        *("_counted", "_counted_at", "_counted_before", "_filled_at", "_limit", "_refused", "_refused_at", "_tokens"),
    )

    def __init__(self, limit: float | None) -> None:
        self._limit = math.inf if limit is None else limit
        self._refused = math.inf  # the rate that was refused last
        self._refused_at = -math.inf
        self._tokens = max(1.0, self._limit * _BURST)
        self._filled_at = 0.0
        self._counted = self._counted_before = 0  # polls of the second that began then, and of the one before
        self._counted_at = 0.0

    def per_second(self, now: float) -> float:
        """Return the polls a second that may start now; infinity where there is no limit."""
        if self._refused == math.inf:
            return self._limit
        since = now - self._refused_at
        rate = self._refused * (1.0 + 0.5 * (since / _RECOVERY - 1.0) ** _CURVE)
        if rate >= self._limit or since > _FORGOTTEN:
            self._refused = math.inf
            return self._limit
        return rate

    def ready_at(self, now: float) -> float:
        """Return the time from which the next poll may start; not after `now` if it may start at once."""
        if self._tokens >= 1.0:  # as of the last poll; there are more by now
            return now
        rate = self._fill(now)
        return now if self._tokens >= 1.0 else now + (1.0 - self._tokens) / rate

    def room(self, now: float) -> int | None:
        """Return how many polls may start at once; None where there is no limit."""
        self._fill(now)
        return None if self._tokens == math.inf else max(0, math.floor(self._tokens + _ROUNDING))

    def record_poll(self, now: float) -> None:
        """Record that a poll starts. One that did not wait to be ready, such as a final one, is owed by later ones."""
        if now >= self._counted_at + _COUNTED:
            self._counted_before = self._counted if now < self._counted_at + 2 * _COUNTED else 0
            self._counted, self._counted_at = 0, now
        self._counted += 1
        if self._tokens < math.inf or self._refused < math.inf:
            rate = self._fill(now)
            self._tokens = max(self._tokens - 1.0, -max(1.0, rate * _BURST))

    def record_refusal(self, now: float, *, started_at: float) -> None:
        """Record a 429.

        Args:
            now: The time.
            started_at: When the refused poll started: one from before the rate was halved does not halve it again.
        """
        if started_at < self._refused_at + _SETTLED:
            return
        counted = max(self._counted, self._counted_before)
        self._refused = min(self._limit, max(_LEAST, min(self.per_second(now), counted)))
        self._refused_at = now
        self._fill(now)

    def _fill(self, now: float) -> float:
        """Add the tokens since the last time, as many as the bucket holds; return the rate."""
        rate = self.per_second(now)
        if rate == math.inf:
            self._tokens = math.inf
        else:
            added = max(0.0, now - self._filled_at) * rate
            burst = _BURST if self._refused == math.inf else _BURST_AFTER_REFUSAL
            self._tokens = min(self._tokens + added, max(1.0, rate * burst))
        self._filled_at = now
        return rate
