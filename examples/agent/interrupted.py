"""The same gate for openai-agents: a run is interrupted before the tool, until the phone has decided."""

import json
from dataclasses import dataclass, field

from agents import Agent, Model, Runner, ToolApprovalItem, function_tool
from agents.tool_context import ToolContext
from gate import Answer, Gate, Transfer
from pydantic import ValidationError

DENIED = "The user has not approved this transfer on their phone ({state}). Nothing was transferred."


@dataclass
class Session:
    """What belongs to one user, and never comes from the model."""

    gate: Gate
    requests: dict[str, str] = field(default_factory=dict)  # the approved request of each call
    transfers: list[str] = field(default_factory=list)  # a bank's place


@function_tool(needs_approval=True)
async def send_money(context: ToolContext[Session], transfer: Transfer) -> str:
    """Transfer money, once the user has approved on their phone."""
    session = context.context
    if not session.gate.spend(transfer, session.requests.get(context.tool_call_id, "")):
        return DENIED.format(state="no unused approval")
    session.transfers.append(transfer.payload)
    return f"{transfer.payload}: done."


async def ask_the_phone(call: ToolApprovalItem, gate: Gate) -> Answer:
    """Ask the user for an interrupted call."""
    try:
        transfer = Transfer.model_validate(json.loads(call.arguments or "")["transfer"])
    except (ValidationError, ValueError, LookupError, TypeError):  # from the model: anything
        return Answer("refused", "")
    return await gate.wait(transfer)


async def run(model: Model, text: str, session: Session) -> str:
    """Run an agent that can transfer money, and return what it says."""
    agent = Agent[Session](name="bank", model=model, tools=[send_money])
    result = await Runner.run(agent, text, context=session)
    while result.interruptions:
        state = result.to_state()  # `state.to_string()` can be stored, and another process goes on
        for call in result.interruptions:
            answer = await ask_the_phone(call, session.gate)
            if answer.state == "approved" and call.call_id:
                session.requests[call.call_id] = answer.request
                state.approve(call)
            else:
                state.reject(call, rejection_message=DENIED.format(state=answer.state))
        result = await Runner.run(agent, state)
    return str(result.final_output)
