"""Approvals in Flask views: `flask --app flask_app run`."""

from flask import Flask, request
from keyless_sync import ask, is_approved

from aiokeyless import ApprovalTicket

app = Flask(__name__)
tickets: dict[str, ApprovalTicket] = {}  # a real application keeps them with its orders


@app.post("/payments")
def pay() -> dict[str, str]:
    """Ask the user's phone."""
    ticket = ask(request.form["user_id"], "Pay 40 to Alice")
    tickets[ticket.operation_id] = ticket
    return {"id": ticket.operation_id}


@app.get("/payments/<payment_id>")
def payment(payment_id: str) -> dict[str, str]:
    """Answer once it is approved, or that it is pending: the page then asks again."""
    return {"state": "approved" if is_approved(tickets[payment_id]) else "pending"}
