"""What the result of one poll means for a wait. Pure; the poller and the worker map it to their actions.

All cases, in the order in which they are checked, as docs/rules.md numbers them:

| case | the poll brought | before the deadline | the final poll |
|---|---|---|---|
| O1 | an approval of this operation | APPROVED | APPROVED |
| O2 | an answer that is rejected | REJECTED | REJECTED |
| O3 | pending | PENDING | TIMED_OUT |
| O4 | a transient failure | TRANSIENT | UNANSWERED |
| O5 | 404, the operation was seen before | TRANSIENT | UNANSWERED |
| O6 | 404 that counts as pending | PENDING | TIMED_OUT |
| O7 | any other error | FAILED | FAILED |

A 404 counts as pending if the operation is young, or if the phone will create it.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, Final, NamedTuple

from aiokeyless.errors import KeylessError, NotFoundError
from aiokeyless.events import PollResult
from aiokeyless.models import Operation, OperationState

from .approval import Rejection, Verdict, evaluate

if TYPE_CHECKING:
    from aiokeyless.ticket import ApprovalTicket

#: The result of nearly all polls. A name is found faster than a member of an enum.
_POLL_PENDING: Final = PollResult.PENDING
_STATE_PENDING: Final = OperationState.PENDING.value
#: Seconds after a create within which a replica that lags may answer 404.
YOUNG: Final = 5.0


class Result(Enum):
    """What to do with a wait after a poll."""

    APPROVED = auto()
    """End it with the operation."""
    PENDING = auto()
    """Go on; the schedule sets the next poll."""
    TRANSIENT = auto()
    """Go on; the backoff sets the next poll."""
    TIMED_OUT = auto()
    """End it with `ApprovalTimeoutError`: time is up, and the operation was pending."""
    UNANSWERED = auto()
    """Repeat the final poll while time is left. Then end the wait with `ApprovalUnknownError`."""
    REJECTED = auto()
    """End it with the error of the rejection."""
    FAILED = auto()
    """End it with the error of the poll."""


class Outcome(NamedTuple):
    """A result, and for REJECTED the reason."""

    result: Result
    rejection: Rejection | None = None


class PollFacts(NamedTuple):
    """The facts about a wait that decide what the result of a poll means for it.

    Attributes:
        operation_id: The operation that is polled.
        ticket: Its ticket; None for a bare id.
        is_final: Whether the poll started at the deadline of the wait or later.
        may_be_missing: Whether a 404 counts as pending: the phone will create the operation, or it is younger than
            `YOUNG` and a replica may lag.
        was_seen: Whether an earlier poll found the operation.
    """

    operation_id: str
    ticket: ApprovalTicket | None
    is_final: bool
    may_be_missing: bool
    was_seen: bool


_APPROVED: Final = Outcome(Result.APPROVED)
_PENDING: Final = (Outcome(Result.PENDING), Outcome(Result.TIMED_OUT))  # by is_final
_TRANSIENT: Final = (Outcome(Result.TRANSIENT), Outcome(Result.UNANSWERED))
_FAILED: Final = Outcome(Result.FAILED)


def poll_outcome(answer: Operation | KeylessError, facts: PollFacts) -> Outcome:
    """Return what the result of a poll means for a wait.

    Args:
        answer: The operation as the service answered it, or the failure of the poll.
        facts: The facts about the wait.
    """
    if isinstance(answer, KeylessError):
        return _after_error(answer, facts)
    verdict = evaluate(answer, facts.operation_id, facts.ticket)
    if verdict is Verdict.APPROVED:
        return _APPROVED
    if verdict is Verdict.PENDING:
        return _PENDING[facts.is_final]
    return Outcome(Result.REJECTED, verdict)


def _after_error(error: KeylessError, facts: PollFacts) -> Outcome:
    if error.is_transient:
        return _TRANSIENT[facts.is_final]
    if isinstance(error, NotFoundError):
        if facts.was_seen:  # operations do not vanish, so an answer of 404 now is a fault of the moment
            return _TRANSIENT[facts.is_final]
        if facts.may_be_missing:
            return _PENDING[facts.is_final]
    return _FAILED


def poll_result(answer: Operation | KeylessError | None) -> PollResult:
    """Return the result of one poll for listeners. What it means for the waits makes no difference.

    Args:
        answer: The operation, or the failure; None if the poll was cut off.
    """
    if isinstance(answer, Operation):
        if answer.state == _STATE_PENDING:
            return _POLL_PENDING
        return PollResult.APPROVED if answer.is_approved else PollResult.INVALID
    if isinstance(answer, NotFoundError):
        return PollResult.MISSING
    return PollResult.CUT_OFF if answer is None else PollResult.FAILED
