"""Approvals in a Celery task: `celery --app celery_tasks worker`. A worker is not held for longer than 25 seconds."""

import os

from celery import Celery, Task

from aiokeyless import ApprovalError, ApprovalTicket, ApprovalUnknownError, KeylessError
from aiokeyless.sync import KeylessClient

app = Celery("payments", broker=os.environ.get("CELERY_BROKER", "memory://"))
keyless = KeylessClient()


def ask(user_id: str) -> str:
    """Ask the user's phone; return the ticket for `settle.delay`."""
    ticket = keyless.create_operation(user_id, operation_payload="Pay 40 to Alice", require_auth_type="biom")
    return ticket.to_json()


# By default, Celery forgets a task when it starts it. With the last two, the task of a killed process runs again.
@app.task(  # type: ignore[untyped-decorator]  # Celery has no types
    bind=True, max_retries=1500, acks_late=True, reject_on_worker_lost=True
)
def settle(task: Task, ticket: str) -> str:
    """Pay once the ticket is approved; try again until that is decided. It may run twice: pay once for each ticket."""
    try:
        approved = keyless.hold_for_approval(ApprovalTicket.from_json(ticket), seconds=25)
    except KeylessError as error:
        if isinstance(error, ApprovalError) and not isinstance(error, ApprovalUnknownError):
            return "not paid"  # time is up, a PIN, or an answer about something else
        raise task.retry(exc=error, countdown=60) from error  # perhaps approved: look again, for a day
    if approved is None:
        raise task.retry(countdown=1)
    return "paid"
