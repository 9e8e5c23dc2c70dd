"""An hour of everything at once: thousands of waits, faults at every layer, a service that is killed; nothing lost.

Three processes: the client with all applications; the service; and this one, which runs the proxy between them, kills
the service now and then, and compares what applications were told with the service's record. See `benchmarks.soak`.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import psutil  # type: ignore[import-untyped]  # it has no type hints

from benchmarks import pictures
from benchmarks.approval_times import ApprovalTimes, seeded_random
from benchmarks.report import CannotMeasureError, Goal, Report, Table
from benchmarks.server import allow_many_sockets
from benchmarks.soak import applications, heap
from benchmarks.soak.applications import Plan, Sample
from benchmarks.soak.histogram import Histogram
from benchmarks.soak.journal import Reader
from benchmarks.soak.proxy import FaultyProxy
from benchmarks.soak.service import Habits, ServiceProcess
from benchmarks.soak.verdicts import Ending, Entry, Outcome, Verdict, Verdicts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from multiprocessing.context import SpawnProcess

    from matplotlib.figure import Figure

    from benchmarks.bench import Bench

#: Not part of "all benchmarks": it takes an hour.
ONLY_BY_NAME: Final = True

#: Of the time: what caches and pools take by then is not growth, nor what the allocator keeps of the bursts of
#: connections after the first outages, of which there is one in some five minutes.
_WARM_UP: Final = 1 / 3
_MEMORY: Final = 1200.0  # seconds after its creation for which an operation is remembered: no wait asks later
_MB: Final = 1e6


class Weather(NamedTuple):
    """What is done to the client, in seconds and shares of the chunks of bytes."""

    faults: float  # usually
    storm_faults: float  # in a storm
    storm_every: float
    storm: float
    kill_every: float
    down: float  # at most


class Reading(NamedTuple):
    """The client's process from outside, at one instant."""

    at: float
    resident: int  # bytes
    descriptors: int
    cpu: float  # seconds since its start


class Soak:
    """One run; `readings` and `samples` are those so far."""

    def __init__(self, bench: Bench, plan: Plan, weather: Weather, approvals: ApprovalTimes, folder: Path) -> None:
        self._bench = bench
        self.plan = plan
        self._weather = weather
        self._source = seeded_random(1)
        self._folder = folder
        self.service = ServiceProcess(folder / "record", Habits(approvals, _MEMORY))
        self.proxy = FaultyProxy(self._source, rate=weather.faults)
        self.verdicts = Verdicts(2 * _MEMORY)
        self._record = Reader(folder / "record", Entry)
        self._outcomes = Reader(folder / "outcomes", Outcome)
        self._samples = Reader(folder / "samples", Sample)
        self.readings: list[Reading] = []
        self.samples: list[Sample] = []
        self.storms = 0

    async def run(self) -> None:
        """Run until the applications are done."""
        async with self.proxy:
            self.proxy.target = await self.service.start()
            client = self._start_client()
            disturbing = [asyncio.create_task(self._storms()), asyncio.create_task(self._kills())]
            try:
                await self._observe(client)
            finally:
                for task in disturbing:
                    task.cancel()
                await asyncio.wait(disturbing)
                client.kill()
                await asyncio.to_thread(client.join)
                await self.service.kill()
        self._compare()
        for task in disturbing:
            if not task.cancelled():
                task.result()  # a service that did not start again
        if client.exitcode not in {0, None} and not self._finished:
            raise CannotMeasureError(f"the client's process ended with {client.exitcode}")

    def _start_client(self) -> SpawnProcess:
        spawn = multiprocessing.get_context("spawn")
        client = spawn.Process(target=applications.run, args=(self.proxy.url, self.plan, self._folder), daemon=True)
        client.start()
        return client

    @property
    def _finished(self) -> bool:
        return bool(self.samples) and self.samples[-1].waiting == 0

    async def _storms(self) -> None:
        while True:
            await asyncio.sleep(self._weather.storm_every * self._source.uniform(0.5, 1.5))
            self.storms += 1
            self.proxy.rate = self._weather.storm_faults
            await asyncio.sleep(self._weather.storm)
            self.proxy.rate = self._weather.faults

    async def _kills(self) -> None:
        while True:
            await asyncio.sleep(self._weather.kill_every * self._source.uniform(0.5, 1.5))
            self.proxy.target = None
            await self.service.kill()
            await asyncio.sleep(self._weather.down * self._source.uniform(0.2, 1.0))
            self.proxy.target = await self.service.start()

    async def _observe(self, client: SpawnProcess) -> None:
        """Read the client's process now and then, and tell what happened each minute, until it ends."""
        process = psutil.Process(client.pid)
        told = time.monotonic()
        while client.is_alive():
            await asyncio.to_thread(client.join, self.plan.sample)
            if not client.is_alive():
                return
            with process.oneshot():
                times = process.cpu_times()
                held = process.memory_info().rss
            self.readings.append(Reading(time.monotonic(), held, process.num_fds(), times.user + times.system))
            if time.monotonic() - told >= 60.0:
                told += 60.0
                self._compare()
                self._bench.progress(f"  {self._line()}")

    def _compare(self) -> None:
        """Compare the outcomes since the last time with the record."""
        outcomes = list(self._outcomes.read())
        for entry in self._record.read():  # later than the outcomes: what they depend on is there
            self.verdicts.record(entry)
        for outcome in outcomes:
            self.verdicts.evaluate(outcome)
        self.samples += self._samples.read()

    def _line(self) -> str:
        """Say what happened so far, and how the client is."""
        verdicts, (last, now) = self.verdicts, (self.samples[-2:] if len(self.samples) > 1 else [self.samples[-1]] * 2)
        passed = (now.at - self.samples[0].at) / 60
        polls = (now.polls - last.polls) / max(now.at - last.at, 1e-9)
        counts = ", ".join(f"{verdict} {verdicts.verdicts[verdict]}" for verdict in Verdict)
        reading = self.readings[-1]
        client = f"{reading.resident / _MB:.1f} MB, {now.tasks} tasks, {reading.descriptors} descriptors"
        kills = f"circuit {now.circuit}, {self.service.starts - 1} kills"
        return f"{passed:.0f} min: {now.waiting} waiting, {polls:.0f} polls/s; {counts}; {client}; {kills}"


