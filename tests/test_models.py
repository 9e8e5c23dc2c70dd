"""What the models promise: nothing secret shows, new fields break nothing, a ticket survives the way through JSON."""

from __future__ import annotations

import copy
import json
import math
import pickle
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.pretty import pretty_repr

from aiokeyless._poller.packing import pack_pending, unpack_pending
from aiokeyless._validation import seconds
from aiokeyless.errors import ConfigurationError, ServerError
from aiokeyless.models import (
    AuthType,
    NewOperation,
    Operation,
    OperationState,
    PendingOperation,
    Region,
    Secret,
    decode_hook,
)
from aiokeyless.reports import ApprovalUpdate, Approved, ClientStatistics, NotApproved
from aiokeyless.ticket import ApprovalTicket, payload_digest

if TYPE_CHECKING:
    from collections.abc import Callable

KEY = "sdk-key-0123456789"
PAYLOAD = "Approve wire transfer of $500"
WIRE: dict[str, Any] = {
    "id": 1,
    "timestamp": "2020-01-02T03:04:05.68",
    "nodeId": "node",
    "userId": "0123456789ABCDEF",
    "apiKey": KEY,
    "externalUserId": "someone@example.com",
    "operationId": "txn-1",
    "operationPayload": PAYLOAD,
    "result": True,
    "authType": "biom",
    "state": "approved",
}
OPTIONAL = ["externalUserId", "operationPayload", "authType"]
EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def decode(fields: dict[str, Any]) -> Operation:
    return msgspec.json.decode(json.dumps(fields), type=Operation, dec_hook=decode_hook)


def operation(**changed: Any) -> Operation:
    return decode(WIRE | changed)


def pending() -> PendingOperation:
    return PendingOperation(operation_id="txn-1", operation_payload=PAYLOAD)


# -- a pending operation, packed

texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(
    st.fixed_dictionaries(
        {
            "id": st.integers(-(10**30), 10**30),
            "timestamp": texts,
            "nodeId": texts,
            "userId": texts,
            "apiKey": texts,
            "operationId": texts,
            "result": st.booleans(),
        },
        optional={name: texts | st.none() for name in OPTIONAL},
    )
)
def test_a_pending_operation_comes_out_of_the_pack_as_it_went_in(fields: dict[str, Any]) -> None:
    before = decode(fields | {"state": "pending"})
    after = unpack_pending(pack_pending(before), before.operation_id)
    assert after == before
    assert [type(value) for value in msgspec.structs.astuple(after)] == [
        type(value) for value in msgspec.structs.astuple(before)
    ]


def test_a_packed_operation_holds_neither_names_nor_what_its_wait_knows() -> None:
    packed = pack_pending(operation(state="pending", result=False))
    assert not any(text.encode() in packed for text in ["operationId", "apiKey", "state", "txn-1", "pending"])


# -- Secret


@pytest.mark.parametrize("spec", ["", "s", "40", ">40", "*^40", ".3", "!", "d", "x" * 100])
def test_a_secret_formats_the_same_whatever_is_asked(spec: str) -> None:
    assert format(Secret(KEY), spec) == "***"
    assert f"{Secret(KEY):{spec}}" == "***"


@pytest.mark.parametrize(
    ("show", "shown"),
    [
        (repr, "Secret('***')"),
        (str, "***"),
        (lambda secret: f"<{secret}>", "<***>"),
        (lambda secret: f"{secret!r}", "Secret('***')"),
        (lambda secret: f"{secret!a}", "Secret('***')"),
        (lambda secret: "%s" % secret, "***"),  # noqa: UP031
        (lambda secret: "%r" % secret, "Secret('***')"),  # noqa: UP031
        ("{:>9}".format, "***"),
        (lambda secret: str([secret]), "[Secret('***')]"),
        (pretty_repr, "Secret('***')"),
    ],
    ids=["repr", "str", "f", "f!r", "f!a", "%s", "%r", "format", "in a list", "rich"],
)
def test_a_secret_does_not_show_itself(show: Callable[[Secret], str], shown: str) -> None:
    assert show(Secret(KEY)) == shown


