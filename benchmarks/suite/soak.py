"""An hour of everything at once: thousands of waits, faults at every layer, a service that is killed; nothing lost.

Three processes: the client with all applications; the service; and this one, which runs the proxy between them, kills
the service now and then, and compares what applications were told with the service's record. See `benchmarks.soak`.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import psutil  # type: ignore[import-untyped]  # it has no type hints

from benchmarks import pictures
from benchmarks.approval_times import ApprovalTimes, seeded_random
from benchmarks.programs import meanwhile, repeat, spawn
from benchmarks.report import CannotMeasureError, Goal, Report, Table
from benchmarks.server import allow_many_sockets
from benchmarks.soak import applications, growth
from benchmarks.soak.applications import Plan, Sample
from benchmarks.soak.journal import Reader
from benchmarks.soak.proxy import FaultyProxy
from benchmarks.soak.service import MEMORY, ServiceProcess
from benchmarks.soak.verdicts import BY_DEFAULT, LOOP, Ending, Entry, Outcome, Verdicts

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

    from matplotlib.figure import Figure

    from benchmarks.bench import Bench
    from benchmarks.soak.growth import Points

_MB: Final = 1e6


class Weather(NamedTuple):
    """What is done to the client, in seconds and shares of the chunks of bytes."""

    faults: float  # usually
    storm_faults: float  # in a storm
    storm: float
    every: float  # there is a storm, and the service is killed
    down: float  # at most


class Soak:
    """One run; `readings` and `samples` are those so far."""

    def __init__(self, bench: Bench, plan: Plan, weather: Weather, approvals: ApprovalTimes, folder: Path) -> None:
        self._bench = bench
        self.plan = plan
        self._weather = weather
        self._source = seeded_random(1)
        self._folder = folder
        network = FaultyProxy(self._source, rate=weather.faults)
        self.service = ServiceProcess(folder / "record", approvals, network)
        self.verdicts = Verdicts(2 * MEMORY)
        self.beside = {how: Verdicts(2 * MEMORY) for how in (BY_DEFAULT, LOOP)}
        self._record = Reader(folder / "record", Entry)
        self._outcomes = Reader(folder / "outcomes", Outcome)
        self._samples = Reader(folder / "samples", Sample)
        self.memory: Points = []  # of the client's process, resident, in MB
        self.cpu = 0.0  # seconds that it used
        self.samples: list[Sample] = []
        self.storms = 0

    async def run(self) -> None:
        """Run until the applications are done."""
        async with self.service:
            client = spawn(applications.run, self.service.network.url, self.plan, self._folder)
            plan = self.plan._replace(applications=self.plan.applications // 50, in_batches=0.0)
            beside = spawn(applications.run_beside, self.service.network.url, plan, self._folder)
            every = self._weather.every
            try:
                async with meanwhile(
                    repeat(every, self._source, self._storm),
                    repeat(every, self._source, self._kill_service),
                    repeat(60.0, self._source, self._tell),
                ):
                    await self._observe(client)
            finally:
                for process in (client, beside):
                    process.kill()
                    await asyncio.to_thread(process.join)
        self._compare()
        if not self.memory or len(self.samples) < 2 or self.samples[-1].waiting:
            raise CannotMeasureError(f"the client's process ended too early, with {client.exitcode}")

    async def _storm(self) -> None:
        self.storms += 1
        self.service.network.rate = self._weather.storm_faults
        await asyncio.sleep(self._weather.storm)
        self.service.network.rate = self._weather.faults

    async def _kill_service(self) -> None:
        await self.service.interrupt(self._weather.down * self._source.uniform(0.2, 1.0))

    async def _observe(self, client: SpawnProcess) -> None:
        """Read the client's process now and then, until it ends."""
        process, started = psutil.Process(client.pid), time.monotonic()
        while client.is_alive():
            await asyncio.to_thread(client.join, self.plan.sample)
            if not client.is_alive():
                return
            self.cpu = sum(process.cpu_times()[:2])
            self.memory.append((time.monotonic() - started, process.memory_info().rss / _MB))

    async def _tell(self) -> None:
        """Compare, and say what happened."""
        self._compare()
        counts = ", ".join(f"{verdict} {count}" for verdict, count in self.verdicts.counts().items())
        self._bench.progress(f"  {self.samples[-1].waiting} waits, {counts}; {self.memory[-1][1]:.1f} MB")

    def _compare(self) -> None:
        """Compare the outcomes since the last time with the record."""
        outcomes = list(self._outcomes.read())
        for entry in self._record.read():  # later than the outcomes: what they depend on is there
            for verdicts in (self.verdicts, *self.beside.values()):
                verdicts.record(entry)
        for outcome in outcomes:
            if outcome.how in self.beside:
                self.beside[outcome.how].evaluate(outcome)
            if outcome.how != LOOP:
                self.verdicts.evaluate(outcome)
        self.samples += self._samples.read()


