"""An hour of a fleet on PostgreSQL: the server is restarted, connections are cut, workers are killed; nothing lost.

A shop places orders with the request for their approval, and rolls some back. Three workers ask Keyless, two readers
pay. A worker and a reader are killed now and then; the others live for the whole time, and their memory is measured.
One of these workers has another threshold of the C library's allocator. See `benchmarks.soak`.
"""

from __future__ import annotations

import asyncio
import math
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import psutil  # type: ignore[import-untyped]  # it has no type hints

from aiokeyless.worker.postgres import PostgresBroker
from benchmarks.approval_times import ApprovalTimes, seeded_random
from benchmarks.cutting_proxy import CuttingProxy
from benchmarks.postgres import PostgresServer
from benchmarks.process import THRESHOLD
from benchmarks.programs import Program, keep_running, meanwhile, repeat, until, wholly
from benchmarks.report import CannotMeasureError, Goal, Report, Table
from benchmarks.soak import fleet, growth
from benchmarks.soak.fleet import Shop, Told
from benchmarks.soak.growth import Sample
from benchmarks.soak.journal import Reader
from benchmarks.soak.proxy import FaultyProxy
from benchmarks.soak.service import ServiceProcess
from benchmarks.soak.verdicts import Entry, Event, Verdicts

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from benchmarks.bench import Bench
    from benchmarks.soak.growth import Points

_SETTLED_WITHIN: Final = 240.0  # seconds
_LASTS: Final = 90.0  # seconds: what is done to a run lasts so long, or less
_SELDOM: Final = 3.0  # seconds: a server starts in one or two
_MB: Final = 1e6
ROLES: Final = ("orders", "workers", "readers")
_KEYLESS: Final = ("request", "waiting", "outcome", "unread")
#: Bytes. asyncio's own event loop allocates 256 KiB for each read, and gives back what the read did not need. From this
#: threshold on that leaves no holes in the heap.
_THRESHOLD: Final = "65536"
_ENVIRONMENTS: Final[list[dict[str, str]]] = [{}, {THRESHOLD: _THRESHOLD}]  # of the workers that nobody kills
_WORKERS: Final = ("worker", f"worker with {THRESHOLD}={_THRESHOLD}")
_PROGRAMS: Final = (*_WORKERS, "reader")
_OBJECTS: Final = "objects of the worker, blocks"
_TABLES: Final = "the broker's tables, MB"


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
    size: int  # bytes of these tables and their indexes


class Run:
    """A shop's orders, the service behind a network that fails, and what the shop was told; on any broker."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self._source = seeded_random(1)
        self._folder = folder
        self._record = folder / "record"
        approvals = ApprovalTimes(((1.0, plan.expires_in / 4, 0.8),), never=0.1)
        self.service = ServiceProcess(self._record, approvals, FaultyProxy(self._source))
        self.proxies: dict[tuple[str, bool], CuttingProxy] = {}
        self.lasting_workers: list[Program] = []
        self.shop = Shop(self._source, plan.expires_in, plan.rate)
        self.happened: Counter[str] = Counter()
        self._log: list[tuple[float, str]] = []  # when that was
        self.told: list[Told] = []
        self.paid: Counter[str] = Counter()
        self.verdicts = Verdicts(math.inf)
        self.asked: set[str] = set()
        self.lost: frozenset[str] = frozenset()

    async def _until(self, is_so: Callable[[], Awaitable[bool]]) -> None:
        """Wait until something is so; if it takes too long, the goals say what is missing."""
        with suppress(CannotMeasureError):
            await until(is_so, within=_SETTLED_WITHIN, every=0.2)

    async def _times(self, count: int, do: Callable[[], Awaitable[None]]) -> None:
        """Do something about so many times in the run."""
        await repeat(self.plan.every(count), self._source, do)

    def _happen(self, what: str, times: int = 1) -> None:
        """Count something that is done, and note when, unless it found nothing to do."""
        self.happened[what] += times
        if times:
            self._log.append((time.monotonic(), what))

    async def _kill(self, what: str, program: Program) -> None:
        self._happen(what, program.kill())

    def _judge(self) -> None:
        """Compare what the shop was told with what it ordered, and with the service's record."""
        for entry in Reader(self._record, Entry).read():
            self.verdicts.record(entry)
            if entry.event is Event.CREATED:
                self.asked.add(entry.operation_id)
        for told in self.told:
            if told.order_id in self.shop.committed and not self._is_documented(told):
                started = self.shop.committed[told.order_id]
                self.verdicts.evaluate(told.as_outcome(started, self.plan.expires_in))

    def _is_documented(self, _told: Told) -> bool:
        """Return whether an outcome is one that the documentation leads to expect of what was done."""
        return False

    # -- what came of it

    def report(self, name: str, *tables: Table) -> Report:
        """Return the report, with these tables at the end."""
        count, minutes = len(self.shop.committed), self.plan.seconds / 60
        report = Report(f"{name}: {count} orders within {minutes:g} minutes, with faults everywhere")
        report.tables += [self._orders(), self.verdicts.table(), self._disturbed(), *tables]
        report.goals += self._promises()
        seconds, ended = self.verdicts.slowest
        approved = ended - seconds
        done = (f"{what} at {at - approved:.0f} s" for at, what in self._log if approved - _LASTS <= at <= ended)
        report.notes += [f"the slowest, told after {seconds:.0f} s: {', '.join(done)}", *self.verdicts.examples]
        report.raw = {"seconds": self.plan.seconds, "orders": count, "verdicts": self.verdicts.counts()}
        report.raw["happened"] = dict(self.happened)
        return report

    def _promises(self) -> list[Goal]:
        """Return what every order but the lost ones is promised."""
        committed = self.shop.committed.keys()
        times = Counter(told.order_id for told in self.told)
        unasked = {told.order_id for told in self.told if told.event.asked is False}
        at_most_none = {
            "orders without an outcome": len(committed - self.lost - times.keys()),
            "outcomes beyond one for each order": times.total() - len(times),
            "payments beyond one for each order": self.paid.total() - len(self.paid),
            "users asked about an order that is not committed": len(self.asked - committed),
            "outcomes that deny that the user was asked": len(unasked & self.asked),
        }
        starts = max(worker.starts for worker in self.lasting_workers)
        return [
            *self.verdicts.goals(),
            *(Goal(what, 0, figure, required=True) for what, figure in at_most_none.items()),
            Goal("starts of a worker that nobody kills", 1, starts, required=True),
        ]

    def _orders(self) -> Table:
        figures = {
            "orders committed": len(self.shop.committed),
            "orders rolled back": len(self.shop.rolled_back),
            "operations at Keyless": len(self.asked),
            "orders that were paid": len(self.paid),
            **{f"outcome: {ending}": count for (_, ending), count in sorted(self.verdicts.endings.items())},
        }
        return Table.of_pairs("orders", figures)

    def _disturbed(self) -> Table:
        happened = {
            **self.happened,
            **{
                f"COMMITs of {of} cut {'after' if after else 'before'}": p.cuts
                for (of, after), p in self.proxies.items()
            },
            **{f"to Keyless: {fault}": count for fault, count in sorted(self.service.network.counts.items())},
        }
        return Table.of_pairs("what was done to it", happened, "times")


