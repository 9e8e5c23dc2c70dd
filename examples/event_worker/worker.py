"""Payments that a human must approve: `payments.requested` in, `payments.approved` or `payments.expired` out.

An event is acknowledged only once its verdict is in the stream, so none is lost with the worker, the broker or Keyless.
An event that comes again is the same operation, whose id is derived from the payment's. And a payment has one verdict.
"""

import asyncio
import logging
import os
from datetime import UTC, datetime
from hashlib import sha256
from typing import Annotated

import nats.errors
from faststream import FastStream
from faststream.exceptions import NackMessage, RejectMessage
from faststream.nats import JStream, NatsBroker, PullSub
from faststream.nats.annotations import NatsMessage
from nats.js.api import ConsumerConfig
from pydantic import AwareDatetime, BaseModel, StringConstraints

import aiokeyless

NATS_URL = os.environ.get("NATS_URL", "nats://127.0.0.1:4222")
MAX_WAITS = 10_000  # a wait is an unacknowledged message, of which a consumer may have 1000 unless told otherwise

_LOGGER = logging.getLogger(__name__)


class Payment(BaseModel):
    """The event `payments.requested`; one that does not fit is refused before anybody is asked."""

    payment_id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    user_id: Annotated[str, StringConstraints(pattern=r"^[0-9A-Fa-f]{1,128}$")]
    amount: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}\.[0-9]{2}$")]
    payee: Annotated[str, StringConstraints(pattern=r"^[\w .,'-]{1,70}$")]
    approve_by: AwareDatetime


class Verdict(BaseModel):
    """The events `payments.approved` and `payments.expired`."""

    payment_id: str


def make_app(client: aiokeyless.KeylessClient, nats_url: str = NATS_URL, *, retry: float = 5.0) -> FastStream:
    """Make the worker; what failed is tried again after `retry` seconds."""
    broker = NatsBroker(nats_url, logger=_LOGGER, log_level=logging.DEBUG)
    stream = JStream("payments", duplicate_window=24 * 3600.0)  # it drops a second verdict for a day
    approved = broker.publisher("payments.approved", stream=stream, timeout=10.0)
    expired = broker.publisher("payments.expired", stream=stream, timeout=10.0)
    asking = asyncio.Semaphore(64)  # creations at once: a burst of events must not be a burst of connections

    @broker.subscriber(
        "payments.requested",
        stream=stream,
        durable="approvals",
        pull_sub=PullSub(),
        config=ConsumerConfig(ack_wait=60.0, max_ack_pending=MAX_WAITS),
        max_workers=MAX_WAITS,
        no_reply=True,
    )
    async def decide(payment: Payment, message: NatsMessage) -> None:
        try:
            verdict = approved if await is_approved(client, asking, payment, message) else expired
            once = {"Nats-Msg-Id": f"verdict-{payment.payment_id}"}  # of either kind: the first one counts
            await verdict.publish(Verdict(payment_id=payment.payment_id), headers=once)
        except (aiokeyless.OperationMismatchError, aiokeyless.InconsistentOperationError) as error:
            _LOGGER.error("payment %s has no verdict, look into it: %s", payment.payment_id, error)  # noqa: TRY400
            raise RejectMessage from error
        except (aiokeyless.KeylessError, nats.errors.Error) as error:  # the end of this worker, too
            _LOGGER.warning("payment %s will be tried again: %s", payment.payment_id, error)
            raise NackMessage(delay=getattr(error, "retry_after", None) or retry) from error

    # Before the broker stops: the waits end now, and their events go back to the stream.
    return FastStream(broker, logger=_LOGGER, on_shutdown=[client.aclose])


async def is_approved(
    client: aiokeyless.KeylessClient, asking: asyncio.Semaphore, payment: Payment, message: NatsMessage
) -> bool:
    """Ask the user, unless that was done or it is too late, and wait."""
    payload = f"Pay {payment.amount} to {payment.payee}"
    ticket = aiokeyless.ApprovalTicket(
        operation_id=f"payment-{payment.payment_id}",
        user_id=payment.user_id.upper(),
        payload_sha256=sha256(payload.encode()).hexdigest(),
        created_at=datetime.now(UTC),
        expires_at=payment.approve_by,  # the event's own: a redelivery prolongs nothing and revives nothing
    )
    try:
        if time_left := ticket.remaining():
            async with asking:
                ticket = await client.create_operation(
                    payment.user_id, operation_id=ticket.operation_id, operation_payload=payload, expires_in=time_left
                )
    except aiokeyless.ConflictError:
        pass  # asked before; whether it was this payment of this user, the wait sees by the ticket
    try:
        # Each poll is a sign of life to the broker. An expired ticket gets one look: what became of it?
        await client.wait_for_approval(ticket, on_poll=lambda _: message.in_progress())
    except aiokeyless.ApprovalUnknownError:
        raise  # Keyless does not answer: no verdict before it does
    except aiokeyless.ApprovalTimeoutError:
        return False
    return True


async def main() -> None:
    """Run until SIGINT or SIGTERM."""
    logging.basicConfig(level=logging.INFO)
    async with aiokeyless.KeylessClient() as client:
        await make_app(client).run()


if __name__ == "__main__":
    asyncio.run(main())
