"""The three brokers side by side: polls, bursts, many waiting requests, a crash, and what an hour leaves on the disk.

Each broker's server, each worker and the service are processes of their own, on the same cores. CPU is measured for
each process, so that it hardly depends on how many share a core; polls per second are those of this machine.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import asyncpg
from tenacity import wait_chain, wait_fixed

from aiokeyless.worker.broker import Exchange
from benchmarks import pictures
from benchmarks.approval_times import seeded_random
from benchmarks.bench import order
from benchmarks.fleet import Fleet, Pace, fleet, new_request, submit_to
from benchmarks.noticing import Plan, by_worker, known_of
from benchmarks.report import CannotMeasureError, Goal, Report, Spread, Table, p95
from benchmarks.server import Server, Workload, serving
from benchmarks.storages import NatsStorage, PostgresStorage, SqliteStorage, Storage, resident, total

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from aiokeyless.worker import Broker
    from benchmarks.bench import Bench

#: It needs PostgreSQL, and takes its time.
ONLY_BY_NAME: Final = True

_STORAGES: Final[tuple[type[Storage], ...]] = (SqliteStorage, PostgresStorage, NatsStorage)
_RATE: Final = 1000.0  # polls of a worker in a second: its default
_READERS: Final = 8  # outcomes that the application handles at once
_LOST_AFTER: Final = 120.0  # seconds after which an unnoticed approval counts as lost
_AN_HOUR: Final = 36_000  # requests: ten a second
_BATCH: Final = 500  # requests that are taken together
_TOGETHER: Final = 10_000  # requests that are submitted in one transaction
_LEASE: Final = 60.0  # seconds
_TAKES: Final = 50  # calls of `take`
_TAKEN: Final = 64  # requests of each
_PUT_OFF: Final = 190.0  # seconds: nearly as long as a broker puts off


class Window(NamedTuple):
    """A time in which workers polled as fast as they could."""

    polls: float  # per second, all workers together
    worker: float  # CPU seconds per poll, all workers together
    broker: float
    service: float
    logged: float  # bytes per poll


class Burst(NamedTuple):
    """Requests that were all submitted at once, and approved some seconds after each was asked."""

    size: int
    submitted: float  # seconds until all were stored
    asked: float  # seconds until the users of all were asked
    late: list[float]  # seconds from each approval until the application was told
    lost: int
    on_disk: float  # bytes that it left


class Waiting(NamedTuple):
    """Many requests that wait."""

    waiting: int
    delivered: list[float]  # seconds from before the submit of one more until it is delivered
    take: list[float]  # seconds of the function `take` alone; empty where there is none
    memory: float  # bytes of the server
    on_disk: float
    restart: float  # seconds from the kill of the server until a new worker has a delivery


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
        quick=Sizes(500, 0.05, 0.5, 1, 0.5, (200,), (1.0, 3.0), 2000),
        smoke=Sizes(50, 0.02, 0.2, 1, 0.2, (20,), (0.1, 0.5), 100),
    )
    raw: dict[str, Any] = {}
    with serving() as server:
        for storage in _STORAGES:
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
    return {
        "windows": {str(count): [window._asdict() for window in of] for count, of in windows.items()},
        "bursts": [burst._asdict() for burst in bursts],
        "waiting": waiting._asdict(),
    }


# -- polls


async def _polls(server: Server, storage: type[Storage], sizes: Sizes) -> dict[int, list[Window]]:
    windows: dict[int, list[Window]] = {1: [], 2: []}
    pace = Pace(wait_chain(wait_fixed(sizes.first), wait_fixed(sizes.interval)))
    async with fleet(server, pace, 2, storage) as workers:
        requests = server.statistics().requests
        await workers.submit(sizes.polled)
        await workers.until(lambda now: now.requests - requests > sizes.polled)
        for turn in range(sizes.rounds):
            for count in order([2, 1], turn):
                await workers.resize(count)
                await workers.until_polled()
                await asyncio.sleep(sizes.seconds / 4)
                windows[count].append(await _window(workers, sizes.seconds))
    return windows


async def _window(workers: Fleet, seconds: float) -> Window:
    logged = workers.logged()
    with Workload(workers.server) as service:
        before = workers.cpu()
        await asyncio.sleep(seconds)
        after = workers.cpu()
    logged = workers.logged() - logged
    polls = service.requests
    if not polls:
        raise CannotMeasureError("the workers made no poll: other programs took the machine")
    if service.bound:
        raise CannotMeasureError(f"the server was the bottleneck ({service.share:.0%} of its core)")
    worker, broker = (b - a for a, b in zip(before, after, strict=True))
    return Window(polls / service.wall, worker / polls, broker / polls, service.cpu / polls, logged / polls)


# -- bursts


async def _burst(server: Server, storage: type[Storage], size: int, ages: tuple[float, float]) -> Burst:
    source = seeded_random(size)
    plan = Plan([0.0] * size, [source.uniform(*ages) for _ in range(size)])
    async with fleet(server, Pace(None, _RATE), 1, storage) as workers:
        empty, created, began = workers.storage.on_disk(), server.statistics().created, time.perf_counter()

        async def until_all_are_asked() -> float:
            await workers.until_created(created + size)
            return time.perf_counter() - began

        async with asyncio.TaskGroup() as group:
            asked = group.create_task(until_all_are_asked())
            reading = group.create_task(by_worker(workers, plan, lost_after=_LOST_AFTER, readers=_READERS))
        noticed = reading.result()
        on_disk = workers.storage.on_disk() - empty
        submitted = workers.submitted_at - began
    late = [one.late for one in known_of(f"burst of {size}", noticed)]
    return Burst(size, submitted, asked.result(), late, noticed.count(None), on_disk)


# -- waiting requests, and a crash


async def _waiting(storage: type[Storage], count: int) -> Waiting:
    async with storage() as stored:
        async with stored.broker() as broker:
            await broker.prepare(lease=_LEASE, service="")
            await _fill(stored, broker, count)
            put_off = 0
            while put_off < count:
                messages = await broker.take(_BATCH, 5.0)
                await asyncio.gather(*(broker.put_off(message, _PUT_OFF, Exchange.ANSWERED) for message in messages))
                put_off += len(messages)
            delivered = [await _delivered(broker) for _ in range(20)]
            take = await _take(stored, broker)
            memory = total(stored.processes(), resident)
        on_disk, began = stored.on_disk(), time.perf_counter()
        await stored.restart()
        async with stored.broker() as broker:
            await broker.prepare(lease=_LEASE, service="")
            await _delivered(broker)
            restart = time.perf_counter() - began
    return Waiting(count, delivered, take, memory, on_disk, restart)


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
    await broker.put_off(messages[0], _PUT_OFF, Exchange.ANSWERED)
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
        taken = await connection.fetch("SELECT * FROM keyless.take($1, $2, NULL, false)", _TAKEN, _LEASE)
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
    polls = _spread(postgres["windows"]["1"], "polls").median
    report.goals.append(Goal("PostgreSQL: 1000 polls/s, over those of one worker", 1, 1000 / polls))
    take = 1e3 * statistics.median(postgres["waiting"]["take"])
    report.goals.append(Goal(f"PostgreSQL: take with {postgres['waiting']['waiting']} waiting", 5, take, " ms"))
    report.notes += [
        "SQLite has no server: what it takes is in the workers' CPU, and what is logged is all that they write",
        "what is logged: PostgreSQL, WAL, which is not on the disk as counted; NATS, pages written",
        f"an hour, computed: what the largest burst left, for {_AN_HOUR} requests, ten a second",
    ]
    return report


def _spread(windows: list[dict[str, float]], what: str) -> Spread:
    return Spread.of([window[what] for window in windows])


def _polls_table(raw: dict[str, Any]) -> Table:
    columns = ["broker", "workers", "polls/s", "CPU per poll, us: workers", "server", "service", "logged per poll, B"]
    table = Table("polls: more due than can be sent", columns)
    for name, of in raw.items():
        for count, windows in of["windows"].items():
            cells = [f"{1e6 * _spread(windows, who).median:.0f}" for who in ("worker", "broker", "service")]
            polls, logged = _spread(windows, "polls").median, _spread(windows, "logged").median
            table.rows.append([name, count, f"{polls:.0f}", *cells, f"{logged:.0f}"])
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
    count = next(iter(raw.values()))["waiting"]["waiting"]
    columns = ["broker", "one more: delivered after, ms", "p95, ms", "take of 64, ms", "server, MB", "disk, MB"]
    columns += ["delivers again after a crash, s", "disk after an hour, MB"]
    table = Table(f"{count} requests that wait", columns)
    for name, of in raw.items():
        waiting, burst = Waiting(**of["waiting"]), Burst(**of["bursts"][-1])
        table.rows.append(
            [
                name,
                f"{1e3 * statistics.median(waiting.delivered):.0f}",
                f"{1e3 * p95(waiting.delivered):.0f}",
                f"{1e3 * statistics.median(waiting.take):.1f}" if waiting.take else "",
                f"{waiting.memory / 1e6:.0f}" if waiting.memory else "",
                f"{waiting.on_disk / 1e6:.0f}",
                f"{waiting.restart:.1f}",
                f"{burst.on_disk / burst.size * _AN_HOUR / 1e6:.0f}",
            ]
        )
    return table


def page(raw: dict[str, Any]) -> str:
    """Write the tables that docs/explanation/limits.md includes."""
    return (
        "\n\n".join(table.markdown() for table in (_polls_table(raw), _bursts_table(raw), _waiting_table(raw))) + "\n"
    )


# -- the picture

_PARTS: Final = {"worker": pictures.OURS, "broker": pictures.OTHERS[2], "service": pictures.OTHERS[0]}
_NAMES: Final = {"worker": "workers", "broker": "server", "service": "service (a stand-in)"}


def draw(raw: dict[str, Any]) -> Figure:
    """Draw the cost of a poll at each broker, and the lateness in the largest burst."""
    figure, (costs, lateness) = pictures.panels(2)
    bars = [(f"{name}, {count}", of["windows"][count]) for name, of in raw.items() for count in of["windows"]]
    labels, bottom = [label for label, _ in bars], [0.0] * len(bars)
    for who, color in _PARTS.items():
        microseconds = [1e6 * _spread(windows, who).median for _, windows in bars]
        costs.barh(labels, microseconds, 0.6, bottom, color=color, label=_NAMES[who])
        bottom = [a + b for a, b in zip(bottom, microseconds, strict=True)]
    for (label, windows), right in zip(bars, bottom, strict=True):
        text = f"{_spread(windows, 'polls').median:,.0f}/s".replace(",", " ")
        costs.annotate(text, (right, label), (3, 0), textcoords="offset points", va="center", fontsize=8)
    costs.invert_yaxis()
    costs.set_xlim(right=1.25 * max(bottom))
    costs.set_ylim(len(bars) - 0.5, -1.5)
    costs.grid(visible=False, axis="y")
    costs.set_xlabel("CPU per poll, µs, by broker and number of workers")
    costs.legend(loc="upper left", ncols=3, fontsize=8)
    for color, (name, of) in zip((*pictures.OTHERS[1:3], pictures.OURS), raw.items(), strict=True):
        late = sorted(of["bursts"][-1]["late"])
        lateness.plot(late, [(k + 1) / len(late) for k in range(len(late))], color=color, label=name)
    size = next(iter(raw.values()))["bursts"][-1]["size"]
    lateness.set_xlabel(f"seconds until an approval is noticed, {size} at once")
    lateness.set_ylabel("share of the approvals")
    lateness.legend()
    return figure
