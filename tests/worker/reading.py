"""What tests of workers share: a delivery and an event made up, and how outcomes are read."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from tenacity import wait_fixed
from waiting import until

from aiokeyless.worker import ApprovalEvent, ApprovalWorker, Outcome, next_outcome, submit_approval
from aiokeyless.worker.messages import Message
from aiokeyless.worker.sqlite import SqliteBroker

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from aiokeyless import KeylessClient
    from aiokeyless.events import Listener
    from aiokeyless.sandbox import RequestRecord, Sandbox
    from aiokeyless.worker import Broker

#: JSON numbers that a context may have, and some that it may not.
MODERATE_NUMBERS = (
    *("0", "-0.0", "0e999", "0e-0000999", "12345678901234567890", "1.7999e308", "-1.7999e308", "1e-307"),
    *(f"0.{'0' * 306}1", "9" * 308, f"1.{'0' * 398}", f"1{'0' * 393}e-390"),
)
EXTREME_NUMBERS = (
    *("1.8e308", "-1.8e308", "1E+309", "1e131000", "1e200000", "0.99e-307", "-0.99e-307", "1e-16000", "0e-16000"),
    *("0e1000", f"1e{'9' * 20}", f"1.{'0' * 399}", f"-1.{'0' * 398}", f"{'2' * 309}e0", "1" * 16_384),
)


def a_message(body: bytes = b"", **changed: Any) -> Message:
    facts: dict[str, Any] = {"stored_at": datetime(2026, 11, 24, 12, tzinfo=UTC), "number": 1, "is_untried": True}
    return Message(body=body, **facts | changed)


def an_event(**changed: Any) -> ApprovalEvent:
    asked_at = datetime(2026, 1, 1, tzinfo=UTC)
    times = {"requested_at": asked_at, "decided_at": asked_at + timedelta(seconds=9)}
    return ApprovalEvent(**{"version": 1, "outcome": Outcome.APPROVED, "deliveries": 3, **times, **changed})


async def submit(broker: Broker, count: int = 1, **options: Any) -> None:
    """Submit txn-1, txn-2 and so on."""
    for number in range(1, count + 1):
        await submit_approval(broker, "C0FFEE", operation_id=f"txn-{number}", **options)


async def ask(sandbox: Sandbox, broker: Broker, count: int = 1, **options: Any) -> None:
    """Submit txn-1, txn-2 and so on, and wait until their users are asked."""
    await submit(broker, count, **options)
    await created(sandbox, count)


def now() -> float:
    return asyncio.get_running_loop().time()


def polls_of(sandbox: Sandbox, operation_id: str) -> list[RequestRecord]:
    return [record for record in sandbox.requests if record.method == "GET" and record.path.endswith(operation_id)]


def approve_all(sandbox: Sandbox) -> None:
    for operation_id in list(sandbox.operations):
        sandbox.approve(operation_id)


async def created(sandbox: Sandbox, count: int) -> None:
    """Wait until users were asked to approve so many operations."""
    await until(lambda: len(sandbox.operations) >= count)


async def read(broker: object, count: int = 1, reader: str = "test") -> list[ApprovalEvent]:
    """Read and handle so many outcomes."""
    events = []
    for _ in range(count):
        async with next_outcome(broker, reader) as event:
            events.append(event)
    return events


async def outcomes(broker: object, reader: str) -> AsyncGenerator[ApprovalEvent]:
    """Iterate over the outcomes, without end; each is handled when the next one is asked for."""
    while True:
        async with next_outcome(broker, reader) as event:
            yield event


@asynccontextmanager
async def working(
    sandbox: Sandbox,
    memory: SqliteBroker | None = None,
    *,
    listeners: Sequence[Listener] = (),
    name: str | None = None,
    **options: Any,
) -> AsyncGenerator[tuple[ApprovalWorker, SqliteBroker]]:
    """Run a worker that polls each second, on this broker or on one of its own in memory."""
    async with (
        sandbox.client(listeners=listeners, name=name) as client,
        SqliteBroker(":memory:") if memory is None else nullcontext(memory) as broker,
        ApprovalWorker(client, broker, **{"schedule": wait_fixed(1.0), **options}) as worker,
    ):
        yield worker, broker


def worker_on(client: KeylessClient, broker: Broker, **options: Any) -> ApprovalWorker:
    """Return a worker that opens its broker and closes it, as one with a URL does."""
    worker = ApprovalWorker(client, broker, **options)
    worker._is_owner = True
    return worker
