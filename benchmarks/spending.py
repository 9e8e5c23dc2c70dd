"""CPU of a call: of this process alone, so that neither the server nor the neighbours of a shared machine count."""

from __future__ import annotations

import asyncio
import gc
import time
import uuid
from typing import TYPE_CHECKING

from .bench import order

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from .bench import Bench


async def spent(call: Callable[[str], Awaitable[object]], operation_ids: list[str], in_flight: int) -> float:
    """Make these calls, so many in flight, and return the seconds of CPU that one took on average."""
    todo = iter(operation_ids)

    async def worker() -> None:
        for operation_id in todo:
            await call(operation_id)

    gc.collect()
    before = time.process_time()
    async with asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(worker())
    return (time.process_time() - before) / len(operation_ids)


async def spent_in_turn(
    bench: Bench,
    calls: Mapping[str, Callable[[str], Awaitable[object]]],
    *,
    in_flight: int,
    rounds: int,
    count: int,
) -> dict[str, list[float]]:
    """Measure the calls in turn, round by round, after one round that only warms up."""
    operation_ids = [str(uuid.uuid4()) for _ in range(count)]
    for call in calls.values():
        await spent(call, operation_ids, in_flight)
    spendings: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(rounds):
        for name in order(list(calls), k):
            spendings[name].append(await spent(calls[name], operation_ids, in_flight))
        if (k + 1) % 20 == 0:
            bench.say(f"  {in_flight} in flight: round {k + 1} of {rounds}")
    return spendings
