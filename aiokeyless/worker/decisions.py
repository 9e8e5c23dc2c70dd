"""What one delivery of a request comes to: an outcome to publish, or the delay after which it is delivered again.

Pure, and by the same rules as the poller's: the verdict is `approval`'s, the pace `schedule`'s and `health`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from aiokeyless._http.protocol import is_transient
from aiokeyless._rules.approval import Distrust, Verdict, judge
from aiokeyless._rules.backoff import error_delay
from aiokeyless.errors import DecodeError, KeylessError, OperationMismatchError
from aiokeyless.schedule import next_delay

from .messages import VERSION, ApprovalEvent, Delivery, FailureReason, Outcome

if TYPE_CHECKING:
    from datetime import datetime

    import msgspec
    from tenacity.wait import wait_base

    from aiokeyless.models import Operation

#: Seconds: the shortest delay that the broker is asked for.
_SHORTEST: Final = 0.02
_LONGEST_DETAIL: Final = 500  # characters: a message may name a path, and that an id of 512


class Again(NamedTuple):
    """The request stays in the stream, and is delivered again after so many seconds."""

    delay: float


class Decided(NamedTuple):
    """The request is done: an event, and the ``Nats-Msg-Id`` under which the stream takes it once."""

    event: ApprovalEvent
    message_id: str


Decision = Again | Decided


class Pace(NamedTuple):
    """How to go on after a failure.

    Attributes:
        failures: Failures in a row, of this worker.
        held_for: Seconds for which the service wants to be left alone, or is to be.
    """

    failures: int
    held_for: float

    def pause(self) -> float:
        """Return the seconds to wait, at random."""
        return max(error_delay(self.failures), self.held_for)


def after_creation(delivery: Delivery, now: datetime, schedule: wait_base) -> Decision:
    """Decide after the operation was created just now: nobody has approved in no time, so there is no look yet."""
    return Again(_paced(delivery, now, schedule))


def after_answer(
    delivery: Delivery, operation: Operation, *, sent_at: datetime, now: datetime, schedule: wait_base
) -> Decision:
    """Decide by the answer to a look.

    Args:
        delivery: The delivery.
        operation: The answer.
        sent_at: When the look began; at the deadline or later, it is the last one.
        now: The time.
        schedule: When to look next.
    """
    ticket = delivery.ticket
    verdict = judge(operation, ticket.operation_id, ticket)
    if verdict is Verdict.APPROVED:
        return _decided(delivery, now, Outcome.APPROVED, auth_type=operation.auth_type)
    if isinstance(verdict, Distrust):
        return _distrusted(delivery, now, operation, verdict)
    return _still_pending(delivery, sent_at, now, schedule)


def after_older(delivery: Delivery, operation: Operation, *, now: datetime) -> Decided:
    """Decide about an operation that was there before this request held its id: it is not this request's."""
    verdict = judge(operation, delivery.ticket.operation_id, delivery.ticket)
    if isinstance(verdict, Distrust):
        return _distrusted(delivery, now, operation, verdict)
    if verdict is Verdict.APPROVED:
        detail = "an operation of this id and content was approved before this request asked; one approval counts once"
        return _failed(delivery, now, FailureReason.ALREADY_APPROVED, detail)
    return _failed(delivery, now, FailureReason.CONFLICT, "an operation of this id was there before this request")


def after_conflict(delivery: Delivery, *, now: datetime) -> Decided:
    """Decide about a request whose operation id a different request holds."""
    return _failed(delivery, now, FailureReason.CONFLICT, "the operation id belongs to a different request")


def after_missing(delivery: Delivery, *, sent_at: datetime, now: datetime) -> Decision | None:
    """Decide after a look that found no operation; None: it is to be created, since it is not too late for that."""
    return _decided(delivery, now, Outcome.EXPIRED, answered=True) if is_last(delivery, sent_at) else None


def after_failed_creation(delivery: Delivery, error: KeylessError, *, now: datetime, pace: Pace) -> Decision:
    """Decide after the operation could not be created."""
    if is_transient(error):
        return Again(_cut(delivery, now, pace.pause()))
    reason = FailureReason.UNREADABLE if isinstance(error, DecodeError) else FailureReason.REJECTED
    return _failed(delivery, now, reason, str(error))


