"""The result of a delivery: an outcome to publish, or the delay after which the request is delivered again.

Pure. `poll_verdict` decides what the result of a poll means, for the poller too. This module turns it into an event or
a delay. docs/rules.md lists the differences of the two engines.
"""

from __future__ import annotations

import math
from datetime import timedelta
from enum import Enum, auto
from typing import TYPE_CHECKING, Final, NamedTuple

from aiokeyless._rules import final
from aiokeyless._rules.ambiguity import may_have_taken_effect
from aiokeyless._rules.approval import Rejection, Verdict, evaluate
from aiokeyless._rules.backoff import error_delay
from aiokeyless._rules.outcome import poll_verdict
from aiokeyless.errors import DecodeError, KeylessError, NotFoundError, PermissionDeniedError
from aiokeyless.models import Operation
from aiokeyless.schedule import MIN_DELAY, attempt_at, next_delay

from .broker import ExchangeResult
from .messages import EVENT_VERSION, ApprovalEvent, Delivery, FailureReason, Outcome, read_rest

if TYPE_CHECKING:
    from datetime import datetime

    from tenacity.wait import wait_base

    from aiokeyless.schedule import wait_adaptive

    from .messages import ApprovalRequest, Message

#: Details of a conflict: the id is another operation's, or a different request holds it.
OTHER_OPERATION: Final = "the operation id is taken by another operation"
OTHER_REQUEST: Final = "the operation id belongs to a different request"
_LONGEST_TEXT: Final = 500  # characters of an answer: a longer event might not fit where the request did
#: The zone of the service's times is not documented: one behind UTC makes an operation seem up to 12 hours older.
_MUCH_OLDER: Final = timedelta(hours=15)
_FIRST_POLL: Final = 2  # the delivery of the first poll: the one before it created the operation


class Redeliver(NamedTuple):
    """The request stays at the broker, and is delivered again after `delay` seconds."""

    delay: float
    result: ExchangeResult = ExchangeResult.ANSWERED
    created: ApprovalRequest | None = None  # if its operation is there, and the phone was not told of it


class Decided(NamedTuple):
    """The request is done."""

    event: ApprovalEvent
    polled_at: datetime | None = None  # start of the poll that decided it, from which the schedule learns


Decision = Redeliver | Decided


class Next(Enum):
    """The exchange that a delivery needs before anything can be decided."""

    CREATE = auto()
    """There is no operation yet: create it."""
    POLL = auto()
    """The operation id is taken, perhaps by an earlier delivery of this request: poll the operation."""


class Pacing(NamedTuple):
    """What sets the delays of redeliveries."""

    schedule: wait_base
    failures: int  # of the request in a row, this one included, that count for its backoff
    paused_for: float  # seconds for which the answer asked the request to pause; 0 or less for none
    closed_for: float  # seconds until the budget and the rate let polls start; 0 or less if they do
    grace: float  # seconds

    def after_failure(self, most: float = math.inf) -> float:
        """Return a random number of seconds to wait after a failure. `most` limits a pause longer than the grace."""
        pause = max(self.paused_for, self.closed_for)
        return max(error_delay(self.failures), pause if pause <= self.grace else min(pause, most))


def after_creation(delivery: Delivery, now: datetime, pacing: Pacing) -> Redeliver:
    """Decide after the operation was created. No user approves at once, so do not poll yet."""
    return Redeliver(_scheduled_delay(delivery, now, pacing), ExchangeResult.CREATED, delivery.request)


def after_conflict(delivery: Delivery, now: datetime, pacing: Pacing) -> Redeliver:
    """Decide after the id was taken, perhaps by an earlier create of this request. A replica may lag behind."""
    return Redeliver(_scheduled_delay(delivery, now, pacing), ExchangeResult.CREATED, find_unannounced(delivery))


def find_unannounced(delivery: Delivery) -> ApprovalRequest | None:
    """Return the request of an operation that is there, if no earlier delivery can have known that.

    The answer to its create was lost. A delivery that is confirmed to have created it, or finds it, does not fail.
    """
    return delivery.request if delivery.message.has_only_failed else None


