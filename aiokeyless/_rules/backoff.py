"""Which failures are transient, how long to pause after them, and what pause the service asks for itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tenacity import wait_random_exponential

from aiokeyless.errors import NotJsonError, StatusError, TransportError
from aiokeyless.schedule import next_delay

if TYPE_CHECKING:
    from aiokeyless.errors import KeylessError

#: The documentation says "try again later" of a 500; the rest are what gateways send for a moment.
TRANSIENT_STATUSES: Final = frozenset({408, 425, 429})
#: Full jitter in a window that doubles from 0.5 s to 30 s.
_ERROR_BACKOFF: Final = wait_random_exponential(multiplier=0.5, max=30.0)


def is_transient(error: KeylessError) -> bool:
    """Return whether the same request may well succeed a little later."""
    if isinstance(error, StatusError):
        return error.status in TRANSIENT_STATUSES or 500 <= error.status < 600
    return isinstance(error, TransportError | NotJsonError)


def error_delay(failures: int) -> float:
    """Return the seconds to wait after so many failures in a row, at random."""
    return next_delay(_ERROR_BACKOFF, attempt_number=failures, since_start=0.0)


def requested_pause(error: KeylessError) -> float | None:
    """Return the seconds for which the service asks all polls to stop: ``Retry-After`` on 429 and 503."""
    return error.retry_after if isinstance(error, StatusError) and error.status in {429, 503} else None
