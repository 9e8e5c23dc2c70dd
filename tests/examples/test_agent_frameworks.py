"""The agents that park until the phone has decided: MCP's tasks, openai-agents, LangGraph."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import agents
import pytest
from agents.testing import ScriptedModel, assistant_message, function_call
from factors import ApprovingSandbox
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from mcp import Client
from mcp.client.extension import ClaimContext, ClientExtension, ResultClaim
from mcp.shared.exceptions import MCPError
from mcp.types import (
    CallToolResult,
    CancelTaskRequest,
    CancelTaskRequestParams,
    GetTaskRequest,
    GetTaskRequestParams,
    Result,
    TextContent,
)
from waiting import until

from aiokeyless.sandbox import Sandbox
from aiokeyless.worker import ApprovalWorker, submit_approval
from aiokeyless.worker.sqlite import SqliteBroker

EXAMPLE = Path(__file__).parents[2] / "examples" / "agent"
sys.path.insert(0, str(EXAMPLE))
import graph as threads  # noqa: E402  # from the folder of the example
from gate import Gate  # noqa: E402
from interrupted import Session, run  # noqa: E402
from phone_tasks import IDENTIFIER  # noqa: E402
from server import make_server  # noqa: E402

sys.path.remove(str(EXAMPLE))

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from aiokeyless import KeylessClient

ARGUMENTS = {"amount": "40", "recipient": "Alice"}
PAYLOAD = "Pay 40.00 EUR to Alice"


@pytest.fixture
def record(tmp_path: Path) -> Generator[sqlite3.Connection]:
    with closing(sqlite3.connect(tmp_path / "agent.sqlite3", isolation_level=None)) as record:
        yield record


# -- MCP: a host with the extension for tasks


class Handle(Result):
    """What a host is given in place of a result."""

    result_type: Literal["task"]
    task_id: str
    status: str
    created_at: str
    last_updated_at: str
    ttl_ms: int
    poll_interval_ms: int


class State(Result):
    """What a host is given when it asks for a task."""

    task_id: str
    status: str
    result: CallToolResult | None = None


class GetTask(GetTaskRequest):
    name_param = "taskId"


class Tasks(ClientExtension):
    """The host's half of the extension."""

    identifier = IDENTIFIER

    def __init__(self) -> None:
        self.handles: list[Handle] = []
        self.polls = 0

    def claims(self) -> Sequence[ResultClaim[Any]]:
        return [ResultClaim(result_type="task", model=Handle, resolve=self.poll)]

    async def poll(self, handle: Handle, context: ClaimContext) -> CallToolResult:
        self.handles.append(handle)
        while True:
            self.polls += 1
            request = GetTask(params=GetTaskRequestParams(task_id=handle.task_id))
            state = await context.session.send_request(request, State)
            assert (state.task_id, state.status) in {(handle.task_id, "working"), (handle.task_id, "completed")}
            if state.result is not None:
                return state.result
            await asyncio.sleep(handle.poll_interval_ms / 1000)


def text_of(result: CallToolResult) -> str:
    [content] = result.content
    assert isinstance(content, TextContent)
    return content.text


async def approve(sandbox: Sandbox, after: float) -> None:
    await until(lambda: len(sandbox.operations) > 0)
    await asyncio.sleep(after)
    for operation_id in list(sandbox.operations):
        sandbox.approve(operation_id)


@pytest.mark.looptime
async def test_a_model_calls_a_tool_once_while_its_host_polls(
    client: KeylessClient, sandbox: Sandbox, tmp_path: Path
) -> None:
    tasks = Tasks()
    async with Client(make_server(client, str(tmp_path / "agent.sqlite3")), extensions=[tasks]) as host:
        tap = asyncio.create_task(approve(sandbox, after=90))
        before = asyncio.get_running_loop().time()
        assert text_of(await host.call_tool("transfer", ARGUMENTS)) == f"{PAYLOAD}: done."
        assert 90 < asyncio.get_running_loop().time() - before < 97
        await tap
        [handle] = tasks.handles
        assert handle.ttl_ms == 300_000
        assert 10 < tasks.polls < 30
        state = await host.session.send_request(GetTask(params=GetTaskRequestParams(task_id=handle.task_id)), State)
        assert state.result is not None
        assert text_of(state.result) == f"{PAYLOAD}: done before."


