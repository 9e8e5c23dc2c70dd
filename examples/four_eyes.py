"""Two of three people approve a payment: docs/howto/four-eyes.md."""

import asyncio
import sqlite3
import uuid
from contextlib import aclosing, closing, suppress

from aiokeyless import (
    AlreadyApprovedError,
    ApprovalTicket,
    ApprovalTimeoutError,
    Approved,
    KeylessClient,
    KeylessError,
)

STAFF = {"alice": "A11CE0", "bob": "B0B", "carol": "CA401", "dave": "DA4E"}  # everybody, and their users at Keyless
APPROVERS = ("alice", "bob", "carol")
NEEDED = 2


def prepare(record: sqlite3.Connection, payload: str, *, requested_by: str, seconds: float = 600) -> str:
    """Record a payment with a question for each person but the one who wants it. Nobody is asked yet."""
    if requested_by not in STAFF:
        raise PermissionError(f"nobody is called {requested_by!r}")
    people = {STAFF[person].upper(): person for person in APPROVERS}  # by user: one person may have two names
    people.pop(STAFF[requested_by].upper(), None)
    payment = str(uuid.uuid4())
    record.execute("INSERT INTO payments VALUES (?, 'asked')", (payment,))
    for user, person in people.items():
        ticket = ApprovalTicket.for_operation(
            f"{payment}-{person}",
            user_id=user,
            operation_payload=payload,
            expires_in=seconds,
            require_auth_type="biom",
        )
        record.execute("INSERT INTO questions VALUES (?, ?, ?, ?)", (payment, person, payload, ticket.to_json()))
    return payment


async def ask(client: KeylessClient, ticket: ApprovalTicket, payload: str) -> None:
    """Create the operation of one person. After a restart it is there already, pending or approved."""
    with suppress(AlreadyApprovedError):  # the answer to this question: its id was never used for another one
        await client.create_operation(
            ticket.user_id, operation_id=ticket.operation_id, operation_payload=payload, if_exists="resume"
        )


async def decide(client: KeylessClient, record: sqlite3.Connection, payment: str) -> bool:
    """Return True once for each payment that enough people approved in time: pay then."""
    questions = record.execute("SELECT person, payload, ticket FROM questions WHERE payment = ?", (payment,)).fetchall()
    tickets = {person: ApprovalTicket.from_json(ticket) for person, _, ticket in questions}
    asked: dict[str, str] = {}  # whose operation it is
    for person, payload, _ in questions:
        if not tickets[person].remaining():
            continue  # what is approved after the end does not count
        try:
            await ask(client, tickets[person], payload)
        except KeylessError as error:  # the others may be enough
            print(f"{person} was not asked: {error}")
        else:
            asked[tickets[person].operation_id] = person
    approved: set[str] = set()
    is_over = not any(ticket.remaining() for ticket in tickets.values())
    async with aclosing(client.wait_for_approvals(tickets[person] for person in asked.values())) as outcomes:
        async for outcome in outcomes:
            if isinstance(outcome, Approved):
                approved.add(asked[outcome.operation_id])
            is_over |= isinstance(outcome.error, ApprovalTimeoutError)  # all have one deadline
            if len(approved) == NEEDED:
                break
    if len(approved) < NEEDED and not is_over:
        return False  # not decided: after an outage, or as this process stops. Call again
    state = "approved" if len(approved) >= NEEDED else "refused"
    changed = record.execute("UPDATE payments SET state = ? WHERE id = ? AND state = 'asked'", (state, payment))
    return state == "approved" and changed.rowcount == 1


async def main() -> None:
    """Record a payment that Dave wants, and ask the three others."""
    with closing(sqlite3.connect("payments.sqlite3", isolation_level=None)) as record:  # each statement commits
        record.execute("CREATE TABLE IF NOT EXISTS payments (id PRIMARY KEY, state)")
        record.execute(
            "CREATE TABLE IF NOT EXISTS questions (payment, person, payload, ticket, UNIQUE (payment, person))"
        )
        payment = prepare(record, "Pay 40000 EUR to Acme, invoice 7", requested_by="dave")
        async with KeylessClient() as client:
            print("pay" if await decide(client, record, payment) else "not paid")


asyncio.run(main())
