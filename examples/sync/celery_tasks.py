"""Approvals in a Celery task: `celery --app celery_tasks worker`. A worker is not held for longer than 25 seconds."""

import os

from celery import Celery, Task

from aiokeyless import ApprovalTicket, ApprovalTimeoutError
from aiokeyless.sync import KeylessClient

app = Celery("payments", broker=os.environ.get("CELERY_BROKER", "memory://"))
keyless = KeylessClient()


@app.task(bind=True, max_retries=None)  # type: ignore[untyped-decorator]  # Celery has no types
def settle(task: Task, ticket: str) -> str:
    """Pay once the ticket is approved; until its time is up, try again later."""
    try:
        approved = keyless.hold_for_approval(ApprovalTicket.from_json(ticket), seconds=25)
    except ApprovalTimeoutError:
        return "not paid"
    if approved is None:
        raise task.retry(countdown=1)
    return "paid"
