"""Payday: a thousand payments at once; prints how they end, and how long all of it took."""

import asyncio
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import msgspec
import nats
from nats.js.api import DeliverPolicy
from payments import NATS_URL, Payment

COUNT = 1000


async def main() -> None:
    """Ask for the payments and count the verdicts."""
    async with await nats.connect(NATS_URL) as connection:
        stream = connection.jetstream()
        events = await stream.subscribe(
            "payments.*", stream="payments", ordered_consumer=True, deliver_policy=DeliverPolicy.NEW
        )
        began, now = time.monotonic(), datetime.now(UTC)
        for n in range(COUNT):
            payment = Payment(
                payment_id=str(uuid4()),
                user_id=f"{n:04X}",
                amount="40.00",
                payee="alice",
                requested_at=now,
                approve_by=now + timedelta(minutes=5),
            )
            await stream.publish("payments.requested", msgspec.json.encode(payment), stream="payments")
        count = Counter([(await events.next_msg(timeout=360)).subject for _ in range(2 * COUNT)])
        seconds = time.monotonic() - began
    print(*(f"{subject}: {number}" for subject, number in count.items()), f"{seconds:.1f} s", sep="\n")


if __name__ == "__main__":
    asyncio.run(main())
