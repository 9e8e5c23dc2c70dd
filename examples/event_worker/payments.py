"""Payments that a human must approve: `payments.requested` in, one verdict out. The waiting is a Keyless worker's.

No key of Keyless is kept here, and of a payment only its verdict, so that an approval pays once. An event is
acknowledged only once what follows it is in a stream: the request for an approval, or the verdict. So none is lost with
this application, a worker or the broker.
"""

import asyncio
import logging
import os
import sqlite3
import sys
from collections.abc import Awaitable, Callable
from contextlib import closing
from datetime import datetime
from hashlib import sha256
from typing import Annotated

import msgspec
import nats.errors
import nats.js.errors
from fast_depends.msgspec import MsgSpecSerializer
from faststream import ExceptionMiddleware, FastStream, Logger
from faststream.exceptions import NackMessage, SkipMessage
from faststream.nats import JStream, NatsBroker
from faststream.nats.annotations import Client, NatsMessage
from msgspec import Meta
from nats.aio.msg import Msg

from aiokeyless.worker import ApprovalEvent, BrokerError, FailureReason, Outcome, submit_approval
from aiokeyless.worker.nats import EventKeys, is_outcome

NATS_URL = os.environ.get("NATS_URL", "nats://127.0.0.1:4222")

READER = "payments"  # this application's place in the streams that it reads
UNCLEAR = {
    FailureReason.ALREADY_APPROVED,
    FailureReason.INTERNAL,
    FailureReason.POLL_REFUSED,
    FailureReason.UNREADABLE,
}


class Payment(msgspec.Struct, frozen=True):
    """The body of all `payments.*`; a request that does not fit is refused before anybody is asked."""

    payment_id: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_-]{1,64}\Z")]
    user_id: Annotated[str, Meta(pattern=r"\A[0-9A-Fa-f]{1,128}\Z")]
    amount: Annotated[str, Meta(pattern=r"\A[0-9]{1,9}\.[0-9]{2}\Z")]
    payee: Annotated[str, Meta(pattern=r"\A[A-Za-z][A-Za-z .'-]{0,39}\Z")]  # a phone shows each of these letters
    requested_at: Annotated[datetime, Meta(tz=True)]
    approve_by: Annotated[datetime, Meta(tz=True)]

    @property
    def text(self) -> str:
        """What the user is asked to approve."""
        return f"Pay {self.amount} to {self.payee}"

    @property
    def digest(self) -> str:
        """Its name in the streams, of all that is in it: another payment under the same id has another."""
        return sha256(msgspec.json.encode(self)).hexdigest()

    def is_asked_by(self, event: ApprovalEvent) -> bool:
        """Return whether the outcome is that of exactly this payment: others can submit it as a context, too."""
        if event.outcome is Outcome.APPROVED and event.auth_type != "biom":
            return False  # a request that asked for no face
        return (event.operation_id, event.user_id, event.payload_sha256) == (
            f"payment-{self.payment_id}",
            self.user_id.upper(),
            sha256(self.text.encode()).hexdigest(),
        )


class Record:
    """The verdict on each payment, on disk: the first one counts, and only the one that stored an approval pays.

    The stream drops a second verdict too, but forgets the first after a day, or with the broker's disk.
    """

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database  # in autocommit
        database.execute("CREATE TABLE IF NOT EXISTS verdicts (payment TEXT PRIMARY KEY, id TEXT, verdict TEXT)")
        database.execute("CREATE UNIQUE INDEX IF NOT EXISTS paid ON verdicts (id) WHERE verdict = 'approved'")

    def settle(self, payment: Payment, verdict: str) -> tuple[str, bool]:
        """Store the verdict on a payment, unless there is one; return the one that counts, and whether it is new."""
        query = "INSERT OR IGNORE INTO verdicts VALUES (?, ?, ?)"
        is_new = self._database.execute(query, (payment.digest, payment.payment_id, verdict)).rowcount == 1
        query = "SELECT verdict FROM verdicts WHERE payment = ?"
        found = self._database.execute(query, (payment.digest,)).fetchone()
        return (found[0] if found else "refused"), is_new  # refused: another payment under its id is paid


