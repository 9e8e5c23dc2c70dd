"""``aiokeyless create``, ``get``, ``pending`` and ``attempts``."""

from __future__ import annotations

import asyncio
import io
import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from raw_server import RawServer, hang

from aiokeyless import AlreadyApprovedError, ApprovalTicket, ConflictError, OperationMismatchError, ServerError
from aiokeyless.cli.app import CommandError, InterruptedCommandError, app
from aiokeyless.cli.error_messages import describe

from .terminal import Terminal, create, json_of, lines_of_json, output_of

if TYPE_CHECKING:
    from aiokeyless.sandbox import Sandbox

pytestmark = pytest.mark.looptime


async def test_create_prints_the_operation_and_how_to_wait_for_it(service: Sandbox) -> None:
    text = await output_of("create", "c0ffee", "--operation-id", "txn 1", "--payload", "Pay 40 to Alice")
    assert re.search(r"Created +txn 1\n +User +C0FFEE\n", text)
    assert printed_ticket(text).operation_id == "txn 1"
    assert service.operations["txn 1"].operation_payload == "Pay 40 to Alice"


@pytest.mark.parametrize(
    ("stream", "options", "is_said"),
    [(Terminal(), (), True), (io.StringIO(), (), False), (Terminal(), ("--json",), False)],
    ids=["at a terminal", "elsewhere", "as JSON"],
)
async def test_create_says_at_a_terminal_that_the_application_notifies_the_phone(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, stream: io.StringIO, options: tuple[str, ...], *, is_said: bool
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    await output_of("create", "C0FFEE", "--operation-id", "-5", *options)
    assert "-5" in service.operations
    # No command for its id: that wait would accept any user's approval.
    said = "Next, your application notifies the phone.\n"
    assert stream.getvalue() == (said if is_said else "")


async def test_create_without_an_id_generates_one(service: Sandbox) -> None:
    text = await output_of("create", "C0FFEE")
    [operation_id] = service.operations
    assert printed_ticket(text).operation_id == operation_id


@pytest.mark.parametrize("operation_id", ["--json", "-5", "$(id)", "a\u202eb'c"])
async def test_the_command_that_create_prints_works_for_any_id(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, operation_id: str
) -> None:
    text = await output_of("create", "C0FFEE", f"--operation-id={operation_id}")
    service.approve(operation_id)
    ticket = printed_ticket(text)
    assert ticket.operation_id == operation_id
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(ticket.to_json().encode())))
    assert "Approved" in await output_of("wait", "--ticket", "-")


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ({"operation_payload": "Pay 4000"}, "its payload is not the one that was created"),
        ({"auth_type": "pin"}, "it must be 'biom', and the answer has 'pin'"),
    ],
)
async def test_the_command_that_create_prints_accepts_no_other_payload_and_no_pin_for_a_face(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, lie: dict[str, str], reason: str
) -> None:
    options = "--operation-id=a", "--payload=Pay 40", "--require-auth-type=biom"
    text = await output_of("create", "C0FFEE", *options)
    service.approve("a")
    service.tamper("a", **lie)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(printed_ticket(text).to_json().encode())))
    with pytest.raises(OperationMismatchError) as caught:
        await app.run_async(["wait", "--ticket", "-"])
    assert reason in describe(caught.value)


def printed_ticket(text: str) -> ApprovalTicket:
    """Return the ticket that the printed command gives to `wait`, as a shell reads it."""
    [command] = re.findall(r"\n  (printf %s .+) \| aiokeyless wait --ticket -\n", text)
    shell = ["bash", "-c", command]
    return ApprovalTicket.from_json(subprocess.check_output(shell))


async def test_creating_the_same_again_takes_what_is_pending_if_that_is_wanted(service: Sandbox) -> None:
    command = ["create", "C0FFEE", "--operation-id", "txn-1", "--payload", "Pay 40 to Alice"]
    await output_of(*command)
    with pytest.raises(ConflictError) as caught:
        await app.run_async(command)
    assert "if you tried this before, --if-exists resume" in describe(caught.value)
    text = await output_of(*command, "--if-exists", "resume")
    assert re.search(r"Pending +txn-1\n", text)
    assert printed_ticket(text).operation_id == "txn-1"
    assert list(service.operations) == ["txn-1"]


