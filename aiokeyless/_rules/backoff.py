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
#: While the service answers, no more failures than this count: the delays are 0.5 to 1 s.
MOST_AT_FIRST: Final = 2
#: After so many in a row one more counts, so that no operation is polled more often than by a loop of one a second.
OFTEN: Final = 32
#: Seconds without a good answer after which all failures count.
SHORT: Final = 30.0
#: After so many failures the delay is the longest.
_MANY: Final = 10


def error_delay(failures: int) -> float:
    """Return the random delay, in seconds, after so many failures in a row."""
    return next_delay(_ERROR_BACKOFF, attempt_number=failures, since_start=0.0)


def failures_that_count(failures: int, *, since_good: float, is_refusal: bool) -> int:
    """Return how many of an operation's failures in a row count for its backoff.

    A longer backoff makes the wait late, and the budget spares the service.

    Args:
        failures: Failures in a row.
        since_good: Seconds since a good answer to any poll, or since the operation's origin if that is later.
        is_refusal: Whether the last one was a 429. A service that refuses polls is not to be asked often.
    """
    if is_refusal or since_good > SHORT:
        return failures
    return min(failures, MOST_AT_FIRST + (failures >= OFTEN))


def requested_pause(error: KeylessError) -> float:
    """Return the seconds of the pause that the service asks for by ``Retry-After``.

    On 429 it is at most 120 s. On 503 it is at most the longest delay: one of many servers may say it for itself.
    """
    if not isinstance(error, StatusError) or not error.retry_after:
        return 0.0
    if error.status == 429:
        return min(error.retry_after, MAX_PAUSE)
    return min(error.retry_after, error_delay(_MANY)) if error.status == 503 else 0.0