def run(bench: Bench) -> Report:
    """Run the soak for an hour, or the minutes that were asked for."""
    allow_many_sockets()
    minutes = bench.minutes if bench.minutes is not None else bench.pick(full=60.0, quick=1.5, smoke=0.1)
    seconds = 60 * minutes
    plan = bench.pick(
        full=Plan(10_700, seconds, min(60.0, seconds / 6), expires_in=180.0, sample=5.0),
        quick=Plan(1_000, seconds, 10.0, expires_in=30.0, sample=1.0),
        smoke=Plan(100, seconds, 0.5, expires_in=2.0, sample=0.2),
    )
    plan = plan._replace(uvloop=bench.uvloop)
    weather = bench.pick(
        full=Weather(0.002, 0.05, storm_every=300.0, storm=30.0, kill_every=300.0, down=20.0),
        quick=Weather(0.005, 0.2, storm_every=30.0, storm=5.0, kill_every=30.0, down=5.0),
        smoke=Weather(0.02, 0.2, storm_every=2.0, storm=0.5, kill_every=2.5, down=0.5),
    )
    approvals = ApprovalTimes(((1.0, plan.expires_in / 3, 0.8),), never=0.1)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(bench, plan, weather, approvals, Path(folder))
        asyncio.run(soak.run())
    return _report(soak, minutes)


def _report(soak: Soak, minutes: float) -> Report:
    if not soak.readings or len(soak.samples) < 2:
        raise CannotMeasureError("the client ended before anything was measured")
    waiting = statistics.median(sample.waiting for sample in soak.samples)
    report = Report(f"soak: {waiting:.0f} waits at a time for {minutes:g} minutes, with faults at every layer")
    report.tables += [_endings(soak), _verdicts(soak), _process(soak), _faults(soak)]
    counts = soak.verdicts.verdicts
    slope = _slope(soak)
    report.goals += [
        Goal("approvals lost", 0, counts[Verdict.LOST], required=True),
        Goal("wrong approvals", 0, counts[Verdict.WRONG], required=True),
        Goal("waits that ended unexpectedly", 0, counts[Verdict.UNEXPECTED], required=True),
        Goal("waits left after the end", 0, soak.samples[-1].waiting, required=True),
        Goal("growth of the resident memory, an hour", 1.0, slope, " MB"),
    ]
    if heap.threshold() is not None:
        report.notes.append(f"with {heap.THRESHOLD}={heap.threshold()} in the environment")
    if soak.plan.uvloop:
        report.notes.append("the client ran on uvloop")
    report.notes += soak.verdicts.examples
    report.raw = _raw(soak, slope)
    return report


