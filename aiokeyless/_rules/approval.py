"""The verdict on one answer: still pending, approved, or not to be trusted; and the errors that end a wait.

This is where money is at stake, so it is small and pure: an answer counts as an approval only if everything that is
known about the operation agrees, and whatever contradicts it is an error, never an approval and never patience.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from aiokeyless.errors import (
    ApprovalError,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    InconsistentOperationError,
    KeylessError,
    OperationMismatchError,
)
from aiokeyless.models import Operation, OperationState
from aiokeyless.ticket import ApprovalTicket, payload_digest

__all__ = ["Distrust", "Verdict", "WaitRecord", "distrusted", "is_same_user", "judge", "timed_out", "unknown"]


class Verdict(Enum):
    """What a trustworthy answer says."""

    PENDING = "pending"
    APPROVED = "approved"


class Distrust(NamedTuple):
    """Why an answer is not to be trusted, and as which error that is raised."""

    error: type[OperationMismatchError | InconsistentOperationError]
    reason: str


class WaitRecord(NamedTuple):
    """What an error tells of the wait that it ends."""

    operation_id: str
    last_operation: Operation | None
    last_error: KeylessError | None
    polls: int
    elapsed: float
    ticket: ApprovalTicket | None


def judge(operation: Operation, operation_id: str, ticket: ApprovalTicket | None = None) -> Verdict | Distrust:
    """Judge one answer of ``GET /v2/operations/{operationId}``.

    Args:
        operation: The answer.
        operation_id: The id that was asked for.
        ticket: What else is known about the operation; None for a bare id.

    Returns:
        The verdict, or why the answer is not to be trusted: checked for pending answers too, so that a mix-up is
        found at the first poll and not at the end.
    """
    mismatch = _mismatch(operation, operation_id, ticket)
    if mismatch is not None:
        return Distrust(OperationMismatchError, mismatch)
    if operation.is_approved:
        return Verdict.APPROVED
    if operation.state == OperationState.PENDING:  # with result true, too: one sign of approval is not two
        return Verdict.PENDING
    if operation.state == OperationState.APPROVED:
        return Distrust(InconsistentOperationError, "its state is 'approved', but its result is false")
    return Distrust(InconsistentOperationError, "its state is not documented; .last_operation has it")


def is_same_user(answered: str, asked: str) -> bool:
    """Whether two user ids are the same: ASCII hex of either case.

    Outside of ASCII, upper case is no comparison: that of the ligature of two f is "FF".
    """
    return answered.isascii() and answered.upper() == asked.upper()


# What an answer says is not quoted here: it may echo the API key.
def _mismatch(operation: Operation, operation_id: str, ticket: ApprovalTicket | None) -> str | None:
    if operation.operation_id != operation_id:
        return "the answer is about another operation; .last_operation has it"
    if ticket is None:
        return None
    if not is_same_user(operation.user_id, ticket.user_id):
        return f"it does not belong to user {ticket.user_id!r}; .last_operation has its user"
    if payload_digest(operation.operation_payload) != ticket.payload_sha256:
        return "its payload is not the one that was created"
    if ticket.external_user_id and operation.external_user_id != ticket.external_user_id:
        return "its external user id is not the one that was created"
    return None


def distrusted(distrust: Distrust, record: WaitRecord) -> ApprovalError:
    """Make the error for an answer that is not to be trusted."""
    message = f"operation {record.operation_id!r} is not to be trusted: {distrust.reason}; treat it as refused"
    return distrust.error(message, **record._asdict())


def timed_out(record: WaitRecord) -> ApprovalTimeoutError:
    """Make the error for a wait whose final look saw the operation pending."""
    message = (
        f"operation {record.operation_id!r} was still {_not_yet(record)} after {record.elapsed:.1f} s and "
        f"{record.polls} polls; a timeout is not a denial: it can still be approved, look again with get_operation"
    )
    return ApprovalTimeoutError(message, **record._asdict())


def _not_yet(record: WaitRecord) -> str:
    return "pending" if record.last_operation is not None else "missing"


def unknown(record: WaitRecord) -> ApprovalUnknownError:
    """Make the error for a wait whose final look got no answer."""
    message = (
        f"operation {record.operation_id!r}: time is up after {record.elapsed:.1f} s and {record.polls} polls, and the "
        f"final look got no answer; approved or not, nobody knows: look again with get_operation before you repeat it"
    )
    return ApprovalUnknownError(message, **record._asdict())
