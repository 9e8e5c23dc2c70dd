"""What the result of one poll means for a wait. Pure; the poller and the worker map it to their actions.

"What a poll's result means" in docs/rules.md has all cases, in the order in which they are checked. If the poll was the
final one, PENDING means "timed out", and TRANSIENT "unanswered".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aiokeyless.errors import (
    CachedAnswerError,
    ConfigurationError,
    DecodeError,
    NotFoundError,
    RateLimitError,
    StatusError,
)
from aiokeyless.events import PollResult
from aiokeyless.models import Operation

from .approval import STATE_PENDING, Verdict, evaluate

if TYPE_CHECKING:
    from aiokeyless.errors import KeylessError
    from aiokeyless.ticket import ApprovalTicket

    from .approval import Rejection

#: The result of nearly all polls. A name is found faster than a member of an enum.
_POLL_PENDING: Final = PollResult.PENDING
#: Seconds after a create within which a replica that lags may answer 404.
YOUNG: Final = 5.0
#: Seconds of unexpected failures that end a wait without a deadline; of refusals of the key alone, that end all waits.
UNEXPECTED_FOR: Final = 60.0


def poll_verdict(
    answer: Operation | KeylessError,
    operation_id: str,
    ticket: ApprovalTicket | None,
    *,
    may_be_missing: bool,
    was_seen: bool,
) -> Verdict | Rejection:
    """Return what the result of a poll means for a wait.

    A 404 may count as pending since the caller says so, or the operation is younger than `YOUNG`, as a replica may lag.
    It always does if the ticket says that the phone starts the operation.
    """
    if isinstance(answer, Operation):
        return evaluate(answer, operation_id, ticket)
    if is_failure(answer, was_seen=was_seen):
        return Verdict.TRANSIENT
    may_be_missing = may_be_missing or (ticket is not None and ticket.started_by == "phone")
    return Verdict.PENDING if may_be_missing and isinstance(answer, NotFoundError) else Verdict.FAILED


def is_failure(error: KeylessError, *, was_seen: bool) -> bool:
    """Return whether the error of a poll is a failure of the moment: of the service, or of a gateway before it.

    Operations do not vanish, and a key that may read one may go on reading it. So once it was seen, any status is odd,
    and so is an answer that cannot be read.
    """
    is_odd = isinstance(error, StatusError | DecodeError)
    return error.is_transient or (was_seen and is_odd)


def is_service_well(answer: Operation | KeylessError, *, was_seen: bool) -> bool | None:
    """Return what the answer to a poll says about the service: it is well, or fails; None: nothing.

    A 404 is a good answer, unless the operation was seen. An error that ends a wait concerns that wait only, and what a
    cache had stored concerns the cache.
    """
    if isinstance(answer, Operation):
        return True
    if isinstance(answer, CachedAnswerError):
        return None
    if is_failure(answer, was_seen=was_seen):
        return False
    return True if isinstance(answer, NotFoundError) else None


def is_unexpected(error: KeylessError) -> bool:
    """Return whether a failure of a poll, see `is_failure`, is not one that the service itself would give.

    It is a gateway's answer, or about the key: it is refused, or the application's own function returned none.
    """
    return not error.is_transient or isinstance(error, ConfigurationError)


def is_logged(error: KeylessError, *, is_limited: bool) -> bool:
    """Return whether a failure of the moment is for the log: an unexpected one, or a 429 that limits the rate."""
    return is_limited if isinstance(error, RateLimitError) else is_unexpected(error)


def poll_result(answer: Operation | KeylessError | None) -> tuple[PollResult, str | None]:
    """Return the result of one poll for listeners, whatever it means for the waits, and the error's name if it failed.

    The answer is None if the poll was cut off.
    """
    if isinstance(answer, Operation):
        if answer.state == STATE_PENDING:
            return _POLL_PENDING, None
        return PollResult.APPROVED if answer.is_approved else PollResult.INVALID, None
    if isinstance(answer, NotFoundError):
        return PollResult.MISSING, None
    return (PollResult.CUT_OFF, None) if answer is None else (PollResult.FAILED, type(answer).__name__)
