"""The verdict on one answer: what counts as approved, and everything that claims it and does not."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokeyless._rules.approval import (
    Rejection,
    Verdict,
    WaitRecord,
    evaluate,
    rejection_error,
    timeout_error,
    unknown_error,
)
from aiokeyless._rules.final import Unanswered
from aiokeyless.errors import (
    ApprovalError,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    InconsistentOperationError,
    OperationMismatchError,
    ServerError,
)
from aiokeyless.models import Operation, Secret
from aiokeyless.ticket import ApprovalTicket, payload_digest

KEY = "sdk-key-0123456789"
PAYLOAD = "Approve wire transfer of $500"
EXTERNAL = "someone@example.com"


def operation(**changed: Any) -> Operation:
    fields: dict[str, Any] = {
        "id": 1,
        "timestamp": "2020-01-02T03:04:05.68",
        "node_id": "node",
        "user_id": "0123456789ABCDEF",
        "api_key": Secret(KEY),
        "external_user_id": EXTERNAL,
        "operation_id": "txn-1",
        "operation_payload": PAYLOAD,
        "result": True,
        "auth_type": "biom",
        "state": "approved",
    }
    return Operation(**fields | changed)


def ticket(*, payload: str | None = PAYLOAD, **changed: Any) -> ApprovalTicket:
    fields: dict[str, Any] = {
        "operation_id": "txn-1",
        "user_id": "0123456789ABCDEF",
        "external_user_id": EXTERNAL,
        "payload_sha256": payload_digest(payload),
        "created_at": datetime(2026, 11, 24, 12, tzinfo=UTC),
        "expires_at": datetime(2026, 11, 24, 12, 2, tzinfo=UTC),
    }
    return ApprovalTicket(**fields | changed)


with_or_without_ticket = pytest.mark.parametrize("known", [None, ticket()], ids=["id", "ticket"])
pending_too = pytest.mark.parametrize(
    ("state", "result"), [("approved", True), ("pending", False), ("pending", True), ("approved", False)]
)


# -- state and result


@pytest.mark.parametrize(
    ("state", "result", "verdict"),
    [
        ("approved", True, Verdict.APPROVED),
        *(("pending", result, Verdict.PENDING) for result in (False, True)),
        *((state, False, InconsistentOperationError) for state in ("approved", "denied", "PENDING")),
        *((state, True, InconsistentOperationError) for state in ("denied", "Approved", "approved ", "")),
    ],
)
@with_or_without_ticket
def test_only_approved_with_result_true_is_an_approval(
    known: ApprovalTicket | None, state: str, result: bool, verdict: Verdict | type[ApprovalError]
) -> None:
    got = evaluate(operation(state=state, result=result), "txn-1", known)
    assert (type(rejection_error(got, record())) if isinstance(got, Rejection) else got) is verdict


@pytest.mark.parametrize("result", [1, "true", [True], 1.0])
def test_a_result_that_is_only_truthy_approves_nothing(result: object) -> None:
    assert isinstance(evaluate(operation(result=result), "txn-1"), Rejection)


# -- the right operation


@pytest.mark.parametrize("other", ["txn-2", "", "TXN-1", "txn-1 ", "txn-10"])
@pending_too
@with_or_without_ticket
def test_an_answer_about_another_operation_is_a_mismatch_in_any_state(
    known: ApprovalTicket | None, state: str, result: bool, other: str
) -> None:
    got = evaluate(operation(operation_id=other, state=state, result=result), "txn-1", known)
    assert got is Rejection.OTHER_OPERATION


@pytest.mark.parametrize(
    ("changed", "known", "reason"),
    [
        ({"user_id": "FEDC"}, ticket(), "user"),
        ({"user_id": ""}, ticket(), "user"),
        ({"user_id": "\ufb00"}, ticket(user_id="FF"), "user"),  # the ligature of two f, whose upper case is FF
        ({"user_id": "0123456789ABCDE"}, ticket(), "user"),
        ({"operation_payload": "Approve wire transfer of $5000"}, ticket(), "payload"),
        ({"operation_payload": PAYLOAD + " "}, ticket(), "payload"),
        ({"operation_payload": PAYLOAD.upper()}, ticket(), "payload"),
        ({"operation_payload": None}, ticket(), "payload"),
        ({"operation_payload": ""}, ticket(), "payload"),
        ({}, ticket(payload=None), "payload"),
        ({}, ticket(payload=""), "payload"),
        ({"operation_payload": "\ud800"}, ticket(), "payload"),
        ({"external_user_id": "another@example.com"}, ticket(), "external user id"),
        ({"external_user_id": EXTERNAL.upper()}, ticket(), "external user id"),
        ({"external_user_id": None}, ticket(), "external user id"),
        ({"external_user_id": ""}, ticket(), "external user id"),
    ],
)
@pending_too
def test_whatever_contradicts_the_ticket_is_a_mismatch_in_any_state(
    state: str, result: bool, changed: dict[str, Any], known: ApprovalTicket, reason: str
) -> None:
    got = evaluate(operation(**changed, state=state, result=result), "txn-1", known)
    assert isinstance(got, Rejection)
    assert got.is_mismatch
    assert reason in got.value
    assert PAYLOAD not in got.value


@pytest.mark.parametrize(
    ("changed", "known"),
    [
        ({"user_id": "0123456789abcdef"}, ticket()),
        ({}, ticket(user_id="0123456789abcdef")),
        ({"operation_payload": None}, ticket(payload=None)),
        ({"operation_payload": ""}, ticket(payload=None)),
        ({"operation_payload": None}, ticket(payload="")),
        ({"external_user_id": None}, ticket(external_user_id=None)),
        ({"external_user_id": ""}, ticket(external_user_id=None)),
        ({"external_user_id": None}, ticket(external_user_id="")),
        ({}, ticket(external_user_id=None)),
        ({}, ticket(external_user_id="")),
    ],
    ids=lambda value: "ticket" if isinstance(value, ApprovalTicket) else str(value),
)
def test_what_means_the_same_as_the_ticket_agrees_with_it(changed: dict[str, Any], known: ApprovalTicket) -> None:
    assert evaluate(operation(**changed), "txn-1", known) is Verdict.APPROVED
    assert evaluate(operation(**changed, state="pending"), "txn-1", known) is Verdict.PENDING


# The same text in two forms of Unicode: composed and decomposed, ohm and omega, a ligature, a wide digit.
FORMS = [("caf\u00e9", "cafe\u0301"), ("5 \u2126", "5 \u03a9"), ("\ufb01ve", "five"), ("\uff15", "5")]


@pytest.mark.parametrize(("answered", "asked"), [*FORMS, *(pair[::-1] for pair in FORMS)])
@pending_too
def test_texts_that_only_unicode_calls_equal_are_different(state: str, result: bool, answered: str, asked: str) -> None:
    for field, known, rejection in (
        ("operation_id", ticket(operation_id=asked), Rejection.OTHER_OPERATION),
        ("operation_payload", ticket(payload=asked), Rejection.OTHER_PAYLOAD),
        ("external_user_id", ticket(external_user_id=asked), Rejection.OTHER_EXTERNAL_USER),
    ):
        answer = operation(**({"operation_id": known.operation_id} | {field: answered}), state=state, result=result)
        assert evaluate(answer, known.operation_id, known) is rejection
    assert evaluate(operation(operation_id=answered, state=state, result=result), asked) is Rejection.OTHER_OPERATION


@pytest.mark.parametrize(
    ("required", "answered", "approved", "pending"),
    [
        ("biom", "biom", Verdict.APPROVED, Verdict.PENDING),
        ("biom", "pin", Rejection.OTHER_AUTH_TYPE, Rejection.OTHER_AUTH_TYPE),
        ("biom", "BIOM", Rejection.OTHER_AUTH_TYPE, Rejection.OTHER_AUTH_TYPE),
        ("biom", None, Rejection.OTHER_AUTH_TYPE, Verdict.PENDING),
        ("biom", "", Rejection.OTHER_AUTH_TYPE, Verdict.PENDING),
        ("pin", "pin", Verdict.APPROVED, Verdict.PENDING),
        ("pin", "biom", Rejection.OTHER_AUTH_TYPE, Rejection.OTHER_AUTH_TYPE),
        (None, "pin", Verdict.APPROVED, Verdict.PENDING),
        (None, None, Verdict.APPROVED, Verdict.PENDING),
    ],
)
def test_only_the_required_factor_approves_and_a_pending_answer_need_not_name_one(
    required: str | None, answered: str | None, approved: Verdict | Rejection, pending: Verdict | Rejection
) -> None:
    known = ticket(require_auth_type=required)
    assert evaluate(operation(auth_type=answered), "txn-1", known) is approved
    assert evaluate(operation(auth_type=answered, state="pending"), "txn-1", known) is pending


@pytest.mark.parametrize(
    ("answered", "named"),
    [("pin", "'pin'"), (None, "no factor"), ("", "no factor"), ("the-api-key-echoed", "an undocumented factor")],
)
def test_a_wrong_factor_is_named_beside_the_required_one(answered: str | None, named: str) -> None:
    answer, known = operation(auth_type=answered), ticket(require_auth_type="biom")
    error = rejection_error(Rejection.OTHER_AUTH_TYPE, record(last_operation=answer, ticket=known))
    assert isinstance(error, OperationMismatchError)
    assert str(error) == (
        "operation 'txn-1' was rejected: its factor is not the required one: it must be 'biom', and the answer has "
        f"{named}; treat it as refused, .last_operation has the answer"
    )


def test_a_bare_id_asks_for_nothing_but_the_id() -> None:
    other = operation(user_id="FF", operation_payload="other", external_user_id="other", auth_type="pin")
    assert evaluate(other, "txn-1") is Verdict.APPROVED


some = st.sampled_from
answered_users = some(["AB", "ab", "AC", "", "ß", "SS", "FF", "\ufb00"])
users = some(["AB", "ab", "AC", "FF"])
payloads = some([None, "", "a", "b", "\ud800"])
externals = some([None, "", "x", "y"])


@given(
    got=st.builds(
        operation,
        operation_id=some(["txn-1", "txn-2", ""]),
        user_id=answered_users,
        operation_payload=payloads,
        external_user_id=externals,
        auth_type=some(["biom", "pin", None]),
        state=some(["approved", "approved", "pending", "denied", ""]) | st.text(max_size=3),
        result=some([True, True, False]),
    ),
    known=st.none()
    | st.builds(
        ticket,
        user_id=users,
        payload=payloads,
        external_user_id=externals,
        require_auth_type=some([None, "biom", "pin"]),
    ),
)
def test_approved_only_if_everything_agrees(got: Operation, known: ApprovalTicket | None) -> None:
    agrees = got.operation_id == "txn-1" and (
        known is None
        or (
            (got.user_id.isascii() and got.user_id.upper() == known.user_id.upper())
            and payload_digest(got.operation_payload) == known.payload_sha256
            and (not known.external_user_id or got.external_user_id == known.external_user_id)
            and (
                known.require_auth_type in {None, got.auth_type} or (got.auth_type is None and got.state != "approved")
            )
        )
    )
    verdict = evaluate(got, "txn-1", known)
    assert (verdict is Verdict.APPROVED) is (agrees and got.state == "approved" and got.result is True)
    assert (verdict is Verdict.PENDING) is (agrees and got.state == "pending")
    if isinstance(verdict, Rejection):
        assert verdict.is_mismatch is not agrees
        assert verdict.value.isprintable()


# -- the errors that end a wait


def record(**changed: Any) -> WaitRecord:
    fields: dict[str, Any] = {
        "operation_id": "txn-1",
        "last_operation": operation(state="pending", result=False),
        "last_error": ServerError(status=503, method="GET", path="/v2/operations/txn-1"),
        "polls": 7,
        "elapsed": 120.04,
        "ticket": ticket(),
    }
    return WaitRecord(**fields | changed)


ERRORS = [
    pytest.param(timeout_error, ApprovalTimeoutError, id="timed out"),
    pytest.param(partial(unknown_error, why=Unanswered.NO_SLOT), ApprovalUnknownError, id="unknown"),
    pytest.param(lambda told: rejection_error(Rejection.OTHER_PAYLOAD, told), OperationMismatchError, id="mismatch"),
    pytest.param(
        lambda told: rejection_error(Rejection.UNKNOWN_STATE, told), InconsistentOperationError, id="inconsistent"
    ),
]


@pytest.mark.parametrize(("make", "kind"), ERRORS)
def test_an_error_carries_all_that_is_known_of_the_wait(make: Any, kind: type[ApprovalError]) -> None:
    told = record()
    error = make(told)
    assert type(error) is kind
    assert vars(error) == told._asdict()


@pytest.mark.parametrize(("make", "kind"), ERRORS)
def test_a_message_names_the_operation_in_one_line_and_shows_no_payload(make: Any, kind: type[ApprovalError]) -> None:
    for operation_id in ("txn-1", "a\u2028b\x85", "'\"\\", "x" * 512):
        message = str(make(record(operation_id=operation_id)))
        assert repr(operation_id) in message
        assert message.isprintable()
        assert PAYLOAD not in message
        assert KEY not in f"{message} {pickle.dumps(make(record()))!r}"
    assert issubclass(kind, ApprovalError)


@pytest.mark.parametrize(
    "hostile",
    ["x" * 10_000, "a\nb\u2028\x1b[31m\u202e", "\ud800", "the-api-key-echoed"],
    ids=["long", "odd", "surrogate", "key"],
)
@pytest.mark.parametrize(
    "field", ["operation_id", "user_id", "operation_payload", "external_user_id", "auth_type", "state"]
)
def test_a_hostile_answer_is_not_quoted(field: str, hostile: str) -> None:
    answer, known = operation(**{field: hostile}), ticket(require_auth_type="biom")
    got = evaluate(answer, "txn-1", known)
    assert isinstance(got, Rejection)
    message = str(rejection_error(got, record(last_operation=answer, ticket=known)))
    assert hostile not in message
    assert message.isprintable()
    assert len(message) < 500


def test_a_timeout_says_that_it_is_no_denial_and_what_was_seen() -> None:
    assert str(timeout_error(record())) == (
        "operation 'txn-1' was still pending after 120.0 s and 7 polls; a timeout is not a denial: it can still be "
        "approved; to check it, wait for its ticket again, which polls once"
    )
    assert "was still missing after" in str(timeout_error(record(last_operation=None)))
    assert " and 1 poll; " in str(timeout_error(record(polls=1)))
    assert str(timeout_error(record(ticket=None))).endswith("; to check it, call get_operation")


@pytest.mark.parametrize("why", Unanswered)
def test_an_unanswered_final_poll_says_why_the_outcome_is_unknown(why: Unanswered) -> None:
    start, end = (
        f"operation 'txn-1': time is up after 120.0 s and 7 polls, and {why.value}",
        ("; the outcome is unknown; before you repeat anything, wait for its ticket again, which polls once"),
    )
    assert str(unknown_error(record(), why)) == f"{start} (last failure: {record().last_error}){end}"
    assert str(unknown_error(record(last_error=None), why)) == start + end


def test_a_rejected_answer_is_to_be_treated_as_refused() -> None:
    got = evaluate(operation(result=False), "txn-1")
    assert isinstance(got, Rejection)
    assert str(rejection_error(got, record())) == (
        "operation 'txn-1' was rejected: its state is 'approved', but its result is false; treat it as refused, "
        ".last_operation has the answer"
    )