async def test_resuming_what_is_approved_says_how_to_check_the_approval_with_its_factor(service: Sandbox) -> None:
    command = ["create", "C0FFEE", "--operation-id", "txn-1", "--payload", "Pay 40", "--require-auth-type", "biom"]
    await app.run_async(command)
    service.approve("txn-1")
    with pytest.raises(AlreadyApprovedError) as caught:
        await app.run_async([*command, "--if-exists", "resume"])
    message = describe(caught.value)
    assert "pay only if your record shows that it was asked, and neither paid nor ended" in message
    ticket = printed_ticket(f"\n  {message.partition(': ')[2]}\n")
    assert ticket == caught.value.ticket
    assert ticket.require_auth_type == "biom"


@pytest.mark.parametrize("stored", [True, False])
async def test_a_create_that_may_have_taken_effect_says_how_to_check(service: Sandbox, stored: bool) -> None:
    service.fail_next(times=None, stored=stored)
    with pytest.raises(ServerError) as error:
        await app.run_async(["create", "C0FFEE", "--operation-id", "-5"])
    assert describe(error.value).endswith("; the operation may exist nevertheless, to check: aiokeyless get -- -5")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("create", "C0FFEE"), "operation {id} may exist; to check: aiokeyless get {id}"),
        (("create", "C0FFEE", "--operation-id", "-5"), "operation -5 may exist; to check: aiokeyless get -- -5"),
        *(
            (
                ("users", link, "C0FFEE", "ann 1"),
                "the user may have this external id; to check: aiokeyless users find 'ann 1'",
            )
            for link in ("link", "relink")
        ),
    ],
)
async def test_a_command_that_is_interrupted_once_its_request_was_sent_says_how_to_check(
    monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], message: str
) -> None:
    monkeypatch.setenv("KEYLESS_API_KEY", "key")
    async with RawServer(hang) as server:
        monkeypatch.setenv("KEYLESS_BASE_URL", server.url)
        running = asyncio.create_task(app.run_async(list(command)))
        await server.asked(1)
        running.cancel()  # as Ctrl-C does
        with pytest.raises(InterruptedCommandError) as interruption:
            await running
        sent = json.loads(server.bodies[0])
    assert str(interruption.value) == message.format(id=sent.get("operationId"))


async def test_create_as_json_is_the_ticket(service: Sandbox) -> None:
    options = "--expires-in=30", "--external-user-id=\u00e9ve", "--payload=-5"
    text = await output_of("create", "C0FFEE", "--json", *options)
    ticket = ApprovalTicket.from_json(text)
    [operation] = service.operations.values()
    assert (ticket.operation_id, ticket.external_user_id) == (operation.operation_id, "\u00e9ve")
    assert (ticket.expires_at - ticket.created_at).total_seconds() == 30
    assert operation.operation_payload == "-5"
    assert text.count("\n") == 1
    assert text.isascii()


@pytest.mark.parametrize(("auth_type", "state"), [("biom", "approved by face"), ("pin", "approved by PIN")])
async def test_get_shows_an_operation_but_not_its_key(service: Sandbox, auth_type: str, state: str) -> None:
    operation = service.approve("txn-1", user_id="C0FFEE", auth_type=auth_type, operation_payload="Pay 40 to Alice")
    text = await output_of("get", "txn-1")
    assert text == (
        "  Operation  txn-1\n"
        f"  State      {state}\n"
        "  Payload    Pay 40 to Alice\n"
        "  User       C0FFEE\n"
        f"  Created    {operation.timestamp}\n"
    )


async def test_get_as_json_is_the_operation_without_its_key(service: Sandbox) -> None:
    operation = service.approve("txn-1", user_id="C0FFEE")
    text = await output_of("get", "txn-1", "--json")
    assert lines_of_json(text) == [{**operation.to_dict(), "is_approved": True}]
    assert operation.api_key is not None
    assert operation.api_key.reveal() not in text
    assert "api_key" not in text