class Soak(Run):
    """One run on PostgreSQL; `readings` are those so far."""

    def __init__(self, bench: Bench, plan: Plan, server: PostgresServer, folder: Path) -> None:
        super().__init__(plan, folder)
        self._bench = bench
        self._server = server
        self._database = server.new_database()
        self.proxies = {(of, after): CuttingProxy(server, cut_after=after) for of in ROLES for after in (False, True)}
        self.readings: list[Reading] = []
        self.samples: list[list[Sample]] = []

    async def run(self) -> None:
        """Run for the planned time, and until all orders are settled."""
        async with PostgresBroker(self._server.url(self._database)) as broker:
            await broker.prepare(lease=1.0, service="")
        self._server.execute(fleet.TABLES, self._database)
        async with AsyncExitStack() as stack:
            for proxy in self.proxies.values():
                await stack.enter_async_context(proxy)
            await stack.enter_async_context(self.service)
            self._start_programs()
            try:
                async with meanwhile(keep_running(self._programs)):
                    await self._sell()
                    await self._until_asked(self._is_settled)
                    self.readings.append(await asyncio.to_thread(self._read))
            finally:
                for program in self._programs:
                    program.kill()
        self._compare()

    def _start_programs(self) -> None:
        urls = {of: self.proxies[of].url(self._database) for of in self.proxies}
        base_url, timeout = self.service.network.url, self.plan.request_timeout
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
        await self._until_asked(lambda: self._ask("SELECT 1 FROM told LIMIT 1") != [])
        self.shop.closes_at = time.monotonic() + self.plan.seconds
        self.readings.append(await asyncio.to_thread(self._read))
        self.service.network.rate = self.plan.faults
        try:
            async with meanwhile(*self._disturbances(), self._observe()):
                await asyncio.gather(*selling)
        finally:
            self.service.network.rate = 0.0

    # -- what is done to it

    def _disturbances(self) -> list[Coroutine[Any, Any, None]]:
        return [
            self._times(6, self._restart),
            self._times(6, self._hang),
            self._times(6, self._interrupt_service),
            self._times(20, partial(self._kill, "worker killed", self.killed_worker)),
            self._times(20, partial(self._kill, "reader killed", self.killed_reader)),
            self._times(60, self._cut_commits),
            self._times(60, self._cut_all),
        ]

    async def _restart(self) -> None:
        """Restart the server: in turn at once, as after a power cut, and in order."""
        is_at_once = self.happened["server stopped at once"] <= self.happened["server shut down"]
        self._happen("server stopped at once" if is_at_once else "server shut down")
        await wholly(asyncio.to_thread(self._stop_and_start, at_once=is_at_once))

    def _stop_and_start(self, *, at_once: bool) -> None:
        if at_once:
            self._server.kill()
        else:
            self._server.stop()
        time.sleep(self._source.uniform(0.0, self.plan.down / 4))
        self._server.start()

    async def _hang(self) -> None:
        self._happen("network of the database hung")
        await asyncio.gather(*(proxy.hang(self.plan.hang) for proxy in self.proxies.values()))

    async def _interrupt_service(self) -> None:
        self._happen("Keyless killed")
        await self.service.interrupt(self.plan.down * self._source.uniform(0.2, 1.0))

    async def _cut_commits(self) -> None:
        for proxy in self.proxies.values():
            proxy.arm()

    async def _cut_all(self) -> None:
        (of, _), proxy = self._source.choice([*self.proxies.items()])
        self._happen(f"connections of {of} cut", proxy.cut_all())

    # -- what is seen of it

    async def _observe(self) -> None:
        """Let time pass for the broker's tables, vacuum, and read how much there is, until cancelled."""
        while True:
            await asyncio.sleep(self.plan.every(60))
            with suppress(RuntimeError, psutil.NoSuchProcess):  # the server is away
                self.readings.append(await asyncio.to_thread(self._read))
                self._bench.progress(f"  {len(self.shop.committed)} orders; {dict(self.happened)}")

    def _read(self) -> Reading:
        # What is kept for a week, and what for 400 days, is that old after a twelfth and a sixth of the time.
        for table, days, share in (("outcome", 8, 12), ("request", 401, 6)):
            self._ask(
                f"UPDATE keyless.{table} SET decided_at = decided_at - interval '{days} days'"  # noqa: S608  # our own texts
                f" WHERE decided_at BETWEEN now() - interval '1 day' AND now() - interval '{self.plan.every(share)} s'"
            )
        size = 0
        for table in _KEYLESS:
            self._ask(f"VACUUM keyless.{table}")
            size += int(self._ask(f"SELECT pg_total_relation_size('keyless.{table}')")[0][0])
        processes = [psutil.Process(program.pid) for program in (*self.lasting_workers, self.lasting_reader)]
        return Reading(time.monotonic(), [process.memory_info().rss for process in processes], size)

    def _ask(self, statement: str) -> list[list[str]]:
        return self._server.execute(statement, self._database)

    def _is_settled(self) -> bool:
        question = "SELECT NOT EXISTS (SELECT FROM keyless.request WHERE decided_at IS NULL) AND NOT EXISTS"
        return self._ask(f"{question} (SELECT FROM keyless.unread)") == [["t"]]

    async def _until_asked(self, is_so: Callable[[], bool]) -> None:
        """Wait until something is so that takes a thread to ask."""
        await self._until(partial(asyncio.to_thread, is_so))

    def _compare(self) -> None:
        """Read what the programs left behind, and judge it."""
        self.told = [Told.of_row(*row) for row in self._ask("SELECT event, at FROM told")]
        self.samples = [[*Reader(self._folder / f"{k}", Sample).read()] for k, _ in enumerate(_WORKERS)]
        self.paid = Counter(row[0] for row in self._ask("SELECT order_id FROM payment"))
        self._judge()