def after_poll(
    delivery: Delivery,
    answer: Operation | KeylessError,
    *,
    polled_at: datetime,
    now: datetime,
    pacing: Pacing,
    was_created: bool,
    grace_left: float,
) -> Decision | Next:
    """Decide by the result of a poll. Return `Next.CREATE` if there is no operation, and it is not too late for it.

    `grace_left` is `Grace.left` when the poll started, so a pause that its answer asks for is not in it.

    If this request may have created the operation, as far as the broker knows, an odd answer says nothing about it: see
    `is_failure`.
    """
    ticket = delivery.ticket
    # No delivery knows what an earlier one saw. That one may have ended before it created the operation.
    verdict = poll_verdict(answer, ticket.operation_id, ticket, may_be_missing=True, was_seen=was_created)
    if isinstance(verdict, Rejection):
        return _reject(delivery, verdict, answer, now=now)
    was_final = is_final(delivery, polled_at)
    if verdict is Verdict.PENDING and not was_final:
        if delivery.is_started_by_phone:  # nothing is to be created, and the application itself told the phone
            return Redeliver(_scheduled_delay(delivery, now, pacing))
        # Not after the deadline: another worker may have decided by then that the user was not asked.
        may_create = isinstance(answer, NotFoundError) and not is_final(delivery, now)
        created = find_unannounced(delivery) if isinstance(answer, Operation) else None
        return Next.CREATE if may_create else Redeliver(_scheduled_delay(delivery, now, pacing), created=created)
    if verdict is Verdict.TRANSIENT:
        if not was_final:
            return Redeliver(_cut_to_deadline(delivery, now, pacing.after_failure()), ExchangeResult.FAILED)
        # If no poll may start for longer than that, the application still gets an outcome in time.
        if grace_left > 0.0:  # no caller waits for the outcome, so the repetition may be later than that
            return Redeliver(pacing.after_failure(grace_left), ExchangeResult.FAILED)
    return _end(delivery, answer, verdict, now)._replace(polled_at=polled_at)


def _end(delivery: Delivery, answer: Operation | KeylessError, verdict: Verdict, now: datetime) -> Decided:
    """Decide by a verdict that ends the request."""
    if isinstance(answer, Operation) and verdict is Verdict.APPROVED:
        return _decide(delivery, now, Outcome.APPROVED, auth_type=answer.auth_type)
    if isinstance(answer, KeylessError) and verdict is Verdict.FAILED:
        reason = FailureReason.UNREADABLE if isinstance(answer, DecodeError) else FailureReason.POLL_REFUSED
        return fail(delivery, reason, str(answer), now=now)
    # If the answer does not show that the user was asked, the claim may.
    asked, answered = isinstance(answer, Operation), verdict is Verdict.PENDING
    detail = None if answered else str(answer)
    return _decide(delivery, now, Outcome.EXPIRED, answered=answered, asked=asked, detail=detail)


def is_older(operation: Operation, delivery: Delivery) -> bool:
    """Return whether an operation was there long before its request, or may have been."""
    created_at = operation.created_at
    return created_at is None or delivery.message.stored_at - created_at > _MUCH_OLDER


def after_unclaimed(delivery: Delivery, operation: Operation, *, now: datetime) -> Decided:
    """Decide about an operation under an id that this request does not hold: it is not this request's."""
    verdict = evaluate(operation, delivery.ticket.operation_id, delivery.ticket)
    if isinstance(verdict, Rejection):
        return _reject(delivery, verdict, operation, now=now)
    if verdict is Verdict.APPROVED:
        detail = "an operation of this id and content was approved before this request asked; one approval counts once"
        return fail(delivery, FailureReason.ALREADY_APPROVED, detail, now=now)
    return fail(delivery, FailureReason.CONFLICT, OTHER_OPERATION, now=now)


def after_failed_creation(
    delivery: Delivery, error: KeylessError, *, now: datetime, pacing: Pacing, may_exist: bool
) -> Decision:
    """Decide after the operation could not be created.

    If an earlier attempt may have created it, the user may have been asked.
    """
    if error.is_transient:
        return Redeliver(_cut_to_deadline(delivery, now, pacing.after_failure()), ExchangeResult.FAILED)
    if may_have_taken_effect(error) or (may_exist and isinstance(error, NotFoundError | PermissionDeniedError)):
        # Polls find out; a 403 or 404 is a gateway's.
        return Redeliver(_scheduled_delay(delivery, now, pacing), ExchangeResult.FAILED)
    reason = FailureReason.POLL_REFUSED if may_exist else FailureReason.REJECTED
    return fail(delivery, reason, str(error), now=now)


def after_outage(delivery: Delivery, failure: str, *, now: datetime) -> Decided:
    """Decide about a request whose final poll got no answer in time, and can get none soon."""
    detail = f"no final poll could be sent, since Keyless is away: {failure}"
    return _decide(delivery, now, Outcome.EXPIRED, answered=False, asked=False, detail=detail)


