"""Payday: a thousand payments at once, all waited for on one client; prints how they end."""

import asyncio
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import nats
from worker import NATS_URL, Payment, make_app

from aiokeyless import KeylessClient

COUNT = 1000


async def main() -> None:
    """Ask for the payments and count the events."""
    async with KeylessClient() as client, make_app(client), await nats.connect(NATS_URL) as broker:
        events = await broker.subscribe("payments.*")
        began, by = time.monotonic(), datetime.now(UTC) + timedelta(seconds=30)
        for n in range(COUNT):
            payment = Payment(payment_id=str(uuid4()), user_id=f"{n:04X}", amount="40.00", payee="alice", approve_by=by)
            await broker.publish("payments.requested", payment.model_dump_json().encode())
        count = Counter([(await events.next_msg(timeout=60)).subject for _ in range(2 * COUNT)])
        seconds, looks = time.monotonic() - began, client.statistics.polls
    print(*(f"{subject}: {number}" for subject, number in count.items()), f"{seconds:.1f} s, {looks} looks", sep="\n")


if __name__ == "__main__":
    asyncio.run(main())