@pytest.mark.looptime
async def test_a_task_that_nobody_approves_ends_and_a_cancelled_one_transfers_nothing(
    client: KeylessClient, sandbox: Sandbox, tmp_path: Path
) -> None:
    async with Client(make_server(client, str(tmp_path / "agent.sqlite3")), extensions=[Tasks()]) as host:
        call = asyncio.create_task(host.call_tool("transfer", ARGUMENTS | {"recipient": "Bob"}))
        await until(lambda: len(sandbox.operations) == 1)
        [request] = sandbox.operations
        await host.session.send_request(CancelTaskRequest(params=CancelTaskRequestParams(task_id=request)), Result)
        sandbox.approve(request)
        assert text_of(await call).startswith("Nothing was transferred")
        with pytest.raises(MCPError, match="Task not found"):
            await host.session.send_request(GetTask(params=GetTaskRequestParams(task_id="made-up")), State)
        assert "1000" in text_of(await host.call_tool("transfer", ARGUMENTS | {"amount": "4000"}))


@pytest.mark.looptime
async def test_a_host_without_the_extension_gets_no_task(client: KeylessClient, tmp_path: Path) -> None:
    async with Client(make_server(client, str(tmp_path / "agent.sqlite3"))) as host:
        assert text_of(await host.call_tool("transfer", ARGUMENTS)).startswith("Not decided yet")
        with pytest.raises(MCPError, match="required extension"):
            await host.session.send_request(GetTask(params=GetTaskRequestParams(task_id="any")), State)


# -- openai-agents


@pytest.fixture(autouse=True)
def _no_traces() -> None:
    agents.set_tracing_disabled(disabled=True)


def model_that_calls(*calls: dict[str, Any]) -> ScriptedModel:
    """Return a model that calls the tool with these arguments in turn, and then says that all went well."""
    steps = [
        function_call("send_money", json.dumps(arguments), call_id=f"call-{number}")
        for number, arguments in enumerate(calls)
    ]
    return ScriptedModel([*([step] for step in steps), [assistant_message("All was transferred.")]])


@pytest.mark.parametrize(
    ("sandbox", "transfers", "returned"),
    [
        (ApprovingSandbox("biom"), [PAYLOAD], f"{PAYLOAD}: done."),
        (ApprovingSandbox("pin"), [], "on their phone (refused)"),
        (Sandbox(), [], "on their phone (timed_out)"),
    ],
    ids=["face", "pin", "nobody"],
)
@pytest.mark.looptime
async def test_an_interrupted_run_goes_on_with_what_the_phone_said(
    sandbox: Sandbox, transfers: list[str], returned: str, record: sqlite3.Connection
) -> None:
    async with sandbox, sandbox.client() as client:
        session = Session(Gate(client, record, "C0FFEE", expires_in=30))
        model = model_that_calls({"transfer": ARGUMENTS})
        assert await run(model, "Pay Alice", session) == "All was transferred."
        assert session.transfers == transfers
        assert len(sandbox.operations) == 1
        assert model.last_call is not None
        assert returned in str(model.last_call.input)


async def test_a_run_asks_nobody_for_arguments_that_would_mislead(
    client: KeylessClient, sandbox: Sandbox, record: sqlite3.Connection
) -> None:
    session = Session(Gate(client, record, "C0FFEE"))
    await run(model_that_calls({"transfer": ARGUMENTS | {"amount": "4000"}}, {}), "Pay Alice", session)
    assert not session.transfers
    assert not sandbox.operations


# -- LangGraph

THREAD = RunnableConfig(configurable={"thread_id": "thread-1"})


def asked(payload: str = PAYLOAD) -> threads.Task:
    return {"user_id": "C0FFEE", "payload": payload}


