"""Payments from RabbitMQ, each paid once if its user approves in time: docs/howto/message-handlers.md."""

import asyncio
import os
import sqlite3
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, closing, suppress
from datetime import UTC, datetime, timedelta
from typing import Annotated

from faststream import Context, ContextRepo, FastStream, Logger
from faststream.exceptions import SkipMessage
from faststream.rabbit import Channel, QueueType, RabbitBroker, RabbitQueue
from pydantic import BaseModel

from aiokeyless import (
    AlreadyApprovedError,
    ApprovalError,
    ApprovalTicket,
    ApprovalUnknownError,
    ClientClosedError,
    ConfigurationError,
    ConflictError,
    KeylessClient,
    KeylessError,
)
from aiokeyless.shutdown import close_on_signals

REFUSED = RabbitQueue("payments.refused", queue_type=QueueType.QUORUM)  # for a person to look at
QUEUE = RabbitQueue(
    "payments",
    queue_type=QueueType.QUORUM,
    arguments={"x-dead-letter-exchange": "", "x-dead-letter-routing-key": REFUSED.name},
)
LATER = RabbitQueue(  # gives a message back after 5 seconds; a return of RabbitMQ's own would count as a failure
    "payments.later",
    queue_type=QueueType.QUORUM,
    arguments={
        "x-message-ttl": 5000,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": QUEUE.name,
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    },
)
WAITS = Channel(prefetch_count=100)  # the payments that one process waits for at once

EXPIRES_IN = 120  # seconds
QUESTIONS = 3  # that a user's phone shows at once: it is not rung all day, and others are asked

broker = RabbitBroker(os.environ.get("RABBITMQ_URL", "amqp://guest:guest@127.0.0.1:5672/"))


class Payment(BaseModel):
    """The body of a message."""

    id: str  # of the operation, too: another payment never has it
    user_id: str
    text: str  # what the user approves; pay nothing else


async def is_approved(client: KeylessClient, payment: Payment, asked_at: datetime) -> bool:
    """Ask the user, or continue to ask, and return whether they approve in time."""
    ticket = ApprovalTicket.for_operation(
        payment.id,
        user_id=payment.user_id,
        operation_payload=payment.text,
        created_at=asked_at,
        expires_in=EXPIRES_IN,
        require_auth_type="biom",
    )
    with suppress(AlreadyApprovedError):  # an earlier delivery asked; the wait checks the approval
        await client.create_operation(
            payment.user_id, operation_id=payment.id, operation_payload=payment.text, if_exists="resume"
        )
    try:
        await client.wait_for_approval(ticket)
    except ApprovalUnknownError:
        raise  # perhaps approved
    except ApprovalError:
        return False  # time is up, or a PIN
    return True


#: Stores a payment before its user is asked, unless the user has so many open ones. A statement of SQLite is a
#: transaction while which nobody else writes; in another database, lock the user's row first.
OPEN = """
    INSERT OR IGNORE INTO payments SELECT :id, :user, :now, 'asked' WHERE :most >
        (SELECT count(*) FROM payments WHERE user_id = :user AND state = 'asked' AND asked_at > :since)
"""


async def settle(client: KeylessClient, record: sqlite3.Connection, payment: Payment) -> bool:
    """Decide a payment once: asked becomes paid, or ended. Return False if the phone shows others of its user."""
    now, user = datetime.now(UTC), payment.user_id.upper()
    since = (now - timedelta(seconds=EXPIRES_IN)).isoformat()
    record.execute(OPEN, {"id": payment.id, "user": user, "now": now.isoformat(), "since": since, "most": QUESTIONS})
    found = record.execute("SELECT asked_at, state FROM payments WHERE id = ?", (payment.id,)).fetchone()
    if found is None:
        return False
    asked_at, state = found
    if state != "asked":
        return True  # decided: neither a copy of the message nor a late approval changes that
    outcome = "paid" if await is_approved(client, payment, datetime.fromisoformat(asked_at)) else "ended"
    # Move the money in the transaction of this change, and only if it changes the row.
    record.execute("UPDATE payments SET state = ? WHERE id = ? AND state = 'asked'", (outcome, payment.id))
    return True


@broker.subscriber(QUEUE, channel=WAITS)  # FastStream acknowledges if this returns, and rejects if it raises
async def handle(
    payment: Payment,
    client: Annotated[KeylessClient, Context()],
    record: Annotated[sqlite3.Connection, Context()],
    logger: Logger,
) -> None:
    """Settle a payment, and keep its message until then."""
    while True:
        try:
            is_over = await settle(client, record, payment)
        except ClientClosedError:
            raise SkipMessage from None  # do neither: RabbitMQ delivers it again when this connection is closed
        except (ConfigurationError, ConflictError):
            raise  # the message is wrong, or has the id of another payment
        except (KeylessError, sqlite3.OperationalError) as error:
            logger.warning("%r is not decided yet: %s", payment.id, error)
            await asyncio.sleep(5)
        else:
            if not is_over:
                await broker.publish(payment, LATER, persist=True)
            return


@asynccontextmanager
async def lifespan(context: ContextRepo) -> AsyncGenerator[None]:
    """Make the client and the record, and close the client when the process is told to stop."""
    client = KeylessClient()
    with closing(sqlite3.connect(os.environ.get("PAYMENTS_DB", "payments.sqlite3"), isolation_level=None)) as record:
        record.execute("CREATE TABLE IF NOT EXISTS payments (id PRIMARY KEY, user_id, asked_at, state)")
        context.set_global("client", client)
        context.set_global("record", record)
        async with close_on_signals(client):
            await broker.connect()
            await broker.declare_queue(REFUSED)
            await broker.declare_queue(LATER)
            yield


app = FastStream(broker, lifespan=lifespan)

if __name__ == "__main__":
    asyncio.run(app.run())
