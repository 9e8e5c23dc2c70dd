"""Nothing of a kept answer is lost, also of a field that is added later."""

from __future__ import annotations

from typing import Any

import pytest

from aiokeyless._poller.packing import pack_pending, unpack_pending
from aiokeyless.models import Operation, Secret

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
