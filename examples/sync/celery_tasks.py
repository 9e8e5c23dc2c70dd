"""Approvals in a Celery task: `celery --app celery_tasks worker`. A worker is not held for longer than 25 seconds."""

import os

from celery import Celery, Task
from keyless_sync import is_approved

from aiokeyless import ApprovalTicket

app = Celery("payments", broker=os.environ.get("CELERY_BROKER", "memory://"))


@app.task(bind=True, max_retries=None)  # type: ignore[untyped-decorator]  # Celery has no types
def settle(task: Task, ticket: str) -> str:
    """Pay once the ticket is approved; until its time is up, try again later."""
    found = ApprovalTicket.from_json(ticket)
    if is_approved(found):
        return "paid"
    if found.remaining() > 0:
        raise task.retry(countdown=1)
    return "not paid"
