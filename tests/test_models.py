"""What the models promise: nothing secret shows, and new fields break nothing."""

from __future__ import annotations

import copy
import json
import pickle
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.pretty import pretty_repr

from aiokeyless.errors import ServerError
from aiokeyless.models import (
    Authentication,
    Authentications,
    AuthType,
    Device,
    ExternalUser,
    NewExternalUser,
    Operation,
    OperationState,
    PendingOperation,
    Region,
    Secret,
    User,
    decode_hook,
)
from aiokeyless.reports import ApprovalUpdate, Approved

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
OPTIONAL = ["id", "timestamp", "nodeId", "externalUserId", "operationPayload", "authType"]
EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def decode(fields: dict[str, Any]) -> Operation:
    return msgspec.json.decode(json.dumps(fields), type=Operation, dec_hook=decode_hook)


def operation(**changed: Any) -> Operation:
    return decode(WIRE | changed)


def pending() -> PendingOperation:
    return PendingOperation(operation_id="txn-1", operation_payload=PAYLOAD)


# -- Secret


@pytest.mark.parametrize("spec", ["", "s", "40", ">40", "*^40", ".3", "!", "d", "x" * 100])
def test_a_secret_formats_the_same_with_every_format_spec(spec: str) -> None:
    assert format(Secret(KEY), spec) == "***"
    assert f"{Secret(KEY):{spec}}" == "***"


@pytest.mark.parametrize(
    ("show", "shown"),
    [
        (repr, "Secret('***')"),
        (str, "***"),
        (lambda secret: f"{secret!r}", "Secret('***')"),
        (lambda secret: f"{secret!a}", "Secret('***')"),
        (lambda secret: "%s" % secret, "***"),  # noqa: UP031
        (lambda secret: "%r" % secret, "Secret('***')"),  # noqa: UP031
        (lambda secret: str([secret]), "[Secret('***')]"),
        (pretty_repr, "Secret('***')"),
    ],
    ids=["repr", "str", "f!r", "f!a", "%s", "%r", "in a list", "rich"],
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
        "api_key=Secret('***'), external_user_id=<19 characters>, operation_id='txn-1', "
        f"operation_payload=<{len(PAYLOAD)} characters>, result=True, auth_type='biom', state='approved')"
    )


def test_an_absent_payload_and_an_empty_one_are_shown_differently() -> None:
    assert "operation_payload=None" in repr(operation(operationPayload=None))
    assert "operation_payload=<0 characters>" in repr(operation(operationPayload=""))


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


def test_each_kind_of_data_is_a_dictionary_too() -> None:
    texts = {"operation_id": "txn-1", "operation_payload": PAYLOAD, "external_user_id": None, "auth_type": None}
    assert pending().to_dict() == texts


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
        *(("approved", True, True), ("approved", False, False), ("pending", False, False)),
        *((state, True, False) for state in ("pending", "Approved", "approved ", "", "denied")),
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
        ("2020-01-02T03:04:05.68", "2020-01-02T03:04:05.680000"),
        ("2025-05-21T10:30:00.000", "2025-05-21T10:30:00"),
        ("2020-01-02T03:04:05.242194378", "2020-01-02T03:04:05.242194"),
        ("2020-01-02T03:04:05.999999999", "2020-01-02T03:04:05.999999"),
        ("2024-02-29T00:00:00", "2024-02-29T00:00:00"),
        ("2020-01-02T03:04:05Z", "2020-01-02T03:04:05"),
        ("2020-01-02T03:04:05.1+02:00", "2020-01-02T01:04:05.100000"),
        ("2020-01-02T03:04:05-0930", "2020-01-02T12:34:05"),
        ("2020-01-02T03:04:05+01", "2020-01-02T02:04:05"),
        (1577934245680, "2020-01-02T03:04:05.680000"),
        (1577934245680.5, "2020-01-02T03:04:05.680500"),
        (-1, "1969-12-31T23:59:59.999000"),
    ],
)
def test_a_timestamp_is_a_time_in_utc(text: str | float, created_at: str) -> None:
    got = operation(timestamp=text)
    assert (got.timestamp, got.created_at) == (text, datetime.fromisoformat(f"{created_at}+00:00"))
    assert getattr(got.created_at, "tzinfo", None) is UTC


@pytest.mark.parametrize(
    "text",
    [
        *("2020-01-02T03:04:05.", "2020-01-02T03:04:05.1234567890", "2020-01-02T03:04:05+25:00", None, 1e300, -1e15),
        *("0001-01-01T00:00:00+01:00", "9999-12-31T23:59:59-00:01", "2020-01-02T03:04:05 Z", "2020-01-02T03:04:05+0"),
        *("2020-02-31T00:00:00", "2023-02-29T00:00:00", "0000-01-01T00:00:00", "2020-01-02T25:00:00"),
        *("2020-01-02T23:59:60", "2020-01-02 03:04:05", "2020-01-02", "20200102T030405", "2020-W01-4T03:04:05"),
        *("٢٠٢٠-01-02T03:04:05", "2020-01-02T03:04:05\n", " 2020-01-02T03:04:05", "1577934245", "yesterday", ""),
    ],
)
def test_another_timestamp_is_kept_and_is_no_time(text: str | float | None) -> None:
    got = operation(timestamp=text)
    assert (got.timestamp, got.created_at) == (text, None)