async def test_a_thread_parks_and_another_process_resumes_it(tmp_path: Path) -> None:
    transfers: list[str] = []

    async with (
        Sandbox() as sandbox,
        sandbox.client() as client,
        ApprovalWorker(client, f"sqlite:{tmp_path}/keyless.db"),
    ):
        for process in range(2):
            async with (
                AsyncSqliteSaver.from_conn_string(str(tmp_path / "threads.db")) as saver,
                SqliteBroker(tmp_path / "keyless.db") as broker,
            ):
                graph = threads.make_graph(broker, lambda payload, _key: transfers.append(payload), saver)
                if process == 0:
                    assert "__interrupt__" in await graph.ainvoke(asked(), THREAD)
                else:
                    reading = asyncio.create_task(threads.read(graph, broker))
                    await approve(sandbox, after=0)
                    await until(lambda: transfers == [PAYLOAD])
                    reading.cancel()
                    await asyncio.gather(reading, return_exceptions=True)


@pytest.mark.looptime
@pytest.mark.parametrize(("factor", "count"), [("biom", 1), ("pin", 0)])
async def test_an_outcome_before_its_thread_parks_comes_again(factor: str, count: int, memory: SqliteBroker) -> None:
    keys: list[str] = []
    graph = threads.make_graph(memory, lambda _payload, key: keys.append(key), InMemorySaver())
    async with ApprovingSandbox(factor) as sandbox, sandbox.client() as client, ApprovalWorker(client, memory):
        await graph.aupdate_state(THREAD, {**asked(), "operation_id": "op-1"}, as_node="choose_id")
        await submit_approval(
            memory,
            "C0FFEE",
            operation_id="op-1",
            operation_payload=PAYLOAD,
            context="thread-1",
            require_auth_type="biom",
        )
        with pytest.raises(threads.NotParkedError):
            await threads.resume(graph, memory)
        await graph.ainvoke(None, THREAD)  # it asks once more, and parks
        await threads.resume(graph, memory)
        assert keys == ["op-1"] * count
        assert (await graph.aget_state(THREAD)).next == ()


@pytest.mark.looptime
async def test_a_thread_that_crashed_while_it_acted_acts_again_under_one_key(memory: SqliteBroker) -> None:
    keys: list[str] = []

    def act(_payload: str, key: str) -> None:
        keys.append(key)
        if len(keys) == 1:
            raise OSError("the bank is closed")

    graph = threads.make_graph(memory, act, InMemorySaver())
    async with ApprovingSandbox("biom") as sandbox, sandbox.client() as client, ApprovalWorker(client, memory):
        await graph.ainvoke(asked(), THREAD)
        with pytest.raises(OSError, match="the bank"):
            await threads.resume(graph, memory)
        await threads.resume(graph, memory)
        assert len(keys) == 2
        assert len({*keys}) == 1


@pytest.mark.looptime
@pytest.mark.parametrize("context", [None, {"order": 7}, "thread-of-another-graph"])
async def test_an_outcome_of_another_application_at_the_same_broker_does_not_end_the_reader(
    context: object, memory: SqliteBroker
) -> None:
    graph = threads.make_graph(memory, lambda _payload, _key: None, InMemorySaver())
    async with ApprovingSandbox("biom") as sandbox, sandbox.client() as client, ApprovalWorker(client, memory):
        await submit_approval(memory, "C0FFEE", operation_id="order-7", context=context)
        await threads.resume(graph, memory)


@pytest.mark.looptime
@pytest.mark.parametrize(("operation_id", "payload"), [("another", PAYLOAD), (None, "Pay 1.00 EUR to Alice")])
async def test_an_outcome_of_something_else_makes_a_thread_do_nothing(
    operation_id: str | None, payload: str, memory: SqliteBroker
) -> None:
    keys: list[str] = []
    graph = threads.make_graph(memory, lambda _payload, key: keys.append(key), InMemorySaver())
    await graph.aupdate_state(THREAD, {**asked(), "operation_id": "op-1"}, as_node="ask")
    await graph.ainvoke(None, THREAD)  # it parks, and has not asked
    async with ApprovingSandbox("biom") as sandbox, sandbox.client() as client, ApprovalWorker(client, memory):
        name = operation_id or "op-1"
        await submit_approval(memory, "C0FFEE", operation_id=name, operation_payload=payload, context="thread-1")
        await threads.resume(graph, memory)
        assert keys == []