def test_the_text_of_a_secret_comes_out_by_reveal_only() -> None:
    secret = Secret(KEY)
    assert secret.reveal() == KEY
    assert not hasattr(secret, "__dict__")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickled_secret_loses_its_text(protocol: int) -> None:
    data = pickle.dumps(Secret(KEY), protocol)
    assert KEY.encode() not in data
    assert pickle.loads(data).reveal() == ""  # noqa: S301


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copied_secret_keeps_its_text(copied: Callable[[Secret], Secret]) -> None:
    assert copied(Secret(KEY)).reveal() == KEY


def test_secrets_are_equal_by_text_and_to_nothing_else() -> None:
    assert Secret(KEY) == Secret(KEY)
    assert hash(Secret(KEY)) == hash(Secret(KEY))
    assert Secret(KEY) != Secret(KEY + "x")
    assert Secret(KEY) != KEY
    assert Secret("\ud800") != Secret("é")  # what UTF-8 cannot encode is compared too
    assert Secret("\ud800") == Secret("\ud800")


def test_a_secret_does_not_get_into_json() -> None:
    with pytest.raises(TypeError):
        msgspec.json.encode(operation())
    with pytest.raises(TypeError):
        json.dumps({"key": Secret(KEY)})


# -- reprs

MODELS = [
    pytest.param(operation(), id="Operation"),
    pytest.param(pending(), id="PendingOperation"),
    pytest.param(
        ApprovalUpdate(operation=operation(), error=None, polls=1, elapsed=0.1, next_poll_in=None), id="ApprovalUpdate"
    ),
    pytest.param(Approved(operation_id="txn-1", operation=operation()), id="Approved"),
]


@pytest.mark.parametrize("show", [repr, str, format, pretty_repr], ids=["repr", "str", "format", "rich"])
@pytest.mark.parametrize("model", MODELS)
def test_no_repr_shows_a_key_or_a_payload_but_its_length(model: object, show: Callable[[object], str]) -> None:
    shown = show(model)
    assert KEY not in shown
    assert PAYLOAD not in shown
    assert f"operation_payload=<{len(PAYLOAD)} characters>" in shown
    assert type(model).__name__ in shown


def test_a_repr_says_everything_else() -> None:
    assert repr(operation()) == (
        "Operation(id=1, timestamp='2020-01-02T03:04:05.68', node_id='node', user_id='0123456789ABCDEF', "
        "api_key=Secret('***'), external_user_id='someone@example.com', operation_id='txn-1', "
        f"operation_payload=<{len(PAYLOAD)} characters>, result=True, auth_type='biom', state='approved')"
    )


def test_an_absent_payload_and_an_empty_one_are_shown_differently() -> None:
    assert "operation_payload=None" in repr(operation(operationPayload=None))
    assert "operation_payload=<0 characters>" in repr(operation(operationPayload=""))


def test_a_model_without_a_payload_has_a_plain_repr() -> None:
    statistics = ClientStatistics(
        waiting=1, in_flight=2, polls=3, approvals=4, timeouts=5, transient_failures=6, lag=0.5, circuit="open"
    )
    assert repr(statistics) == (
        "ClientStatistics(waiting=1, in_flight=2, polls=3, approvals=4, timeouts=5, transient_failures=6, lag=0.5, "
        "circuit='open')"
    )
    error = ServerError(status=503, method="GET", path="/x", detail=PAYLOAD)
    assert PAYLOAD not in repr(NotApproved(operation_id="txn-1", error=error))


# -- the structs


@pytest.mark.parametrize("model", MODELS)
def test_models_are_values_that_do_not_change(model: Any) -> None:
    with pytest.raises(AttributeError):
        model.operation_id = "another"
    assert hash(model) == hash(copy.copy(model))


