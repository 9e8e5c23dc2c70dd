"""An hour of a fleet on PostgreSQL: the server is restarted, connections are cut, workers are killed; nothing lost.

A shop places orders with the request for their approval, and rolls some back. Three workers ask Keyless, two readers
pay. A worker and a reader are killed now and then; the others live for the whole time, and their memory is measured.
One of these workers has another threshold of the C library's allocator. See `benchmarks.soak`.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import psutil  # type: ignore[import-untyped]  # it has no type hints

from aiokeyless.worker.postgres import PostgresBroker
from benchmarks import pictures
from benchmarks.approval_times import ApprovalTimes, seeded_random
from benchmarks.cutting_proxy import CuttingProxy
from benchmarks.postgres import PostgresServer, is_installed
from benchmarks.programs import Program, keep_running
from benchmarks.report import CannotMeasureError, Goal, Report, Table
from benchmarks.soak import fleet, heap
from benchmarks.soak.fleet import Sample, Shop, Told
from benchmarks.soak.journal import Reader
from benchmarks.soak.proxy import FaultyProxy
from benchmarks.soak.service import Habits, ServiceProcess
from benchmarks.soak.verdicts import WORKER, Ending, Entry, Event, Verdict, Verdicts

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from matplotlib.figure import Figure

    from benchmarks.bench import Bench

#: It needs PostgreSQL, and takes an hour.
ONLY_BY_NAME: Final = True

_WARM_UP: Final = 1 / 3  # of the time
_MEMORY: Final = 1200.0  # seconds after its creation for which the service remembers an operation
_SETTLED_WITHIN: Final = 240.0  # seconds
_SELDOM: Final = 3.0  # seconds: a server starts in one or two
_MB: Final = 1e6
_ROLES: Final = ("orders", "workers", "readers")
_KEYLESS: Final = ("request", "waiting", "outcome", "unread")
#: Bytes. asyncio's own event loop allocates 256 KiB for each read, and gives back what the read did not need. From this
#: threshold on that leaves no holes in the heap.
_THRESHOLD: Final = "65536"
_ENVIRONMENTS: Final[list[dict[str, str]]] = [{}, {heap.THRESHOLD: _THRESHOLD}]  # of the workers that nobody kills
_WORKERS: Final = ("worker", f"worker with {heap.THRESHOLD}={_THRESHOLD}")
_PROGRAMS: Final = (*_WORKERS, "reader")


class Plan(NamedTuple):
    """What happens, in seconds."""

    seconds: float
    rate: float  # orders in a second
    expires_in: float
    request_timeout: float
    faults: float  # share of the chunks of bytes between workers and Keyless
    hang: float  # of the database's network
    down: float  # of Keyless, at most

    def every(self, times: int) -> float:
        """Return how often something is done that is to be done so many times; not so often that nothing else is."""
        return max(self.seconds / times, _SELDOM)


class Reading(NamedTuple):
    """The processes that nobody kills, and the broker's tables after a vacuum, at one instant."""

    at: float
    resident: list[int]  # bytes, as _PROGRAMS
    cpu: float  # seconds, of all since their start
    rows: list[int]  # as _KEYLESS
    size: int  # bytes of these tables and their indexes


