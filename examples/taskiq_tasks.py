"""Approvals in a taskiq task: `taskiq worker taskiq_tasks:broker`. A run takes at most 25 seconds."""

import os
import sqlite3
from contextlib import closing
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


def decide(ticket: ApprovalTicket, state: str) -> str:
    """Store how a ticket ended, before anybody is told: the first outcome counts. Return the one that counts."""
    with closing(sqlite3.connect(os.environ.get("PAYMENTS_DB", "payments.sqlite3"), isolation_level=None)) as record:
        record.execute("CREATE TABLE IF NOT EXISTS outcomes (id PRIMARY KEY, state)")
        record.execute("INSERT OR IGNORE INTO outcomes VALUES (?, ?)", (ticket.operation_id, state))
        query = "SELECT state FROM outcomes WHERE id = ?"
        return str(record.execute(query, (ticket.operation_id,)).fetchone()[0])


@broker.task(retry_on_error=True, max_retries=1500)
async def settle(stored: str, context: Annotated[Context, TaskiqDepends()]) -> str:
    """Pay once the ticket is approved; run again until that is decided. It may run twice, and decides once."""
    ticket = ApprovalTicket.from_json(stored)
    try:
        approved = await context.state.keyless.hold_for_approval(ticket, seconds=25)
    except KeylessError as error:
        if isinstance(error, ApprovalError) and not isinstance(error, ApprovalUnknownError):
            return decide(ticket, "not paid")  # time is up, a PIN, or an answer about something else
        raise  # perhaps approved: the middleware runs it again, for a day
    if approved is None:
        await context.requeue()  # which ends this run
    state = decide(ticket, "paid")
    if state == "paid":
        print(f"pay, with the idempotency key {ticket.operation_id}")  # the second run repeats it
    return state
