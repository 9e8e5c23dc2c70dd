"""What a delivery results in: answers and moments in, an outcome or a delay out."""

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
    InvalidRequestError,
    KeylessError,
    NotFoundError,
    NotJsonError,
    PermissionDeniedError,
    RateLimitError,
    ServerError,
    StatusError,
    TransportError,
)
from aiokeyless.models import Operation, Secret
from aiokeyless.schedule import wait_adaptive
from aiokeyless.ticket import ApprovalTicket, payload_digest
from aiokeyless.worker.broker import ExchangeResult
from aiokeyless.worker.decisions import (
    Decided,
    Decision,
    Next,
    Pacing,
    Redeliver,
    after_bug,
    after_conflict,
    after_creation,
    after_failed_creation,
    after_outage,
    after_poll,
    after_unclaimed,
    fail,
    fail_unreadable,
    is_final,
    is_older,
    observation,
)
from aiokeyless.worker.messages import EVENT_VERSION, REQUEST_VERSION, ApprovalRequest, Delivery, FailureReason, Outcome

from .reading import a_message

if TYPE_CHECKING:
    from tenacity.wait import wait_base

CREATED_AT = datetime(2026, 11, 24, 12, tzinfo=UTC)
LIFE = 120.0
SHORTEST = 0.02
#: Before, at and after the deadline.
IN_TIME, FINAL, LATE = LIFE - 1, LIFE, LIFE + 60
EVERY_THREE = wait_fixed(3)


def at(age: float) -> datetime:
    return CREATED_AT + timedelta(seconds=age)


REQUEST = ApprovalRequest(
    version=REQUEST_VERSION,
    user_id="c0ffee",
    operation_id="txn 1",
    operation_payload="Pay 40",
    context=msgspec.Raw(b'{"order": 7}'),
)
DELIVERY = Delivery(
    message=a_message(number=7),
    request=REQUEST,
    ticket=ApprovalTicket(
        operation_id="txn 1",
        user_id="C0FFEE",
        external_user_id="eve",
        payload_sha256=payload_digest("Pay 40"),
        created_at=CREATED_AT,
        expires_at=at(LIFE),
    ),
)


def numbered(number: int) -> Delivery:
    return msgspec.structs.replace(DELIVERY, message=a_message(number=number))


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


def pacing(
    schedule: wait_base = EVERY_THREE,
    *,
    failures: int = 1,
    paused_for: float = 0.0,
    closed_for: float = 0.0,
    grace: float = 0.0,
) -> Pacing:
    return Pacing(schedule, failures, paused_for, closed_for, grace)


def polled(
    answer: Operation | KeylessError,
    age: float,
    *,
    took: float = 0.0,
    delivery: Delivery = DELIVERY,
    schedule: wait_base = EVERY_THREE,
    was_created: bool = False,
    **options: Any,
) -> Decision | Next:
    """Decide by a poll that starts at this age."""
    paced = pacing(schedule, **options)
    times: dict[str, Any] = {"polled_at": at(age), "now": at(age + took), "grace_left": LIFE + paced.grace - age}
    return after_poll(delivery, answer, pacing=paced, was_created=was_created, **times)


def answered(age: float, *, took: float = 0.0, every: float = 3.0, **changed: Any) -> Decision | Next:
    return polled(operation(**changed), age, took=took, schedule=wait_fixed(every))


def not_created(error: KeylessError, age: float, *, paused_for: float = 0.0, may_exist: bool = False) -> Decision:
    return after_failed_creation(
        DELIVERY, error, now=at(age), pacing=pacing(paused_for=paused_for), may_exist=may_exist
    )


def decided(decision: Decision | Next) -> Decided:
    assert isinstance(decision, Decided)
    assert decision.event.version == EVENT_VERSION
    return decision


def delay(decision: Decision | Next, result: ExchangeResult = ExchangeResult.ANSWERED) -> float:
    assert isinstance(decision, Redeliver)
    assert decision.result is result
    return decision.delay


def delay_after_failure(decision: Decision | Next) -> float:
    return delay(decision, ExchangeResult.FAILED)


def status(kind: type[Any], number: int, *, path: str = "/v2/x") -> KeylessError:
    error: KeylessError = kind(status=number, method="GET", path=path)
    return error


UNREACHABLE = TransportError("no answer", method="GET", path="/v2/x")
GATEWAY = NotJsonError("a page", status=200, method="GET", path="/v2/x")
MISSING = status(NotFoundError, 404)
FORBIDDEN = status(PermissionDeniedError, 403)
MISSHAPEN = DecodeError("another shape", status=200, method="GET", path="/v2/x")

