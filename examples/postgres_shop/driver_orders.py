"""Readers on connections of psycopg and psycopg2. Each settles one order: call it in a loop."""

import psycopg

from aiokeyless import sync, worker
from aiokeyless.worker import ApprovalEvent, Outcome

#: Settles the order that an event is about, if it is open, and of the same user and text; and pays for a face alone.
SETTLE = """
    WITH settled AS (
        UPDATE orders SET state = %(state)s
        WHERE id = %(operation_id)s AND state = 'asked' AND user_id = %(user_id)s
            AND encode(sha256(convert_to(text, 'UTF8')), 'hex') = %(payload_sha256)s
            AND (%(state)s <> 'paid' OR %(auth_type)s = 'biom')
        RETURNING id, state
    )
    INSERT INTO payments (order_id) SELECT id FROM settled WHERE state = 'paid'
"""


def values(event: ApprovalEvent) -> dict[str, str | None]:
    """Return what `SETTLE` needs of an event."""
    return {
        "state": "paid" if event.outcome is Outcome.APPROVED else "not paid",
        "operation_id": event.operation_id,
        "user_id": event.user_id,
        "payload_sha256": event.payload_sha256,
        "auth_type": event.auth_type,
    }


def settle_next(connection: psycopg.Connection) -> None:  # or psycopg2's
    """Wait for the next outcome, and settle its order."""
    with sync.next_outcome(connection, "shop") as event, connection.cursor() as cursor:
        cursor.execute(SETTLE, values(event))


async def settle_next_async(connection: psycopg.AsyncConnection) -> None:
    """Wait for the next outcome, and settle its order."""
    async with worker.next_outcome(connection, "shop") as event:
        await connection.execute(SETTLE, values(event))
