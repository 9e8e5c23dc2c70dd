"""Approvals in a Celery task: `celery --app celery_tasks worker`. A worker is not held for longer than 25 seconds."""

import os

from celery import Celery, Task

from aiokeyless import ApprovalError, ApprovalTicket
from aiokeyless.sync import KeylessClient

app = Celery("payments", broker=os.environ.get("CELERY_BROKER", "memory://"))
keyless = KeylessClient()


def ask(user_id: str) -> str:
    """Ask the user's phone; return the ticket for `settle.delay`."""
    ticket = keyless.create_operation(user_id, operation_payload="Pay 40 to Alice", require_auth_type="biom")
    return ticket.to_json()


@app.task(bind=True, max_retries=None)  # type: ignore[untyped-decorator]  # Celery has no types
def settle(task: Task, ticket: str) -> str:
    """Pay once the ticket is approved; until its time is up, try again later."""
    try:
        approved = keyless.hold_for_approval(ApprovalTicket.from_json(ticket), seconds=25)
    except ApprovalError:  # time is up, a PIN, or an answer about something else
        return "not paid"
    if approved is None:
        raise task.retry(countdown=1)
    return "paid"