# -- answers


@pytest.mark.parametrize("age", [0.0, IN_TIME, FINAL, LATE])
def test_an_approval_is_an_approval_at_any_time(age: float) -> None:
    event, *_ = decided(answered(age, **APPROVED, auth_type="biom"))
    assert (event.outcome, event.auth_type, event.reason, event.answered) == (Outcome.APPROVED, "biom", None, None)


def test_a_pending_operation_is_polled_again_when_the_schedule_says() -> None:
    assert delay(answered(10, every=3)) == 3


@pytest.mark.parametrize(
    ("number", "failures", "is_news"),
    [(1, 0, False), (1, 5, False), (2, 1, True), (2, 0, False), (3, 2, True), (3, 1, False), (9, 9, True)],
)
def test_a_pending_operation_is_news_if_all_before_failed(number: int, failures: int, *, is_news: bool) -> None:
    """One that did not fail knew of the operation: it created it, or found it."""
    delivery = msgspec.structs.replace(DELIVERY, message=a_message(number=number, failures=failures))
    decision = polled(operation(), 10, delivery=delivery)
    assert isinstance(decision, Redeliver)
    assert decision.created is (REQUEST if is_news else None)


@pytest.mark.parametrize("answer", [FORBIDDEN, UNREACHABLE], ids=["forbidden", "unreachable"])
def test_an_answer_that_shows_no_operation_is_no_news(answer: KeylessError) -> None:
    delivery = msgspec.structs.replace(DELIVERY, message=a_message(number=2, failures=1))
    decision = polled(answer, 10, delivery=delivery, was_created=True)
    assert isinstance(decision, Redeliver)
    assert decision.created is None


@pytest.mark.parametrize("age", [FINAL, LATE])
@pytest.mark.parametrize(("answer", "asked"), [(operation(), True), (MISSING, False)], ids=["pending", "missing"])
def test_pending_or_missing_at_the_final_poll_is_expired_and_answered(
    answer: Operation | KeylessError, age: float, *, asked: bool
) -> None:
    event, *_ = decided(polled(answer, age, took=1))
    assert (event.outcome, event.answered, event.asked) == (Outcome.EXPIRED, True, asked)
    assert (event.auth_type, event.reason) == (None, None)


@pytest.mark.parametrize("every", [1.5, 60.0])
def test_no_delay_goes_past_the_deadline_so_that_the_final_poll_starts_there(every: float) -> None:
    assert delay(answered(IN_TIME, every=every)) == 1


def test_a_poll_that_started_in_time_is_not_the_final_one_however_late_its_answer() -> None:
    assert delay(answered(IN_TIME, took=10)) == SHORTEST


@pytest.mark.parametrize("age", [0.25, 10.0])
def test_the_schedule_sees_the_age_of_the_request_and_the_number_of_the_delivery(age: float) -> None:
    seen = []

    class Noting(wait_fixed):
        def __call__(self, retry_state: Any) -> float:
            seen.append((retry_state.attempt_number, retry_state.seconds_since_start))
            return super().__call__(retry_state)

    delivery = numbered(1 if age < 1 else 7)
    polled(operation(), age - 0.25, took=0.25, schedule=Noting(1), delivery=delivery)
    assert seen[-1] == (delivery.message.number, age)


def test_failed_polls_do_not_advance_an_exponential_schedule() -> None:
    schedule = wait_exponential(multiplier=1, max=60)
    after_an_outage = numbered(40)
    assert delay(polled(operation(), 3.5, schedule=schedule, delivery=after_an_outage)) == 4  # polls at 1, 3 and 7


def test_a_clock_that_is_behind_the_applications_is_at_the_beginning() -> None:
    schedule = wait_adaptive(jitter=0)
    assert polled(operation(), -60, took=10, schedule=schedule) == polled(operation(), 0, schedule=schedule)


#: What an operation of somebody else differs in.
FOREIGN = [{"user_id": "BAD"}, {"operation_payload": "Pay 4000"}, {"external_user_id": "mallory"}]


