"""What a delivery comes to: answers and moments in, an outcome or a delay out."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenacity import wait_exponential, wait_fixed

from aiokeyless.errors import (
    BadRequestError,
    DecodeError,
    KeylessError,
    NotFoundError,
    NotJsonError,
    PermissionDeniedError,
    RateLimitError,
    ServerError,
    TransportError,
)
from aiokeyless.models import Operation, Secret
from aiokeyless.schedule import wait_adaptive
from aiokeyless.ticket import ApprovalTicket, payload_digest
from aiokeyless.worker.decisions import (
    Decided,
    Decision,
    Pace,
    Redeliver,
    after_bug,
    after_conflict,
    after_creation,
    after_failed_creation,
    after_older,
    after_poll,
    invalid,
    is_final,
)
from aiokeyless.worker.messages import Delivery, FailureReason, InvalidRequestError, Outcome

if TYPE_CHECKING:
    from tenacity.wait import wait_base

CREATED_AT = datetime(2026, 11, 24, 12, tzinfo=UTC)
LIFE = 120.0
SHORTEST = 0.02
#: Before, at and after the deadline.
IN_TIME, LAST, LATE = LIFE - 1, LIFE, LIFE + 60
EVERY_THREE = wait_fixed(3)


def at(age: float) -> datetime:
    return CREATED_AT + timedelta(seconds=age)


DELIVERY = Delivery(
    ticket=ApprovalTicket(
        operation_id="txn 1",
        user_id="C0FFEE",
        external_user_id="eve",
        payload_sha256=payload_digest("Pay 40"),
        created_at=CREATED_AT,
        expires_at=at(LIFE),
    ),
    payload="Pay 40",
    number=7,
    name="request-1",
    context=msgspec.Raw(b'{"order": 7}'),
)


def operation(**changed: Any) -> Operation:
    fields: dict[str, Any] = {
        "id": 1,
        "timestamp": "2026-11-24T12:00:00",
        "node_id": "node",
        "user_id": "C0FFEE",
        "api_key": Secret("sdk-key"),
        "external_user_id": "eve",
        "operation_id": "txn 1",
        "operation_payload": "Pay 40",
        "result": False,
        "state": "pending",
    }
    return Operation(**fields | changed)


APPROVED: dict[str, Any] = {"state": "approved", "result": True}


def polled(
    answer: Operation | KeylessError,
    age: float,
    *,
    took: float = 0.0,
    schedule: wait_base = EVERY_THREE,
    delivery: Delivery = DELIVERY,
    failures: int = 1,
    held_for: float = 0.0,
    grace: float = 0.0,
) -> Decision | None:
    """What comes of a poll that starts at this age."""
    return after_poll(
        delivery,
        answer,
        polled_at=at(age),
        now=at(age + took),
        schedule=schedule,
        pace=Pace(failures, held_for),
        grace=grace,
    )


def answered(age: float, *, took: float = 0.0, every: float = 3.0, **changed: Any) -> Decision | None:
    return polled(operation(**changed), age, took=took, schedule=wait_fixed(every))


def not_created(error: KeylessError, age: float, *, held_for: float = 0.0) -> Decision:
    return after_failed_creation(DELIVERY, error, now=at(age), pace=Pace(1, held_for))


def decided(decision: Decision | None) -> Decided:
    assert isinstance(decision, Decided)
    return decision


def delay(decision: Decision | None) -> float:
    assert isinstance(decision, Redeliver)
    return decision.delay


def status(kind: type[Any], number: int, *, path: str = "/v2/x") -> KeylessError:
    error: KeylessError = kind(status=number, method="GET", path=path)
    return error


UNREACHABLE = TransportError("no answer", method="GET", path="/v2/x")
GATEWAY = NotJsonError("a page", status=200, method="GET", path="/v2/x")
MISSING = status(NotFoundError, 404)
MISSHAPEN = DecodeError("another shape", status=200, method="GET", path="/v2/x")

# -- answers


@pytest.mark.parametrize("age", [0.0, IN_TIME, LAST, LATE])
def test_an_approval_is_an_approval_at_any_time(age: float) -> None:
    event, _ = decided(answered(age, **APPROVED, auth_type="biom"))
    assert (event.outcome, event.auth_type, event.reason, event.answered) == (Outcome.APPROVED, "biom", None, None)


def test_a_pending_operation_is_looked_at_again_when_the_schedule_says() -> None:
    assert delay(answered(10, every=3)) == 3


@pytest.mark.parametrize("age", [LAST, LATE])
def test_pending_at_the_last_look_is_expired_and_answered(age: float) -> None:
    event, _ = decided(answered(age))
    assert (event.outcome, event.answered, event.auth_type, event.reason) == (Outcome.EXPIRED, True, None, None)


@pytest.mark.parametrize("every", [1.5, 60.0])
def test_no_delay_goes_past_the_deadline_so_that_the_last_look_begins_there(every: float) -> None:
    assert delay(answered(IN_TIME, every=every)) == 1


def test_a_look_that_began_in_time_is_not_the_last_one_however_late_its_answer() -> None:
    assert delay(answered(IN_TIME, took=10)) == SHORTEST


def test_the_schedule_sees_the_age_of_the_request_and_the_number_of_the_delivery() -> None:
    seen = []

    class Noting(wait_fixed):
        def __call__(self, retry_state: Any) -> float:
            seen.append((retry_state.attempt_number, retry_state.seconds_since_start))
            return super().__call__(retry_state)

    polled(operation(), 9, took=1, schedule=Noting(1))
    assert seen[-1] == (7, 10.0)


def test_failed_polls_do_not_advance_an_exponential_schedule() -> None:
    schedule = wait_exponential(multiplier=1, max=60)
    after_an_outage = msgspec.structs.replace(DELIVERY, number=40)
    assert delay(polled(operation(), 3.5, schedule=schedule, delivery=after_an_outage)) == 4  # polls at 1, 3 and 7


def test_a_clock_that_is_behind_the_applications_is_at_the_beginning() -> None:
    schedule = wait_adaptive(jitter=0)
    assert polled(operation(), -60, took=10, schedule=schedule) == polled(operation(), 0, schedule=schedule)


@pytest.mark.parametrize("age", [0.0, IN_TIME, LAST, LATE])
@pytest.mark.parametrize(
    "lie",
    [{"state": "approved"}, {"state": "denied"}, {"state": "denied", "result": True}, {"state": "", "result": True}],
    ids=repr,
)
def test_an_answer_that_contradicts_itself_has_failed_and_never_approved(age: float, lie: dict[str, Any]) -> None:
    event, message_id = decided(answered(age, **lie))
    assert (event.outcome, event.reason) == (Outcome.FAILED, FailureReason.INCONSISTENT)
    assert event.detail
    assert message_id == DELIVERY.name


foreign = pytest.mark.parametrize(
    "other", [{"user_id": "BAD"}, {"operation_payload": "Pay 4000"}, {"external_user_id": "mallory"}], ids=repr
)


@pytest.mark.parametrize("state", [{}, APPROVED], ids=["pending", "approved"])
@pytest.mark.parametrize("age", [0.0, IN_TIME, LAST, LATE])
@foreign
def test_an_operation_of_somebody_else_is_a_conflict(state: dict[str, Any], age: float, other: dict[str, Any]) -> None:
    event, _ = decided(answered(age, **state, **other))
    assert (event.outcome, event.reason) == (Outcome.FAILED, FailureReason.CONFLICT)
    assert event.detail


@pytest.mark.parametrize("age", [0.0, IN_TIME, LAST, LATE])
def test_an_answer_about_another_operation_is_a_mismatch_of_this_one(age: float) -> None:
    event, message_id = decided(answered(age, **APPROVED, operation_id="txn 2"))
    assert (event.outcome, event.reason, event.operation_id) == (Outcome.FAILED, FailureReason.MISMATCH, "txn 1")
    assert message_id == DELIVERY.name


def test_every_outcome_of_a_request_has_the_same_name_so_that_the_stream_keeps_the_first() -> None:
    outcomes = [
        answered(1, **APPROVED),
        answered(LAST),
        answered(1, state="denied"),
        polled(UNREACHABLE, LAST),
        polled(MISSHAPEN, 1),
        polled(MISSING, LAST),
        answered(1, user_id="BAD"),
        not_created(status(NotFoundError, 404), 1),
        after_bug(DELIVERY, ZeroDivisionError(), now=at(1)),
        after_conflict(DELIVERY, now=at(1)),
        after_older(DELIVERY, operation(**APPROVED), now=at(1)),
    ]
    assert {decided(outcome).message_id for outcome in outcomes} == {DELIVERY.name}


def test_an_event_tells_whom_and_when_and_hands_the_context_back() -> None:
    event, _ = decided(answered(5, took=2, **APPROVED))
    assert (event.operation_id, event.user_id, event.external_user_id) == ("txn 1", "C0FFEE", "eve")
    assert event.payload_sha256 == payload_digest("Pay 40")
    assert (event.requested_at, event.decided_at, event.deliveries) == (CREATED_AT, at(7), 7)
    assert bytes(event.context) == b'{"order": 7}'


def test_no_event_holds_the_payload_or_the_key_of_the_answer() -> None:
    encoded = msgspec.json.encode(decided(answered(5, **APPROVED)).event)
    assert b"Pay 40" not in encoded
    assert b"sdk-key" not in encoded


# -- an operation that is not this request's


def test_an_approval_from_before_the_request_does_not_count_again() -> None:
    event, _ = decided(after_older(DELIVERY, operation(**APPROVED), now=at(1)))
    assert (event.outcome, event.reason) == (Outcome.FAILED, FailureReason.ALREADY_APPROVED)
    assert event.detail


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, FailureReason.CONFLICT),
        ({"user_id": "BAD", **APPROVED}, FailureReason.CONFLICT),
        ({"operation_payload": "Pay 4000", **APPROVED}, FailureReason.CONFLICT),
        ({"external_user_id": "mallory", **APPROVED}, FailureReason.CONFLICT),
        ({"operation_id": "txn 2", **APPROVED}, FailureReason.MISMATCH),
        ({"state": "approved"}, FailureReason.INCONSISTENT),
    ],
    ids=repr,
)
def test_any_other_operation_from_before_the_request_is_no_approval_and_says_why(
    changed: dict[str, Any], reason: FailureReason
) -> None:
    event, _ = decided(after_older(DELIVERY, operation(**changed), now=at(1)))
    assert (event.outcome, event.reason) == (Outcome.FAILED, reason)
    assert event.detail


def test_an_id_that_a_different_request_holds_is_a_conflict() -> None:
    event, _ = decided(after_conflict(DELIVERY, now=at(1)))
    assert (event.outcome, event.reason) == (Outcome.FAILED, FailureReason.CONFLICT)
    assert event.detail


# -- no answer


def test_just_created_it_is_looked_at_when_the_schedule_says() -> None:
    assert delay(after_creation(DELIVERY, at(1), wait_fixed(3))) == 3
    assert delay(after_creation(DELIVERY, at(IN_TIME), wait_fixed(3))) == 1


def test_created_after_the_deadline_there_is_still_the_last_look() -> None:
    assert delay(after_creation(DELIVERY, at(LATE), wait_fixed(3))) == SHORTEST


def test_a_bug_fails_the_request_and_shows_nothing_of_it() -> None:
    event, message_id = decided(after_bug(DELIVERY, ZeroDivisionError("a secret"), now=at(1)))
    assert (event.outcome, event.reason, event.operation_id) == (Outcome.FAILED, FailureReason.INTERNAL, "txn 1")
    assert "ZeroDivisionError" in (event.detail or "")
    assert "secret" not in (event.detail or "")
    assert message_id == DELIVERY.name


def test_missing_in_time_it_is_to_be_created() -> None:
    assert polled(MISSING, IN_TIME, took=LATE) is None


@pytest.mark.parametrize("age", [LAST, LATE])
def test_missing_at_the_last_look_is_expired_and_answered(age: float) -> None:
    event, _ = decided(polled(MISSING, age, took=1))
    assert (event.outcome, event.answered) == (Outcome.EXPIRED, True)


transient = pytest.mark.parametrize(
    "error", [UNREACHABLE, GATEWAY, status(ServerError, 503), status(RateLimitError, 429)], ids=repr
)


@transient
def test_a_passing_failure_is_repeated_at_the_pace_of_failures(error: KeylessError) -> None:
    assert SHORTEST <= delay(polled(error, 1, failures=1)) <= 0.5


def test_the_more_failures_in_a_row_the_longer_the_delay_may_be() -> None:
    delays = [delay(polled(UNREACHABLE, 1, failures=6)) for _ in range(200)]
    assert max(delays) > 2
    assert max(delays) <= 16


@transient
def test_a_service_that_wants_to_be_left_alone_is(error: KeylessError) -> None:
    assert delay(polled(error, 1, held_for=30)) == 30


@transient
def test_a_hold_does_not_go_past_the_deadline(error: KeylessError) -> None:
    assert delay(polled(error, IN_TIME, held_for=30)) == 1
    assert delay(polled(error, IN_TIME, took=9, held_for=30)) == SHORTEST


@transient
@pytest.mark.parametrize("age", [LAST, LATE])
def test_a_last_look_without_an_answer_is_expired_and_says_that_nobody_knows(error: KeylessError, age: float) -> None:
    event, _ = decided(polled(error, age, held_for=30))
    assert (event.outcome, event.answered) == (Outcome.EXPIRED, False)


@transient
def test_a_last_look_without_an_answer_is_repeated_in_the_grace_and_not_after_it(error: KeylessError) -> None:
    assert SHORTEST <= delay(polled(error, LAST, grace=30)) <= 0.5
    assert delay(polled(error, LAST + 29.9, held_for=60, grace=30)) == 60
    assert decided(polled(error, LAST + 30, grace=30)).event.answered is False


@pytest.mark.parametrize("age", [1.0, IN_TIME, LAST, LATE])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (status(BadRequestError, 400), FailureReason.POLL_REFUSED),
        (status(PermissionDeniedError, 403), FailureReason.POLL_REFUSED),
        (MISSHAPEN, FailureReason.UNREADABLE),
    ],
    ids=repr,
)
def test_a_look_that_fails_for_good_has_failed_at_once_with_its_reason(
    error: KeylessError, reason: FailureReason, age: float
) -> None:
    event, message_id = decided(polled(error, age))
    assert (event.outcome, event.reason, event.detail) == (Outcome.FAILED, reason, str(error))
    assert message_id == DELIVERY.name


# -- not created


@transient
def test_what_could_not_be_created_is_tried_again_at_the_pace_of_failures_and_by_the_deadline(
    error: KeylessError,
) -> None:
    assert SHORTEST <= delay(not_created(error, 1)) <= 0.5
    assert delay(not_created(error, 1, held_for=30)) == 30
    assert delay(not_created(error, IN_TIME, held_for=30)) == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (status(NotFoundError, 404), FailureReason.REJECTED),
        (status(BadRequestError, 400), FailureReason.REJECTED),
        (MISSHAPEN, FailureReason.UNREADABLE),
    ],
    ids=repr,
)
def test_what_is_not_to_be_created_has_failed_with_its_reason(error: KeylessError, reason: FailureReason) -> None:
    event, message_id = decided(not_created(error, 1))
    assert (event.outcome, event.reason, event.detail) == (Outcome.FAILED, reason, str(error))
    assert message_id == DELIVERY.name


def test_a_long_message_is_cut() -> None:
    error = TransportError("x" * 10_000, method="GET", path="/v2/x")
    event, _ = decided(after_bug(DELIVERY, error, now=at(1)))
    assert len(event.detail or "") <= 500
    event, _ = decided(not_created(status(NotFoundError, 404, path="/v2/" + "y" * 10_000), 1))
    assert len(event.detail or "") == 500


@given(
    age=st.floats(-1e6, LIFE, exclude_max=True),
    took=st.floats(0, 1e6),
    every=st.floats(0, 1e9),
    held_for=st.floats(-1e9, 1e9),
)
def test_whatever_the_moment_a_delay_is_positive_and_ends_by_the_deadline(
    age: float, took: float, every: float, held_for: float
) -> None:
    now = at(age + took)
    longest = max(SHORTEST, (at(LIFE) - now).total_seconds())
    for decision in (
        answered(age, took=took, every=every),
        polled(UNREACHABLE, age, took=took, held_for=held_for),
        after_creation(DELIVERY, now, wait_fixed(every)),
    ):
        if not is_final(DELIVERY, at(age)):  # rounded to microseconds, it may be
            assert SHORTEST <= delay(decision) <= longest


# -- no request


def test_a_message_that_is_no_request_has_failed_under_a_name_of_its_own() -> None:
    event, message_id = invalid(
        "message-9", 2, InvalidRequestError("it is none"), msgspec.Raw(b"[1]"), stored_at=at(0), now=at(1)
    )
    assert message_id == "message-9"
    assert (event.outcome, event.reason, event.detail) == (Outcome.FAILED, "invalid_request", "it is none")
    assert (event.operation_id, event.user_id, bytes(event.context)) == (None, None, b"[1]")
    assert (event.requested_at, event.decided_at, event.deliveries) == (at(0), at(1), 2)