def after_bug(delivery: Delivery, error: Exception, *, now: datetime) -> Decided:
    """Decide about a request that the worker could not handle: it must not be delivered again forever."""
    detail = f"the worker failed ({type(error).__name__}); see its log"
    return fail(delivery, FailureReason.INTERNAL, detail, now=now)


def fail(delivery: Delivery, reason: FailureReason, detail: str, *, now: datetime) -> Decided:
    """Decide that a request has failed."""
    return _decide(delivery, now, Outcome.FAILED, reason=reason, detail=detail)


def fail_unreadable(
    message: Message, error: KeylessError, *, now: datetime, reason: FailureReason = FailureReason.INVALID_REQUEST
) -> Decided:
    """Decide that a message that is not a request, as far as this worker knows, has failed."""
    operation_id, context = read_rest(message.body)
    event = ApprovalEvent(
        version=EVENT_VERSION,
        outcome=Outcome.FAILED,
        operation_id=operation_id,
        reason=reason,
        detail=str(error)[:_LONGEST_TEXT],
        requested_at=message.stored_at,
        decided_at=now,
        deliveries=message.number,
        context=context,
    )
    return Decided(event)


def is_final(delivery: Delivery, polled_at: datetime) -> bool:
    """Return whether a poll that started then is the final one."""
    return final.is_final((delivery.ticket.expires_at - polled_at).total_seconds())


def observation(decided: Decided, schedule: wait_adaptive) -> tuple[float, float | None] | None:
    """Return what a schedule learns from an outcome, as `wait_adaptive.observe` takes it; None if it learns nothing.

    Another worker may have sent the poll before the deciding one. Its time is not stored, so it is taken from the
    schedule.
    """
    event, polled_at = decided
    if polled_at is None:
        return None
    age = max(0.0, (polled_at - event.requested_at).total_seconds())
    if event.outcome is Outcome.APPROVED and event.deliveries > 1:
        # The first delivery created the operation, so the second was the first poll.
        after = schedule.previous_poll(age) if event.deliveries > _FIRST_POLL else 0.0
        return after, max(after, (event.decided_at - event.requested_at).total_seconds())
    return (age, None) if event.answered else None


def _scheduled_delay(delivery: Delivery, now: datetime, pacing: Pacing) -> float:
    age = max(0.0, (now - delivery.ticket.created_at).total_seconds())
    attempt = attempt_at(pacing.schedule, age, most=delivery.message.number)
    delay = next_delay(pacing.schedule, attempt_number=attempt, since_start=age)
    return _cut_to_deadline(delivery, now, delay)


def _cut_to_deadline(delivery: Delivery, now: datetime, delay: float) -> float:
    """Cut a delay to the deadline, so that a final poll starts there."""
    return max(MIN_DELAY, min(delay, delivery.ticket.remaining(now)))


def _reject(delivery: Delivery, rejection: Rejection, answer: Operation | KeylessError, *, now: datetime) -> Decided:
    if not rejection.is_mismatch:
        reason = FailureReason.INCONSISTENT
    elif rejection in {Rejection.OTHER_OPERATION, Rejection.OTHER_AUTH_TYPE} or delivery.is_started_by_phone:
        reason = FailureReason.MISMATCH
    else:
        reason = FailureReason.CONFLICT
    return fail(delivery, reason, rejection.describe(answer, delivery.ticket), now=now)


def _decide(
    delivery: Delivery,
    now: datetime,
    outcome: Outcome,
    *,
    auth_type: str | None = None,
    answered: bool | None = None,
    asked: bool | None = None,
    reason: FailureReason | None = None,
    detail: str | None = None,
) -> Decided:
    ticket = delivery.ticket
    event = ApprovalEvent(
        version=EVENT_VERSION,
        outcome=outcome,
        operation_id=ticket.operation_id,
        user_id=ticket.user_id,
        external_user_id=ticket.external_user_id,
        payload_sha256=ticket.payload_sha256,
        auth_type=None if auth_type is None else auth_type[:_LONGEST_TEXT],
        answered=answered,
        asked=asked if asked is None else asked or delivery.is_started_by_phone,
        reason=reason,
        detail=None if detail is None else detail[:_LONGEST_TEXT],
        requested_at=ticket.created_at,
        decided_at=now,
        deliveries=delivery.message.number,
        context=delivery.request.context,
    )
    return Decided(event)
