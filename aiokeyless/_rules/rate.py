"""Limits the polls that start in a second: a token bucket whose rate adapts to the service's refusals. Pure.

A refusal is a 429. It concerns its own operation, or the tenant, whose limit all polls must respect. The caller records
what happened and when, and asks when the next poll may start.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from .backoff import requested_pause

if TYPE_CHECKING:
    from aiokeyless.errors import RateLimitError

#: Seconds of polls that may start at once after a quiet time. Final polls may overdraw the bucket by as many.
_BURST: Final = 1.0
#: Seconds after a refusal until the rate is back where it was refused. Most of the way takes a few seconds, so polls
#: stay close to the service's limit. The rest is slow, so the service seldom refuses again.
_RECOVERY: Final = 20.0
#: The exponent of that curve. It must be odd.
_CURVE: Final = 9
#: Seconds after which a refusal no longer counts.
_FORGOTTEN: Final = 120.0
#: The lowest rate that is halved. A service that refuses everything is a matter for the budget.
_LEAST: Final = 1.0
#: Seconds after a refusal in which further refusals are about the polls before it.
_SETTLED: Final = 1.0
_ROUNDING: Final = 1e-6
#: Seconds over which polls are counted, to find the rate that was refused.
_COUNTED: Final = 1.0
#: If over a third of the last forty polls were refused, the limit is the tenant's, and all polls must respect it. While
#: they respect one, a sudden onset shows that they have reached it again: more than three times as many refusals as
#: among the forty polls before. If somebody else uses up the limit, refusals come at any rate of ours.
_LAST: Final = 40
_MANY_REFUSED: Final = 14
_ONSET: Final = 3


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
        self._refusals = 0  # a bit for each of the last polls, the newest one lowest: whether it was refused
        self.paused_until: float = -math.inf
        """The end of the pause that the service asked for: no ordinary poll starts before."""

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
        if self.paused_until > now:
            return self.paused_until
        if self._tokens >= 1.0:  # as of the last poll; there are more by now
            return now
        rate = self._fill(now)
        return now + max(0.0, 1.0 - self._tokens) / rate

    def room(self, now: float) -> int | None:
        """Return how many polls may start at once; None if there is no limit."""
        if self.paused_until > now:
            return 0
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

    def record_answer(self) -> None:
        """Record that a poll was not refused."""
        if self._refusals:
            self._shift(is_refusal=False)

    def record_refusal(
        self, now: float, error: RateLimitError, *, started_at: float, is_final: bool, was_good: bool
    ) -> None:
        """Record a 429. If the limit is the tenant's, halve the rate, and pause all polls if the service asks for it.

        Args:
            now: The time.
            error: The refusal.
            started_at: When the poll started. If the rate was halved since then, it is not halved again.
            is_final: Whether the poll was a final one, which starts in a pause, too, and so prolongs none.
            was_good: Whether the operation's poll before was answered well. Otherwise this is no sign of the tenant's
                limit: operations with limits of their own are refused again and again.
        """
        if not was_good:
            return
        self._shift(is_refusal=True)
        if not self._is_tenants(now):
            return
        pause = requested_pause(error)
        if pause and not (is_final and now < self.paused_until):
            self.paused_until = max(self.paused_until, now + pause)
        if started_at >= self._refused_at + _SETTLED:
            counted = max(self._counted, self._counted_before)
            self._refused = min(self._limit, max(_LEAST, min(self.per_second(now), counted)))
            self._refused_at = now
            self._fill(now)

    def _is_tenants(self, now: float) -> bool:
        """Return whether many of the last polls were refused, or fewer while an earlier refusal limits the rate."""
        before = (self._refusals >> _LAST).bit_count()
        last = self._refusals.bit_count() - before
        return last >= _MANY_REFUSED or (self.is_limited(now) and last >= _ONSET + _ONSET * before)

    def _shift(self, *, is_refusal: bool) -> None:
        self._refusals = (self._refusals << 1 | is_refusal) & ((1 << 2 * _LAST) - 1)

    def _fill(self, now: float) -> float:
        """Add the tokens since the last time, as many as the bucket holds; return the rate."""
        rate = self.per_second(now)
        if rate == math.inf:
            self._tokens = math.inf
        else:
            added = max(0.0, now - self._filled_at) * rate
            # The service may count polls over a shorter time than a second.
            most = rate * _BURST if self._refused == math.inf else 1.0
            self._tokens = min(self._tokens + added, max(1.0, most))
        self._filled_at = now
        return rate
