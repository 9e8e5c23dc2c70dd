"""The three brokers side by side: polls, bursts, and many waiting requests.

Each broker's server, the worker and the service are processes of their own, on the same cores. CPU is measured for
each process, so that it hardly depends on how many share a core; polls per second are those of this machine.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import asyncpg
from tenacity import wait_chain, wait_fixed

from aiokeyless.worker import Outcome, next_outcome
from aiokeyless.worker.broker import ExchangeResult
from benchmarks.approval_times import seeded_random
from benchmarks.bench import cancel
from benchmarks.report import CannotMeasureError, Goal, Report, Table, p95
from benchmarks.server import Server, Workload, approved_after, serving
from benchmarks.storages import STORAGES, PostgresStorage, Storage, resident, total
from benchmarks.worker import Worker, new_request, submit, submit_to, working

if TYPE_CHECKING:
    from aiokeyless.worker import Broker
    from benchmarks.bench import Bench

    Row = dict[str, Any]

_READERS: Final = 8  # outcomes that the application handles at once
_LOST_AFTER: Final = 120.0  # seconds after which an unnoticed approval counts as lost
_BATCH: Final = 500  # requests that are taken together
_TOGETHER: Final = 10_000  # requests that are submitted in one transaction
_LEASE: Final = 60.0  # seconds
_TAKES: Final = 50  # calls of `take`
_TAKEN: Final = 64  # requests of each
_PUT_OFF: Final = 190.0  # seconds: nearly as long as a broker puts off


class Sizes(NamedTuple):
    """How much is measured."""

    polled: int
    interval: float
    first: float
    rounds: int
    seconds: float
    bursts: tuple[int, ...]
    ages: tuple[float, float]
    waiting: int


def run(bench: Bench) -> Report:
    """Measure each broker."""
    sizes = bench.pick(
        full=Sizes(4000, 0.2, 3.0, 2, 4.0, (1000, 10_000), (5.0, 15.0), 100_000),
        smoke=Sizes(50, 0.02, 0.2, 1, 0.2, (20,), (0.1, 0.5), 100),
    )
    raw: dict[str, Any] = {}
    with serving() as server:
        for storage in STORAGES:
            raw[storage.name] = asyncio.run(_measure(bench, server, storage, sizes))
    return _report(raw)


async def _measure(bench: Bench, server: Server, storage: type[Storage], sizes: Sizes) -> dict[str, Any]:
    bench.progress(f"  {storage.name}: polls")
    windows = await _polls(server, storage, sizes)
    bursts = []
    for size in sizes.bursts:
        bench.progress(f"  {storage.name}: a burst of {size}")
        bursts.append(await _burst(server, storage, size, sizes.ages))
    bench.progress(f"  {storage.name}: {sizes.waiting} waiting")
    waiting = await _waiting(storage, sizes.waiting)
    return {"windows": windows, "bursts": bursts, "waiting": waiting}


# -- polls


async def _polls(server: Server, storage: type[Storage], sizes: Sizes) -> list[Row]:
    schedule = wait_chain(wait_fixed(sizes.first), wait_fixed(sizes.interval))
    async with working(server, storage, schedule=schedule, max_polls_per_second=None) as worker:
        requests = server.statistics().requests
        await worker.submit(sizes.polled)
        await worker.until(lambda now: now.requests - requests > sizes.polled)
        await asyncio.sleep(sizes.seconds / 4)
        return [await _window(worker, sizes.seconds) for _ in range(sizes.rounds)]


async def _window(worker: Worker, seconds: float) -> Row:
    logged = worker.logged()
    with Workload(worker.server) as service:
        before = worker.cpu()
        await asyncio.sleep(seconds)
        after = worker.cpu()
    logged = worker.logged() - logged
    polls = service.requests
    if not polls:
        raise CannotMeasureError("the worker made no poll: other programs took the machine")
    service.check()
    of_worker, of_broker = (b - a for a, b in zip(before, after, strict=True))
    return {
        "polls": polls / service.wall,
        "worker": of_worker / polls,
        "broker": of_broker / polls,
        "service": service.cpu / polls,
        "logged": logged / polls,
    }


# -- bursts


async def _burst(server: Server, storage: type[Storage], size: int, ages: tuple[float, float]) -> Row:
    source = seeded_random(size)
    operation_ids = [approved_after(source.uniform(*ages)) for _ in range(size)]
    told: dict[str, float] = {}  # when, by operation
    all_told = asyncio.Event()
    async with working(server, storage) as worker:
        created, began = server.statistics().created, time.perf_counter()

        async def until_all_are_asked() -> float:
            await worker.until_created(created + size)
            return time.perf_counter() - began

        async def read() -> None:
            while True:
                async with next_outcome(worker.broker, "benchmark") as event:
                    if event.outcome is Outcome.APPROVED and event.operation_id is not None:
                        told[event.operation_id] = time.perf_counter()
                if len(told) == size:
                    all_told.set()

        asking = asyncio.create_task(until_all_are_asked())
        reading = [asyncio.create_task(read()) for _ in range(_READERS)]
        await asyncio.gather(*(submit(worker.broker, operation_id) for operation_id in operation_ids))
        submitted = time.perf_counter() - began
        with suppress(TimeoutError):  # approvals not told by then are lost
            await asyncio.wait_for(all_told.wait(), ages[1] + _LOST_AFTER)
        await cancel(reading)
        asked = await asking
    due = server.approvals()
    late = [at - due[operation_id] for operation_id, at in told.items()]
    if len(late) < 2:
        raise CannotMeasureError(f"{len(late)} of {size} approvals were noticed")
    return {"size": size, "submitted": submitted, "asked": asked, "late": late, "lost": size - len(late)}


# -- waiting requests


async def _waiting(storage: type[Storage], count: int) -> Row:
    async with storage() as stored:
        async with stored.broker() as broker:
            await broker.prepare(lease=_LEASE, service="")
            await _fill(stored, broker, count)
            put_off = 0
            while put_off < count:
                messages = await broker.take(_BATCH, 5.0)
                await asyncio.gather(
                    *(broker.put_off(message, _PUT_OFF, ExchangeResult.ANSWERED) for message in messages)
                )
                put_off += len(messages)
            delivered = [await _delivered(broker) for _ in range(20)]
            take = await _take(stored, broker)
            memory = total(stored.processes(), resident)
        on_disk = stored.on_disk()
    return {"waiting": count, "delivered": delivered, "take": take, "memory": memory, "on_disk": on_disk}


async def _fill(stored: Storage, broker: Broker, count: int) -> None:
    """Submit many requests; where `submit` is a function, in few transactions, since each waits for the disk."""
    if not isinstance(stored, PostgresStorage):
        await submit_to(broker, count)
        return
    connection = await asyncpg.connect(stored.url)
    for start in range(0, count, _TOGETHER):
        requests = [new_request() for _ in range(min(_TOGETHER, count - start))]
        await connection.execute("SELECT keyless.submit(request) FROM unnest($1::text[]) request", requests)
    await connection.close()


async def _delivered(broker: Broker) -> float:
    """Submit one more request; return the seconds until something is delivered."""
    began = time.perf_counter()
    await submit_to(broker, 1)
    while not (messages := await broker.take(1, 5.0)):
        if time.perf_counter() - began > _LOST_AFTER:
            raise CannotMeasureError("nothing was delivered")
    seconds = time.perf_counter() - began
    await broker.put_off(messages[0], _PUT_OFF, ExchangeResult.ANSWERED)
    return seconds


async def _take(stored: Storage, broker: Broker) -> list[float]:
    """Return the seconds of each of some calls of `take`, as a worker calls it, where that is a function."""
    if not isinstance(stored, PostgresStorage):
        return []
    await _fill(stored, broker, _TAKES * _TAKEN)
    connection = await asyncpg.connect(stored.url)
    seconds = []
    for _ in range(_TAKES):
        began = time.perf_counter()
        taken = await connection.fetch("SELECT * FROM keyless.take($1, $2, NULL, NULL, 1)", _TAKEN, _LEASE)
        seconds.append(time.perf_counter() - began)
        if len(taken) != _TAKEN:
            raise CannotMeasureError(f"{len(taken)} requests were due, and not {_TAKEN}")
    await connection.close()
    return seconds


# -- the report


def _report(raw: dict[str, Any]) -> Report:
    report = Report("distributed: workers on three brokers", raw=raw)
    report.tables += [_polls_table(raw), _bursts_table(raw), _waiting_table(raw)]
    for name, of in raw.items():
        report.goals.append(
            Goal(f"{name}: approvals lost", 0, sum(burst["lost"] for burst in of["bursts"]), required=True)
        )
        first = of["bursts"][0]
        report.goals.append(Goal(f"{name}: seconds until a burst of {first['size']} is asked", 3, first["asked"]))
    postgres = raw[PostgresStorage.name]
    polls = _median(postgres["windows"], "polls")
    report.goals.append(Goal("PostgreSQL: 1000 polls/s, over those of one worker", 1, 1000 / polls))
    take = 1e3 * statistics.median(postgres["waiting"]["take"])
    report.goals.append(Goal(f"PostgreSQL: take with {postgres['waiting']['waiting']} waiting", 5, take, " ms"))
    report.notes += [
        "SQLite has no server: what it takes is in the worker's CPU, and what is logged is all that it writes",
        "what is logged: PostgreSQL, WAL, which is not on the disk as counted; NATS, pages written",
    ]
    return report


def _median(windows: list[dict[str, float]], what: str) -> float:
    return statistics.median(window[what] for window in windows)


def _polls_table(raw: dict[str, Any]) -> Table:
    columns = ["broker", "polls/s", "CPU per poll, us: worker", "server", "service", "logged per poll, B"]
    table = Table("polls: more due than can be sent", columns)
    for name, of in raw.items():
        windows = of["windows"]
        figures = (_median(windows, "polls"), *(1e6 * _median(windows, who) for who in ("worker", "broker", "service")))
        table.rows.append([name, *(f"{each:.0f}" for each in (*figures, _median(windows, "logged")))])
    return table


def _bursts_table(raw: dict[str, Any]) -> Table:
    columns = ["broker", "requests", "all stored, s", "all asked, s", "noticed late, s", "p95, s", "lost"]
    table = Table("bursts: requests at once, to one idle worker of 1000 polls/s, with eight readers", columns)
    for name, of in raw.items():
        for burst in of["bursts"]:
            late = burst["late"]
            cells = [f"{burst['submitted']:.1f}", f"{burst['asked']:.1f}", f"{statistics.median(late):.2f}"]
            table.rows.append([name, str(burst["size"]), *cells, f"{p95(late):.2f}", str(burst["lost"])])
    return table


def _waiting_table(raw: dict[str, Any]) -> Table:
    columns = ["broker", "one more: delivered after, ms", "p95, ms", "take of 64, ms", "server, MB", "disk, MB"]
    table = Table(f"{next(iter(raw.values()))['waiting']['waiting']} requests that wait", columns)
    for name, of in raw.items():
        waiting = of["waiting"]
        cells = [f"{1e3 * each:.0f}" for each in (statistics.median(waiting["delivered"]), p95(waiting["delivered"]))]
        cells.append(f"{1e3 * statistics.median(waiting['take']):.1f}" if waiting["take"] else "")
        cells.append(f"{waiting['memory'] / 1e6:.0f}" if waiting["memory"] else "")
        table.rows.append([name, *cells, f"{waiting['on_disk'] / 1e6:.0f}"])
    return table
