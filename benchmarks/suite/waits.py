"""Memory of a sleeping wait, alone and among those of `wait_for_approvals`; what a client for each wait costs.

Each measurement has a process of its own. It starts a few waits to warm up, and cancels them. Then it starts all of
them. Each has its own operation id, is answered "pending" once, and sleeps. The growth of the resident memory is
divided by their number.

A client for each wait, as an application with many tenants has it, is compared with a session of aiohttp for each and
with one client for all. Each operation is polled once a second. CPU is that of ten seconds.
"""

from __future__ import annotations

import asyncio
import gc
import time
import uuid
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tenacity import wait_fixed

from aiokeyless import KeylessClient
from benchmarks.baselines import BARE, OURS, BareClient, bare_session
from benchmarks.bench import cancel
from benchmarks.process import resident
from benchmarks.programs import until
from benchmarks.report import Goal, Report, Table
from benchmarks.server import API_KEY, Server, serving

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from aiokeyless import Operation
    from benchmarks.bench import Bench

_SLEEP: Final = 3000.0  # seconds: no wait wakes up during the measurement
_TIMEOUT: Final = 4000.0
_BATCH: Final = 64  # waits started at once, so that all sides use the same number of connections
_START_WITHIN: Final = 600.0

_POLLED_EVERY: Final = 1.0
_WARM_FOR: Final = 3.0
_ONE: Final = f"{OURS}, one client"

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
        clients = bench.pick(full=500, smoke=5)
        title, seconds = f"{clients} clients with one wait each", bench.pick(full=10.0, smoke=0.2)
        report.tables.append(table := Table(title, ["", "resident, MB", "CPU, s"]))
        for name in (OURS, BARE, _ONE):
            bench.progress(f"  {clients} clients: {name}")
            cost = bench.in_fresh_process(measure_clients, server, name, clients, seconds)
            report.raw[f"clients: {name}"] = cost._asdict()
            table.rows.append([name, f"{cost.memory / 1e6:.1f}", f"{cost.cpu:.2f}"])
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


class Cost(NamedTuple):
    """What the clients of a process cost."""

    memory: int  # bytes
    cpu: float  # seconds


def measure_clients(server: Server, side: str, count: int, seconds: float) -> Cost:
    """Return what so many clients cost while each of their operations is polled for so many seconds."""
    return asyncio.run(_measure_clients(server, side, count, seconds))


async def _measure_clients(server: Server, side: str, count: int, seconds: float) -> Cost:
    async def poll(client: BareClient, name: str) -> None:
        while True:
            await client.get_operation(name)
            await asyncio.sleep(_POLLED_EVERY)

    async with AsyncExitStack() as stack:

        async def client() -> KeylessClient:
            made = KeylessClient(API_KEY, base_url=server.base_url, schedule=wait_fixed(_POLLED_EVERY))
            return await stack.enter_async_context(made)

        shared, before = await client(), _memory()
        tasks: list[asyncio.Task[Any]] = []
        for _ in range(count):
            name = str(uuid.uuid4())
            wait: Coroutine[Any, Any, Any]
            if side == BARE:
                wait = poll(BareClient(await stack.enter_async_context(bare_session()), server), name)
            else:
                ours = shared if side == _ONE else await client()
                wait = ours.wait_for_approval(name, timeout=_TIMEOUT)
            tasks.append(asyncio.create_task(wait))
        await asyncio.sleep(min(_WARM_FOR, seconds))
        began = time.process_time()
        await asyncio.sleep(seconds)
        cost = Cost(_memory() - before, time.process_time() - began)
        await cancel(tasks)
    return cost


def _memory() -> int:
    gc.collect()
    return resident()
