"""Approvals in Flask views: `flask --app flask_app run`. FLASK_SECRET_KEY signs the sessions."""

import os
import sqlite3
import uuid
from contextlib import closing

from flask import Flask, abort, session

from aiokeyless import (
    AlreadyApprovedError,
    ApprovalError,
    ApprovalTicket,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    ClientClosedError,
    KeylessError,
)
from aiokeyless.sync import KeylessClient

PAYLOAD = "Pay 40 to Alice"  # your site makes it of the order
EXPIRES_IN = 120.0  # seconds for an approval; tests set fewer

app = Flask(__name__)
app.config["SESSION_COOKIE_SAMESITE"] = "Lax"  # a form of another site starts no payment
app.config["PAYMENTS_DB"] = "payments.sqlite3"
app.config.from_prefixed_env()  # $FLASK_SECRET_KEY signs the sessions
keyless = KeylessClient(lambda: os.environ["KEYLESS_API_KEY"])  # whoever only imports this module needs no key


def record() -> closing[sqlite3.Connection]:
    """Open the record of the payments. The session is no place for it: an old cookie can be sent again."""
    db = sqlite3.connect(app.config["PAYMENTS_DB"], isolation_level=None)  # each statement commits
    db.execute("CREATE TABLE IF NOT EXISTS payments (id PRIMARY KEY, user_id, ticket, state)")
    return closing(db)


def user() -> str:
    """Return the user whom your login stored in the session, by their id at Keyless."""
    user_id: str = session.get("user_id") or abort(401)
    return user_id


def find(order: str) -> tuple[str, str]:
    """Return ticket and state of the payment of an order. There is none for another user."""
    with record() as db:
        query = "SELECT ticket, state FROM payments WHERE id = ? AND user_id = ?"
        found: tuple[str, str] = db.execute(query, (order, user())).fetchone() or abort(404)
    return found


@app.post("/payments/<order>")
def pay(order: str) -> dict[str, str]:
    """Ask the user's phone about an order, once, however often the browser repeats it.

    Your site looks up whose order it is. Here, it is of the user who asks first.
    """
    new = ApprovalTicket.for_operation(
        str(uuid.uuid4()), user_id=user(), operation_payload=PAYLOAD, expires_in=EXPIRES_IN, require_auth_type="biom"
    )
    with record() as db:  # before asking
        db.execute("INSERT OR IGNORE INTO payments VALUES (?, ?, ?, 'asked')", (order, user(), new.to_json()))
    stored, state = find(order)
    ticket = ApprovalTicket.from_json(stored)
    if state == "asked" and ticket.remaining():
        try:
            keyless.create_operation(
                user(), operation_id=ticket.operation_id, operation_payload=PAYLOAD, if_exists="resume"
            )
            # here, notify the phone
        except AlreadyApprovedError:
            pass  # `payment` finds the approval
        except KeylessError as error:
            if not error.is_transient:
                raise
            state = "not asked"  # perhaps: the browser asks once more
    return {"state": state}


@app.get("/payments/<order>")
def payment(order: str) -> tuple[dict[str, str], dict[str, str]]:
    """Answer once a payment is decided, or that it is pending: the page then asks again."""
    stored, state = find(order)
    if state == "asked":
        try:
            approved = keyless.hold_for_approval(ApprovalTicket.from_json(stored), seconds=25, if_missing="wait")
            state = "pending" if approved is None else decide(order, "approved")
        except ApprovalUnknownError:  # perhaps approved: the page asks again in a while, which polls once more
            state = "unknown"
        except ApprovalTimeoutError:
            state = decide(order, "timed out")
        except ApprovalError:  # a PIN, or an answer about something else
            state = decide(order, "refused")
        except ClientClosedError:  # the server stops: the page asks the next one
            state = "pending"
    return {"state": state}, {"Cache-Control": "no-store"}


def decide(order: str, state: str) -> str:
    """Store an outcome before anybody is told: the first one counts, and an approval after it changes nothing."""
    with record() as db:
        change = "UPDATE payments SET state = ? WHERE id = ? AND state = 'asked'"
        if db.execute(change, (state, order)).rowcount == 1 and state == "approved":
            print(f"{order}: pay", flush=True)  # once: after a crash right here, repeat it under the same order
    _, decided = find(order)
    return decided