def test_an_operation_survives_pickling_but_for_its_key() -> None:
    again = pickle.loads(pickle.dumps(operation()))  # noqa: S301
    assert again.to_dict() == operation().to_dict()
    assert again.api_key.reveal() == ""
    assert copy.deepcopy(operation()) == operation()


def test_the_documented_answer_is_read_field_by_field() -> None:
    got = operation()
    assert got.api_key == Secret(KEY)
    assert got.to_dict() == {
        "id": 1,
        "timestamp": "2020-01-02T03:04:05.68",
        "node_id": "node",
        "user_id": "0123456789ABCDEF",
        "external_user_id": "someone@example.com",
        "operation_id": "txn-1",
        "operation_payload": PAYLOAD,
        "result": True,
        "auth_type": "biom",
        "state": "approved",
    }


def test_to_dict_is_plain_data_without_the_key() -> None:
    assert KEY not in json.dumps(operation().to_dict())
    assert "api_key" not in operation().to_dict()


def test_unknown_fields_are_ignored() -> None:
    assert operation(newField={"deep": [1, None]}, api_key="snake case is not the wire's") == operation()


@pytest.mark.parametrize("field", OPTIONAL)
@pytest.mark.parametrize("null", [True, False], ids=["null", "absent"])
def test_an_optional_field_may_be_absent_or_null(field: str, null: bool) -> None:
    fields = WIRE | {field: None} if null else {name: value for name, value in WIRE.items() if name != field}
    assert decode(fields) == operation(**{field: None})


