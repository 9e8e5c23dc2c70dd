"""The backoff of transient failures, and how long the service may ask to be left alone."""

from __future__ import annotations

from typing import Final

from tenacity import wait_random_exponential

from aiokeyless.schedule import next_delay

# The pace of transient failures: full jitter in a window that doubles from 0.5 s to 30 s.
ERROR_PACE: Final = wait_random_exponential(multiplier=0.5, max=30.0)


MAX_HOLD: Final = 120.0  # seconds: a Retry-After of days must not turn a wait into a sleep


def error_delay(failures: int) -> float:
    """Return the seconds to wait after so many failures in a row, at random."""
    return next_delay(ERROR_PACE, attempt_number=failures, since_start=0.0)
