"""Workers and applications that are killed with -9 at a statement of their own choice. Run by `test_crashes`.

For each line of its input, such as ``worker 7``, the program forks one, which is killed before its seventh statement,
and prints how it ended. What they import is imported once.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from typing import TYPE_CHECKING

import msgspec

from aiokeyless.worker.broker import Claim, ExchangeResult, NewRequest
from aiokeyless.worker.messages import EVENT_VERSION, REQUEST_VERSION, ApprovalEvent, ApprovalRequest, Message, Outcome
from aiokeyless.worker.sqlite import SqliteBroker, schema, store

if TYPE_CHECKING:
    import sqlite3


def kill_at(number: int) -> None:
    """Kill this process before its statement of that number."""
    statements = itertools.count(1)

    def traced(_statement: str) -> None:
        if next(statements) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def traced_connect(path: str, *, now: float) -> sqlite3.Connection:
        connection = schema.connect(path, now=now)
        connection.set_trace_callback(traced)
        return connection

    vars(store)["connect"] = traced_connect


def say(*facts: object) -> None:
    """Tell the test, before anything else happens."""
    os.write(1, (" ".join(map(str, facts)) + "\n").encode())


async def application(broker: SqliteBroker) -> None:
    for number in range(3):
        request = ApprovalRequest(version=REQUEST_VERSION, user_id="C0FFEE", operation_id=f"payment-{number}")
        new = NewRequest(request, msgspec.json.encode(request), f"digest-{number}", None)
        say("submitted", number, await broker.submit(new))
    try:
        async with asyncio.timeout(0.3):
            outcome = await broker.next_outcome("shop")
    except TimeoutError:
        return
    event = msgspec.json.decode(outcome.data, type=ApprovalEvent)
    say("handling", event.operation_id)
    await outcome.mark_handled()
    say("handled", event.operation_id)


async def worker(broker: SqliteBroker) -> None:
    await broker.prepare(lease=0.2, service="")
    for _ in range(6):
        for message in await broker.take(2, 0.25):
            await process(broker, message)
    say("done")


async def process(broker: SqliteBroker, message: Message) -> None:
    request = msgspec.json.decode(message.body, type=ApprovalRequest)
    assert request.operation_id is not None
    if not await broker.has_claim(message):
        if await broker.claim(message) is Claim.NEW:
            say("asked", request.operation_id)
        await broker.put_off(message, 0.0, ExchangeResult.ANSWERED)
        return
    event = ApprovalEvent(
        version=EVENT_VERSION,
        outcome=Outcome.APPROVED,
        operation_id=request.operation_id,
        requested_at=message.stored_at,
        decided_at=broker.now(),
        deliveries=message.number,
    )
    if await broker.decide(message, event):
        say("decided", request.operation_id)


async def main(role: str, path: str) -> None:
    async with SqliteBroker(path) as broker:
        await (application if role == "application" else worker)(broker)


if __name__ == "__main__":
    for line in sys.stdin:
        role, number = line.split()
        if not os.fork():
            kill_at(int(number))
            asyncio.run(main(role, sys.argv[1]))
            os._exit(0)
        say("ended", os.wait()[1])