def run(bench: Bench) -> Report:
    """Run the soak for an hour, or the minutes that were asked for."""
    allow_many_sockets()
    seconds = 60 * bench.minutes
    plan, weather = bench.pick(
        full=(
            Plan(10_700, 0.1, seconds, min(60.0, seconds / 6), expires_in=180.0, sample=5.0, uvloop=bench.uvloop),
            Weather(0.002, 0.05, storm=30.0, every=300.0, down=20.0),
        ),
        smoke=(
            Plan(100, 0.1, seconds, 0.5, expires_in=2.0, sample=0.2, uvloop=bench.uvloop),
            Weather(0.02, 0.2, storm=0.5, every=2.0, down=0.5),
        ),
    )
    approvals = ApprovalTimes(((1.0, plan.expires_in / 3, 0.8),), never=0.1)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(bench, plan, weather, approvals, Path(folder))
        asyncio.run(soak.run())
    return _report(soak)


def _report(soak: Soak) -> Report:
    waiting = statistics.median(sample.waiting for sample in soak.samples)
    series = _series(soak)
    report = Report(
        f"soak: {waiting:.0f} waits at a time for {soak.plan.seconds / 60:g} minutes, with faults at every layer"
    )
    report.tables += [_endings(soak), soak.verdicts.table(), _beside(soak), growth.table(series), _process(soak)]
    report.goals += [
        *soak.verdicts.goals(),
        Goal("growth of the resident memory, an hour", 1.0, growth.an_hour(series["resident memory, MB"]), " MB"),
    ]
    if soak.plan.uvloop:
        report.notes.append("the client ran on uvloop")
    report.notes += soak.verdicts.examples
    samples = soak.samples[:: 1 + len(soak.samples) // 240]
    report.raw = {
        "seconds": soak.plan.seconds,
        "memory": soak.memory[:: 1 + len(soak.memory) // 240],
        "polls": [(sample.held.at - samples[0].held.at, sample.polls) for sample in samples],
        "verdicts": soak.verdicts.counts(),
        "beside": {how: verdicts.counts() for how, verdicts in soak.beside.items()},
    }
    return report


def _series(soak: Soak) -> dict[str, Points]:
    """Return what the client took, until its shutdown: to cancel ten thousand tasks takes some megabytes."""
    start, samples, seconds = soak.samples[0].held.at, soak.samples[:-1], soak.plan.seconds
    series = {
        "resident memory, MB": [point for point in soak.memory if point[0] < seconds],
        **growth.held("client", [sample.held for sample in samples], start),
    }
    return {name: growth.warm(points, seconds) for name, points in series.items()}


def _endings(soak: Soak) -> Table:
    endings = soak.verdicts.endings
    seen = [ending for ending in Ending if any(of is ending for _, of in endings)]
    table = Table("how waits ended", ["method", *seen])
    for how in sorted({how for how, _ in endings}):
        table.rows.append([how, *(f"{endings[how, ending]}" for ending in seen)])
    return table


def _beside(soak: Soak) -> Table:
    by_default, loops = (verdicts.figures() for verdicts in soak.beside.values())
    rows = [[name, f"{figure}", f"{loops[name]}"] for name, figure in by_default.items()]
    return Table("beside each other, compared with the service's record", ["", *soak.beside], rows)


def _process(soak: Soak) -> Table:
    samples, (passed, _) = soak.samples, soak.memory[-1]
    first, last = samples[0], samples[-1]
    figures = {
        "polls a second": f"{(last.polls - first.polls) / (last.held.at - first.held.at):.0f}",
        "CPU, share of a core": f"{soak.cpu / passed:.0%}",
        "waits, at most": max(sample.waiting for sample in samples),
        "tasks, at most": max(sample.tasks for sample in samples[:-1]),
        "tasks after the end": last.tasks,
        "the service was killed": soak.service.starts - 1,
        "storms of faults": soak.storms,
        "connections that the client made": soak.service.network.connections,
        **{f"proxy: {fault}": count for fault, count in sorted(soak.service.network.counts.items())},
    }
    return Table.of_pairs("the client, and what was done to it", figures)


def draw(raw: dict[str, Any]) -> Figure:
    """Draw the resident memory, and the polls a second, over time."""
    figure, (memory, polls) = pictures.panels(2)
    growth.draw(memory, {"client": raw["memory"]}, raw["seconds"])
    memory.set_ylabel("resident memory, MB")
    memory.legend()
    rates = [(then, (b - a) / (then - at)) for (at, a), (then, b) in itertools.pairwise(raw["polls"]) if then > at]
    growth.draw(polls, {"client": rates}, raw["seconds"])
    polls.set_ylabel("polls per second")
    return figure
