"""One approval pays one order once: docs/howto/paid-once.md."""

import asyncio
import sqlite3
import uuid
from contextlib import closing, suppress

from aiokeyless import (
    AlreadyApprovedError,
    ApprovalError,
    ApprovalTicket,
    ApprovalUnknownError,
    KeylessClient,
    KeylessError,
)

USER, PAYLOAD = "0123456789ABCDEF", "Pay 40 to Alice"


async def ask(client: KeylessClient, order: str) -> None:
    """Ask for the approval of an order, or go on asking, and wait for it."""
    ticket = ApprovalTicket.for_operation(order, user_id=USER, operation_payload=PAYLOAD, require_auth_type="biom")
    with suppress(AlreadyApprovedError):  # the answer to an earlier call; our record shows whether it was paid
        await client.create_operation(USER, operation_id=order, operation_payload=PAYLOAD, if_exists="resume")
    await client.wait_for_approval(ticket)


async def pay(client: KeylessClient, record: sqlite3.Connection, order: str) -> bool:
    """Return True once for each order that is approved in time, across all processes: pay then."""
    record.execute("INSERT OR IGNORE INTO orders VALUES (?, 'asked')", (order,))  # before asking
    if record.execute("SELECT state FROM orders WHERE id = ?", (order,)).fetchone() != ("asked",):
        return False  # paid or ended
    change = "UPDATE orders SET state = ? WHERE id = ? AND state = 'asked'"
    try:
        await ask(client, order)
    except KeylessError as error:
        if isinstance(error, ApprovalError) and not isinstance(error, ApprovalUnknownError):
            record.execute(change, ("ended", order))  # time is up, or a PIN: a later approval pays for nothing
            print(f"not paid after {error.polls} polls")
        else:  # perhaps approved, or not asked: the next call continues with the same operation
            print(f"not known yet: {error}")
        return False
    return record.execute(change, ("paid", order)).rowcount == 1


async def main() -> None:
    """Pay one order, and do not pay it again."""
    with closing(sqlite3.connect("orders.sqlite3", isolation_level=None)) as record:  # each statement commits
        record.execute("CREATE TABLE IF NOT EXISTS orders (id TEXT PRIMARY KEY, state TEXT)")
        async with KeylessClient(max_attempts=5) as client:
            order = f"order-{uuid.uuid4()}"  # a new one each time that this program runs
            paid = [await pay(client, record, order), await pay(client, record, order)]
            print("paid, once" if paid.count(True) == 1 else "not paid")


asyncio.run(main())