def after_failed_look(
    delivery: Delivery, error: KeylessError, *, sent_at: datetime, now: datetime, pace: Pace, grace: float
) -> Decision:
    """Decide after a look has failed.

    Args:
        delivery: The delivery.
        error: The failure.
        sent_at: When the look began.
        now: The time.
        pace: How to go on.
        grace: Seconds past the deadline for which a last look that got no answer is repeated.
    """
    if not is_transient(error):
        reason = FailureReason.UNREADABLE if isinstance(error, DecodeError) else FailureReason.LOOK_REFUSED
        return _failed(delivery, now, reason, str(error))
    if not is_last(delivery, sent_at):
        return Again(_cut(delivery, now, pace.pause()))
    if (sent_at - delivery.ticket.expires_at).total_seconds() < grace:
        # The user may have approved in time: an error at the wrong moment must not cost that.
        return Again(pace.pause())
    return _decided(delivery, now, Outcome.EXPIRED, answered=False)


def after_bug(delivery: Delivery, error: Exception, *, now: datetime) -> Decided:
    """Decide about a request that the worker could not handle: it must not come again forever."""
    detail = f"the worker failed ({type(error).__name__}); see its log"
    return _failed(delivery, now, FailureReason.INTERNAL, detail)


def invalid(
    message: str, number: int, error: KeylessError, context: msgspec.Raw, *, stored_at: datetime, now: datetime
) -> Decided:
    """Decide about a message that is no request.

    Args:
        message: A name of the message that no other one ever has.
        number: Number of this delivery.
        error: What is wrong with it.
        context: What to hand back, as far as it can be found.
        stored_at: When the stream stored it.
        now: The time.
    """
    event = ApprovalEvent(
        version=VERSION,
        outcome=Outcome.FAILED,
        reason=FailureReason.INVALID_REQUEST,
        detail=str(error)[:_LONGEST_DETAIL],
        requested_at=stored_at,
        decided_at=now,
        deliveries=number,
        context=context,
    )
    return Decided(event, message)


def is_last(delivery: Delivery, sent_at: datetime) -> bool:
    """Whether a look that began then is the final one."""
    return sent_at >= delivery.ticket.expires_at


def _still_pending(delivery: Delivery, sent_at: datetime, now: datetime, schedule: wait_base) -> Decision:
    if is_last(delivery, sent_at):
        return _decided(delivery, now, Outcome.EXPIRED, answered=True)
    return Again(_paced(delivery, now, schedule))


def _paced(delivery: Delivery, now: datetime, schedule: wait_base) -> float:
    age = max(0.0, (now - delivery.ticket.created_at).total_seconds())
    return _cut(delivery, now, next_delay(schedule, attempt_number=delivery.number, since_start=age))


def _cut(delivery: Delivery, now: datetime, delay: float) -> float:
    """Cut a delay to the deadline, so that a final look begins there."""
    return max(_SHORTEST, min(delay, delivery.ticket.remaining(now)))


def _distrusted(delivery: Delivery, now: datetime, operation: Operation, distrust: Distrust) -> Decided:
    if distrust.error is not OperationMismatchError:
        return _failed(delivery, now, FailureReason.INCONSISTENT, distrust.reason)
    if operation.operation_id == delivery.ticket.operation_id:
        return _failed(delivery, now, FailureReason.CONFLICT, distrust.reason)
    return _failed(delivery, now, FailureReason.MISMATCH, distrust.reason)


def _failed(delivery: Delivery, now: datetime, reason: FailureReason, detail: str) -> Decided:
    return _decided(delivery, now, Outcome.FAILED, reason=reason, detail=detail)


def _decided(
    delivery: Delivery,
    now: datetime,
    outcome: Outcome,
    *,
    auth_type: str | None = None,
    answered: bool | None = None,
    reason: FailureReason | None = None,
    detail: str | None = None,
) -> Decided:
    ticket = delivery.ticket
    event = ApprovalEvent(
        version=VERSION,
        outcome=outcome,
        operation_id=ticket.operation_id,
        user_id=ticket.user_id,
        external_user_id=ticket.external_user_id,
        payload_sha256=ticket.payload_sha256,
        auth_type=auth_type,
        answered=answered,
        reason=reason,
        detail=None if detail is None else detail[:_LONGEST_DETAIL],
        requested_at=ticket.created_at,
        decided_at=now,
        deliveries=delivery.number,
        context=delivery.context,
    )
    return Decided(event, delivery.name)