def run(bench: Bench) -> Report:
    """Run the fleet for an hour, or the minutes that were asked for."""
    with closing(PostgresServer(fsync="on")) as server, tempfile.TemporaryDirectory() as folder:
        soak = Soak(bench, planned(bench), server, Path(folder))
        asyncio.run(soak.run())
    return _report(soak)


def planned(bench: Bench) -> Plan:
    """Return the plan for an hour, or the minutes that were asked for."""
    seconds = 60 * bench.minutes
    return bench.pick(
        full=Plan(seconds, 5.0, 60.0, request_timeout=5.0, faults=0.005, hang=15.0, down=20.0),
        smoke=Plan(seconds, 5.0, 8.0, request_timeout=1.0, faults=0.01, hang=0.5, down=0.5),
    )


def _report(soak: Soak) -> Report:
    series = _series(soak)
    report = soak.report("soak_fleet", growth.table(series))
    figures = {
        "worker's objects": (1.0, growth.percent_an_hour(series[_OBJECTS]), "%"),
        **{f"{name}'s memory": (1.0, growth.an_hour(series[f"memory of the {name}, MB"]), " MB") for name in _PROGRAMS},
        "broker's tables after a vacuum": (5.0, growth.percent_an_hour(series[_TABLES]), "%"),
    }
    report.goals += [Goal(f"growth of the {what}, an hour", *figure) for what, figure in figures.items()]
    return report


def _series(soak: Soak) -> dict[str, Points]:
    """Return the memory of the programs, what two of them hold, and the size of the tables, after the warm-up."""
    start, readings = soak.readings[0].at, soak.readings
    series = {
        f"memory of the {name}, MB": [(reading.at - start, reading.resident[k] / _MB) for reading in readings]
        for k, name in enumerate(_PROGRAMS)
    }
    for name, of in zip(_WORKERS, soak.samples, strict=True):
        series |= growth.held(name, of, start)
    series[_TABLES] = [(reading.at - start, reading.size / _MB) for reading in readings]
    return {name: growth.warm(points, soak.plan.seconds) for name, points in series.items()}
