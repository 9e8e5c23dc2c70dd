"""The same gate for an agent of pydantic-ai: its deferred tools wait for the phone, and are denied without it."""

from gate import Gate, Transfer
from pydantic_ai import Agent, DeferredToolRequests, DeferredToolResults, RunContext, ToolApproved, ToolDenied
from pydantic_ai.capabilities import HandleDeferredToolCalls
from pydantic_ai.models import Model

DENIED = "The user has not approved this transfer on their phone ({state}). Nothing was transferred."


async def ask_the_phone(context: RunContext[Gate], requests: DeferredToolRequests) -> DeferredToolResults:
    """Ask the user for each call that needs an approval, one after the other."""
    results: dict[str, bool | ToolApproved | ToolDenied] = {}
    for call in requests.approvals:
        transfer = Transfer.model_validate(call.args_as_dict()["transfer"])
        answer = await context.deps.wait(transfer)
        approved = answer.state == "approved"
        arguments = call.args_as_dict() | {"request": answer.request}  # by this code, whatever the model wrote
        results[call.tool_call_id] = (
            ToolApproved(override_args=arguments) if approved else ToolDenied(DENIED.format(state=answer.state))
        )
    return requests.build_results(approvals=results)


def make_agent(model: Model, transfers: list[str]) -> Agent[Gate, str]:
    """Return an agent that can transfer money.

    Args:
        model: The language model.
        transfers: Where the transfers are made: a bank's place.
    """
    agent = Agent(model, deps_type=Gate, capabilities=[HandleDeferredToolCalls(handler=ask_the_phone)])

    @agent.tool(requires_approval=True)
    async def send_money(context: RunContext[Gate], transfer: Transfer, request: str = "") -> str:
        """Transfer money, once the user has approved on their phone. Leave `request` out."""
        if not context.deps.spend(transfer, request):
            return DENIED.format(state="no unused approval")
        transfers.append(transfer.payload)
        return f"{transfer.payload}: done."

    return agent
