"""Approvals in a Celery task: `celery --app celery_tasks worker`. A worker is not held for longer than 25 seconds."""

import os
import sqlite3
from contextlib import closing

from celery import Celery, Task

from aiokeyless import ApprovalError, ApprovalTicket, ApprovalUnknownError, KeylessError
from aiokeyless.sync import KeylessClient

app = Celery("payments", broker=os.environ.get("CELERY_BROKER", "memory://"))
keyless = KeylessClient()


def ask(user_id: str) -> str:
    """Ask the user's phone; return the ticket for `settle.delay`."""
    ticket = keyless.create_operation(user_id, operation_payload="Pay 40 to Alice", require_auth_type="biom")
    return ticket.to_json()


def decide(ticket: ApprovalTicket, state: str) -> str:
    """Store how a ticket ended, before anybody is told: the first outcome counts. Return the one that counts."""
    with closing(sqlite3.connect(os.environ.get("PAYMENTS_DB", "payments.sqlite3"), isolation_level=None)) as record:
        record.execute("CREATE TABLE IF NOT EXISTS outcomes (id PRIMARY KEY, state)")
        record.execute("INSERT OR IGNORE INTO outcomes VALUES (?, ?)", (ticket.operation_id, state))
        query = "SELECT state FROM outcomes WHERE id = ?"
        return str(record.execute(query, (ticket.operation_id,)).fetchone()[0])


# By default, Celery forgets a task when it starts it. With the last two, the task of a killed process runs again.
@app.task(bind=True, max_retries=1500, acks_late=True, reject_on_worker_lost=True)
def settle(task: Task, stored: str) -> str:
    """Pay once the ticket is approved; try again until that is decided. It may run twice, and decides once."""
    ticket = ApprovalTicket.from_json(stored)
    try:
        approved = keyless.hold_for_approval(ticket, seconds=25)
    except KeylessError as error:
        if isinstance(error, ApprovalError) and not isinstance(error, ApprovalUnknownError):
            return decide(ticket, "not paid")  # time is up, a PIN, or an answer about something else
        raise task.retry(exc=error, countdown=60) from error  # perhaps approved: look again, for a day
    if approved is None:
        raise task.retry(countdown=1)
    state = decide(ticket, "paid")
    if state == "paid":
        print(f"pay, with the idempotency key {ticket.operation_id}")  # the second run repeats it
    return state
