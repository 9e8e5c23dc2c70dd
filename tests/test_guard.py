"""examples/agent/guard.py: a tool acts once, for what was approved, and survives a restart."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from waiting import until

from aiokeyless import ApprovalTicket

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox

PROGRAM = (Path(__file__).parents[1] / "examples" / "agent" / "guard.py").read_text()
PAYLOAD = "Delete the project Fern"

pytestmark = pytest.mark.looptime


class Tool:
    """A tool behind the page's guard, as one process has it."""

    def __init__(self, client: KeylessClient, record: sqlite3.Connection) -> None:
        names: dict[str, Any] = {"__name__": "guard"}
        exec(PROGRAM, names)  # noqa: S102  # our own program
        self._guarded = names["Guard"](client, record, "C0FFEE").guarded
        self.acted = 0

    async def call(self, payload: str = PAYLOAD, *, seconds: float = 50) -> str:
        answer: str = await self._guarded("session-1/call-1", payload, self._act, seconds=seconds)
        return answer.partition(":")[0]

    def _act(self) -> str:
        self.acted += 1
        return "acted"


@pytest.fixture
def record(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(tmp_path / "calls.sqlite3", isolation_level=None)) as record:
        yield record


@pytest.fixture
async def tool(client: KeylessClient, record: sqlite3.Connection) -> Tool:
    return Tool(client, record)


async def approve(sandbox: Sandbox) -> None:
    await until(lambda: len(sandbox.operations) > 0)
    sandbox.approve(*sandbox.operations)


async def test_it_acts_after_the_approval_and_once(tool: Tool, sandbox: Sandbox) -> None:
    assert await tool.call(seconds=5) == "pending"
    assert tool.acted == 0
    await approve(sandbox)
    assert [await tool.call() for _ in range(3)] == ["acted", "done before", "done before"]
    assert tool.acted == 1
    assert len(sandbox.operations) == 1


async def test_of_two_processes_that_go_on_one_acts(tool: Tool, record: sqlite3.Connection, sandbox: Sandbox) -> None:
    killed = asyncio.create_task(tool.call())
    await until(lambda: len(sandbox.operations) == 1)
    killed.cancel()
    async with sandbox.client() as client:
        another = Tool(client, record)
        calls = asyncio.gather(tool.call(), another.call())
        await approve(sandbox)
        assert sorted(await calls) == ["acted", "done before"]
    assert tool.acted + another.acted == 1
    assert len(sandbox.operations) == 1


async def test_an_approval_serves_no_other_arguments(tool: Tool, sandbox: Sandbox) -> None:
    await tool.call(seconds=1)
    await approve(sandbox)
    assert await tool.call("Delete every project") == "refused"
    assert tool.acted == 0


async def test_an_answer_about_something_else_is_refused(tool: Tool, sandbox: Sandbox) -> None:
    await tool.call(seconds=1)
    sandbox.tamper(*sandbox.operations, operation_payload="Delete nothing", state="approved", result=True)
    assert await tool.call() == "refused"
    assert tool.acted == 0


async def test_a_pin_lets_nothing_act_now_or_later(tool: Tool, sandbox: Sandbox) -> None:
    await tool.call(seconds=1)
    sandbox.approve(*sandbox.operations, auth_type="pin")
    assert [await tool.call() for _ in range(2)] == ["refused"] * 2
    assert tool.acted == 0


async def test_an_approval_after_the_timeout_does_nothing(tool: Tool, sandbox: Sandbox) -> None:
    assert await tool.call(seconds=400) == "refused"
    await approve(sandbox)
    assert await tool.call() == "refused"  # this clock has moved, and the ticket's has not
    assert tool.acted == 0


async def test_an_approval_that_is_found_only_after_the_end_does_nothing(
    tool: Tool, record: sqlite3.Connection, sandbox: Sandbox
) -> None:
    await tool.call(seconds=1)
    await approve(sandbox)
    [operation_id] = sandbox.operations
    ended = ApprovalTicket.for_operation(
        operation_id,
        user_id="C0FFEE",
        operation_payload=PAYLOAD,
        created_at=datetime.now(UTC) - timedelta(seconds=400),
        expires_in=300,
    )
    record.execute("UPDATE calls SET ticket = ?", (ended.to_json(),))
    assert [await tool.call() for _ in range(2)] == ["refused"] * 2
    assert tool.acted == 0


async def test_an_outage_is_no_refusal(tool: Tool, sandbox: Sandbox) -> None:
    sandbox.fail_next(503, None)
    assert await tool.call() == "pending"
    sandbox.recover()
    tap = asyncio.create_task(approve(sandbox))
    assert await tool.call() == "acted"
    await tap