@pytest.mark.parametrize("field", [name for name in WIRE if name not in {*OPTIONAL, "apiKey"}])
def test_a_field_that_is_always_there_must_be_there(field: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode({name: value for name, value in WIRE.items() if name != field})
    with pytest.raises(msgspec.ValidationError):
        decode(WIRE | {field: None})


@pytest.mark.parametrize("value", ["true", 1, 0, None, [], "approved"])
def test_a_result_is_true_or_false_and_nothing_like_it(value: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        operation(result=value)


@pytest.mark.parametrize("value", [1, ["a"], {"a": 1}, True])
def test_a_key_that_is_no_text_is_refused_with_the_field_named_and_the_value_not(value: object) -> None:
    with pytest.raises(msgspec.ValidationError, match=r"Expected `str`, got `\w+` - at `\$\.apiKey`"):
        operation(apiKey=value)


def test_states_and_auth_types_that_are_new_are_kept_as_they_are() -> None:
    got = operation(state="denied", authType="voice")
    assert (got.state, got.auth_type) == ("denied", "voice")


def test_the_documented_values_have_names() -> None:
    assert list(OperationState) == ["pending", "approved"]
    assert list(AuthType) == ["biom", "pin"]
    assert list(Region) == ["eu", "us", "latam", "sg"]
    assert operation().state == OperationState.APPROVED
    assert operation().auth_type == AuthType.BIOMETRIC


@pytest.mark.parametrize(
    ("state", "result", "approved"),
    [
        ("approved", True, True),
        ("approved", False, False),
        ("pending", True, False),
        ("pending", False, False),
        ("Approved", True, False),
        ("approved ", True, False),
        ("", True, False),
        ("denied", True, False),
    ],
)
def test_approved_means_state_and_result_both(state: str, result: bool, approved: bool) -> None:
    assert operation(state=state, result=result).is_approved is approved


def test_a_result_that_is_only_truthy_is_no_approval() -> None:
    assert msgspec.structs.replace(operation(), result=1).is_approved is False


# -- timestamps


@pytest.mark.parametrize(
    ("text", "created_at"),
    [
        ("2020-01-02T03:04:05.68", datetime(2020, 1, 2, 3, 4, 5, 680000)),  # noqa: DTZ001
        ("2025-05-21T10:30:00.000", datetime(2025, 5, 21, 10, 30)),  # noqa: DTZ001
        ("2020-01-02T03:04:05.242194378", datetime(2020, 1, 2, 3, 4, 5, 242194)),  # noqa: DTZ001
        ("2020-01-02T03:04:05.999999999", datetime(2020, 1, 2, 3, 4, 5, 999999)),  # noqa: DTZ001
        ("2020-01-02T03:04:05", datetime(2020, 1, 2, 3, 4, 5)),  # noqa: DTZ001
        ("2020-01-02T03:04:05.1", datetime(2020, 1, 2, 3, 4, 5, 100000)),  # noqa: DTZ001
        ("2024-02-29T00:00:00", datetime(2024, 2, 29)),  # noqa: DTZ001
        ("2020-01-02T03:04:05Z", None),
        ("2020-01-02T03:04:05+00:00", None),
        ("2020-01-02T03:04:05.", None),
        ("2020-01-02T03:04:05.1234567890", None),
        ("2020-02-31T00:00:00", None),
        ("2023-02-29T00:00:00", None),
        ("0000-01-01T00:00:00", None),
        ("2020-01-02T25:00:00", None),
        ("2020-01-02T23:59:60", None),
        ("2020-01-02 03:04:05", None),
        ("2020-01-02", None),
        ("20200102T030405", None),
        ("2020-W01-4T03:04:05", None),
        ("٢٠٢٠-01-02T03:04:05", None),
        ("2020-01-02T03:04:05\n", None),
        (" 2020-01-02T03:04:05", None),
        ("1577934245", None),
        ("yesterday", None),
        ("", None),
    ],
)
def test_a_timestamp_is_a_naive_datetime_or_none(text: str, created_at: datetime | None) -> None:
    got = operation(timestamp=text)
    assert got.created_at == created_at
    assert got.timestamp == text


@given(st.text() | st.from_regex(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,12})?"))
def test_no_timestamp_whatever_raises(text: str) -> None:
    got = msgspec.structs.replace(operation(), timestamp=text).created_at
    assert got is None or got.tzinfo is None


# -- the small ones


def test_the_body_of_a_create_leaves_out_what_is_absent() -> None:
    assert msgspec.json.encode(NewOperation(operation_id="a")) == b'{"operationId":"a"}'


def test_an_absent_payload_and_an_empty_one_have_the_same_digest() -> None:
    assert payload_digest(None) == payload_digest("") == EMPTY_SHA256
    assert payload_digest("é") == "4a99557e4033c3539de2eb65472017cad5f9557f7a0625a09f1c3f6e2ba69c4c"
    assert len(payload_digest("\ud800")) == 64


@pytest.mark.parametrize(
    "value",
    [None, "1", True, False, math.nan, 1j, Decimal(1), timedelta(seconds=1), [1.0], pytest.param(10**5000, id="huge")],
)
def test_what_is_no_number_of_seconds_is_refused_by_name(value: object) -> None:
    with pytest.raises(ConfigurationError, match=r"^timeout must be a number of seconds, not .+") as caught:
        seconds(value, "timeout", zero=True)
    assert str(caught.value).isprintable()


def test_seconds_are_more_than_nothing() -> None:
    for value in (0, 0.0, -0.0, -1, -math.inf):
        with pytest.raises(ConfigurationError, match=r"^timeout must be more than 0 seconds, not "):
            seconds(value, "timeout")
    with pytest.raises(ConfigurationError, match=r"^timeout must be at least 0 seconds, not -1$"):
        seconds(-1, "timeout", zero=True)


@pytest.mark.parametrize("value", [1, 0.5, 5e-324, 1e308, math.inf])
def test_seconds_come_back_as_a_float(value: float) -> None:
    got = seconds(value, "timeout")
    assert (got, type(got)) == (value, float)
    assert seconds(0, "timeout", zero=True) == 0.0


# -- ApprovalTicket

TICKET: dict[str, Any] = {
    "operation_id": "txn-1",
    "user_id": "0123456789ABCDEF",
    "external_user_id": None,
    "payload_sha256": payload_digest(PAYLOAD),
    "created_at": "2026-11-24T12:00:00Z",
    "expires_at": "2026-11-24T12:02:00Z",
    "reconciled": False,
    "version": 1,
}


def ticket(**changed: Any) -> ApprovalTicket:
    return ApprovalTicket.from_json(json.dumps(TICKET | changed))


def test_the_form_of_a_ticket_is_this_one() -> None:
    assert json.loads(ticket().to_json()) == TICKET
    assert "\n" not in ticket().to_json()


instants = st.datetimes(timezones=st.just(UTC))
texts = st.text(st.characters(exclude_categories=["Cs"]))


tickets = st.builds(
    ApprovalTicket,
    operation_id=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=3, max_size=512),
    user_id=st.text("0123456789abcdefABCDEF", min_size=1, max_size=512),
    external_user_id=st.none() | texts,
    payload_sha256=st.builds(payload_digest, st.none() | st.text()),
    created_at=instants,
    expires_at=instants,
    reconciled=st.booleans(),
)


@given(tickets)
def test_a_ticket_survives_the_way_through_json_and_pickle(before: ApprovalTicket) -> None:
    assert ApprovalTicket.from_json(before.to_json()) == before
    assert ApprovalTicket.from_json(before.to_json().encode()) == before
    assert pickle.loads(pickle.dumps(before)) == before  # noqa: S301


def test_a_ticket_holds_neither_payload_nor_key() -> None:
    shown = f"{ticket()!r} {ticket().to_json()} {pretty_repr(ticket())}"
    assert PAYLOAD not in shown
    assert "key" not in shown.lower()
    assert set(ApprovalTicket.__struct_fields__) == set(TICKET)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "{",
        "null",
        "1",
        "[]",
        '""',
        "{}",
        "<html>",
        '{"version": 1}',
        "[" * 100_000,
        '{"x":' * 100_000,
        "\ud800",
        '{"version": 1e999}',
        b"\xff",
        b"",
        json.dumps(TICKET) + "x",
        json.dumps(TICKET)[:-1],
        "\ufeff" + json.dumps(TICKET),
        json.dumps(TICKET).replace("txn", "\ud800"),
        json.dumps(TICKET).replace("txn", "\\ud800"),
        json.dumps(TICKET).replace('"version": 1', '"version": ' + "1" * 5000),
        None,
        1,
        ["text"],
    ],
    ids=lambda text: repr(text)[:24],
)
def test_a_text_that_is_not_a_ticket_is_refused_in_one_line(text: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^not a valid approval ticket \(.*to_json\(\) returned$") as caught:
        ApprovalTicket.from_json(text)
    assert str(caught.value).isprintable()
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"operation_id": None}, "operation_id"),
        ({"operation_id": ""}, "operation_id"),
        ({"operation_id": ".."}, "operation_id"),
        ({"user_id": 1}, "user_id"),
        ({"user_id": ""}, "user_id"),
        ({"user_id": "ann"}, "user_id"),
        ({"external_user_id": []}, "external_user_id"),
        ({"reconciled": 1}, "reconciled"),
        ({"payload_sha256": "0" * 63}, "payload_sha256"),
        ({"payload_sha256": "0" * 65}, "payload_sha256"),
        ({"payload_sha256": "A" * 64}, "payload_sha256"),
        ({"payload_sha256": "0" * 64 + "\n"}, "payload_sha256"),
        ({"payload_sha256": "\u0660" * 64}, "payload_sha256"),
        ({"payload_sha256": None}, "payload_sha256"),
        ({"created_at": "2026-11-24T12:00:00"}, "created_at"),
        ({"expires_at": "2026-11-24T12:00:00"}, "expires_at"),
        ({"created_at": 1}, "created_at"),
        ({"created_at": "2026-02-31T12:00:00Z"}, "created_at"),
        ({"created_at": "0001-01-01T00:00:00+14:00"}, "created_at"),
        ({"expires_at": "9999-12-31T23:59:59-14:00"}, "expires_at"),
        ({"version": True}, "version"),
        ({"version": "1"}, "version"),
        ({"version": 1.5}, "version"),
        ({"version": None}, "version"),
        ({"version": 2}, "version 2 is unknown"),
        ({"version": 0}, "version 0 is unknown"),
        ({"version": -1}, "version -1 is unknown"),
    ],
    ids=str,
)
def test_a_ticket_with_a_wrong_field_is_refused_by_name(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        ticket(**changed)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"operation_id": None}, "operation_id"),
        ({"operation_id": ""}, "operation_id"),
        ({"user_id": None}, "user_id"),
        ({"user_id": "ann"}, "user_id"),
        ({"external_user_id": 7}, "external_user_id"),
        ({"payload_sha256": None}, "payload_sha256"),
        ({"payload_sha256": "0" * 63}, "payload_sha256"),
        ({"created_at": "2026-11-24T12:00:00Z"}, "created_at"),
        ({"created_at": datetime(2026, 11, 24, tzinfo=None)}, "created_at"),  # noqa: DTZ001  # naive is what is refused
        ({"expires_at": None}, "expires_at"),
    ],
    ids=str,
)
def test_a_ticket_made_by_hand_checks_itself(changed: dict[str, Any], message: str) -> None:
    plain: dict[str, Any] = {name: getattr(ticket(), name) for name in ApprovalTicket.__struct_fields__}
    with pytest.raises(ConfigurationError, match=message):
        ApprovalTicket(**(plain | changed))
    with pytest.raises(ConfigurationError, match=message):
        msgspec.structs.replace(ticket(), **changed)


