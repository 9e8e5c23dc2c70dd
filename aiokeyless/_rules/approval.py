"""The verdict on one answer: pending, approved, or rejected; and the errors that end a wait without an approval.

Money depends on this module, so it is small and pure. An answer counts as an approval only if it agrees with everything
that is known about the operation. An answer that contradicts it is an error: never an approval, never a reason to wait.

Rule 2 of docs/rules.md. Source: Keyless documentation, Server API / Operations, "Get operation".
"""

from __future__ import annotations

import re
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

from aiokeyless.errors import (
    ApprovalError,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    InconsistentOperationError,
    KeylessError,
    OperationMismatchError,
)
from aiokeyless.models import AuthType, Operation, OperationState
from aiokeyless.ticket import ApprovalTicket, payload_digest

if TYPE_CHECKING:
    from .final import Unanswered


class Verdict(Enum):
    """What one answer, or the failure of a poll, means for a wait."""

    APPROVED = "approved"
    """End it with the operation."""
    PENDING = "pending"
    """Go on; the schedule sets the next poll. If this poll was the final one, time is up."""
    TRANSIENT = "transient"
    """Go on; the backoff sets the next poll. A final poll is repeated while time is left."""
    FAILED = "failed"
    """End it with the error of the poll."""


class Rejection(Enum):
    """Why an answer is rejected. Its value is a clause for the error's message, see `describe`."""

    OTHER_OPERATION = "the answer is about another operation"
    OTHER_USER = "it belongs to another user than the ticket"
    OTHER_PAYLOAD = "its payload is not the one that was created"
    OTHER_EXTERNAL_USER = "its external user id is not the one that was created"
    OTHER_AUTH_TYPE = "its factor is not the required one"
    RESULT_IS_FALSE = "its state is 'approved', but its result is false"
    UNKNOWN_STATE = "its state is not documented"

    @property
    def is_mismatch(self) -> bool:
        """Whether the answer is about another operation, user or payload, or has another factor."""
        return self not in {Rejection.RESULT_IS_FALSE, Rejection.UNKNOWN_STATE}

    def describe(self, answer: Operation | KeylessError | None, ticket: ApprovalTicket | None) -> str:
        """Return the reason for a message.

        Of the answer, which may echo the API key, it quotes nothing but a documented factor.
        """
        if self is not Rejection.OTHER_AUTH_TYPE or not isinstance(answer, Operation) or ticket is None:
            return self.value
        answered = "no factor"
        if answer.auth_type:
            answered = repr(answer.auth_type) if answer.auth_type in _FACTORS else "an undocumented factor"
        return f"{self.value}: it must be {ticket.require_auth_type!r}, and the answer has {answered}"


#: Nearly all answers. A name is found faster than a member of an enum.
STATE_PENDING: Final = OperationState.PENDING.value
_PENDING: Final = Verdict.PENDING
_FACTORS: Final = frozenset(factor.value for factor in AuthType)
_PATH: Final = re.compile(r"^[A-Z]+ /\S+ ")


class WaitRecord(NamedTuple):
    """What an error reports about the wait that it ends."""

    operation_id: str
    last_operation: Operation | None
    last_error: KeylessError | None
    polls: int
    elapsed: float
    ticket: ApprovalTicket | None

    @property
    def length(self) -> str:
        """How long the wait was, for messages."""
        return f"{self.elapsed:.1f} s and {self.polls} {'poll' if self.polls == 1 else 'polls'}"

    @property
    def check(self) -> str:
        """How to learn the outcome, for messages. Only a wait for a ticket compares user and payload."""
        return "call get_operation" if self.ticket is None else "wait for its ticket again, which polls once"


def evaluate(operation: Operation, operation_id: str, ticket: ApprovalTicket | None = None) -> Verdict | Rejection:
    """Evaluate one answer of ``GET /v2/operations/{operationId}``.

    Pending answers are checked like approved ones, so the first poll already finds a mix-up.
    """
    if operation.operation_id != operation_id:
        return Rejection.OTHER_OPERATION
    if ticket is not None and (mismatch := _mismatch(operation, ticket)) is not None:
        return mismatch
    if operation.state == STATE_PENDING:  # even with result true: an approval needs both signs
        return _PENDING
    if operation.state != OperationState.APPROVED:
        return Rejection.UNKNOWN_STATE
    return Verdict.APPROVED if operation.is_approved else Rejection.RESULT_IS_FALSE


def _mismatch(operation: Operation, ticket: ApprovalTicket) -> Rejection | None:
    if not is_same_user(operation.user_id, ticket.user_id):
        return Rejection.OTHER_USER
    if payload_digest(operation.operation_payload) != ticket.payload_sha256:
        return Rejection.OTHER_PAYLOAD
    if ticket.external_user_id and operation.external_user_id != ticket.external_user_id:
        return Rejection.OTHER_EXTERNAL_USER
    required, answered = ticket.require_auth_type, operation.auth_type
    # The factor is optional in the API: while the operation is pending, there may be none yet.
    if required and answered != required and (answered or operation.state == OperationState.APPROVED):
        return Rejection.OTHER_AUTH_TYPE
    return None


def is_same_user(answered: str, asked: str) -> bool:
    """Return whether two user ids are equal: ASCII hex of either case.

    Only ASCII is compared, since the upper case of other characters may be ASCII: the ligature of two f becomes "FF".
    """
    return answered.isascii() and answered.upper() == asked.upper()


def rejection_error(rejection: Rejection, record: WaitRecord) -> ApprovalError:
    """Make the error for an answer that is rejected; the caller sets ``last_operation`` to that answer."""
    message = (
        f"operation {record.operation_id!r} was rejected: {rejection.describe(record.last_operation, record.ticket)}; "
        "treat it as refused, .last_operation has the answer"
    )
    error = OperationMismatchError if rejection.is_mismatch else InconsistentOperationError
    return error(message, **record._asdict())


def timeout_error(record: WaitRecord) -> ApprovalTimeoutError:
    """Make the error for a wait whose final poll found the operation pending."""
    seen = "pending" if record.last_operation is not None else "missing"
    message = (
        f"operation {record.operation_id!r} was still {seen} after {record.length}; a timeout is not a denial: it can "
        f"still be approved; to check it, {record.check}"
    )
    return ApprovalTimeoutError(message, **record._asdict())


def unknown_error(
    record: WaitRecord, why: Unanswered, others_failure: KeylessError | None = None
) -> ApprovalUnknownError:
    """Make the error for a wait whose final poll got no answer, or could not be sent: then others' polls failed."""
    failure = record.last_error if others_failure is None else describe_apart(others_failure)
    cause = "" if failure is None else f" (last failure: {failure})"
    message = (
        f"operation {record.operation_id!r}: time is up after {record.length}, and {why.value}{cause}; the outcome is "
        f"unknown; before you repeat anything, {record.check}"
    )
    return ApprovalUnknownError(message, **record._asdict())


def describe_apart(failure: KeylessError) -> str:
    """Return the text of an error without its path, which names the operation or the user of another request."""
    return _PATH.sub("", str(failure))
