"""The reader with sessions of SQLAlchemy: what the ORM changes is committed with the outcome."""

import asyncio
import logging
import time
from hashlib import sha256

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from tables import Order, Payment

from aiokeyless import BrokerError, sync, worker
from aiokeyless.worker import ApprovalEvent, Outcome

log = logging.getLogger("settle")


def settle(session: Session, event: ApprovalEvent) -> None:
    """Store the outcome of an order, if the event is about it."""
    order = session.get(Order, event.operation_id, with_for_update=True)
    if order is None or (order.state, event.user_id, event.payload_sha256) != (
        "asked",
        order.user_id,
        sha256(order.text.encode()).hexdigest(),
    ):
        log.warning("%s is about no order that is open", event)
    elif event.outcome is Outcome.APPROVED and event.auth_type != "biom":
        log.warning("%s is no face's: somebody submitted a request that requires none", event)
    else:
        order.state = "paid" if event.outcome is Outcome.APPROVED else "not paid"
        if order.state == "paid":
            session.add(Payment(order_id=order.id))


def read(engine: Engine) -> None:
    """Settle orders as their outcomes come, in a process of its own."""
    quiet_until = 0.0
    with Session(engine) as session:
        while True:
            try:
                with sync.next_outcome(session, "shop") as event:
                    settle(session, event)  # and the session commits, if this raises nothing
            except BrokerError as error:  # the database is away, or has no schema: say so once a minute
                if time.monotonic() > quiet_until:
                    log.warning("%s", error)
                    quiet_until = time.monotonic() + 60
                time.sleep(1)


async def read_async(engine: AsyncEngine) -> None:
    """Settle orders as their outcomes come, in a task beside the server."""
    quiet_until = 0.0
    async with AsyncSession(engine) as session:
        while True:
            try:
                async with worker.next_outcome(session, "shop") as event:
                    await session.run_sync(settle, event)
            except BrokerError as error:
                if time.monotonic() > quiet_until:
                    log.warning("%s", error)
                    quiet_until = time.monotonic() + 60
                await asyncio.sleep(1)
