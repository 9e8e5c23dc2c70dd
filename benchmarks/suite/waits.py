"""Memory of a sleeping wait, alone and among those of `wait_for_approvals`.

Each measurement has a process of its own. It starts a few waits to warm up, and cancels them. Then it starts all of
them. Each has its own operation id, is answered "pending" once, and sleeps. The growth of the resident memory is
divided by their number.
"""

from __future__ import annotations

import asyncio
import gc
import uuid
from typing import TYPE_CHECKING, Any, Final

from tenacity import wait_fixed

from aiokeyless import KeylessClient
from benchmarks.baselines import OURS
from benchmarks.bench import cancel
from benchmarks.process import resident
from benchmarks.programs import until
from benchmarks.report import Goal, Report, Table
from benchmarks.server import API_KEY, Server, serving

if TYPE_CHECKING:
    from aiokeyless import Operation
    from benchmarks.bench import Bench

_SLEEP: Final = 3000.0  # seconds: no wait wakes up during the measurement
_TIMEOUT: Final = 4000.0
_BATCH: Final = 64  # waits started at once, so that all sides use the same number of connections
_START_WITHIN: Final = 600.0

_SIDES: Final = {OURS: False, f"{OURS}, wait_for_approvals": True}  # whether waits are together


def run(bench: Bench) -> Report:
    """Measure each side once: many waits are an average already."""
    size = bench.pick(full=100_000, smoke=200)
    report = Report("waits: memory of a sleeping wait")
    report.tables.append(table := Table(f"{size} waits", ["", "resident, B"]))
    with serving() as server:
        for name in _SIDES:
            bench.progress(f"  {size} waits: {name}")
            report.raw[name] = bench.in_fresh_process(measure, server, name, size)
            table.rows.append([name, f"{report.raw[name]:.0f}"])
    report.goals.append(Goal(f"{size} waits", 1750, report.raw[OURS], " B"))
    return report


def measure(server: Server, name: str, size: int) -> float:
    """Return the bytes of one wait among ``size``."""
    return asyncio.run(_measure(server, size, is_together=_SIDES[name]))


async def _measure(server: Server, size: int, *, is_together: bool) -> float:
    """Wait for those that are started at once in one task, or in a task each."""
    held: list[object] = [None] * size  # allocated beforehand: the list that holds the tasks does not count

    async def together(operation_ids: list[str]) -> None:
        async for _ in client.wait_for_approvals(operation_ids, timeout=_TIMEOUT):
            pass

    def start(count: int) -> list[asyncio.Task[None]] | list[asyncio.Task[Operation]]:
        operation_ids = [str(uuid.uuid4()) for _ in range(count)]
        if is_together:
            return [asyncio.create_task(together(operation_ids))]
        return [asyncio.create_task(client.wait_for_approval(name, timeout=_TIMEOUT)) for name in operation_ids]

    def polled() -> int:
        return client.statistics.polls - client.statistics.in_flight

    async def until_polled(count: int) -> None:
        await until(lambda: polled() >= count, within=_START_WITHIN, every=0.0005)

    options: dict[str, Any] = {"schedule": wait_fixed(_SLEEP), "max_polls_per_second": None}
    async with KeylessClient(API_KEY, base_url=server.base_url, **options) as client:
        warm = start(_BATCH)
        await until_polled(_BATCH)
        await cancel(warm)
        del warm
        await asyncio.sleep(0.01)  # until the loop and the connections have released them
        answered, before = polled(), _memory()
        for k in range(0, size, _BATCH):
            count = min(_BATCH, size - k)
            for number, task in enumerate(start(count), k):
                held[number] = task
            await until_polled(answered + k + count)
        growth = (_memory() - before) / size
        await cancel(held)
    return growth


def _memory() -> int:
    gc.collect()
    return resident()
