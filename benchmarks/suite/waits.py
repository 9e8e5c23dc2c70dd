"""Memory of a sleeping wait, alone and among those of `wait_for_approvals`.

Each measurement has a process of its own. It starts a few waits to warm up, and cancels them. Then it starts all of
them. Each has its own operation id, is answered "pending" once, and sleeps. The growth of the process is divided by
their number.
"""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
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
    from collections.abc import Callable

    from benchmarks.bench import Bench

_SLEEP: Final = 3000.0  # seconds: no wait wakes up during the measurement
_TIMEOUT: Final = 4000.0
_BATCH: Final = 64  # waits started at once, so that all sides use the same number of connections
_START_WITHIN: Final = 600.0
_FEW: Final = 1_000  # up to here allocations are counted, which is exact but slow; for more, the resident memory

_SIDES: Final = {OURS: False, f"{OURS}, wait_for_approvals": True}  # whether waits are together


def run(bench: Bench) -> Report:
    """Measure each side with 1 000 and with 100 000 waits, once: many waits are an average already."""
    report = Report("waits: memory of a sleeping wait")
    sizes = bench.pick(full=[1_000, 100_000], smoke=[200])
    with serving() as server:
        for size in sizes:
            bench.progress(f"  {size} waits")
            growths = {name: bench.in_fresh_process(measure, server, name, size) for name in _SIDES}
            report.tables.append(_table(size, growths))
            report.raw[str(size)] = growths
    report.goals.append(Goal(f"{sizes[-1]} waits", 1750, report.raw[str(sizes[-1])][OURS], " B"))
    return report


def _table(size: int, growths: dict[str, float]) -> Table:
    table = Table(f"{size} waits", ["", f"{'allocated' if size <= _FEW else 'resident'}, B", f"over {OURS}"])
    for name, growth in growths.items():
        table.rows.append([name, f"{growth:.0f}", f"{growth / growths[OURS]:.2f}"])
    return table


def measure(server: Server, name: str, size: int) -> float:
    """Return the bytes of one wait among ``size``."""
    gauge = _Gauge(size)
    asyncio.run(_measure(server, gauge, is_together=_SIDES[name]))
    return gauge.growth


class _Gauge:
    """Measures the memory of so many waits."""

    growth: float

    def __init__(self, size: int) -> None:
        self._size = size
        self._is_exact = size <= _FEW
        # Allocated beforehand: the list that holds the tasks does not count.
        self._held: list[object] = [None] * size

    async def measure(
        self, start: Callable[[list[str]], list[asyncio.Task[object]]], polled: Callable[[], int]
    ) -> None:
        """Start the waits, and measure.

        Args:
            start: Starts the waits for some operations, and returns tasks to keep.
            polled: Returns the number of answered polls, of all waits so far.
        """
        if self._is_exact:
            tracemalloc.start()  # before the warm-up: reusing memory that it freed is not growth
        warm = start(_ids(_BATCH))
        await self._until(polled, _BATCH)
        await cancel(warm)
        del warm
        await asyncio.sleep(0.01)  # until the loop and the connections have released them
        answered = polled()
        before = self._memory()
        for k in range(0, self._size, _BATCH):
            count = min(_BATCH, self._size - k)
            for number, task in enumerate(start(_ids(count)), k):
                self._held[number] = task
            await self._until(polled, answered + k + count)
        self.growth = (self._memory() - before) / self._size
        await cancel(self._held)

    async def _until(self, polled: Callable[[], int], count: int) -> None:
        await until(lambda: polled() >= count, within=_START_WITHIN, every=0.0005)

    def _memory(self) -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0] if self._is_exact else resident()


def _ids(count: int) -> list[str]:
    return [str(uuid.uuid4()) for _ in range(count)]


async def _measure(server: Server, gauge: _Gauge, *, is_together: bool) -> None:
    """Wait for those that are started at once in one task, or in a task each."""

    async def together(operation_ids: list[str]) -> None:
        async for _ in client.wait_for_approvals(operation_ids, timeout=_TIMEOUT):
            pass

    def start(operation_ids: list[str]) -> list[asyncio.Task[object]]:
        if is_together:
            return [asyncio.create_task(together(operation_ids))]
        return [asyncio.create_task(client.wait_for_approval(name, timeout=_TIMEOUT)) for name in operation_ids]

    options: dict[str, Any] = {"schedule": wait_fixed(_SLEEP), "max_polls_per_second": None}
    async with KeylessClient(API_KEY, base_url=server.base_url, **options) as client:
        await gauge.measure(start, lambda: client.statistics.polls - client.statistics.in_flight)