class Soak:
    """One run; `readings` are those so far."""

    def __init__(self, bench: Bench, plan: Plan, server: PostgresServer, folder: Path) -> None:
        self._bench = bench
        self.plan = plan
        self._source = seeded_random(1)
        self._server = server
        self._database = server.new_database()
        self._folder = folder
        self._record = folder / "record"
        approvals = ApprovalTimes(((1.0, plan.expires_in / 4, 0.8),), never=0.1)
        self.service = ServiceProcess(self._record, Habits(approvals, _MEMORY))
        self.to_service = FaultyProxy(self._source)
        self.proxies = {(of, after): CuttingProxy(server, cut_after=after) for of in _ROLES for after in (False, True)}
        self.shop = Shop(self._source, plan.expires_in, plan.rate)
        self.happened: Counter[str] = Counter()
        self.readings: list[Reading] = []
        self.samples: list[list[Sample]] = []
        self.told: list[Told] = []
        self.paid: Counter[str] = Counter()
        self.verdicts = Verdicts(math.inf)
        self.asked: set[str] = set()

    async def run(self) -> None:
        """Run for the planned time, and until all orders are settled."""
        async with PostgresBroker(self._server.url(self._database)) as broker:
            await broker.prepare(lease=1.0, service="")
        self._server.execute(fleet.TABLES, self._database)
        async with AsyncExitStack() as stack:
            for proxy in self.proxies.values():
                await stack.enter_async_context(proxy)
            await stack.enter_async_context(self.to_service)
            self.to_service.target = await self.service.start()
            self._start_programs()
            keeping = asyncio.create_task(keep_running(self._programs))
            try:
                await self._sell()
                await self._until(self._is_settled)
                self.readings.append(await asyncio.to_thread(self._read))
            finally:
                keeping.cancel()
                for program in self._programs:
                    program.kill()
                await self.service.kill()
        self._compare()

    def _start_programs(self) -> None:
        urls = {of: self.proxies[of].url(self._database) for of in self.proxies}
        base_url, timeout = self.to_service.url, self.plan.request_timeout
        self.lasting_workers = [
            Program(fleet.work, urls["workers", True], base_url, timeout, self._folder / f"{k}", **environment)
            for k, environment in enumerate(_ENVIRONMENTS)
        ]
        self.killed_worker = Program(fleet.work, urls["workers", False], base_url, timeout, self._folder / "killed")
        self.lasting_reader = Program(fleet.read, urls["readers", True])
        self.killed_reader = Program(fleet.read, urls["readers", False])
        self._programs = [*self.lasting_workers, self.killed_worker, self.lasting_reader, self.killed_reader]

    async def _sell(self) -> None:
        """Place orders, and disturb everything once the first one is settled."""
        urls = [proxy.url(self._database) for (of, _), proxy in self.proxies.items() if of == "orders"]
        selling = [asyncio.create_task(self.shop.sell(url, 1 / len(urls))) for url in urls]
        await self._until(lambda: self._ask("SELECT 1 FROM told LIMIT 1") != [])
        self.shop.closes_at = time.monotonic() + self.plan.seconds
        self.readings.append(await asyncio.to_thread(self._read))
        self.to_service.rate = self.plan.faults
        disturbing = [asyncio.create_task(doing) for doing in self._disturbances()]
        disturbing.append(asyncio.create_task(self._observe()))
        try:
            await asyncio.gather(*selling)
        finally:
            self.to_service.rate = 0.0
            for task in disturbing:
                task.cancel()
            await asyncio.wait(disturbing)
        for task in disturbing:
            if not task.cancelled():
                task.result()  # a server that did not start again

    # -- what is done to it

    def _disturbances(self) -> list[Any]:
        every = self.plan.every
        return [
            self._repeat(every(6), self._restart),
            self._repeat(every(6), self._hang),
            self._repeat(every(6), self._interrupt_service),
            self._repeat(every(20), self._kill_worker),
            self._repeat(every(20), self._kill_reader),
            self._repeat(every(60), self._cut_commits),
            self._repeat(every(60), self._cut_all),
        ]

    async def _repeat(self, every: float, do: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(every * self._source.uniform(0.75, 1.25))
            await do()

    async def _restart(self) -> None:
        """Restart the server: in turn at once, as after a power cut, and in order."""
        is_at_once = self.happened["server stopped at once"] <= self.happened["server shut down"]
        self.happened["server stopped at once" if is_at_once else "server shut down"] += 1
        restart = asyncio.ensure_future(asyncio.to_thread(self._stop_and_start, at_once=is_at_once))
        try:
            await asyncio.shield(restart)
        finally:
            await restart  # nothing settles while the server is away

    def _stop_and_start(self, *, at_once: bool) -> None:
        if at_once:
            self._server.kill()
        else:
            self._server.stop()
        time.sleep(self._source.uniform(0.0, self.plan.down / 4))
        self._server.start()

    async def _hang(self) -> None:
        self.happened["network of the database hung"] += 1
        await asyncio.gather(*(proxy.hang(self.plan.hang) for proxy in self.proxies.values()))

    async def _interrupt_service(self) -> None:
        self.happened["Keyless killed"] += 1
        self.to_service.target = None
        await self.service.kill()
        await asyncio.sleep(self.plan.down * self._source.uniform(0.2, 1.0))
        self.to_service.target = await self.service.start()

    async def _kill_worker(self) -> None:
        self.happened["worker killed"] += self.killed_worker.kill()

    async def _kill_reader(self) -> None:
        self.happened["reader killed"] += self.killed_reader.kill()

    async def _cut_commits(self) -> None:
        for proxy in self.proxies.values():
            proxy.arm()

    async def _cut_all(self) -> None:
        (of, _), proxy = self._source.choice([*self.proxies.items()])
        self.happened[f"connections of {of} cut"] += proxy.cut_all()

    # -- what is seen of it

    async def _observe(self) -> None:
        """Let time pass for the broker's tables, vacuum, and read how much there is, until cancelled."""
        while True:
            await asyncio.sleep(self.plan.every(60))
            with suppress(RuntimeError, psutil.NoSuchProcess):  # the server is away
                self.readings.append(await asyncio.to_thread(self._read))
                self._bench.progress(f"  {self._line()}")

    def _read(self) -> Reading:
        # What is kept for a week, and what for 400 days, is that old after a twelfth and a sixth of the time.
        for table, days, share in (("outcome", 8, 12), ("request", 401, 6)):
            self._ask(
                f"UPDATE keyless.{table} SET decided_at = decided_at - interval '{days} days'"  # noqa: S608  # our own texts
                f" WHERE decided_at BETWEEN now() - interval '1 day' AND now() - interval '{self.plan.every(share)} s'"
            )
        rows, size = [], 0
        for table in _KEYLESS:
            self._ask(f"VACUUM keyless.{table}")
            ((count, held),) = self._ask(
                f"SELECT count(*), pg_total_relation_size('keyless.{table}') FROM keyless.{table}"  # noqa: S608  # likewise
            )
            rows.append(int(count))
            size += int(held)
        processes = [psutil.Process(program.pid) for program in (*self.lasting_workers, self.lasting_reader)]
        cpu = sum(sum(process.cpu_times()[:2]) for process in processes)
        return Reading(time.monotonic(), [process.memory_info().rss for process in processes], cpu, rows, size)

    def _line(self) -> str:
        last = self.readings[-1]
        memory = ", ".join(f"{name} {held / _MB:.1f} MB" for name, held in zip(_PROGRAMS, last.resident, strict=True))
        rows = ", ".join(f"{table} {count}" for table, count in zip(_KEYLESS, last.rows, strict=True))
        ((outcomes,),) = self._ask("SELECT count(*) FROM told")
        counts = f"{len(self.shop.committed)} orders, {len(self.shop.rolled_back)} rolled back, {outcomes} outcomes"
        return f"{counts}; {memory}; rows: {rows}; {last.size / _MB:.1f} MB; {dict(self.happened)}"

    def _ask(self, statement: str) -> list[list[str]]:
        return self._server.execute(statement, self._database)

    def _is_settled(self) -> bool:
        question = "SELECT NOT EXISTS (SELECT FROM keyless.request WHERE decided_at IS NULL) AND NOT EXISTS"
        return self._ask(f"{question} (SELECT FROM keyless.unread)") == [["t"]]

    async def _until(self, is_so: Callable[[], bool]) -> None:
        """Wait until something is so; if it takes too long, the goals say what is missing."""
        deadline = time.monotonic() + _SETTLED_WITHIN
        while time.monotonic() < deadline and not await asyncio.to_thread(is_so):  # noqa: ASYNC110  # another program
            await asyncio.sleep(0.2)

    def _compare(self) -> None:
        """Compare what the shop was told with what it ordered, and with the service's record."""
        self.told = [Told(*row) for row in self._ask(fleet.SELECT_TOLD)]
        self.samples = [[*Reader(self._folder / f"{k}", Sample).read()] for k, _ in enumerate(_WORKERS)]
        self.paid = Counter(row[0] for row in self._ask("SELECT order_id FROM payment"))
        for entry in Reader(self._record, Entry).read():
            self.verdicts.record(entry)
            if entry.event is Event.CREATED:
                self.asked.add(entry.operation_id)
        for told in self.told:
            if told.order_id in self.shop.committed:
                started = self.shop.committed[told.order_id]
                self.verdicts.evaluate(told.as_outcome(started, self.plan.expires_in))


def run(bench: Bench) -> Report:
    """Run the fleet for an hour, or the minutes that were asked for."""
    if not is_installed():
        raise CannotMeasureError("PostgreSQL is not installed")
    minutes = bench.minutes if bench.minutes is not None else bench.pick(full=60.0, quick=1.5, smoke=0.2)
    seconds = 60 * minutes
    plan = bench.pick(
        full=Plan(seconds, 5.0, 60.0, request_timeout=5.0, faults=0.005, hang=15.0, down=20.0),
        quick=Plan(seconds, 5.0, 20.0, request_timeout=2.0, faults=0.01, hang=4.0, down=5.0),
        smoke=Plan(seconds, 5.0, 8.0, request_timeout=1.0, faults=0.01, hang=0.5, down=0.5),
    )
    server = PostgresServer(fsync="on")
    try:
        with tempfile.TemporaryDirectory() as folder:
            soak = Soak(bench, plan, server, Path(folder))
            asyncio.run(soak.run())
    finally:
        server.close()
    return _report(soak, minutes)


def _report(soak: Soak, minutes: float) -> Report:
    committed, counts = soak.shop.committed.keys(), soak.verdicts.verdicts
    times = Counter(told.order_id for told in soak.told)
    unasked = {told.order_id for told in soak.told if told.asked == "f"}
    title = f"soak_fleet: {len(committed)} orders in PostgreSQL within {minutes:g} minutes, with faults everywhere"
    report = Report(title, [_orders(soak), _disturbed(soak), _grown(soak)])
    report.goals += [
        Goal("orders without an outcome", 0, len(committed - times.keys()), required=True),
        Goal("approvals lost", 0, counts[Verdict.LOST], required=True),
        Goal("wrong approvals", 0, counts[Verdict.WRONG], required=True),
        Goal("outcomes that nothing explains", 0, counts[Verdict.UNEXPECTED], required=True),
        Goal("outcomes beyond one for each order", 0, times.total() - len(times), required=True),
        Goal("payments beyond one for each order", 0, soak.paid.total() - len(soak.paid), required=True),
        Goal("users asked about an order that is not committed", 0, len(soak.asked - committed), required=True),
        Goal("outcomes that deny that the user was asked", 0, len(unasked & soak.asked), required=True),
        Goal("starts of a worker that nobody kills", 1, max(of.starts for of in soak.lasting_workers), required=True),
        Goal("growth of the worker's objects, an hour", 1.0, _blocks_growth(soak, 0), "%"),
        *(Goal(f"growth of the {name}'s memory, an hour", 1.0, _growth(soak, k), " MB") for k, name in _numbered()),
        Goal("growth of the broker's tables after a vacuum, an hour", 5.0, _table_growth(soak), "%"),
    ]
    report.notes += soak.verdicts.examples
    report.raw = _raw(soak)
    return report


def _orders(soak: Soak) -> Table:
    verdicts, late = soak.verdicts, soak.verdicts.lateness
    endings = {ending: verdicts.endings[WORKER, ending] for ending in Ending}
    rows: list[tuple[str, object]] = [
        ("orders committed", len(soak.shop.committed)),
        ("orders rolled back", len(soak.shop.rolled_back)),
        ("operations at Keyless", len(soak.asked)),
        ("orders that were paid", len(soak.paid)),
        *((f"outcome: {ending}", count) for ending, count in endings.items() if count),
        *((f"compared with the service's record: {verdict}", verdicts.verdicts[verdict]) for verdict in Verdict),
        ("paid after the approval, median, s", f"{late.quantile(0.5):.2f}"),
        ("the same, 99%", f"{late.quantile(0.99):.2f}"),
        ("the same, the longest", f"{late.quantile(1.0):.1f}"),
    ]
    return Table("orders", ["", "figure"], [[what, f"{figure}"] for what, figure in rows])


def _disturbed(soak: Soak) -> Table:
    happened = {
        **soak.happened,
        **{f"COMMITs of {of} cut {'after' if after else 'before'}": p.cuts for (of, after), p in soak.proxies.items()},
        **{f"to Keyless: {fault}": count for fault, count in sorted(soak.to_service.counts.items())},
    }
    return Table("what was done to it", ["", "times"], [[what, f"{times}"] for what, times in happened.items()])


def _grown(soak: Soak) -> Table:
    warm, first, last = _warm(soak), soak.readings[0], soak.readings[-1]
    passed = last.at - first.at
    polls = sum(int(told.deliveries) for told in soak.told)
    table = Table("what it takes", ["", "after the warm-up", "at the end", "growth an hour"])
    for k, name in _numbered():
        start, end = (reading.resident[k] / _MB for reading in (warm[0], warm[-1]))
        table.rows.append([f"memory of the {name}, MB", f"{start:.1f}", f"{end:.1f}", f"{_growth(soak, k):.2f} MB"])
    for k, name in enumerate(_WORKERS):
        table.rows.extend(_held(soak, k, name))
    start, end = (reading.size / _MB for reading in (warm[0], warm[-1]))
    table.rows.append(["the broker's tables, MB", f"{start:.2f}", f"{end:.2f}", f"{_table_growth(soak):.1f}%"])
    for k, name in enumerate(_KEYLESS):
        table.rows.append([f"rows of {name}", f"{warm[0].rows[k]}", f"{warm[-1].rows[k]}", ""])
    table.rows.append(["polls a second", "", f"{polls / soak.plan.seconds:.0f}", ""])
    table.rows.append(["CPU of the three, share of a core", "", f"{(last.cpu - first.cpu) / passed:.0%}", ""])
    return table


def _held(soak: Soak, k: int, name: str) -> list[list[str]]:
    """Return what a worker's objects take, and what of the C library's heap is in use and free."""
    warm = _warm_samples(soak, k)
    start, end = warm[0], warm[-1]
    rows = [[f"objects of the {name}, blocks", f"{start.blocks}", f"{end.blocks}", f"{_blocks_growth(soak, k):.2f}%"]]
    heaps = [(sample.at, sample.heap) for sample in warm if sample.heap is not None]
    for what, of in (("in use", "in_use"), ("free", "free")):
        values = [(at, getattr(each, of) / _MB) for at, each in heaps]
        if values:
            start, end = values[0][1], values[-1][1]
            rows.append([f"its heap, {what}, MB", f"{start:.2f}", f"{end:.2f}", f"{_an_hour(values):.2f} MB"])
    return rows


def _numbered() -> list[tuple[int, str]]:
    return [*enumerate(_PROGRAMS)]


def _warm(soak: Soak) -> list[Reading]:
    """Return the readings after the warm-up."""
    start = soak.readings[0].at + _WARM_UP * soak.plan.seconds
    return [reading for reading in soak.readings if reading.at >= start] or soak.readings[-1:]


def _warm_samples(soak: Soak, k: int) -> list[Sample]:
    """Return a worker's samples of the same time."""
    readings = _warm(soak)
    start, end = readings[0].at, readings[-1].at
    return [sample for sample in soak.samples[k] if start <= sample.at <= end] or soak.samples[k][-1:]


def _an_hour(points: list[tuple[float, float]]) -> float:
    """Return how fast a value grew in an hour, by a straight line through its values at times in seconds."""
    if len(points) < 2:
        return 0.0
    return statistics.linear_regression([at / 3600 for at, _ in points], [value for _, value in points]).slope


def _growth(soak: Soak, k: int) -> float:
    """Return how fast the memory of a process grew after the warm-up, in MB an hour."""
    return _an_hour([(reading.at, reading.resident[k] / _MB) for reading in _warm(soak)])


def _blocks_growth(soak: Soak, k: int) -> float:
    """Return how fast the memory blocks of a worker's objects grew after the warm-up, in percent an hour."""
    warm = _warm_samples(soak, k)
    return 100 * _an_hour([(sample.at, sample.blocks) for sample in warm]) / warm[0].blocks


def _table_growth(soak: Soak) -> float:
    """Return how fast the broker's tables grew after the warm-up, in percent an hour."""
    warm = _warm(soak)
    return 100 * _an_hour([(reading.at, reading.size) for reading in warm]) / warm[0].size


def _raw(soak: Soak) -> dict[str, Any]:
    start = soak.readings[0].at
    return {
        "readings": [[r.at - start, r.resident, r.cpu, r.rows, r.size] for r in soak.readings],
        "samples": [
            [[s.at - start, s.blocks, *(s.heap or ())] for s in samples[:: 1 + len(samples) // 200]]
            for samples in soak.samples
        ],
        "warm_up": _WARM_UP * soak.plan.seconds,
        "orders": len(soak.shop.committed),
        "rolled back": len(soak.shop.rolled_back),
        "paid": len(soak.paid),
        "verdicts": {f"{verdict}": soak.verdicts.verdicts[verdict] for verdict in Verdict},
        "lateness": soak.verdicts.lateness.counts,
        "happened": dict(soak.happened),
    }


def draw(raw: dict[str, Any]) -> Figure:
    """Draw the memory of the processes that nobody kills, and the size of the broker's tables, over time."""
    figure, (memory, tables) = pictures.panels(2)
    minutes = [reading[0] / 60 for reading in raw["readings"]]
    for (k, name), color in zip(_numbered(), (pictures.OURS, *pictures.OTHERS[1:3]), strict=True):
        memory.plot(minutes, [reading[1][k] / _MB for reading in raw["readings"]], color=color, label=name)
    memory.set_ylabel("resident memory, MB")
    tables.plot(minutes, [reading[4] / _MB for reading in raw["readings"]], color=pictures.OURS)
    tables.set_ylabel("tables after a vacuum, MB")
    for panel in (memory, tables):
        panel.axvline(raw["warm_up"] / 60, color=pictures.OTHERS[0], linestyle="--", label="end of the warm-up")
        panel.set_ylim(bottom=0)
        panel.set_xlabel("minutes")
    memory.legend()
    return figure
