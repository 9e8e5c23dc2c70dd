"""What may be asked of Telemetry to explain a wait, when, and how its answer is put into words. Pure.

An explanation never approves and never ends a wait: what it costs is kept small, and nothing waits for it but, at the
end of a wait, for a moment.

Source: Keyless documentation, Server API / Telemetry.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiokeyless.errors import ApprovalTimeoutError
    from aiokeyless.models import Authentication

PENDING_FOR: Final = 5.0  # seconds: most who approve have done so by then, and need no explanation
INTERVAL: Final = 10.0  # seconds between two requests about one operation
AT_THE_END: Final = 1.0  # seconds that the end of a wait may be delayed by its last request
_MOST_ATTEMPTS: Final = 100  # of one operation; a lockout ends most rows of attempts much earlier
_MOST_REASONS: Final = 3  # in one message


def may_ask(now: float, *, asked_at: float, pending_since: float = -math.inf, deadline: float = math.inf) -> bool:
    """Return whether Telemetry may be asked about an operation now.

    Args:
        now: The time, in seconds; the other arguments are by the same clock.
        asked_at: When it was last asked about this operation; minus infinity if it was not.
        pending_since: Since when the operation is pending.
        deadline: When the wait ends. Shortly before that nothing is asked, so that the end may ask.
    """
    return now - asked_at >= INTERVAL and now - pending_since >= PENDING_FOR and deadline - now >= INTERVAL


def merged(
    known: tuple[Authentication, ...], answered: Sequence[Authentication], operation_id: str
) -> tuple[Authentication, ...]:
    """Return the attempts at one operation, oldest first: Telemetry forgets after ten minutes, a wait may not.

    Args:
        known: What earlier answers told.
        answered: What the latest answer tells, in any order; attempts at other operations are left out, so that
            nothing is explained by them.
        operation_id: The operation.
    """
    fresh = [attempt for attempt in answered if attempt.operation_id == operation_id]
    everything = [*(attempt for attempt in known if attempt not in fresh), *fresh]
    # The timestamps have one form, which sorts as a text does; those without one come first.
    everything.sort(key=lambda attempt: attempt.created_at or "")
    return tuple(everything[-_MOST_ATTEMPTS:])


def in_words(attempts: Sequence[Authentication]) -> str | None:
    """Return a clause about the failed attempts, such as "2 attempts failed: the face did not match (30004)".

    It quotes nothing of the service's texts: an answer may echo anything.

    Returns:
        The clause; None where no attempt failed.
    """
    failed = [attempt for attempt in attempts if attempt.failed]
    if not failed:
        return None
    reasons = list(dict.fromkeys(_reason(attempt) for attempt in failed))[-_MOST_REASONS:]
    return f"{len(failed)} {'attempt' if len(failed) == 1 else 'attempts'} failed: {', '.join(reasons)}"


def explain(error: ApprovalTimeoutError, attempts: tuple[Authentication, ...]) -> None:
    """Add attempts to the error that ends a wait, and to its message those that failed."""
    error.attempts = attempts
    if words := in_words(attempts):
        error.args = (f"{error}; {words}",)


def _reason(attempt: Authentication) -> str:
    code = attempt.error_code or 0
    if not code:
        return "no reason was given"
    return f"{attempt.reason} ({code})" if attempt.reason else f"error {code}"