@pytest.mark.parametrize("age", [0.0, IN_TIME, FINAL, LATE])
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        *((foreign, FailureReason.CONFLICT) for foreign in FOREIGN),
        *((APPROVED | foreign, FailureReason.CONFLICT) for foreign in FOREIGN),
        (APPROVED | {"operation_id": "txn 2"}, FailureReason.MISMATCH),
        ({"state": "approved"}, FailureReason.INCONSISTENT),
        ({"state": "denied"}, FailureReason.INCONSISTENT),
        ({"state": "denied", "result": True}, FailureReason.INCONSISTENT),
        ({"state": "", "result": True}, FailureReason.INCONSISTENT),
    ],
)
def test_an_answer_about_something_else_or_that_contradicts_itself_has_failed_and_says_why(
    answer: dict[str, Any], reason: FailureReason, age: float
) -> None:
    for decision in (answered(age, **answer), after_unclaimed(DELIVERY, operation(**answer), now=at(age))):
        event, *_ = decided(decision)
        assert (event.outcome, event.reason, event.operation_id) == (Outcome.FAILED, reason, "txn 1")
        assert event.detail


def test_every_outcome_says_when_it_was_decided() -> None:
    now = at(FINAL + 2)
    outcomes = [
        answered(FINAL, took=2),
        answered(FINAL, took=2, **APPROVED),
        answered(FINAL, took=2, state="denied"),
        polled(UNREACHABLE, FINAL, took=2),
        polled(MISSHAPEN, FINAL, took=2),
        not_created(status(BadRequestError, 400), FINAL + 2),
        after_bug(DELIVERY, ZeroDivisionError(), now=now),
        fail(DELIVERY, FailureReason.REJECTED, "it is", now=now),
        after_unclaimed(DELIVERY, operation(**APPROVED), now=now),
        after_unclaimed(DELIVERY, operation(), now=now),
        after_unclaimed(DELIVERY, operation(user_id="BAD"), now=now),
        after_outage(DELIVERY, "it is down", now=now),
    ]
    assert {decided(outcome).event.decided_at for outcome in outcomes} == {now}


def test_an_event_tells_whom_and_when_and_hands_the_context_back() -> None:
    event, *_ = decided(answered(5, took=2, **APPROVED))
    assert (event.operation_id, event.user_id, event.external_user_id) == ("txn 1", "C0FFEE", "eve")
    assert event.payload_sha256 == payload_digest("Pay 40")
    assert (event.requested_at, event.decided_at, event.deliveries) == (CREATED_AT, at(7), 7)
    assert bytes(event.context) == b'{"order": 7}'


def test_no_event_holds_the_payload_or_the_key_of_the_answer() -> None:
    encoded = msgspec.json.encode(decided(answered(5, **APPROVED)).event)
    assert b"Pay 40" not in encoded
    assert b"sdk-key" not in encoded


# -- an operation that the phone starts


PHONE = msgspec.structs.replace(DELIVERY, ticket=msgspec.structs.replace(DELIVERY.ticket, started_by="phone"))


def test_an_operation_that_the_phone_has_not_started_is_polled_again_when_the_schedule_says() -> None:
    assert polled(MISSING, 10, schedule=EVERY_THREE, delivery=PHONE) == Redeliver(3)


def test_what_the_phone_started_is_no_news_to_the_application() -> None:
    delivery = msgspec.structs.replace(PHONE, message=a_message(number=2, failures=1))
    decision = polled(operation(), 10, delivery=delivery)
    assert isinstance(decision, Redeliver)
    assert decision.created is None


@pytest.mark.parametrize(("answer", "is_answered"), [(MISSING, True), (UNREACHABLE, False)], ids=str)
def test_the_application_asked_the_user_itself(answer: KeylessError, *, is_answered: bool) -> None:
    expired = polled(answer, LATE, delivery=PHONE), after_outage(PHONE, "it is down", now=at(LATE))
    assert [decided(each).event.asked for each in expired] == [True, True]
    assert decided(expired[0]).event.answered is is_answered


@pytest.mark.parametrize("other", FOREIGN)
def test_what_the_app_sent_in_place_of_what_it_was_given_is_a_mismatch(other: dict[str, Any]) -> None:
    event, *_ = decided(polled(operation(**APPROVED, **other), 10, delivery=PHONE))
    assert (event.outcome, event.reason) == (Outcome.FAILED, FailureReason.MISMATCH)


