"""Payments that a human must approve: `payments.requested` in, one verdict out. The waiting is a Keyless worker's.

Nothing about a payment is kept here, and no key of Keyless. An event is acknowledged only once what follows it is in a
stream: the request for an approval, or the verdict. So none is lost with this application, a worker or the broker.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Callable
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

from aiokeyless.worker import (
    ApprovalEvent,
    BrokerError,
    EventKeys,
    FailureReason,
    Outcome,
    is_outcome,
    submit_approval,
)

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
    payee: Annotated[str, Meta(pattern=r"\A[\w .,'-]{1,70}\Z")]
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
        return (event.operation_id, event.user_id, event.payload_sha256) == (
            f"payment-{self.payment_id}",
            self.user_id.upper(),
            sha256(self.text.encode()).hexdigest(),
        )


def make_app(nats_url: str = NATS_URL, *, retry: float = 5.0) -> FastStream:
    """Make the application; what the broker did not take is tried again after `retry` seconds."""

    def try_again(error: Exception, logger: Logger) -> None:
        logger.warning("an event will be tried again: %s", error)
        raise NackMessage(delay=retry) from error

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
            created_at=payment.requested_at,  # so that an event that is delivered again is the same request
        )

    keys = EventKeys.from_environment()  # those of the workers; None trusts every user of the broker

    async def from_the_stream(message: Msg, parse: Callable[[Msg], Awaitable[NatsMessage]]) -> NatsMessage:
        signature = (message.headers or {}).get("Keyless-Signature")
        is_signed = keys is None or keys.are_of(message.data, signature, fleet="keyless")
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
        once = {"Nats-Msg-Id": f"verdict-{payment.digest}"}  # whatever the verdict: the first one counts
        await broker.publish(payment, f"payments.{verdict(event)}", stream=payments.name, headers=once, timeout=10.0)

    return FastStream(broker)


def verdict(event: ApprovalEvent) -> str:
    """Say no more than the worker knows: approved, expired, refused, or unclear."""
    never_answered = event.outcome is Outcome.EXPIRED and not event.answered
    if never_answered or event.reason in UNCLEAR:
        return "unclear"  # perhaps the user did approve, now or before
    return "refused" if event.outcome is Outcome.FAILED else event.outcome


if __name__ == "__main__":
    try:
        asyncio.run(make_app().run())
    except nats.js.errors.NotFoundError:
        sys.exit("there is no stream KEYLESS_OUTCOMES: start a worker first, it makes it")
