"""Many tenants in one process: what a client for each costs, and small ones beside one that has many waits.

Each measurement has a process of its own. For the first table, each client has one wait, which is polled once a
second. The shared session has no limits and no cookies. CPU is that of ten seconds.

For the second one, each of the small tenants asks once. Its operation is approved after 5 to 25 seconds. Late is from
then until its wait has ended. The large tenant's waits are never approved.
"""

from __future__ import annotations

import asyncio
import gc
import time
import uuid
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import psutil  # type: ignore[import-untyped]  # it has no type hints
from tenacity import wait_fixed

from aiokeyless import KeylessClient
from benchmarks.approval_times import seeded_random
from benchmarks.baselines import BARE, OURS, BareClient, bare_session
from benchmarks.bench import cancel
from benchmarks.process import resident
from benchmarks.programs import until
from benchmarks.report import Goal, Report, Spread, Table, p95
from benchmarks.server import API_KEY, USER_ID, Server, allow_many_sockets, approved_after, serving

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from benchmarks.bench import Bench

_TIMEOUT: Final = 4000.0
_POLLED_EVERY: Final = 1.0
_WARM_FOR: Final = 3.0
_SHARED: Final = f"{OURS}, one session"
_ONE: Final = f"{OURS}, one client"
_SIDES: Final = (OURS, _SHARED, _ONE, BARE)
_START_WITHIN: Final = 600.0
_AT_MOST: Final = 1.3  # times as late as alone


class Cost(NamedTuple):
    """What the clients of a process cost: bytes, sockets, and seconds, of which `cpu` are of the processor."""

    memory: int
    sockets: int
    start: float
    stop: float
    cpu: float


def run(bench: Bench) -> Report:
    """Measure the cost of each side, and the small tenants alone and beside the large one, in turn."""
    count = bench.pick(full=500, smoke=5)
    seconds = bench.pick(full=10.0, smoke=0.2)
    large, ages = bench.pick(full=(10_000, (5.0, 25.0)), smoke=(50, (0.1, 0.5)))
    report = Report(f"tenants: {count} in one process")
    with serving() as server:
        columns = ["", "resident, MB", "sockets", "start, s", "stop, s", "CPU, s"]
        report.tables.append(table := Table("a client for each, with one wait", columns))
        for name in _SIDES:
            bench.progress(f"  {count} clients: {name}")
            cost = bench.in_fresh_process(measure_clients, server, name, count, seconds)
            report.raw[name] = cost._asdict()
            figures = f"{cost.memory / 1e6:.1f}", f"{cost.sockets}", f"{cost.start:.2f}", f"{cost.stop:.2f}"
            table.rows.append([name, *figures, f"{cost.cpu:.2f}"])
        late: dict[str, list[float]] = {"alone": [], f"beside one with {large} waits": []}
        for turn in range(bench.pick(full=3, smoke=1)):
            for name, waits in zip(late, (0, large), strict=True):
                bench.progress(f"  {count - 1} small ones {name}, round {turn + 1}")
                late[name].append(p95(bench.in_fresh_process(measure_small, server, count - 1, waits, ages, turn)))
    alone, beside = late.values()
    report.raw["late, p95"] = late
    report.tables.append(table := Table(f"{count - 1} small tenants", ["", "late, p95 s"]))
    table.rows.extend([name, Spread.of(seen).text(2)] for name, seen in late.items())
    ratio = Spread.of([two / one for one, two in zip(alone, beside, strict=True)]).median
    report.goals.append(Goal("small tenants beside a large one: late, p95", _AT_MOST, ratio, "x"))
    return report


def measure_clients(server: Server, side: str, count: int, seconds: float) -> Cost:
    """Return what so many clients cost while each of their operations is polled for so many seconds."""
    allow_many_sockets()
    return asyncio.run(_measure_clients(server, side, count, seconds))


async def _measure_clients(server: Server, side: str, count: int, seconds: float) -> Cost:
    async def poll(client: BareClient, name: str) -> None:
        while True:
            await client.get_operation(name)
            await asyncio.sleep(_POLLED_EVERY)

    async with AsyncExitStack() as first, AsyncExitStack() as stack:

        async def client(**options: Any) -> KeylessClient:
            made = KeylessClient(API_KEY, base_url=server.base_url, schedule=wait_fixed(_POLLED_EVERY), **options)
            return await stack.enter_async_context(made)

        session = await first.enter_async_context(bare_session()) if side == _SHARED else None
        shared, memory, sockets = await client(session=session), _memory(), _sockets()
        tasks: list[asyncio.Task[Any]] = []
        began = time.perf_counter()
        for _ in range(count):
            name = str(uuid.uuid4())
            wait: Coroutine[Any, Any, Any]
            if side == BARE:
                wait = poll(BareClient(await stack.enter_async_context(bare_session()), server), name)
            else:
                ours = shared if side == _ONE else await client(session=session)
                wait = ours.wait_for_approval(name, timeout=_TIMEOUT)
            tasks.append(asyncio.create_task(wait))
        start = time.perf_counter() - began
        await asyncio.sleep(min(_WARM_FOR, seconds))
        cpu = time.process_time()
        await asyncio.sleep(seconds)
        cpu = time.process_time() - cpu
        memory, sockets = _memory() - memory, _sockets() - sockets
        began = time.perf_counter()
        if side == BARE:
            await cancel(tasks)
        await stack.aclose()
        await asyncio.gather(*tasks, return_exceptions=True)
        return Cost(memory, sockets, start, time.perf_counter() - began, cpu)


def measure_small(server: Server, count: int, large: int, ages: tuple[float, float], seed: int) -> list[float]:
    """Return how late the waits of so many tenants end, beside one with `large` waits."""
    allow_many_sockets()
    return asyncio.run(_measure_small(server, count, large, ages, seed))


async def _measure_small(server: Server, count: int, large: int, ages: tuple[float, float], seed: int) -> list[float]:
    source, ended = seeded_random(seed), dict[str, float]()

    async def ask(client: KeylessClient) -> None:
        await asyncio.sleep(source.uniform(0.0, 1.0))
        name = approved_after(source.uniform(*ages))
        await client.create_operation(USER_ID, operation_id=name)
        await client.wait_for_approval(name)
        ended[name] = time.perf_counter()

    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(KeylessClient(API_KEY, base_url=server.base_url)) for _ in range(count + 1)
        ]
        many = [
            asyncio.create_task(clients[0].wait_for_approval(str(uuid.uuid4()), timeout=_TIMEOUT)) for _ in range(large)
        ]
        await until(lambda: clients[0].statistics.polls >= large, within=_START_WITHIN)
        await asyncio.gather(*map(ask, clients[1:]))
        await cancel(many)
    due = server.approvals()
    return [at - due[name] for name, at in ended.items()]


def _memory() -> int:
    gc.collect()
    return resident()


def _sockets() -> int:
    return len(psutil.Process().net_connections("tcp"))