@pytest.mark.parametrize(
    ("timestamp", "expected"),
    [
        ("2026-11-23T21:00:00", False),
        ("2026-11-23T20:59:59.999999", True),
        ("2026-11-25T02:00:00", False),  # a zone before UTC
        ("0001-01-01T00:00:00", True),
        ("", True),
        (None, True),
        ("2026-11-24T12:00:00+14:00", False),
        ("2026-11-24T10:00:00+14:00", True),
    ],
)
def test_an_operation_is_older_if_no_zone_and_no_clock_explain_it(timestamp: str, *, expected: bool) -> None:
    assert is_older(operation(timestamp=timestamp), DELIVERY) is expected


# -- an operation that is not this request's


def test_an_approval_from_before_the_request_does_not_count_again() -> None:
    event, *_ = decided(after_unclaimed(DELIVERY, operation(**APPROVED), now=at(1)))
    assert (event.outcome, event.reason) == (Outcome.FAILED, FailureReason.ALREADY_APPROVED)
    assert (
        event.detail
        == "an operation of this id and content was approved before this request asked; one approval counts once"
    )


def test_a_pending_operation_from_before_the_request_is_a_conflict() -> None:
    event, *_ = decided(after_unclaimed(DELIVERY, operation(), now=at(1)))
    assert (event.outcome, event.reason) == (Outcome.FAILED, FailureReason.CONFLICT)
    assert event.detail


def test_an_operation_that_a_pin_approved_is_no_face_and_says_so() -> None:
    face = msgspec.structs.replace(DELIVERY, ticket=msgspec.structs.replace(DELIVERY.ticket, require_auth_type="biom"))
    answer = operation(**APPROVED, auth_type="pin")
    for decision in (polled(answer, 1, delivery=face), after_unclaimed(face, answer, now=at(1))):
        event, *_ = decided(decision)
        assert (event.outcome, event.reason) == (Outcome.FAILED, FailureReason.MISMATCH)
        assert event.detail == "its factor is not the required one: it must be 'biom', and the answer has 'pin'"


# -- no answer


@pytest.mark.parametrize(("age", "expected"), [(1, 3), (IN_TIME, 1), (LATE, SHORTEST)])
def test_just_created_it_is_polled_when_the_schedule_says_and_by_the_deadline(age: float, expected: float) -> None:
    decision = after_creation(DELIVERY, at(age), pacing())
    assert delay(decision, ExchangeResult.CREATED) == expected
    assert decision.created == DELIVERY.request  # the phone is told of it


@pytest.mark.parametrize("failures", [1, 2])
def test_a_create_that_is_a_conflict_waits_as_one_that_succeeds_and_is_told_if_no_delivery_knew(failures: int) -> None:
    third = msgspec.structs.replace(DELIVERY, message=a_message(number=3, failures=failures))
    decision = after_conflict(third, at(1), pacing())
    assert delay(decision, ExchangeResult.CREATED) == 3
    assert decision.created == (third.request if failures == 2 else None)


def test_a_bug_fails_the_request_and_shows_nothing_of_it() -> None:
    event, *_ = decided(after_bug(DELIVERY, ZeroDivisionError("a secret"), now=at(1)))
    assert (event.outcome, event.reason, event.operation_id) == (Outcome.FAILED, FailureReason.INTERNAL, "txn 1")
    assert "ZeroDivisionError" in (event.detail or "")
    assert "secret" not in (event.detail or "")


def test_a_request_that_an_outage_outlasts_is_expired_and_unknown() -> None:
    event, polled_at = after_outage(DELIVERY, "it is down", now=at(LATE))
    assert event.detail == "no final poll could be sent, since Keyless is away: it is down"
    assert (event.outcome, event.answered, event.asked, event.reason) == (Outcome.EXPIRED, False, False, None)
    assert polled_at is None


@pytest.mark.parametrize("answer", [MISSING, FORBIDDEN], ids=["missing", "refused by a gateway"])
def test_an_odd_answer_about_what_it_may_have_created_ends_and_creates_nothing(answer: KeylessError) -> None:
    assert SHORTEST <= delay_after_failure(polled(answer, 10, was_created=True)) <= 0.5
    assert SHORTEST <= delay_after_failure(polled(answer, FINAL, was_created=True, grace=30)) <= 0.5
    event, *_ = decided(polled(answer, FINAL, was_created=True))
    assert (event.outcome, event.answered, event.detail) == (Outcome.EXPIRED, False, str(answer))


def test_missing_in_time_it_is_to_be_created() -> None:
    assert polled(MISSING, IN_TIME - 10, took=10) is Next.CREATE


def test_no_user_is_asked_after_the_deadline_since_another_worker_may_have_decided_by_then() -> None:
    assert delay(polled(MISSING, IN_TIME, took=10)) == SHORTEST  # then the final poll comes


