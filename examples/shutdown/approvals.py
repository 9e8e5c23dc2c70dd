"""What the servers of this folder share: they ask a user, and answer a long poll. Each of them imports it."""

import os
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import TypeAlias

from aiokeyless import (
    AlreadyApprovedError,
    ApprovalError,
    ApprovalTicket,
    ApprovalTimeoutError,
    ClientClosedError,
    KeylessClient,
    KeylessError,
)

USER = "C0FFEE"  # a real site has it from its login, and in upper case
EXPIRES_IN = 120.0  # seconds for an approval; tests set fewer
LATE = timedelta(seconds=2)  # after them, for a browser on its way: what is found later pays nothing
QUESTIONS, HOLDS = 3, 2  # of one user at once: nobody rings a phone all day, or occupies all connections
OPEN = ("asking", "asked")  # asking: the answer to the create may be lost, and the phone was not told

Answer: TypeAlias = tuple[dict[str, str], int]  # its JSON, and its status
TOO_MANY = {"error": "Too many pages of yours wait already. Close one, or ask again in a second."}


@contextmanager
def record() -> Iterator[sqlite3.Connection]:
    """Begin a transaction while nobody else has one. In another database, lock the rows of the user and the order."""
    with closing(sqlite3.connect(os.environ.get("APPROVALS_DB", "approvals.sqlite3"), isolation_level=None)) as db, db:
        db.execute("BEGIN IMMEDIATE")
        db.execute("CREATE TABLE IF NOT EXISTS orders (id PRIMARY KEY, user_id, text)")  # your site's
        db.execute("CREATE TABLE IF NOT EXISTS approvals (id PRIMARY KEY, user_id, ticket, state, ends)")
        db.execute("CREATE TABLE IF NOT EXISTS places (id PRIMARY KEY, who, ends)")
        yield db


def find(db: sqlite3.Connection, user: str, order: str) -> tuple[str, str, str]:
    """Return an order's text of now, and ticket and state of its approval; empty texts if it is another user's."""
    query = "SELECT text, ticket, state FROM orders o LEFT JOIN approvals USING (id) WHERE (id, o.user_id) = (?, ?)"
    text, ticket, state = db.execute(query, (order, user)).fetchone() or ("", "", "")
    return text, ticket or "", state or ""


@contextmanager
def place(who: str, most: int) -> Iterator[bool]:
    """Take one of so many places, if there is one. Those of a killed process count for 30 seconds."""
    place, now = str(uuid.uuid4()), datetime.now(UTC).timestamp()
    with record() as db:
        db.execute("DELETE FROM places WHERE ends < ?", (now,))
        is_free = db.execute("SELECT count(*) FROM places WHERE who = ?", (who,)).fetchone()[0] < most
        if is_free:
            db.execute("INSERT INTO places VALUES (?, ?, ?)", (place, who, now + 30))
    try:
        yield is_free
    finally:
        with record() as db:
            db.execute("DELETE FROM places WHERE id = ?", (place,))


async def ask(client: KeylessClient, user: str, order: str) -> Answer:
    """Ask the user about an order, once, however often the browser or the next process repeats it."""
    with record() as db:
        text, stored, state = find(db, user, order)
        if not text:
            return {"error": "There is no such order."}, 404
        if not stored:  # before asking
            query = "SELECT count(*) FROM approvals WHERE user_id = ? AND ends > ?"
            if db.execute(query, (user, datetime.now(UTC).timestamp())).fetchone()[0] >= QUESTIONS:
                return {"error": "Your phone shows three questions. Answer one of them first."}, 429
            new = ApprovalTicket.for_operation(
                str(uuid.uuid4()), user_id=user, operation_payload=text, expires_in=EXPIRES_IN, require_auth_type="biom"
            )
            stored, state, ends = new.to_json(), "asking", new.expires_at.timestamp()
            db.execute("INSERT INTO approvals VALUES (?, ?, ?, ?, ?)", (order, user, stored, state, ends))
    ticket = ApprovalTicket.from_json(stored)
    if not is_about(ticket, user, text):
        return {"error": "This order has changed since you were asked. Ask about it under a new number."}, 409
    if state == "asking" and ticket.remaining():
        return await create(client, order, ticket, text)
    return {"state": state}, 200


async def create(client: KeylessClient, order: str, ticket: ApprovalTicket, text: str) -> Answer:
    """Create the operation, or find it if the answer to an earlier create was lost."""
    with place(f"{ticket.user_id} asks", QUESTIONS) as is_free:
        if not is_free:
            return TOO_MANY, 429
        try:
            await client.create_operation(
                ticket.user_id, operation_id=ticket.operation_id, operation_payload=text, if_exists="resume"
            )
        except AlreadyApprovedError:
            pass  # `state` finds the approval
        except KeylessError as error:
            if not error.is_transient:
                raise
            return {"state": "not asked"}, 503  # perhaps: the browser asks once more
    with record() as db:
        change = "UPDATE approvals SET state = 'asked' WHERE id = ? AND state = 'asking'"
        if db.execute(change, (order,)).rowcount == 1:
            notify_phone(ticket)
    return {"state": "asked"}, 200


def is_about(ticket: ApprovalTicket, user: str, text: str) -> bool:
    """Return whether this user was asked for exactly this."""
    return (ticket.user_id, ticket.payload_sha256) == (user, sha256(text.encode()).hexdigest())


def notify_phone(ticket: ApprovalTicket) -> None:
    """Send a push notification: your own function. It is called once, after the operation is there."""
    print(f"push to {ticket.user_id}: {ticket.operation_id}", flush=True)


async def state(client: KeylessClient, user: str, order: str) -> Answer:
    """Answer once an order is decided, or after 25 seconds that it is pending: the caller then asks again."""
    with record() as db:
        _, stored, state = find(db, user, order)
    if state in OPEN:
        ticket = ApprovalTicket.from_json(stored)
        if not ticket.remaining(datetime.now(UTC) - LATE):
            return {"state": decide(user, order, "timed out")}, 200
        with place(f"{user} waits", HOLDS) as is_free:
            if not is_free:
                return TOO_MANY, 429
            state = await wait(client, user, order, ticket)
    return {"state": state or "not asked"}, 200


async def wait(client: KeylessClient, user: str, order: str, ticket: ApprovalTicket) -> str:
    """Wait for a piece of the time, and return the state."""
    try:
        approved = await client.hold_for_approval(ticket, seconds=25, if_missing="wait")
        return "pending" if approved is None else decide(user, order, "approved")
    except ApprovalTimeoutError:  # also if it is unknown: nobody finds an approval later
        return decide(user, order, "timed out")
    except ApprovalError:  # a PIN, or an answer about something else
        return decide(user, order, "refused")
    except ClientClosedError:  # the server stops: the caller asks the next one
        return "pending"


def decide(user: str, order: str, state: str) -> str:
    """Store an outcome before anybody is told: the first one counts, and it must be about the order of now."""
    with record() as db:
        text, stored, decided = find(db, user, order)
        if decided not in OPEN:
            return decided or "refused"  # or the order is no longer there
        ticket = ApprovalTicket.from_json(stored)
        if state == "approved" and not ticket.remaining(datetime.now(UTC) - LATE):
            state = "timed out"
        elif state == "approved" and not is_about(ticket, user, text):
            state = "refused"
        # Your site stores what else follows from a payment here, in the same transaction.
        db.execute("UPDATE approvals SET state = ?, ends = 0 WHERE id = ?", (state, order))
    if state == "approved":
        print(f"{order!r}: pay", flush=True)  # once: after a crash right here, repeat it under the same order
    return state
