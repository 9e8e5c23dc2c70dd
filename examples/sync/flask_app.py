"""Approvals in Flask views: `flask --app flask_app run`. FLASK_SECRET_KEY signs the sessions."""

import os
import sqlite3
import uuid
from contextlib import closing, suppress

from flask import Flask, abort, session

from aiokeyless import (
    AlreadyApprovedError,
    ApprovalError,
    ApprovalTicket,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    ClientClosedError,
)
from aiokeyless.sync import KeylessClient

EXPIRES_IN = 120.0  # seconds for an approval; tests set fewer

app = Flask(__name__)
app.config["SESSION_COOKIE_SAMESITE"] = "Lax"  # a form of another site starts no payment
app.config["PAYMENTS_DB"] = "payments.sqlite3"
app.config.from_prefixed_env()
keyless = KeylessClient(lambda: os.environ["KEYLESS_API_KEY"])  # whoever only imports this module needs no key


def record() -> closing[sqlite3.Connection]:
    """Open the record of the payments. The session is no place for it: an old cookie can be sent again."""
    db = sqlite3.connect(app.config["PAYMENTS_DB"], isolation_level=None)  # each statement commits
    db.execute("CREATE TABLE IF NOT EXISTS payments (id, user_id, ticket, state, PRIMARY KEY (id, user_id))")
    return closing(db)


def find(order: str) -> list[tuple[str, str]]:
    """Return ticket and state of the payment of this order and of this user, if there is one."""
    with record() as db:
        query = "SELECT ticket, state FROM payments WHERE id = ? AND user_id = ?"
        return db.execute(query, (order, session["user_id"])).fetchall()


@app.post("/payments/<order>")
def pay(order: str) -> dict[str, str]:
    """Ask the phone of the user whom your login stored in the session, and never of one whom the browser names.

    The user is asked about an order once, however often the browser repeats it.
    """
    user, payload = session["user_id"], "Pay 40 to Alice"
    new = ApprovalTicket.for_operation(
        str(uuid.uuid4()), user_id=user, operation_payload=payload, expires_in=EXPIRES_IN, require_auth_type="biom"
    )
    with record() as db:  # before asking
        db.execute("INSERT OR IGNORE INTO payments VALUES (?, ?, ?, 'asked')", (order, user, new.to_json()))
    [(ticket, state)] = find(order)
    if state == "asked":
        operation_id = ApprovalTicket.from_json(ticket).operation_id
        with suppress(AlreadyApprovedError):  # the answer to this question, which `payment` finds
            keyless.create_operation(user, operation_id=operation_id, operation_payload=payload, if_exists="resume")
    return {"state": state}


@app.get("/payments/<order>")
def payment(order: str) -> dict[str, str]:
    """Answer once a payment is decided, or that it is pending: the page then asks again."""
    if not (found := find(order)):
        abort(404)  # also for a payment of another user
    [(ticket, state)] = found
    if state == "asked":
        try:
            approved = keyless.hold_for_approval(ApprovalTicket.from_json(ticket), seconds=25)
            state = "pending" if approved is None else decide(order, "approved")
        except ApprovalUnknownError:  # perhaps approved: the page asks again in a while, which polls once more
            state = "unknown"
        except ApprovalTimeoutError:
            state = decide(order, "timed out")
        except ApprovalError:  # a PIN, or an answer about something else
            state = decide(order, "refused")
        except ClientClosedError:  # the server stops: the page asks the next one
            state = "pending"
    return {"state": state}


def decide(order: str, state: str) -> str:
    """Decide a payment before anybody is told: the first outcome counts, and a late approval changes nothing."""
    with record() as db:
        change = "UPDATE payments SET state = ? WHERE id = ? AND user_id = ? AND state = 'asked'"
        if db.execute(change, (state, order, session["user_id"])).rowcount == 1 and state == "approved":
            print(f"{order}: pay", flush=True)  # once: after a crash right here, repeat it under the same order
    [(_, decided)] = find(order)
    return decided