def test_a_ticket_made_by_hand_is_as_one_that_was_read() -> None:
    zone = timezone(timedelta(hours=2))
    made = ApprovalTicket(
        operation_id="txn-1",
        user_id="0123456789abcdef",
        payload_sha256=payload_digest(PAYLOAD),
        created_at=datetime(2026, 11, 24, 14, tzinfo=zone),
        expires_at=datetime(2026, 11, 24, 14, 2, tzinfo=zone),
    )
    assert made == ticket()
    assert made.created_at.tzinfo is UTC


def test_a_ticket_for_an_operation_binds_user_payload_and_external_id() -> None:
    made = ApprovalTicket.for_operation(
        "txn-1",
        user_id="c0ffee",
        operation_payload=PAYLOAD,
        external_user_id="ann",
        created_at=datetime(2026, 11, 24, 12, tzinfo=UTC),
        expires_in=60,
    )
    assert made == ApprovalTicket(
        operation_id="txn-1",
        user_id="C0FFEE",
        external_user_id="ann",
        payload_sha256=payload_digest(PAYLOAD),
        created_at=datetime(2026, 11, 24, 12, tzinfo=UTC),
        expires_at=datetime(2026, 11, 24, 12, 1, tzinfo=UTC),
    )


def test_a_ticket_for_an_operation_begins_now_and_lasts_two_minutes() -> None:
    before = datetime.now(UTC)
    made = ApprovalTicket.for_operation("txn-1", user_id="C0FFEE")
    assert before <= made.created_at <= datetime.now(UTC)
    assert made.expires_at - made.created_at == timedelta(seconds=120)
    assert (made.payload_sha256, made.external_user_id, made.reconciled) == (EMPTY_SHA256, None, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operation_id": ""}, "operation_id"),
        ({"user_id": "ann"}, "user_id"),
        ({"operation_payload": 7}, "operation_payload"),
        ({"operation_payload": "\ud800"}, "operation_payload"),
        ({"external_user_id": 7}, "external_user_id"),
        ({"created_at": datetime(2026, 11, 24)}, "created_at"),  # noqa: DTZ001  # naive is what is refused
        ({"created_at": "now"}, "created_at"),
        ({"expires_in": 0}, "expires_in"),
        ({"expires_in": -1}, "expires_in"),
        ({"expires_in": math.nan}, "expires_in"),
        ({"expires_in": math.inf}, "expires_in"),
        ({"expires_in": 1e12}, "expires_in must end before the year 10000"),
    ],
    ids=str,
)
def test_a_ticket_for_an_operation_says_what_is_wrong(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ApprovalTicket.for_operation(**({"operation_id": "txn-1", "user_id": "C0FFEE"} | arguments))


@pytest.mark.parametrize("field", [name for name in TICKET if name not in {"external_user_id", "reconciled"}])
def test_a_ticket_lacking_a_field_is_refused_by_name(field: str) -> None:
    with pytest.raises(ConfigurationError, match=field):
        ApprovalTicket.from_json(json.dumps({name: value for name, value in TICKET.items() if name != field}))


def test_a_newer_ticket_is_refused_for_its_version_whatever_its_form() -> None:
    with pytest.raises(ConfigurationError, match=r"ticket version 2 .* upgrade this one$"):
        ApprovalTicket.from_json('{"version": 2, "operations": ["a", "b"], "created_at": 5}')


def test_a_ticket_of_this_version_with_more_in_it_is_read() -> None:
    assert ticket(note="for me") == ticket()


@pytest.mark.parametrize("zone", [timezone(timedelta(hours=2)), timezone(timedelta(hours=-11, minutes=-30)), UTC])
def test_times_of_other_zones_become_utc(zone: timezone) -> None:
    made = datetime(2026, 11, 24, 12, tzinfo=UTC)
    got = ticket(created_at=made.astimezone(zone).isoformat(), expires_at=made.astimezone(zone).isoformat())
    assert (got.created_at, got.created_at.tzinfo) == (made, UTC)
    assert (got.expires_at, got.expires_at.tzinfo) == (made, UTC)


fields_of_tickets = st.fixed_dictionaries(
    {},
    optional={
        name: st.just(value) | st.none() | st.integers() | st.text(max_size=5) | st.booleans() | st.floats()
        for name, value in TICKET.items()
    },
)
zoned = st.datetimes(timezones=st.timezones()).map(lambda moment: moment.isoformat())


@given(
    st.text()
    | st.binary()
    | st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5).map(json.dumps)
    | fields_of_tickets.map(json.dumps)
    | st.builds(lambda made, end: json.dumps(TICKET | {"created_at": made, "expires_at": end}), zoned, zoned)
)
def test_any_text_is_a_ticket_or_a_configuration_error(text: str | bytes) -> None:
    try:
        got = ApprovalTicket.from_json(text)
    except ConfigurationError as error:
        assert str(error).isprintable()  # noqa: PT017  # both outcomes are fine
    else:
        assert got.created_at.tzinfo is UTC
        assert got.expires_at.tzinfo is UTC
        assert got.version == 1


def test_remaining_counts_down_to_nothing_and_not_below() -> None:
    now = datetime(2026, 11, 24, 12, 1, 59, 500000, tzinfo=UTC)
    assert ticket().remaining(now) == 0.5
    assert ticket().remaining(now.astimezone(timezone(timedelta(hours=5)))) == 0.5
    assert ticket().remaining(now + timedelta(days=1)) == 0.0
    assert ticket().remaining(datetime(2026, 11, 24, 12, tzinfo=UTC)) == 120.0


def test_remaining_counts_from_this_machines_clock_by_default() -> None:
    assert ticket(expires_at="2001-01-01T00:00:00Z").remaining() == 0.0
    soon = datetime.now(UTC) + timedelta(hours=1)
    assert 3500 < ticket(expires_at=soon.isoformat()).remaining() <= 3600


def test_remaining_refuses_a_naive_now() -> None:
    with pytest.raises(ConfigurationError, match="aware"):
        ticket().remaining(datetime(2026, 11, 24, 12))  # noqa: DTZ001
