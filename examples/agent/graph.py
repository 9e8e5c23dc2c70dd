"""A LangGraph thread that parks until its user has decided, and a reader that resumes it, in any process."""

import logging
import uuid
from collections.abc import Callable
from hashlib import sha256
from typing import Any, TypeAlias, TypedDict

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph import StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Command, interrupt

from aiokeyless.worker import Broker, Outcome, next_outcome, submit_approval

log = logging.getLogger("agent")


class Task(TypedDict):
    """What a thread begins with. The session sets the user, and code writes the payload."""

    user_id: str
    payload: str


class State(Task):
    """What a thread knows later."""

    operation_id: str
    is_approved: bool


class NotParkedError(Exception):
    """The outcome came before the thread was parked."""


Graph: TypeAlias = CompiledStateGraph[State, None, Task, State]


def make_graph(broker: Broker, act: Callable[[str, str], None], saver: BaseCheckpointSaver[str]) -> Graph:
    """Return a graph that acts once its user has approved.

    Args:
        broker: Where workers are.
        act: What to do, with a payload and an idempotency key: a node may run again after a crash.
        saver: Where the threads are kept.
    """

    def choose_id(_task: Task) -> dict[str, str]:  # in a node of its own: what runs again keeps the id
        return {"operation_id": str(uuid.uuid4())}

    async def ask(state: State, config: RunnableConfig) -> None:
        await submit_approval(
            broker,
            state["user_id"],
            operation_id=state["operation_id"],
            operation_payload=state["payload"],
            context=config.get("configurable", {})["thread_id"],
            require_auth_type="biom",
        )

    def park(state: State) -> dict[str, bool]:
        return {"is_approved": interrupt(state["operation_id"])}

    def transfer(state: State) -> None:
        if state["is_approved"]:
            act(state["payload"], state["operation_id"])

    nodes: list[Any] = [choose_id, ask, park, transfer]
    graph = StateGraph(State, input_schema=Task).add_sequence(nodes).set_entry_point("choose_id")
    return graph.compile(checkpointer=saver)


async def resume(graph: Graph, broker: Broker) -> None:
    """Resume the thread of the next outcome; raises `NotParkedError` if the outcome is to come again."""
    async with next_outcome(broker, "agent") as event:
        name = str(event.read_context(object))  # another application's outcomes have any context
        thread = RunnableConfig(configurable={"thread_id": name})
        state = await graph.aget_state(thread)
        values = state.values
        if values.get("operation_id") != event.operation_id or not state.next:
            return  # nothing of this thread waits for it: it was resumed before
        if state.interrupts:
            asked = (values["user_id"], sha256(values["payload"].encode()).hexdigest())
            is_approved = event.outcome is Outcome.APPROVED and asked == (event.user_id, event.payload_sha256)
            await graph.ainvoke(Command(resume=is_approved), thread)
        elif "is_approved" in values:
            await graph.ainvoke(None, thread)  # it crashed while it acted
        else:
            raise NotParkedError


async def read(graph: Graph, broker: Broker) -> None:
    """Resume threads, one after the other."""
    while True:
        try:
            await resume(graph, broker)
        except NotParkedError:
            log.info("the outcome comes again, once the thread is parked")
