"""What the servers of this folder share: they ask a user, and answer a long poll. Each of them imports it."""

import os
import sqlite3
import uuid
from contextlib import closing

from aiokeyless import (
    AlreadyApprovedError,
    ApprovalError,
    ApprovalTicket,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    ClientClosedError,
    KeylessClient,
    KeylessError,
)

USER, PAYLOAD = "C0FFEE", "Pay 40 to Alice"  # a real site has them from its login and from the order
EXPIRES_IN = 120.0  # seconds for an approval; tests set fewer


def record() -> closing[sqlite3.Connection]:
    """Open the record. A real site has its database, and keeps the user who may read it with each order."""
    db = sqlite3.connect(os.environ.get("APPROVALS_DB", "approvals.sqlite3"), isolation_level=None)  # statements commit
    db.execute("CREATE TABLE IF NOT EXISTS approvals (id PRIMARY KEY, ticket, state)")
    return closing(db)


def find(order: str) -> list[tuple[str, str]]:
    """Return ticket and state of an order, if it was asked about."""
    with record() as db:
        return db.execute("SELECT ticket, state FROM approvals WHERE id = ?", (order,)).fetchall()


async def ask(client: KeylessClient, order: str) -> dict[str, str]:
    """Ask the user about an order, once, however often the browser or the next process repeats it."""
    new = ApprovalTicket.for_operation(
        str(uuid.uuid4()), user_id=USER, operation_payload=PAYLOAD, expires_in=EXPIRES_IN, require_auth_type="biom"
    )
    with record() as db:  # before asking
        db.execute("INSERT OR IGNORE INTO approvals VALUES (?, ?, 'asked')", (order, new.to_json()))
    [(stored, state)] = find(order)
    ticket = ApprovalTicket.from_json(stored)
    if state == "asked" and ticket.remaining():
        try:
            await client.create_operation(
                USER, operation_id=ticket.operation_id, operation_payload=PAYLOAD, if_exists="resume"
            )
            # here, notify the phone
        except AlreadyApprovedError:
            pass  # `state` finds the approval
        except KeylessError as error:
            if not error.is_transient:
                raise
            state = "not asked"  # perhaps: the browser asks once more
    return {"state": state}


async def state(client: KeylessClient, order: str) -> dict[str, str]:
    """Answer once an order is decided, or after 25 seconds that it is pending: the caller then asks again."""
    if not (found := find(order)):
        return {"state": "not asked"}
    [(stored, state)] = found
    if state == "asked":
        try:
            ticket = ApprovalTicket.from_json(stored)
            operation = await client.hold_for_approval(ticket, seconds=25, if_missing="wait")
            state = "pending" if operation is None else decide(order, "approved")
        except ApprovalUnknownError:  # perhaps approved: the caller asks again in a while, which polls once more
            state = "unknown"
        except ApprovalTimeoutError:
            state = decide(order, "timed out")
        except ApprovalError:  # a PIN, or an answer about something else
            state = decide(order, "refused")
        except ClientClosedError:  # the server stops: the caller asks the next one
            state = "pending"
    return {"state": state}


def decide(order: str, state: str) -> str:
    """Store an outcome before anybody is told: the first one counts, and an approval after it changes nothing."""
    with record() as db:
        change = "UPDATE approvals SET state = ? WHERE id = ? AND state = 'asked'"
        if db.execute(change, (state, order)).rowcount == 1 and state == "approved":
            print(f"{order}: pay", flush=True)  # once: after a crash right here, repeat it under the same order
    [(_, decided)] = find(order)
    return decided
