"""Limits the polls that start in a second: a token bucket whose rate adapts to the service's refusals. Pure.

The caller records what happened and when, and asks when the next poll may start.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from aiokeyless.errors import RateLimitError

if TYPE_CHECKING:
    from aiokeyless.errors import KeylessError

    from .circuit import Circuit

#: Seconds of polls that may start at once after a quiet time. Final polls may overdraw the bucket by as many.
_BURST: Final = 1.0
#: The same after a refusal, since the service may count polls over a shorter time than a second.
_BURST_AFTER_REFUSAL: Final = 0.1
#: Seconds after a refusal until the rate is back where it was refused. Most of the way takes a few seconds, so polls
#: stay close to the service's limit. The rest is slow, so the service seldom refuses again.
_RECOVERY: Final = 20.0
#: The exponent of that curve. It must be odd.
_CURVE: Final = 9
#: Seconds after which a refusal no longer counts.
_FORGOTTEN: Final = 120.0
#: The lowest rate that is halved. A service that refuses everything is a matter for the circuit.
_LEAST: Final = 1.0
#: Seconds after a refusal in which further refusals are about the polls before it.
_SETTLED: Final = 1.0
_ROUNDING: Final = 1e-6
#: Seconds over which polls are counted, to find the rate that was refused.
_COUNTED: Final = 1.0


class PollRate:
    """A token bucket whose rate the service's 429 halves.

    A refused rate is halved once and then rises. It is back where it was within 20 s, and then rises faster and faster,
    a thousandfold within about a minute. So polls find the limit of a service and stay just below it. If `limit` is
    None, there is none until the service refuses. Times are of one clock, in seconds.
    """

    def __init__(self, limit: float | None) -> None:
        self._limit = math.inf if limit is None else limit
        self._refused = math.inf  # the rate that was refused last
        self._refused_at = -math.inf
        self._tokens = max(1.0, self._limit * _BURST)
        self._filled_at = 0.0
        self._counted = self._counted_before = 0  # polls in the second from `_counted_at` on, and in the one before
        self._counted_at = 0.0

    def per_second(self, now: float) -> float:
        """Return the polls a second that may start now; infinity if there is no limit."""
        if self._refused == math.inf:
            return self._limit
        since = now - self._refused_at
        rate = self._refused * (1.0 + 0.5 * (since / _RECOVERY - 1.0) ** _CURVE)
        if rate >= self._limit or since > _FORGOTTEN:
            self._refused = math.inf
            return self._limit
        return rate

    def is_limited(self, now: float) -> bool:
        """Return whether an earlier refusal limits the rate."""
        return self.per_second(now) < self._limit

    def ready_at(self, now: float) -> float:
        """Return the time from which the next poll may start; not after `now` if it may start at once."""
        if self._tokens >= 1.0:  # as of the last poll; there are more by now
            return now
        rate = self._fill(now)
        return now + max(0.0, 1.0 - self._tokens) / rate

    def room(self, now: float) -> int | None:
        """Return how many polls may start at once; None if there is no limit."""
        self._fill(now)
        return None if self._tokens == math.inf else max(0, math.floor(self._tokens + _ROUNDING))

    def record_poll(self, now: float) -> None:
        """Record that a poll starts. If it did not wait for the rate, as a final poll, later polls make up for it."""
        if now >= self._counted_at + _COUNTED:
            self._counted_before = self._counted if now < self._counted_at + 2 * _COUNTED else 0
            self._counted, self._counted_at = 0, now
        self._counted += 1
        rate = self._fill(now)
        self._tokens = max(self._tokens - 1.0, -max(1.0, rate * _BURST))

    def record_failure(
        self, now: float, circuit: Circuit, error: KeylessError, *, started_at: float, is_probe: bool
    ) -> None:
        """Record a failure that the circuit has recorded: a 429 by the tenant's limit halves the rate."""
        if isinstance(error, RateLimitError) and circuit.record_refusal(
            now, error, is_probe=is_probe, is_limited=self.is_limited(now)
        ):
            self.record_refusal(now, started_at=started_at)

    def record_refusal(self, now: float, *, started_at: float) -> None:
        """Record a 429. If the rate has been halved since that poll started, it is not halved again."""
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
