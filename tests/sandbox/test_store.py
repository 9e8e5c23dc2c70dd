"""The operations of a sandbox and their rules, without HTTP and without a loop."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from aiokeyless.errors import ConfigurationError
from aiokeyless.models import Operation
from aiokeyless.sandbox.store import SDK_API_KEY, OperationStore

USER = "C0FFEE"
NESTED_IN_ITSELF: list[object] = []
NESTED_IN_ITSELF.append(NESTED_IN_ITSELF)


@pytest.fixture
def store() -> OperationStore:
    return OperationStore(clock=lambda: 1_577_934_245_242_194_378)


#: What an operation shows before it is approved.
DOCUMENTED = {
    "id": 1,
    "timestamp": "2020-01-02T03:04:05.242",
    "nodeId": "sandbox",
    "userId": USER,
    "apiKey": SDK_API_KEY,
    "externalUserId": "ann",
    "operationId": "txn-1",
    "operationPayload": "Pay 5",
    "result": False,
    "state": "pending",
}


def shown(store: OperationStore, operation_id: str) -> dict[str, Any]:
    answer = store.operation_json(operation_id)
    assert answer is not None
    document: dict[str, Any] = json.loads(answer)
    return document


def pending_ids(store: OperationStore, user_id: str) -> list[str]:
    return [item["operationId"] for item in json.loads(store.pending_json(user_id))]


# Creation


def test_created_operation_is_pending_and_shows_exactly_the_documented_fields(store: OperationStore) -> None:
    store.create(USER, "txn-1", operation_payload="Pay 5", external_user_id="ann")
    assert shown(store, "txn-1") == DOCUMENTED


def test_an_approved_operation_shows_each_field_that_the_client_reads(store: OperationStore) -> None:
    store.create(USER, "txn-1", operation_payload="Pay 5", external_user_id="ann@example.com")
    store.approve("txn-1")
    assert shown(store, "txn-1").keys() == {field.encode_name for field in msgspec.structs.fields(Operation)}


def test_empty_payload_is_kept_as_it_was_sent(store: OperationStore) -> None:
    store.create(USER, "txn-1", operation_payload="", external_user_id="")
    assert shown(store, "txn-1")["operationPayload"] == ""
    assert json.loads(store.pending_json(USER)) == [
        {"operationId": "txn-1", "operationPayload": "", "externalUserId": ""}
    ]


def test_ids_count_up_and_are_not_used_twice(store: OperationStore) -> None:
    store.create(USER, "a")
    store.forget("a")
    store.create(USER, "a")
    assert shown(store, "a")["id"] == 2


def test_timestamps_have_no_zone_and_a_varying_number_of_digits(store: OperationStore) -> None:
    for operation_id in "abcd":
        store.create(USER, operation_id)
    assert [operation.timestamp for operation in store.operations.values()] == [
        "2020-01-02T03:04:05.242",
        "2020-01-02T03:04:05.242194378",
        "2020-01-02T03:04:05.24",
        "2020-01-02T03:04:05.242",
    ]
    assert all(operation.created_at is not None for operation in store.operations.values())


def test_timestamp_of_a_whole_second_keeps_its_digits() -> None:
    store = OperationStore(clock=lambda: 1_577_934_245_000_000_000)
    store.create(USER, "a")
    assert shown(store, "a")["timestamp"] == "2020-01-02T03:04:05.000"


# The pending list


def test_pending_list_is_of_one_user_oldest_first(store: OperationStore) -> None:
    store.create(USER, "b", operation_payload="Pay 5", external_user_id="ann")
    store.create("BAD", "x")
    store.create(USER, "a")
    assert json.loads(store.pending_json(USER)) == [
        {"operationId": "b", "operationPayload": "Pay 5", "externalUserId": "ann"},
        {"operationId": "a"},
    ]


def test_an_unknown_user_has_nothing_pending(store: OperationStore) -> None:
    assert store.pending_json("F00") == b"[]"


def test_user_without_pending_operations_leaves_nothing_behind(store: OperationStore) -> None:
    store.create(USER, "a")
    store.create(USER, "b")
    store.approve("a")
    store.forget("b")
    assert store._pending == {}  # memory has no other face


# Approval


@pytest.mark.parametrize("auth_type", ["biom", "pin"])
def test_approval_sets_state_result_and_auth_type_and_nothing_else(store: OperationStore, auth_type: str) -> None:
    store.create(USER, "a", operation_payload="Pay 5")
    before = shown(store, "a")
    approved = store.approve("a", auth_type=auth_type)
    assert approved.is_approved
    assert store.operations["a"] is approved
    assert shown(store, "a") == {**before, "state": "approved", "result": True, "authType": auth_type}


def test_auth_type_that_the_service_does_not_have_is_refused(store: OperationStore) -> None:
    store.create(USER, "a")
    with pytest.raises(ConfigurationError, match="auth_type must be 'biom' or 'pin', not 'iris'"):
        store.approve("a", auth_type="iris")
    assert pending_ids(store, USER) == ["a"]


def test_approving_twice_changes_nothing(store: OperationStore) -> None:
    store.create(USER, "a")
    first = store.approve("a", auth_type="pin")
    assert store.approve("a", auth_type="biom") is first


def test_unknown_operation_is_not_approved_without_a_user(store: OperationStore) -> None:
    with pytest.raises(ConfigurationError, match=r"no operation 'a' to approve.*wait until it is in"):
        store.approve("a")
    assert not store.operations


def test_unknown_operation_of_a_user_is_stored_approved_as_the_phone_does(store: OperationStore) -> None:
    store.approve("txn-1", user_id="c0ffee", auth_type="pin", external_user_id="ann", operation_payload="Pay 5")
    assert shown(store, "txn-1") == DOCUMENTED | {"state": "approved", "result": True, "authType": "pin"}
    assert pending_ids(store, USER) == []
    assert store.create(USER, "txn-1") is None


@pytest.mark.parametrize(
    ("name", "value"), [("user_id", "BAD"), ("operation_payload", "Pay 9000"), ("external_user_id", "mallory")]
)
@pytest.mark.parametrize("approved", [False, True])
def test_approval_of_something_else_is_refused(store: OperationStore, name: str, value: str, approved: bool) -> None:
    operation = store.create(USER, "a", operation_payload="Pay 5", external_user_id="ann")
    if approved:
        operation = store.approve("a")
    with pytest.raises(ConfigurationError, match=f"has another {name}") as caught:
        store.approve("a", **{name: value})
    assert store.operations["a"] is operation
    assert "Pay" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("user_id", value) for value in ("", "xyz", "C0FFEE\n", 12)),
        *(("operation_id", value) for value in ("", None, "\ud800")),
        *((name, value) for name in ("operation_payload", "external_user_id") for value in (7, "\udfff")),
    ],
)
def test_argument_that_cannot_be_is_refused(store: OperationStore, name: str, value: object) -> None:
    arguments: dict[str, Any] = {"operation_id": "a", "user_id": USER, name: value}
    with pytest.raises(ConfigurationError, match=name):
        store.approve(**arguments)
    assert not store.operations


# Forgetting


@pytest.mark.parametrize("approved", [False, True])
def test_forgotten_operation_is_gone_and_its_id_free(store: OperationStore, approved: bool) -> None:
    store.create(USER, "a")
    if approved:
        store.approve("a")
    store.forget("a")
    assert store.operation_json("a") is None
    assert pending_ids(store, USER) == []
    assert store.create("BAD", "a") is not None


def test_forgetting_what_is_not_there_is_refused(store: OperationStore) -> None:
    with pytest.raises(ConfigurationError, match="no operation 'a'"):
        store.forget("a")


# Tampering


@pytest.mark.parametrize("field", msgspec.structs.fields(Operation), ids=lambda field: field.name)
@pytest.mark.parametrize("value", [99, "odd", None])
def test_tampered_field_has_its_wire_name_alone(store: OperationStore, field: Any, value: object) -> None:
    store.create(USER, "a")
    before = shown(store, "a")
    store.tamper("a", {field.name: value})
    assert shown(store, "a") == {**before, field.encode_name: value}


def test_field_can_be_left_out_of_the_answer(store: OperationStore) -> None:
    store.create(USER, "a")
    store.tamper("a", {"result": msgspec.UNSET, "auth_type": msgspec.UNSET})
    assert "result" not in shown(store, "a")


def test_tampering_changes_neither_the_operation_nor_the_pending_list(store: OperationStore) -> None:
    operation = store.create(USER, "a")
    store.tamper("a", {"operation_id": "b", "user_id": "BAD", "state": "approved", "result": True})
    assert store.operations == {"a": operation}
    assert pending_ids(store, USER) == ["a"]


def test_each_tampering_replaces_the_one_before_and_none_restores_the_truth(store: OperationStore) -> None:
    store.create(USER, "a")
    truth = shown(store, "a")
    store.tamper("a", {"state": "denied"})
    store.tamper("a", {"user_id": "BAD"})
    assert shown(store, "a") == {**truth, "userId": "BAD"}
    store.tamper("a", {})
    assert shown(store, "a") == truth


def test_tampering_is_forgotten_with_the_operation(store: OperationStore) -> None:
    store.create(USER, "a")
    store.tamper("a", {"state": "denied"})
    store.forget("a")
    store.create(USER, "a")
    assert shown(store, "a")["state"] == "pending"


def test_tampering_with_a_misspelt_field_is_refused(store: OperationStore) -> None:
    store.create(USER, "a")
    with pytest.raises(ConfigurationError, match="no field 'status'"):
        store.tamper("a", {"status": "denied"})


@pytest.mark.parametrize("value", [object(), "\ud800", {"deep": [object()]}, NESTED_IN_ITSELF])
def test_tampering_with_what_json_cannot_carry_is_refused(store: OperationStore, value: object) -> None:
    store.create(USER, "a")
    truth = shown(store, "a")
    with pytest.raises(ConfigurationError, match="JSON"):
        store.tamper("a", {"state": value})
    assert shown(store, "a") == truth


# The view


def test_operations_are_a_live_view_that_cannot_be_written_to(store: OperationStore) -> None:
    view = store.operations
    created = store.create(USER, "a")
    assert view["a"] is created
    with pytest.raises(TypeError):
        del view["a"]  # type: ignore[attr-defined]  # that is what must fail
    with pytest.raises(AttributeError):
        view["a"].state = "approved"  # type: ignore[misc]  # as above
