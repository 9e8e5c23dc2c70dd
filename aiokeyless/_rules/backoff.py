"""The pause after a transient failure, and the pause that the service asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tenacity import wait_exponential, wait_random_exponential

from aiokeyless.errors import StatusError
from aiokeyless.schedule import next_delay

if TYPE_CHECKING:
    from aiokeyless.errors import KeylessError

_MAY_ASK_FOR_A_PAUSE: Final = frozenset({429, 503})
#: Seconds of a ``Retry-After`` that count. A value of days must not turn a wait into a sleep.
MAX_PAUSE: Final = 120.0
#: The delay is random in the second half of a window, which doubles from 0.5 s to 5 s. Delays below 2.5 s cost requests
#: while a service is down. Delays above 5 s cost time after it has recovered.
_ERROR_BACKOFF: Final = wait_exponential(multiplier=0.25, max=2.5) + wait_random_exponential(multiplier=0.25, max=2.5)
#: If answers fail at random, no more failures than this count.
_AT_RANDOM: Final = 2
#: They do if a good answer came within so many seconds, and one to this operation within so many. One of its polls may
#: have hung in between.
_GOOD: Final = 1.0
_OWN: Final = 30.0


def error_delay(failures: int) -> float:
    """Return the random delay, in seconds, after so many failures in a row."""
    return next_delay(_ERROR_BACKOFF, attempt_number=failures, since_start=0.0)


def failures_that_count(failures: int, *, since_good: float, since_own: float) -> int:
    """Return how many of an operation's transient failures in a row count for its backoff.

    If the service answers other polls well, and answered this operation well lately, its answers fail at random. A
    longer backoff would then make the wait late and spare the service little.

    Args:
        failures: Failures in a row.
        since_good: Seconds since a good answer to any poll.
        since_own: Seconds since a poll of this operation started that was answered well.
    """
    return min(failures, _AT_RANDOM) if since_good <= _GOOD and since_own <= _OWN else failures


def requested_pause(error: KeylessError) -> float:
    """Return the seconds of the pause that the service asks for: ``Retry-After`` on 429 and 503; at most 120."""
    if isinstance(error, StatusError) and error.status in _MAY_ASK_FOR_A_PAUSE:
        return min(error.retry_after or 0.0, MAX_PAUSE)
    return 0.0
