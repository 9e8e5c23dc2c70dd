"""Approvals in a taskiq task: `taskiq worker taskiq_tasks:broker`. A run takes at most 25 seconds."""

from typing import Annotated

from taskiq import Context, InMemoryBroker, SmartRetryMiddleware, TaskiqDepends, TaskiqEvents, TaskiqState

from aiokeyless import ApprovalError, ApprovalTicket, ApprovalUnknownError, KeylessClient, KeylessError

broker = InMemoryBroker()  # for example NATS's or Redis's
broker.add_middlewares(SmartRetryMiddleware(default_delay=60))


@broker.on_event(TaskiqEvents.WORKER_STARTUP)
async def make_client(state: TaskiqState) -> None:
    """Make the client of this process."""
    state.keyless = KeylessClient()


@broker.on_event(TaskiqEvents.WORKER_SHUTDOWN)
async def close_client(state: TaskiqState) -> None:
    """Close it."""
    await state.keyless.aclose()


@broker.task(retry_on_error=True, max_retries=1500)
async def settle(ticket: str, context: Annotated[Context, TaskiqDepends()]) -> str:
    """Pay once the ticket is approved; run again until that is decided. It may run twice: pay once for each ticket."""
    try:
        approved = await context.state.keyless.hold_for_approval(ApprovalTicket.from_json(ticket), seconds=25)
    except KeylessError as error:
        if isinstance(error, ApprovalError) and not isinstance(error, ApprovalUnknownError):
            return "not paid"  # time is up, a PIN, or an answer about something else
        raise  # perhaps approved: the middleware runs it again, for a day
    if approved is None:
        await context.requeue()  # which ends this run
    return "paid"
