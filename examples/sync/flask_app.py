"""Approvals in Flask views: `flask --app flask_app run`. FLASK_SECRET_KEY signs the sessions."""

from flask import Flask, abort, session

from aiokeyless import (
    ApprovalError,
    ApprovalTicket,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    ClientClosedError,
)
from aiokeyless.sync import KeylessClient

app = Flask(__name__)
app.config["SESSION_COOKIE_SAMESITE"] = "Lax"  # a form of another site starts no payment
app.config.from_prefixed_env()
keyless = KeylessClient()
tickets: dict[tuple[str, str], ApprovalTicket] = {}  # by user and id; a real application keeps them with its orders


@app.post("/payments")
def pay() -> dict[str, str]:
    """Ask the phone of the user whom your login stored in the session, and never of one whom the browser names."""
    ticket = keyless.create_operation(session["user_id"], operation_payload="Pay 40 to Alice", require_auth_type="biom")
    tickets[session["user_id"], ticket.operation_id] = ticket
    return {"id": ticket.operation_id}


@app.get("/payments/<payment_id>")
def payment(payment_id: str) -> dict[str, str]:
    """Answer once it is approved, or that it is pending: the page then asks again."""
    if (ticket := tickets.get((session["user_id"], payment_id))) is None:
        abort(404)  # also for a payment of another user
    try:
        approved = keyless.hold_for_approval(ticket, seconds=25)
    except ApprovalUnknownError:  # perhaps approved: the page asks again in a while, which polls once more
        return {"state": "unknown"}
    except ApprovalTimeoutError:
        return {"state": "timed out"}
    except ApprovalError:  # a PIN, or an answer about something else
        return {"state": "refused"}
    except ClientClosedError:  # the server stops: the page asks the next one
        return {"state": "pending"}
    return {"state": "pending" if approved is None else "approved"}