@given(
    st.text()
    | st.from_regex(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,12})?(Z|[+-]\d\d:?\d\d)?")
    | st.integers()
    | st.floats()
)
def test_no_timestamp_raises(text: str | float) -> None:
    got = msgspec.structs.replace(operation(), timestamp=text).created_at
    assert got is None or got.tzinfo is UTC


# -- users and devices

TIME = "2025-08-06T15:04:05.242194378"
DOCUMENTED: dict[Any, dict[str, Any]] = {
    ExternalUser: {
        "sdkCustomerId": 1,
        "userId": "0123456789ABCDEF",
        "externalUserId": "text",
        "createdAt": TIME,
        "updatedAt": TIME,
    },
    User: {"userId": "0123456789ABCDEF", "biometricPublicSigningKey": "a2V5", "createdAt": TIME, "updatedAt": TIME},
    Device: {
        "userId": "0123456789ABCDEF",
        "sdkCustomerId": 1,
        "publicSigningKey": "a2V5",
        "publicEncryptionKey": "a2V6",
        "state": "ACTIVE",
        "createdAt": TIME,
        "osVersion": "15",
        "sdkVersion": "5.2",
        "deletedAt": TIME,
    },
}
documented = pytest.mark.parametrize(
    ("kind", "wire"), DOCUMENTED.items(), ids=lambda each: getattr(each, "__name__", "")
)


@documented
def test_a_documented_user_or_device_is_read_field_by_field(kind: Any, wire: dict[str, Any]) -> None:
    got = msgspec.json.decode(json.dumps(wire | {"info": "deprecated"}), type=kind)
    assert list(got.to_dict().values()) == list(wire.values())
    assert list(got.to_dict()) == [re.sub("[A-Z]", lambda letter: f"_{letter[0].lower()}", name) for name in wire]
    assert msgspec.json.decode(msgspec.json.encode(got)) == wire


@documented
def test_of_a_user_or_device_only_what_is_documented_as_optional_may_be_absent(kind: Any, wire: dict[str, Any]) -> None:
    optional = {"osVersion", "sdkVersion", "deletedAt"} | ({"sdkCustomerId"} if kind is ExternalUser else set())
    for name in wire:
        less = json.dumps({other: value for other, value in wire.items() if other != name})
        if name in optional:
            assert msgspec.json.decode(less, type=kind)
        else:
            with pytest.raises(msgspec.ValidationError):
                msgspec.json.decode(less, type=kind)


def test_no_repr_shows_an_external_id() -> None:
    personal = "someone@example.com"
    link = msgspec.json.decode(json.dumps(DOCUMENTED[ExternalUser] | {"externalUserId": personal}), type=ExternalUser)
    for model in (link, NewExternalUser(external_user_id=personal), operation()):
        assert personal not in f"{model!r} {pretty_repr(model)}"
        assert "external_user_id=<19 characters>" in repr(model)


# -- attempts to authenticate


def test_a_cancelled_attempt_says_so_in_words_and_keeps_its_number() -> None:
    attempt = Authentication(created_at="2025-05-21T10:34:00.000", result="FAILED", error_code=30003, auth_type="pin")
    assert attempt.reason == "the user left the scan"
    assert attempt.to_dict() == {
        "created_at": "2025-05-21T10:34:00.000",
        "result": "FAILED",
        "error_code": 30003,
        "operation_id": None,
        "device_id": None,
        "auth_type": "pin",
        "reason": "the user left the scan",
    }


@pytest.mark.parametrize(
    "code", [512, 534, 535, 1131, 1167, 20000, 30000, 30003, 30004, 30005, 30007, 30008, 30009, 40002]
)
def test_a_documented_code_has_words_that_accuse_nobody(code: int) -> None:
    reason = Authentication(error_code=code).reason
    assert reason
    assert not {"spoof", "fraud", "attack", "fake"} & set(reason.split())


@pytest.mark.parametrize("code", [None, 0, 1, 29999, 30001, 99999])
def test_a_code_that_is_not_documented_has_no_words(code: int | None) -> None:
    assert Authentication(error_code=code).reason is None


@pytest.mark.parametrize(
    ("fields", "failed"),
    [
        ({}, False),
        ({"result": "APPROVED"}, False),
        ({"result": "APPROVED", "error_code": 0}, False),
        ({"error_code": 0}, False),
        ({"error_code": 30004}, True),
        ({"result": "APPROVED", "error_code": 30004}, True),
        ({"result": "REJECTED"}, True),
        ({"result": "", "error_code": 0}, True),
    ],
)
def test_an_attempt_failed_if_anything_says_so(fields: dict[str, Any], failed: bool) -> None:
    assert Authentication(**fields).failed is failed


def test_attempts_differ_if_only_one_of_them_has_more_pages() -> None:
    attempts = Authentications(attempts=(Authentication(error_code=30003),), truncated=True)
    for same in (copy.copy(attempts), pickle.loads(pickle.dumps(attempts))):  # noqa: S301
        assert same == attempts
    assert attempts != Authentications(attempts=attempts.attempts)
    assert attempts.to_dict() == {"attempts": [attempts.attempts[0].to_dict()], "truncated": True}


def test_a_report_is_plain_data_to_its_innermost_part() -> None:
    error = ServerError(status=500, method="GET", path="/x")
    update = ApprovalUpdate(operation=operation(), error=error, polls=1, elapsed=0.5, next_poll_in=None)
    shown = json.loads(json.dumps(update.to_dict()))
    assert (shown["operation"], shown["error"]) == (operation().to_dict(), f"ServerError: {error}")
    assert shown["attempts"] == []
    assert KEY not in json.dumps(shown)