def order(payment: Payment) -> None:
    """Stand in for what a bank would do: the payment's digest is its idempotency key, to repeat it after a crash."""
    logging.getLogger("payments").info("%s: %s", payment.text, payment.digest)


def make_app(
    database: sqlite3.Connection,
    nats_url: str = NATS_URL,
    *,
    retry: float = 5.0,
    pay: Callable[[Payment], object] = order,
) -> FastStream:
    """Make the application.

    Args:
        database: Where the record of the verdicts is kept.
        nats_url: The broker.
        retry: Seconds after which is tried again what the broker did not take.
        pay: Moves the money; called once for an approved payment.
    """

    def try_again(error: Exception, logger: Logger) -> None:
        logger.warning("an event will be tried again: %s", error)
        raise NackMessage(delay=retry) from error

    record = Record(database)
    broker = NatsBroker(
        nats_url,
        max_reconnect_attempts=-1,  # a broker that is away is waited for
        serializer=MsgSpecSerializer(),
        middlewares=[ExceptionMiddleware({BrokerError: try_again, nats.errors.Error: try_again})],
        log_level=logging.DEBUG,
    )
    payments = JStream("payments", subjects=["payments.*"], duplicate_window=24 * 3600.0)
    outcomes = JStream("KEYLESS_OUTCOMES", declare=False)  # the worker makes it

    @broker.subscriber("payments.requested", stream=payments, durable=READER, pull_sub=True)
    async def ask(payment: Payment, connection: Client) -> None:
        time_to_approve = (payment.approve_by - payment.requested_at).total_seconds()
        await submit_approval(
            connection,
            payment.user_id,
            operation_id=f"payment-{payment.payment_id}",
            operation_payload=payment.text,
            expires_in=max(time_to_approve, 1e-6),  # too late: nobody is asked
            context=payment,
            require_auth_type="biom",
            created_at=payment.requested_at,  # so that an event that is delivered again is the same request
        )

    keys = EventKeys.from_environment()  # those of the workers; None trusts every user of the broker

    async def from_the_stream(message: Msg, parse: Callable[[Msg], Awaitable[NatsMessage]]) -> NatsMessage:
        signature = (message.headers or {}).get("Keyless-Signature")
        is_signed = keys is None or keys.verify(message.data, signature, fleet="keyless")
        if not is_outcome(message.reply, READER) or not is_signed:
            raise SkipMessage  # published by another user: neither believed nor acknowledged
        return await parse(message)

    @broker.subscriber("keyless.approvals.*", stream=outcomes, durable=READER, pull_sub=True, parser=from_the_stream)
    async def decide(message: NatsMessage) -> None:
        event = msgspec.json.decode(message.body, type=ApprovalEvent)
        if message.raw_message.subject != f"keyless.approvals.{event.outcome}":
            return  # permission for one subject is none for another
        try:
            payment = event.read_context(Payment)
        except msgspec.ValidationError:
            return  # another application's: the stream is everybody's
        if event.operation_id is not None and not payment.is_asked_by(event):
            return
        what, is_new = record.settle(payment, verdict(event))
        if is_new and what == "approved":
            pay(payment)
        once = {"Nats-Msg-Id": f"verdict-{payment.digest}"}  # an event that is delivered again publishes no second one
        await broker.publish(payment, f"payments.{what}", stream=payments.name, headers=once, timeout=10.0)

    return FastStream(broker)


def verdict(event: ApprovalEvent) -> str:
    """Say no more than the worker knows: approved, expired, refused, or unclear."""
    perhaps_asked = event.outcome is Outcome.EXPIRED and event.asked is not False
    if (perhaps_asked and not event.answered) or event.reason in UNCLEAR:
        return "unclear"  # perhaps the user did approve, now or before
    return "refused" if event.outcome is Outcome.FAILED else event.outcome


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    try:
        with closing(sqlite3.connect(os.environ.get("PAYMENTS_DB", "payments.sqlite3"), isolation_level=None)) as file:
            asyncio.run(make_app(file).run())
    except nats.js.errors.NotFoundError:
        sys.exit("there is no stream KEYLESS_OUTCOMES: start a worker first, it makes it")
