"""The pause after a transient failure, and the pause that the service asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tenacity import wait_exponential, wait_random_exponential

from aiokeyless.errors import StatusError
from aiokeyless.schedule import next_delay

if TYPE_CHECKING:
    from aiokeyless.errors import KeylessError

#: Seconds of a ``Retry-After`` that count. A value of days must not turn a wait into a sleep.
MAX_PAUSE: Final = 120.0
#: The delay is random in the second half of a window, which doubles from 0.5 s to 5 s. Delays below 2.5 s cost requests
#: while a service is down. Delays above 5 s cost time after it has recovered.
_ERROR_BACKOFF: Final = wait_exponential(multiplier=0.25, max=2.5) + wait_random_exponential(multiplier=0.25, max=2.5)
#: No more failures than this count while they may be short: the delays are 0.5 to 1 s.
MOST_AT_FIRST: Final = 2
#: Seconds for which an outage, or an operation that fails, counts as short.
SHORT: Final = 30.0
#: Answers fail at random if a good one came within so many seconds.
GOOD: Final = 1.0
#: After so many failures the delay is the longest.
_MANY: Final = 10


def error_delay(failures: int) -> float:
    """Return the random delay, in seconds, after so many failures in a row."""
    return next_delay(_ERROR_BACKOFF, attempt_number=failures, since_start=0.0)


def failures_that_count(failures: int, *, since_own: float, since_good: float, is_spared: bool) -> int:
    """Return how many of an operation's failures in a row count for its backoff.

    A longer backoff would make the wait late and spare the service little, if the service answers other polls well, or
    if few polls are sent anyway.

    Args:
        failures: Failures in a row.
        since_own: Seconds since a poll started that was answered well. If there is none, since the operation's origin.
        since_good: Seconds since a good answer to any poll.
        is_spared: Whether few polls are sent anyway.
    """
    is_short = since_own <= SHORT and (is_spared or since_good <= GOOD)
    return min(failures, MOST_AT_FIRST) if is_short else failures


def requested_pause(error: KeylessError) -> float:
    """Return the seconds of the pause that the service asks for by ``Retry-After``.

    On 429 it is at most 120 s. On 503 it is at most the longest delay: one of many servers may say it for itself.
    """
    if not isinstance(error, StatusError) or not error.retry_after:
        return 0.0
    if error.status == 429:
        return min(error.retry_after, MAX_PAUSE)
    return min(error.retry_after, error_delay(_MANY)) if error.status == 503 else 0.0