transient = pytest.mark.parametrize(
    "error", [UNREACHABLE, GATEWAY, status(ServerError, 503), status(RateLimitError, 429)]
)


@transient
def test_a_transient_failure_is_retried_with_the_backoff_after_the_pause_by_the_deadline(error: KeylessError) -> None:
    assert SHORTEST <= delay_after_failure(polled(error, 1, failures=1)) <= 0.5
    assert delay_after_failure(polled(error, 1, paused_for=30)) == 30
    assert delay_after_failure(polled(error, 1, closed_for=30)) == 30
    assert delay_after_failure(polled(error, IN_TIME, paused_for=30)) == 1
    assert delay_after_failure(polled(error, IN_TIME, took=9, paused_for=30)) == SHORTEST


def test_the_more_failures_in_a_row_the_longer_the_delay_may_be() -> None:
    delays = [delay_after_failure(polled(UNREACHABLE, 1, failures=6)) for _ in range(200)]
    assert max(delays) > 2
    assert max(delays) <= 16


@transient
@pytest.mark.parametrize("age", [FINAL, LATE])
def test_a_final_poll_without_an_answer_is_expired_and_says_that_it_is_unknown(error: KeylessError, age: float) -> None:
    event, *_ = decided(polled(error, age, paused_for=30))
    assert (event.outcome, event.answered) == (Outcome.EXPIRED, False)


@transient
def test_a_final_poll_without_an_answer_is_repeated_in_the_grace_and_not_after_it(error: KeylessError) -> None:
    assert SHORTEST <= delay_after_failure(polled(error, FINAL, grace=30)) <= 0.5
    for pause, delay_in_grace in ((15, 15), (30, 30), (60, 20)):  # after 20 s it can be told
        assert delay_after_failure(polled(error, FINAL + 10, paused_for=pause, grace=30)) == delay_in_grace
        assert delay_after_failure(polled(error, FINAL + 10, closed_for=pause, grace=30)) == delay_in_grace
    assert decided(polled(error, FINAL + 30, grace=30)).event.answered is False


@pytest.mark.parametrize("age", [1.0, IN_TIME, FINAL, LATE])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (status(BadRequestError, 400), FailureReason.POLL_REFUSED),
        (status(PermissionDeniedError, 403), FailureReason.POLL_REFUSED),
        (MISSHAPEN, FailureReason.UNREADABLE),
    ],
)
def test_a_poll_that_fails_for_good_says_why_at_once(error: KeylessError, reason: FailureReason, age: float) -> None:
    event, *_ = decided(polled(error, age))
    assert (event.outcome, event.reason, event.detail) == (Outcome.FAILED, reason, str(error))


# -- not created


@transient
def test_what_could_not_be_created_is_retried_with_the_backoff_and_by_the_deadline(error: KeylessError) -> None:
    assert SHORTEST <= delay_after_failure(not_created(error, 1)) <= 0.5
    assert delay_after_failure(not_created(error, 1, paused_for=30)) == 30
    assert delay_after_failure(not_created(error, IN_TIME, paused_for=30)) == 1


@pytest.mark.parametrize(
    ("error", "may_exist", "reason"),
    [
        (MISSING, False, FailureReason.REJECTED),
        (status(BadRequestError, 400), False, FailureReason.REJECTED),
        (status(BadRequestError, 400), True, FailureReason.POLL_REFUSED),
    ],
)
def test_a_create_that_is_refused_is_rejected_unless_an_earlier_one_may_have_taken_effect(
    error: KeylessError, reason: FailureReason, *, may_exist: bool
) -> None:
    event, *_ = decided(not_created(error, 1, may_exist=may_exist))
    assert (event.outcome, event.reason, event.detail) == (Outcome.FAILED, reason, str(error))


@pytest.mark.parametrize("error", [MISSHAPEN, status(StatusError, 202), MISSING, FORBIDDEN])
def test_what_may_have_been_created_is_not_given_up(error: KeylessError) -> None:
    assert delay(not_created(error, 10, may_exist=True), ExchangeResult.FAILED) == 3
    assert delay(not_created(error, IN_TIME, may_exist=True), ExchangeResult.FAILED) == 1