def _endings(soak: Soak) -> Table:
    endings = soak.verdicts.endings
    seen = [ending for ending in Ending if any(of is ending for _, of in endings)]
    table = Table("how waits ended", ["method", *seen])
    for how in sorted({how for how, _ in endings}):
        table.rows.append([how, *(f"{endings[how, ending]}" for ending in seen)])
    table.rows.append(["all", *(f"{sum(n for (_, of), n in endings.items() if of is ending)}" for ending in seen)])
    return table


def _verdicts(soak: Soak) -> Table:
    verdicts, late = soak.verdicts, soak.verdicts.lateness
    table = Table("compared with the service's record", ["", "figure"])
    table.rows.extend([f"{verdict}", f"{verdicts.verdicts[verdict]}"] for verdict in Verdict)
    table.rows.extend(
        [
            ["noticed after the approval, median, s", f"{late.quantile(0.5):.2f}"],
            ["the same, 99%", f"{late.quantile(0.99):.2f}"],
            ["the same, the longest", f"{late.quantile(1.0):.2f}"],
        ]
    )
    for how, over in sorted(verdicts.overrun.items()):
        table.rows.append([f"{how}: over later than 2 s after the deadline", f"{over.total}"])
        table.rows.append(["the longest of them, s more", f"{over.quantile(1.0):.2g}"])
    return table


def _process(soak: Soak) -> Table:
    warm, last, samples = _warm(soak), soak.readings[-1], soak.samples
    lag = Histogram()
    for sample in samples:
        lag.update(Histogram(sample.loop_lag))
    passed = last.at - soak.readings[0].at
    while_busy = samples[:-1]
    table = Table("the client's process", ["", "figure"])
    table.rows.extend(
        [
            ["polls a second", f"{(samples[-1].polls - samples[0].polls) / (samples[-1].at - samples[0].at):.0f}"],
            ["polls that failed", f"{samples[-1].failures}"],
            ["CPU, share of a core", f"{(last.cpu - soak.readings[0].cpu) / max(passed, 1e-9):.0%}"],
            ["resident memory after the warm-up, MB", f"{warm[0].resident / _MB:.1f}"],
            ["at the end", f"{warm[-1].resident / _MB:.1f}"],
            ["growth, MB an hour", f"{_slope(soak):.2f}"],
            ["growth of what objects take of it, % an hour", f"{_blocks_slope(soak):.2f}"],
            *_heap_rows(soak),
            ["waits, at most", f"{max(sample.waiting for sample in samples)}"],
            ["tasks, at most", f"{max(sample.tasks for sample in while_busy)}"],
            ["tasks after the end", f"{samples[-1].tasks}"],
            ["descriptors after the warm-up", f"{warm[0].descriptors}"],
            ["descriptors, at most", f"{max(reading.descriptors for reading in soak.readings)}"],
            ["lag of the event loop, median, ms", f"{1e3 * lag.quantile(0.5):.2f}"],
            ["the same, 99%", f"{1e3 * lag.quantile(0.99):.2f}"],
            ["the same, the longest", f"{1e3 * lag.quantile(1.0):.0f}"],
            ["the longest that polls were late, s", f"{max(sample.lag for sample in samples):.2f}"],
            ["until the slowest cancelled wait had ended, ms", f"{1e3 * max(sample.cancel for sample in samples):.0f}"],
        ]
    )
    return table


def _faults(soak: Soak) -> Table:
    table = Table("what was done to it", ["", "times"])
    table.rows.extend(
        [
            ["the service was killed", f"{soak.service.starts - 1}"],
            ["storms of faults", f"{soak.storms}"],
            ["connections that the client made", f"{soak.proxy.connections}"],
            *([f"proxy: {fault}", f"{count}"] for fault, count in sorted(soak.proxy.counts.items())),
        ]
    )
    return table


