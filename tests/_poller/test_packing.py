"""A pending operation comes out of its pack as it went in, and takes little memory there."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokeyless._poller.packing import pack_pending, unpack_pending
from aiokeyless.models import Operation, Secret, decode_hook

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


def decode(fields: dict[str, Any]) -> Operation:
    return msgspec.json.decode(json.dumps(fields), type=Operation, dec_hook=decode_hook)


def operation(**changed: Any) -> Operation:
    return decode(WIRE | changed)


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


def test_every_field_is_packed() -> None:
    assert {field.encode_name for field in msgspec.structs.fields(Operation)} == set(WIRE), "a new field: pack it, too"
    before = operation(state="pending")
    assert unpack_pending(pack_pending(before), before.operation_id) == before


#: A value for each field that no default has; `state` is what a packed operation always is.
FIELDS: dict[str, Any] = {
    "id": 7,
    "timestamp": "2026-11-24T12:00:00",
    "node_id": "node",
    "user_id": "C0FFEE",
    "api_key": Secret("sdk-key"),
    "external_user_id": "ann",
    "operation_id": "txn-1",
    "operation_payload": "Pay 5",
    "result": True,
    "auth_type": "pin",
    "state": "pending",
}


def test_every_field_of_an_operation_is_tried_here() -> None:
    assert tuple(FIELDS) == Operation.__struct_fields__


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in {"operation_id", "state"}])
def test_no_field_is_lost(name: str) -> None:
    before = Operation(**FIELDS)
    after = unpack_pending(pack_pending(before), "txn-1")
    assert getattr(after, name) == FIELDS[name]
    assert after == before


@pytest.mark.parametrize("changed", [{"api_key": None}, {"id": 1.5}, {"operation_payload": None, "result": False}])
def test_what_may_be_absent_stays_absent(changed: dict[str, Any]) -> None:
    before = Operation(**FIELDS | changed)
    assert unpack_pending(pack_pending(before), "txn-1") == before