@pytest.mark.parametrize(
    ("lie", "state"),
    [
        ({"result": True, "state": "pending"}, "pending"),
        ({"result": False, "state": "approved"}, "approved, with result False: contradictory"),
        ({"state": "denied\x1b[2J"}, r"denied\x1b[2J, with result True: contradictory or unknown; do not trust it"),
        ({"auth_type": None}, "approved"),
        ({"auth_type": "voice"}, "approved by voice"),
    ],
)
async def test_get_says_approved_only_of_an_approved_operation(
    service: Sandbox, lie: dict[str, object], state: str
) -> None:
    service.approve("txn-1", user_id="C0FFEE")
    service.tamper("txn-1", **lie)
    text = await output_of("get", "txn-1")
    assert re.search(rf"State +{re.escape(state)}", text)


@pytest.mark.parametrize("command", ["get", "attempts"])
async def test_an_answer_about_another_operation_is_refused(service: Sandbox, command: str) -> None:
    service.approve("txn-1", user_id="C0FFEE")
    service.tamper("txn-1", operation_id="txn-2")
    with pytest.raises(CommandError, match="another operation, txn-2"):
        await app.run_async([command, "txn-1"])
    assert len(service.requests) == 1


async def test_pending_is_a_table_of_the_pending_operations(service: Sandbox) -> None:
    async with service.client() as client:
        await client.create_operation("C0FFEE", operation_id="txn-1", operation_payload="Pay 40 to Alice")
        await client.create_operation("C0FFEE", operation_id="txn-2")
        await client.create_operation("BADA55", operation_id="txn-3")
    text = await output_of("pending", "c0ffee")
    assert [line.split() for line in text.splitlines()] == [
        ["Operation", "Payload"],
        ["txn-1", "Pay", "40", "to", "Alice"],
        ["txn-2"],
    ]


async def test_pending_as_json_is_one_object(service: Sandbox) -> None:
    await create(service, external_user_id="alice")
    operation = {"operation_id": "txn-1", "operation_payload": None, "external_user_id": "alice", "auth_type": None}
    assert await json_of("pending", "c0ffee") == {"user_id": "C0FFEE", "pending": [operation]}


@pytest.mark.usefixtures("service")
async def test_pending_says_that_there_are_none() -> None:
    assert await output_of("pending", "c0ffee") == "No pending operations for C0FFEE.\n"
    assert lines_of_json(await output_of("pending", "c0ffee", "--json")) == [{"user_id": "C0FFEE", "pending": []}]


async def test_attempts_shows_each_attempt_with_its_reason_and_that_none_is_an_approval(service: Sandbox) -> None:
    await output_of("create", "C0FFEE", "--operation-id", "txn 1")
    await output_of("create", "C0FFEE", "--operation-id", "other")
    service.fail_authentication("txn 1", 30003)
    service.fail_authentication("txn 1", 12345, auth_type="pin")
    service.fail_authentication("other", 30004)
    text = await output_of("attempts", "txn 1")
    assert re.match(r"  Operation  txn 1\n  State      pending\n\n", text)
    assert re.search(r"\n20[\dT:.-]+ +FAILED +the user left the scan \(30003\) +biom +sandbox-phone *\n", text)
    assert re.search(r"\n20[\dT:.-]+ +FAILED +error 12345 +pin +sandbox-phone *\n", text)
    assert "30004" not in text
    service.approve("txn 1")
    text = await output_of("attempts", "txn 1")
    assert re.search(r"State +approved by face\n", text)
    assert re.search(r" APPROVED +", text)


@pytest.mark.usefixtures("service")
async def test_attempts_says_that_there_are_none() -> None:
    await output_of("create", "C0FFEE", "--operation-id", "txn-1")
    text = await output_of("attempts", "txn-1")
    assert text.endswith("\nNo attempts under this operation's id in the last ten minutes.\n")


async def test_attempts_says_that_there_are_more(service: Sandbox) -> None:
    await output_of("create", "C0FFEE", "--operation-id", "txn-1")
    for _ in range(21):
        service.fail_authentication("txn-1", 30003)
    text = await output_of("attempts", "txn-1")
    assert text.endswith("\nThere are more, which the service does not show.\n")


async def test_attempts_as_json_is_one_object(service: Sandbox) -> None:
    await output_of("create", "C0FFEE", "--operation-id", "txn-1")
    failed = service.fail_authentication("txn-1", 30003)
    [answer] = lines_of_json(await output_of("attempts", "txn-1", "--json"))
    assert answer == {
        "operation_id": "txn-1",
        "user_id": "C0FFEE",
        "is_approved": False,
        "attempts": [failed.to_dict()],
        "truncated": False,
    }
