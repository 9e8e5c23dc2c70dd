"""Approvals in Flask views: `flask --app flask_app run`. FLASK_SECRET_KEY signs the sessions."""

import os
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from hashlib import sha256

from flask import Flask, abort, session

from aiokeyless import (
    AlreadyApprovedError,
    ApprovalError,
    ApprovalTicket,
    ApprovalTimeoutError,
    ClientClosedError,
    KeylessError,
)
from aiokeyless.sync import KeylessClient

EXPIRES_IN = 120.0  # seconds for an approval; tests set fewer
LATE = timedelta(seconds=2)  # after them, for a browser on its way: what is found later pays nothing
QUESTIONS, HOLDS = 3, 2  # of one user at once: nobody rings a phone all day, or occupies all threads
OPEN = ("asking", "asked")  # asking: the answer to the create may be lost, and the phone was not told

app = Flask(__name__)
app.config["SESSION_COOKIE_SAMESITE"] = "Lax"  # a form of another site starts no payment
app.config["PAYMENTS_DB"] = "payments.sqlite3"
app.config.from_prefixed_env()  # $FLASK_SECRET_KEY signs the sessions
keyless = KeylessClient(lambda: os.environ["KEYLESS_API_KEY"])  # whoever only imports this module needs no key


@contextmanager
def record() -> Iterator[sqlite3.Connection]:
    """Begin a transaction while nobody else has one. In another database, lock the rows of the user and the order."""
    with closing(sqlite3.connect(app.config["PAYMENTS_DB"], timeout=30, isolation_level=None)) as db, db:
        db.execute("BEGIN IMMEDIATE")
        db.execute("CREATE TABLE IF NOT EXISTS orders (id PRIMARY KEY, user_id, text)")  # your site's
        db.execute("CREATE TABLE IF NOT EXISTS payments (id PRIMARY KEY, user_id, ticket, state, ends)")
        db.execute("CREATE TABLE IF NOT EXISTS places (id PRIMARY KEY, who, ends)")
        yield db


def user() -> str:
    """Return the user whom your login stored in the session, by their id at Keyless, in upper case."""
    return str(session.get("user_id") or abort(401)).upper()


def find(db: sqlite3.Connection, order: str) -> tuple[str, str | None, str]:
    """Return an order's text of now, and ticket and state of its payment. There is none for another user."""
    found: tuple[str, str | None, str] | None = db.execute(
        "SELECT text, ticket, state FROM orders o LEFT JOIN payments USING (id) WHERE id = ? AND o.user_id = ?",
        (order, user()),
    ).fetchone()
    return found or abort(404)


@contextmanager
def place(who: str, most: int) -> Iterator[None]:
    """Take one of so many places: each occupies a thread. Those of a killed process count for 30 seconds."""
    place, now = str(uuid.uuid4()), datetime.now(UTC).timestamp()
    with record() as db:
        db.execute("DELETE FROM places WHERE ends < ?", (now,))
        if db.execute("SELECT count(*) FROM places WHERE who = ?", (who,)).fetchone()[0] >= most:
            abort(429, "Too many pages of yours wait already. Close one, or ask again in a second.")
        db.execute("INSERT INTO places VALUES (?, ?, ?)", (place, who, now + 30))
    try:
        yield
    finally:
        with record() as db:
            db.execute("DELETE FROM places WHERE id = ?", (place,))


def is_about(ticket: ApprovalTicket, text: str) -> bool:
    """Return whether this user was asked for exactly this."""
    return (ticket.user_id, ticket.payload_sha256) == (user(), sha256(text.encode()).hexdigest())


@app.post("/payments/<order>")
def pay(order: str) -> dict[str, str] | tuple[dict[str, str], int]:
    """Ask the user's phone about an order, once, however often the browser repeats it."""
    with record() as db:
        text, stored, state = find(db, order)
        new = ApprovalTicket.for_operation(
            str(uuid.uuid4()), user_id=user(), operation_payload=text, expires_in=EXPIRES_IN, require_auth_type="biom"
        )
        if stored is None:  # before asking
            query = "SELECT count(*) FROM payments WHERE user_id = ? AND ends > ?"
            if db.execute(query, (user(), datetime.now(UTC).timestamp())).fetchone()[0] >= QUESTIONS:
                abort(429, "Your phone shows three questions. Answer one of them first.")
            stored, state, ends = new.to_json(), "asking", new.expires_at.timestamp()
            db.execute("INSERT INTO payments VALUES (?, ?, ?, ?, ?)", (order, user(), stored, state, ends))
    ticket = ApprovalTicket.from_json(stored)
    if not is_about(ticket, text):
        abort(409, "This order has changed since you were asked. Ask about it under a new number.")
    if state == "asking" and ticket.remaining():
        try:
            with place(f"{user()} asks", QUESTIONS):
                keyless.create_operation(
                    user(), operation_id=ticket.operation_id, operation_payload=text, if_exists="resume"
                )
        except AlreadyApprovedError:
            pass  # `payment` finds the approval
        except KeylessError as error:
            if not error.is_transient:
                raise
            return {"state": "not asked"}, 503  # perhaps: the browser asks once more
        state = "asked"
        with record() as db:
            change = "UPDATE payments SET state = 'asked' WHERE id = ? AND state = 'asking'"
            if db.execute(change, (order,)).rowcount == 1:
                notify_phone(ticket)
    return {"state": state}


def notify_phone(ticket: ApprovalTicket) -> None:
    """Send a push notification: your own function. It is called once, after the operation is there."""
    print(f"push to {ticket.user_id}: {ticket.operation_id}", flush=True)


@app.get("/payments/<order>")
def payment(order: str) -> tuple[dict[str, str], dict[str, str]]:
    """Answer once a payment is decided, or that it is pending: the page then asks again."""
    with record() as db:
        _, stored, state = find(db, order)
    if state in OPEN:
        ticket = ApprovalTicket.from_json(stored or "")
        if ticket.remaining(datetime.now(UTC) - LATE):
            with place(f"{user()} waits", HOLDS):
                state = wait(order, ticket)
        else:
            state = decide(order, "timed out")
    elif stored is None:
        abort(404)
    return {"state": state}, {"Cache-Control": "no-store"}


def wait(order: str, ticket: ApprovalTicket) -> str:
    """Wait for a piece of the time, and return the state."""
    try:
        approved = keyless.hold_for_approval(ticket, seconds=25, if_missing="wait")
        return "pending" if approved is None else decide(order, "approved")
    except ApprovalTimeoutError:  # also if it is unknown: nobody finds an approval later
        return decide(order, "timed out")
    except ApprovalError:  # a PIN, or an answer about something else
        return decide(order, "refused")
    except ClientClosedError:  # the server stops: the page asks the next one
        return "pending"


def decide(order: str, state: str) -> str:
    """Store an outcome before anybody is told: the first one counts, and it must be about the order of now."""
    with record() as db:
        text, stored, decided = find(db, order)
        ticket = ApprovalTicket.from_json(stored or abort(404))
        if decided not in OPEN:
            return decided
        if state == "approved" and not ticket.remaining(datetime.now(UTC) - LATE):
            state = "timed out"
        elif state == "approved" and not is_about(ticket, text):
            state = "refused"
        # Your site stores what else follows from a payment here, in the same transaction.
        db.execute("UPDATE payments SET state = ?, ends = 0 WHERE id = ?", (state, order))
    if state == "approved":
        print(f"{order!r}: pay", flush=True)  # once: after a crash right here, repeat it under the same order
    return state