def _warm(soak: Soak) -> list[Reading]:
    """Return the readings after the warm-up, until the last sample before the client was shut down.

    Cancelling ten thousand tasks at once takes some megabytes, which is no growth.
    """
    start, end = soak.readings[0].at + _WARM_UP * soak.plan.seconds, soak.samples[-2].at
    return [reading for reading in soak.readings if start <= reading.at <= end] or soak.readings[-1:]


def _warm_samples(soak: Soak) -> list[Sample]:
    """Return the samples after the warm-up, without that of the end."""
    return soak.samples[int(_WARM_UP * len(soak.samples)) : -1]


def _an_hour(points: Sequence[tuple[float, float]]) -> float:
    """Return how fast a value grew in an hour, by a straight line through its values at times in seconds."""
    if len(points) < 2:
        return 0.0
    return statistics.linear_regression([at / 3600 for at, _ in points], [value for _, value in points]).slope


def _slope(soak: Soak) -> float:
    """Return how fast the resident memory grew after the warm-up, in MB an hour."""
    return _an_hour([(reading.at, reading.resident / _MB) for reading in _warm(soak)])


def _blocks_slope(soak: Soak) -> float:
    """Return how fast the memory blocks of objects grew after the warm-up, in percent an hour."""
    warm = _warm_samples(soak)
    return 100 * _an_hour([(sample.at, sample.blocks) for sample in warm]) / warm[0].blocks if warm else 0.0


def _heap_rows(soak: Soak) -> list[list[str]]:
    """Return how fast the C library's heap grew after the warm-up: what is in use, and what is free between that."""
    warm = [(sample.at, sample.heap) for sample in _warm_samples(soak) if sample.heap is not None]
    if len(warm) < 2:
        return []
    in_use = _an_hour([(at, of.in_use / _MB) for at, of in warm])
    free = _an_hour([(at, of.free / _MB) for at, of in warm])
    return [
        ["growth of what is in use of the C library's heap, MB an hour", f"{in_use:.2f}"],
        ["growth of what is free in it, MB an hour", f"{free:.2f}"],
    ]


def _raw(soak: Soak, slope: float) -> dict[str, Any]:
    start = soak.readings[0].at
    every = max(len(soak.readings) // 240, 1)
    return {
        "readings": [[r.at - start, r.resident, r.descriptors, r.cpu] for r in soak.readings[::every]],
        "samples": [
            [s.at - start, s.waiting, s.polls, s.failures, s.tasks, s.lag, s.blocks] for s in soak.samples[::every]
        ],
        "slope": slope,
        "warm_up": _WARM_UP * soak.plan.seconds,
        "verdicts": {f"{verdict}": soak.verdicts.verdicts[verdict] for verdict in Verdict},
        "endings": [[how, f"{ending}", count] for (how, ending), count in sorted(soak.verdicts.endings.items())],
        "lateness": soak.verdicts.lateness.counts,
        "overrun": {how: over.counts for how, over in soak.verdicts.overrun.items()},
    }


def draw(raw: dict[str, Any]) -> Figure:
    """Draw the resident memory, and the polls a second, over time."""
    figure, (memory, polls) = pictures.panels(2)
    memory.plot([r[0] / 60 for r in raw["readings"]], [r[1] / _MB for r in raw["readings"]], color=pictures.OURS)
    memory.axvline(raw["warm_up"] / 60, color=pictures.OTHERS[0], linestyle="--", label="end of the warm-up")
    memory.set_ylim(bottom=0)
    memory.set_xlabel("minutes")
    memory.set_ylabel("resident memory, MB")
    memory.legend()
    rates = list(_rates(raw["samples"]))
    polls.plot([minute for minute, _ in rates], [rate for _, rate in rates], color=pictures.OURS)
    polls.set_ylim(bottom=0)
    polls.set_xlabel("minutes")
    polls.set_ylabel("polls per second")
    return figure


def _rates(samples: list[list[float]]) -> Iterator[tuple[float, float]]:
    for (before, _, first, *_), (at, _, then, *_) in itertools.pairwise(samples):
        if at > before:
            yield at / 60, (then - first) / (at - before)
