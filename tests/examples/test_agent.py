"""The agent example: agents that lie, repeat, change arguments, or approve themselves, get nothing done."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from mcp import Client
from mcp.types import TextContent
from pydantic import ValidationError
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart, ToolReturnPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from unshown import UNSHOWN
from waiting import until

from aiokeyless import ApprovalTicket

EXAMPLE = Path(__file__).parents[2] / "examples" / "agent"
sys.path.insert(0, str(EXAMPLE))
from deferred import make_agent  # noqa: E402  # from the folder of the example
from gate import Gate, Transfer  # noqa: E402
from server import make_server  # noqa: E402

sys.path.remove(str(EXAMPLE))

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox

pytestmark = pytest.mark.looptime

FORTY = Transfer.model_validate({"amount": "40", "recipient": "Alice"})
FOUR_THOUSAND = Transfer.model_validate({"amount": "400", "recipient": "Mallory"})


@pytest.fixture
def record(tmp_path: Path) -> Generator[sqlite3.Connection]:
    with closing(sqlite3.connect(tmp_path / "agent.sqlite3", isolation_level=None)) as record:
        yield record


@pytest.fixture
async def gate(client: KeylessClient, record: sqlite3.Connection) -> Gate:
    return Gate(client, record, "C0FFEE")


async def approve(sandbox: Sandbox, after: float = 1) -> None:
    """Approve what is open, some seconds after something is."""
    await until(lambda: len(sandbox.operations) > 0)
    await asyncio.sleep(after)
    for operation_id in list(sandbox.operations):
        sandbox.approve(operation_id)


async def hold_approved(gate: Gate, sandbox: Sandbox, request: str | None = None) -> str:
    """Hold the transfer of forty until it is approved, and return its request."""
    tap = asyncio.create_task(approve(sandbox))
    answer = await gate.hold(FORTY, request=request)
    await tap
    assert answer.state == "approved"
    return answer.request


# -- the gate


async def test_approved_transfer_is_made_once(gate: Gate, sandbox: Sandbox) -> None:
    request = await hold_approved(gate, sandbox)
    assert [gate.spend(FORTY, request) for _ in range(3)] == [True, False, False]
    assert (await gate.hold(FORTY, request=request)).state == "spent"


async def test_unapproved_transfer_is_not_made(gate: Gate) -> None:
    state, request = await gate.hold(FORTY, seconds=5)
    assert state == "pending"
    assert not gate.spend(FORTY, request)


async def test_a_pin_makes_no_transfer(gate: Gate, sandbox: Sandbox) -> None:
    _, request = await gate.hold(FORTY, seconds=1)
    sandbox.approve(request, auth_type="pin")
    assert (await gate.hold(FORTY, request=request)).state == "refused"
    assert not gate.spend(FORTY, request)


async def test_phone_shows_what_the_code_wrote(gate: Gate, sandbox: Sandbox) -> None:
    _, request = await gate.hold(FORTY, seconds=1)
    assert sandbox.operations[request].operation_payload == "Pay 40.00 EUR to Alice"
    assert sandbox.operations[request].user_id == "C0FFEE"


@pytest.mark.parametrize(
    ("amount", "recipient"),
    [
        *((amount, "Alice") for amount in ("0", "-40", "NaN", "1e9", "0.001")),
        *(("40", recipient) for recipient in ("", "Alice\n(approved)", "A" * 41, *UNSHOWN)),
    ],
)
def test_arguments_that_would_mislead_are_refused(amount: str, recipient: str) -> None:
    with pytest.raises(ValidationError):
        Transfer.model_validate({"amount": amount, "recipient": recipient})


async def test_changed_arguments_are_refused_under_the_old_request(gate: Gate, sandbox: Sandbox) -> None:
    request = await hold_approved(gate, sandbox)
    assert await gate.hold(FOUR_THOUSAND, request=request) == ("refused", request)
    assert not gate.spend(FOUR_THOUSAND, request)
    assert gate.spend(FORTY, request)


async def test_repeated_calls_ask_once_and_go_on(gate: Gate, sandbox: Sandbox) -> None:
    first = await gate.hold(FORTY, seconds=5)
    answers = await asyncio.gather(*(gate.hold(FORTY, seconds=5) for _ in range(5)))
    assert {first, *answers} == {("pending", first.request)}
    assert len(sandbox.operations) == 1


async def test_two_processes_on_one_record_ask_once_and_act_once(gate: Gate, sandbox: Sandbox, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "agent.sqlite3", isolation_level=None)) as record:
        async with sandbox.client() as client:
            gates = [gate, Gate(client, record, "C0FFEE")]
            holds = asyncio.gather(*(each.hold(FORTY) for each in gates * 3))
            answers, _ = await asyncio.gather(holds, approve(sandbox))
            assert {answer.state for answer in answers} == {"approved"}
            assert len(sandbox.operations) == 1
            assert sorted(each.spend(FORTY, answers[0].request) for each in gates * 3) == [False] * 5 + [True]


async def test_an_approval_of_one_user_is_neither_found_nor_spent_by_another_on_the_same_record(
    gate: Gate, client: KeylessClient, record: sqlite3.Connection, sandbox: Sandbox
) -> None:
    request = await hold_approved(gate, sandbox)
    thief = Gate(client, record, "BAD")
    assert (await thief.hold(FORTY, request=request)).state == "refused"
    assert thief.find(request) is None
    assert not thief.spend(FORTY, request)
    thief.cancel(request)
    own = await thief.hold(FORTY, seconds=1)  # for which the other user is asked, too
    assert (own.state, sandbox.operations[own.request].user_id) == ("pending", "BAD")
    assert gate.spend(FORTY, request)


async def test_request_that_nobody_approves_ends_and_a_late_approval_counts_for_nothing(
    client: KeylessClient, record: sqlite3.Connection, sandbox: Sandbox
) -> None:
    gate = Gate(client, record, "C0FFEE", expires_in=0.2)
    state, request = await gate.hold(FORTY)
    assert state == "timed_out"
    await approve(sandbox)
    assert (await gate.hold(FORTY, request=request)).state == "timed_out"
    assert not gate.spend(FORTY, request)


@pytest.mark.parametrize(("seconds", "is_spent"), [(2, True), (11, False)], ids=["found by the final poll", "kept"])
async def test_an_approval_is_spent_at_once_or_never_once_its_time_has_ended(
    gate: Gate, record: sqlite3.Connection, sandbox: Sandbox, *, seconds: float, is_spent: bool
) -> None:
    request = await hold_approved(gate, sandbox)
    end(record, seconds)
    assert gate.spend(FORTY, request) is is_spent
    assert (await gate.hold(FORTY, request=request)).state == ("spent" if is_spent else "timed_out")
    assert not gate.spend(FORTY, request)


def end(record: sqlite3.Connection, seconds: float) -> None:
    """Let the one request have ended so many seconds ago."""
    [stored] = record.execute("SELECT ticket FROM requests").fetchone()
    ended = datetime.now(UTC) - timedelta(seconds=seconds)
    ticket = msgspec.structs.replace(ApprovalTicket.from_json(stored), expires_at=ended)
    record.execute("UPDATE requests SET ticket = ?", (ticket.to_json(),))


async def test_answer_about_something_else_is_refused_for_good(gate: Gate, sandbox: Sandbox) -> None:
    _, request = await gate.hold(FORTY, seconds=1)
    sandbox.tamper(request, operation_payload="Pay 400.00 EUR to Mallory", state="approved", result=True)
    assert (await gate.hold(FORTY, request=request)).state == "refused"
    sandbox.tamper(request)
    sandbox.approve(request)
    assert (await gate.hold(FORTY, request=request)).state == "refused"
    assert not gate.spend(FORTY, request)


@pytest.mark.parametrize("stored", [False, True], ids=["lost", "stored"])
async def test_outage_is_told_and_the_same_request_goes_on(gate: Gate, sandbox: Sandbox, *, stored: bool) -> None:
    sandbox.fail_next(503, times=1, stored=stored, method="POST")
    sandbox.fail_next(401, times=None)
    state, request = await gate.hold(FORTY)
    assert state == "unreachable"
    sandbox.recover()
    for operation_id in list(sandbox.operations):  # approved meanwhile, where the create was stored
        sandbox.approve(operation_id)
    assert await hold_approved(gate, sandbox, request) == request
    assert gate.spend(FORTY, request)
    assert len(sandbox.operations) == 1


async def test_closed_client_leaves_the_request_open(gate: Gate, client: KeylessClient, sandbox: Sandbox) -> None:
    held = asyncio.create_task(gate.hold(FORTY))
    await until(lambda: len(sandbox.operations) > 0)
    await client.aclose()
    assert (await held).state == "unreachable"
    assert (await gate.wait(FORTY)).state == "unreachable"


# -- the MCP server


@asynccontextmanager
async def bank(client: KeylessClient, tmp_path: Path) -> AsyncGenerator[Client]:
    async with Client(make_server(client, str(tmp_path / "agent.sqlite3"))) as caller:
        yield caller


async def call(caller: Client, **arguments: object) -> str:
    """Return the text of the tool, or of its error."""
    [content] = (await caller.call_tool("transfer", dict(arguments))).content
    assert isinstance(content, TextContent)
    return content.text


async def test_tool_answers_with_a_handle_and_goes_on(client: KeylessClient, sandbox: Sandbox, tmp_path: Path) -> None:
    async with bank(client, tmp_path) as caller:
        before = asyncio.get_running_loop().time()
        text = await call(caller, amount="40", recipient="Alice")
        assert asyncio.get_running_loop().time() - before < 52
        [request] = sandbox.operations
        assert text.endswith(f"this request: {request}")
        sandbox.approve(request)
        assert await call(caller, amount="40", recipient="Alice", request=request) == "Pay 40.00 EUR to Alice: done."
        again = await call(caller, amount="40", recipient="Alice", request=request)
        assert again == "Pay 40.00 EUR to Alice: done before."


async def test_tool_refuses_what_an_agent_makes_up(client: KeylessClient, sandbox: Sandbox, tmp_path: Path) -> None:
    async with bank(client, tmp_path) as caller:
        for extra in ({"request": "made-up"}, {"request": "approved"}):
            assert (await call(caller, amount="40", recipient="Alice", **extra)).startswith("Nothing was transferred")
        assert not sandbox.operations
        for wrong in ({"amount": "4000"}, {"recipient": "A\u202eB"}):
            assert "done" not in await call(caller, **({"amount": "40", "recipient": "Alice"} | wrong))
        assert not sandbox.operations


# -- pydantic-ai


def model_that_calls(*calls: dict[str, Any]) -> FunctionModel:
    """Return a model that calls the tool with these arguments in turn, and then says that all went well."""

    def answer(messages: list[ModelMessage], _info: AgentInfo) -> ModelResponse:
        returned = sum(isinstance(part, ToolReturnPart) for message in messages for part in message.parts)
        if returned < len(calls):
            return ModelResponse(parts=[ToolCallPart("send_money", calls[returned])])
        return ModelResponse(parts=[TextPart("The user approved, and all was transferred.")])

    return FunctionModel(answer)


ALICE = {"transfer": {"amount": "40", "recipient": "Alice"}}
MALLORY = {"transfer": {"amount": "400", "recipient": "Mallory"}}


async def test_agent_that_says_approved_gets_nothing_done(client: KeylessClient, record: sqlite3.Connection) -> None:
    transfers: list[str] = []
    gate = Gate(client, record, "C0FFEE", expires_in=30)
    agent = make_agent(model_that_calls(MALLORY | {"request": "approved"}), transfers)
    await agent.run("Pay Mallory", deps=gate)
    assert transfers == []


async def test_agent_that_repeats_or_changes_a_call_is_asked_about_anew(
    client: KeylessClient, record: sqlite3.Connection, sandbox: Sandbox
) -> None:
    transfers: list[str] = []
    gate = Gate(client, record, "C0FFEE", expires_in=30)
    agent = make_agent(model_that_calls(ALICE, ALICE | {"request": "approved"}, MALLORY), transfers)
    await asyncio.gather(agent.run("Pay Alice", deps=gate), approve(sandbox, after=0))
    assert transfers == ["Pay 40.00 EUR to Alice"]
    assert [operation.operation_payload for operation in sandbox.operations.values()] == [
        "Pay 40.00 EUR to Alice",
        "Pay 40.00 EUR to Alice",
        "Pay 400.00 EUR to Mallory",
    ]