def test_a_long_text_of_an_answer_is_cut() -> None:
    error = TransportError("x" * 10_000, method="GET", path="/v2/x")
    event, *_ = decided(after_bug(DELIVERY, error, now=at(1)))
    assert len(event.detail or "") <= 500
    event, *_ = decided(not_created(status(NotFoundError, 404, path="/v2/" + "y" * 10_000), 1))
    assert len(event.detail or "") == 500
    event, *_ = decided(answered(1, **APPROVED, auth_type="x" * 10_000))
    assert (event.outcome, len(event.auth_type or "")) == (Outcome.APPROVED, 500)


@given(
    age=st.floats(-1e6, LIFE, exclude_max=True),
    took=st.floats(0, 1e6),
    every=st.floats(0, 1e9),
    paused_for=st.floats(-1e9, 1e9),
)
def test_whatever_the_moment_a_delay_is_positive_and_ends_by_the_deadline(
    age: float, took: float, every: float, paused_for: float
) -> None:
    now = at(age + took)
    longest = max(SHORTEST, (at(LIFE) - now).total_seconds())
    for decision in (
        answered(age, took=took, every=every),
        polled(UNREACHABLE, age, took=took, paused_for=paused_for),
        after_creation(DELIVERY, now, pacing(wait_fixed(every))),
    ):
        if not is_final(DELIVERY, at(age)):  # rounded to microseconds, it may be
            assert isinstance(decision, Redeliver)
            assert SHORTEST <= decision.delay <= longest


# -- no request


def test_a_message_that_is_no_request_has_failed() -> None:
    message = a_message(b'{"context": [1]}', number=2, stored_at=at(0))
    event, _ = fail_unreadable(message, InvalidRequestError("it is none"), now=at(1))
    assert event.version == EVENT_VERSION
    assert (event.outcome, event.reason, event.detail) == (Outcome.FAILED, "invalid_request", "it is none")
    assert (event.operation_id, event.user_id, bytes(event.context)) == (None, None, b"[1]")
    assert (event.requested_at, event.decided_at, event.deliveries) == (at(0), at(1), 2)


@pytest.mark.parametrize(
    ("written", "named"), [("txn-1", "txn-1"), ("a/b", "a/b"), ("", None), (7, None), ("x" * 513, None)]
)
def test_it_names_its_operation_if_that_can_be_read(written: object, named: str | None) -> None:
    message = a_message(msgspec.json.encode({"version": "1", "operation_id": written}))
    assert fail_unreadable(message, InvalidRequestError("it is none"), now=at(1)).event.operation_id == named


# -- what a schedule learns


def learned(decision: Decision | Next, schedule: wait_adaptive | None = None) -> tuple[float, float | None] | None:
    return observation(decided(decision), schedule or wait_adaptive(jitter=0))


def test_an_approval_came_between_the_poll_before_and_the_answer() -> None:
    schedule = wait_adaptive(jitter=0)
    assert learned(answered(30, took=2, **APPROVED), schedule) == (schedule.previous_poll(30), 32)


SHORT = msgspec.structs.replace(DELIVERY, ticket=msgspec.structs.replace(DELIVERY.ticket, expires_at=at(0.5)))


@pytest.mark.parametrize(
    ("decision", "expected"),
    [
        (polled(operation(**APPROVED), 30, took=2, delivery=numbered(2)), (0.0, 32)),
        (answered(FINAL, took=2), (FINAL, None)),
        (polled(MISSING, FINAL, took=2), (FINAL, None)),
        (polled(operation(), 0.5, delivery=SHORT), (0.5, None)),
    ],
    ids=["approved before the first poll", "expired", "expired, never there", "expired soon"],
)
def test_what_is_learned_begins_with_the_request_and_ends_with_the_final_poll(
    decision: Decision | Next, expected: tuple[float, float | None]
) -> None:
    assert learned(decision) == expected


def test_a_clock_that_steps_back_during_a_poll_makes_no_observation_that_ends_before_it_begins() -> None:
    after, until = learned(answered(60, took=-59, **APPROVED)) or (0.0, None)
    assert until == after


@pytest.mark.parametrize(
    "decision",
    [
        polled(UNREACHABLE, FINAL),
        polled(MISSHAPEN, 1),
        answered(1, state="denied"),
        after_unclaimed(DELIVERY, operation(**APPROVED), now=at(1)),
        after_bug(DELIVERY, ZeroDivisionError(), now=at(1)),
        polled(operation(**APPROVED), 30, delivery=numbered(1)),
    ],
)
def test_nothing_is_learned_from_what_does_not_show_when_the_user_approved(decision: Decision | Next) -> None:
    assert learned(decision) is None
