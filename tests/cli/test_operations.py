"""``aiokeyless create``, ``get`` and ``pending``."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

import pytest

from aiokeyless import ApprovalTicket
from aiokeyless.cli.app import CommandError, app

from .terminal import lines_of_json, output_of

if TYPE_CHECKING:
    from aiokeyless.sandbox import Sandbox


@pytest.mark.looptime
async def test_create_prints_the_operation_and_how_to_wait_for_it(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox
) -> None:
    text = await output_of(
        monkeypatch, io.StringIO(), "create", "c0ffee", "--operation-id", "txn 1", "--payload", "Pay 40 to Alice"
    )
    assert re.search(r"Created +txn 1\n +User +C0FFEE\n", text)
    assert "\n  aiokeyless wait 'txn 1'\n" in text
    assert service.operations["txn 1"].operation_payload == "Pay 40 to Alice"


@pytest.mark.looptime
async def test_create_without_an_id_generates_one(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    text = await output_of(monkeypatch, io.StringIO(), "create", "C0FFEE")
    [operation_id] = service.operations
    assert f"aiokeyless wait {operation_id}\n" in text


@pytest.mark.looptime
async def test_create_as_json_is_the_ticket(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    text = await output_of(
        monkeypatch,
        io.StringIO(),
        "create",
        "C0FFEE",
        "--json",
        "--expires-in=30",
        "--external-user-id=\u00e9ve",
        "--payload=-5",
    )
    ticket = ApprovalTicket.from_json(text)
    [operation] = service.operations.values()
    assert (ticket.operation_id, ticket.external_user_id) == (operation.operation_id, "\u00e9ve")
    assert (ticket.expires_at - ticket.created_at).total_seconds() == 30
    assert operation.operation_payload == "-5"
    assert text.count("\n") == 1
    assert text.isascii()


@pytest.mark.looptime
@pytest.mark.parametrize(
    ("auth_type", "state"), [("biom", "approved with their face"), ("pin", "approved with their PIN")]
)
async def test_get_shows_an_operation_but_not_its_key(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, auth_type: str, state: str
) -> None:
    operation = service.approve("txn-1", user_id="C0FFEE", auth_type=auth_type, operation_payload="Pay 40 to Alice")
    text = await output_of(monkeypatch, io.StringIO(), "get", "txn-1")
    assert text == (
        "  Operation  txn-1\n"
        f"  State      {state}\n"
        "  Payload    Pay 40 to Alice\n"
        "  User       C0FFEE\n"
        f"  Created    {operation.timestamp}\n"
        "  Number     1\n"
        "  Node       sandbox\n"
    )


@pytest.mark.looptime
async def test_get_as_json_is_the_operation_without_its_key(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    operation = service.approve("txn-1", user_id="C0FFEE")
    text = await output_of(monkeypatch, io.StringIO(), "get", "txn-1", "--json")
    assert lines_of_json(text) == [{**operation.to_dict(), "is_approved": True}]
    assert operation.api_key is not None
    assert operation.api_key.reveal() not in text
    assert "api_key" not in text


@pytest.mark.looptime
@pytest.mark.parametrize(
    ("lie", "state"),
    [
        ({"result": True, "state": "pending"}, "pending"),
        ({"result": False, "state": "approved"}, "approved, with result False: contradictory"),
        ({"state": "denied\x1b[2J"}, r"denied\x1b[2J, with result True: contradictory or unknown; do not trust it"),
        ({"auth_type": None}, "approved"),
        ({"auth_type": "voice"}, "approved by voice"),
    ],
    ids=repr,
)
async def test_get_says_approved_only_of_an_approved_operation(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, lie: dict[str, object], state: str
) -> None:
    service.approve("txn-1", user_id="C0FFEE")
    service.tamper("txn-1", **lie)
    text = await output_of(monkeypatch, io.StringIO(), "get", "txn-1")
    assert re.search(rf"State +{re.escape(state)}", text)


@pytest.mark.looptime
async def test_get_refuses_an_answer_about_another_operation(service: Sandbox) -> None:
    service.approve("txn-1", user_id="C0FFEE")
    service.tamper("txn-1", operation_id="txn-2")
    with pytest.raises(CommandError, match="another operation, txn-2"):
        await app.run_async(["get", "txn-1"])


@pytest.mark.looptime
async def test_pending_is_a_table_of_the_pending_operations(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    async with service.client() as client:
        await client.create_operation("C0FFEE", operation_id="txn-1", operation_payload="Pay 40 to Alice")
        await client.create_operation("C0FFEE", operation_id="txn-2")
        await client.create_operation("BADA55", operation_id="txn-3")
    text = await output_of(monkeypatch, io.StringIO(), "pending", "c0ffee")
    assert [line.split() for line in text.splitlines()] == [
        ["Operation", "Payload"],
        ["txn-1", "Pay", "40", "to", "Alice"],
        ["txn-2"],
    ]


@pytest.mark.looptime
async def test_pending_as_json_is_one_object(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    async with service.client() as client:
        await client.create_operation("C0FFEE", operation_id="txn-1", external_user_id="alice")
    assert lines_of_json(await output_of(monkeypatch, io.StringIO(), "pending", "c0ffee", "--json")) == [
        {
            "user_id": "C0FFEE",
            "pending": [
                {
                    "operation_id": "txn-1",
                    "operation_payload": None,
                    "external_user_id": "alice",
                    "auth_type": None,
                }
            ],
        }
    ]


@pytest.mark.looptime
@pytest.mark.usefixtures("service")
async def test_pending_says_that_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await output_of(monkeypatch, io.StringIO(), "pending", "c0ffee") == "No pending operations for C0FFEE.\n"
    assert lines_of_json(await output_of(monkeypatch, io.StringIO(), "pending", "c0ffee", "--json")) == [
        {"user_id": "C0FFEE", "pending": []}
    ]
