"""Reads outcomes, and stores what follows in the transaction in which each counts as handled: a payment, once.

Run as many of them as you like. One that is killed, or whose connection breaks, has done nothing with the outcome that
it had in hand, and another one gets it.
"""

import asyncio
import logging
import time
from hashlib import sha256

import asyncpg
from tables import DATABASE_URL

from aiokeyless.worker import ApprovalEvent, BrokerError, Outcome, next_outcome

log = logging.getLogger("settle")


async def settle(connection: asyncpg.Connection, event: ApprovalEvent) -> None:
    """Store the outcome of an order."""
    order = await connection.fetchrow(
        "SELECT * FROM orders WHERE id = $1 AND state = 'asked' FOR UPDATE", event.operation_id
    )
    if order is None or (event.user_id, event.payload_sha256) != (
        order["user_id"],
        sha256(order["text"].encode()).hexdigest(),
    ):
        log.warning("%s is about no order that is open", event)
        return
    if event.outcome is Outcome.APPROVED and event.auth_type != "biom":
        log.warning("%s is no face's: somebody submitted a request that requires none", event)
        return
    state = "paid" if event.outcome is Outcome.APPROVED else "not paid"
    await connection.execute("UPDATE orders SET state = $2 WHERE id = $1", order["id"], state)
    if state == "paid":
        await connection.execute("INSERT INTO payments (order_id) VALUES ($1)", order["id"])
    log.info("order %s: %s", order["id"], event.outcome)


async def read() -> None:
    """Handle outcomes until the connection breaks."""
    connection = await asyncpg.connect(DATABASE_URL)
    try:
        while True:
            async with next_outcome(connection, "shop") as event:
                await settle(connection, event)
    finally:
        await connection.close(timeout=1)


async def main() -> None:
    """Handle outcomes; after whatever goes wrong, again in a second. A reason that stays is logged once a minute."""
    reason, logged_at = "", 0.0
    while True:
        try:
            await read()
        except (BrokerError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            if str(error) != reason or time.monotonic() > logged_at + 60:
                reason, logged_at = str(error), time.monotonic()
                log.warning("%s", reason)
            await asyncio.sleep(1)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    asyncio.run(main())
