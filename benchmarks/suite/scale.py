"""The cost as the work grows: more waits, more polls per second, and the CPU of each package.

Waits that are never approved are polled again and again, at random times, so that the number of waits and the polls
per second are independent. CPU is that of the client process, divided by its polls in the same time.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import statistics
import time
import uuid
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tenacity import wait_chain, wait_random

from aiokeyless import KeylessClient
from benchmarks import pictures
from benchmarks.baselines import OURS
from benchmarks.bench import order
from benchmarks.report import CannotMeasureError, Goal, Report, Spread, Table
from benchmarks.server import API_KEY, Server, Workload, serving
from benchmarks.suite import waits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from types import FrameType

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmarks.bench import Bench

_IN_FLIGHT: Final = 16
_STRAIGHT: Final = 1.05  # the largest slope in a log-log diagram that counts as linear
_FEW: Final = 3_000  # up to here allocations are counted: resident memory is too rough for few waits
_MANY: Final = 10_000  # more waits than this take long to start: one round is enough
_LATE: Final = 0.02  # seconds: with a larger median lag, the polls are not sustained
_FULL: Final = 0.9  # of a core: with less, other programs took the rest
_SETTLE: Final = 0.7  # seconds
_START_WITHIN: Final = 300.0
_SAMPLE: Final = 0.001  # CPU seconds between two samples
_LAG_INTERVAL: Final = 0.02  # seconds between two readings of the lag


class Point(NamedTuple):
    """The measurements of one time window."""

    polls: float  # per second
    cpu: float  # seconds per poll
    lag: float  # seconds by which the oldest due poll was late, median of many readings


class Size(NamedTuple):
    """A number of waits, and their cost."""

    waits: int
    points: list[Point]
    memory: float  # bytes per wait

    @property
    def cpu(self) -> Spread:
        """CPU seconds per poll."""
        return Spread.of([point.cpu for point in self.points])


class Step(NamedTuple):
    """One step of the sweep to higher rates."""

    offered: float  # polls per second
    point: Point

    @property
    def sustained(self) -> bool:
        """Whether polls were sent when they were due."""
        return self.point.lag <= _LATE

    @property
    def share(self) -> float:
        """The share of a core that the client used."""
        return self.point.polls * self.point.cpu


def run(bench: Bench) -> Report:
    """Measure by number of waits, by polls per second, and by package."""
    report = Report(f"scale: cost as the work grows, {_IN_FLIGHT} in flight")
    with serving() as server:
        rate = bench.pick(full=2000.0, quick=2000.0, smoke=500.0)
        sizes = _sizes(bench, server, rate)
        steps = _sweep(bench, server)
        report.tables += [_size_table(sizes, rate), _step_table(steps)]
        _judge(report, sizes, steps)
        _profile_packages(bench, server, report)
    report.raw["rate"] = rate
    report.raw["sizes"] = [
        {"waits": size.waits, "cpu": size.cpu.median, "memory": size.memory, "points": [[*p] for p in size.points]}
        for size in sizes
    ]
    report.raw["steps"] = [{"offered": step.offered, **step.point._asdict()} for step in steps]
    return report


def _judge(report: Report, sizes: list[Size], steps: list[Step]) -> None:
    # The smallest number of waits partly reuses memory that the warm-up freed.
    many = sizes[1:] if len(sizes) > 2 else sizes
    done = [step for step in steps if step.sustained]
    fit = [step.point for step in (done if len(done) > 1 else steps)]
    slopes = {
        "CPU over waits": slope([s.waits for s in sizes], [s.waits * s.cpu.median for s in sizes]),
        "memory over waits": slope([s.waits for s in many], [s.waits * s.memory for s in many]),
        "CPU over polls": slope([p.polls for p in fit], [p.polls * p.cpu for p in fit]),
    }
    report.raw["slopes"] = {**slopes}
    report.goals += [Goal(f"slope of {what}", _STRAIGHT, value) for what, value in slopes.items()]
    report.notes.append("slopes are of straight lines fitted to the logarithms: 1 is linear growth")
    most = f"{done[-1].point.polls:.0f}" if done else "none"
    busiest = max(steps, key=lambda step: step.point.polls)
    report.notes.append(
        f"most polls per second sustained: {most}; most completed: "
        f"{busiest.point.polls:.0f}, at 1/{1 / busiest.point.cpu:.0f} s of CPU per poll"
    )
    if busiest.share < _FULL:
        report.notes.append(
            f"but the client had only {busiest.share:.0%} of its core: other processes took the rest, "
            "and one core can do more"
        )


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return the slope of the straight line that fits best in a log-log diagram."""
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope


# -- by waits


def _sizes(bench: Bench, server: Server, rate: float) -> list[Size]:
    counts = bench.pick(full=[100, 1_000, 10_000, 100_000], quick=[300, 1_500], smoke=[20, 50])
    rounds, windows, seconds = bench.pick(full=(2, 3, 1.0), quick=(1, 3, 0.2), smoke=(1, 1, 0.1))
    points: dict[int, list[Point]] = {count: [] for count in counts}
    for k in range(rounds):
        for count in order(counts, k):
            if k == 0 or count <= _MANY:
                bench.progress(f"  {count} waits, round {k + 1} of {rounds}")
                points[count] += bench.in_fresh_process(measure, server, count, rate, windows, seconds)
    return [Size(count, points[count], _memory(bench, server, count)) for count in counts]


def _memory(bench: Bench, server: Server, count: int) -> float:
    bench.progress(f"  {count} waits, memory")
    method = waits.Method.ALLOCATED if count <= _FEW else waits.Method.RESIDENT
    return bench.in_fresh_process(waits.measure, server, OURS, count, method).memory


def _size_table(sizes: list[Size], rate: float) -> Table:
    table = Table(
        f"increasing number of waits, {rate:.0f} polls per second",
        ["waits", "polls/s", "CPU per poll, us", f"over {sizes[0].waits} waits", "memory per wait, B"],
    )
    for size in sizes:
        polls = Spread.of([point.polls for point in size.points]).median
        cpu = Spread.of([1e6 * point.cpu for point in size.points]).text(1)
        over = size.cpu.median / sizes[0].cpu.median
        table.rows.append([f"{size.waits}", f"{polls:.0f}", cpu, f"{over:.2f}", f"{size.memory:.0f}"])
    return table


# -- by polls


def _sweep(bench: Bench, server: Server) -> list[Step]:
    bench.progress("  increasing polls per second")
    size, offered, growth, most, seconds = bench.pick(
        full=(2_000, 2000.0, 1.25, 20, 2.0), quick=(1_000, 6000.0, 1.6, 10, 0.3), smoke=(200, 4000.0, 4.0, 2, 0.1)
    )
    return bench.in_fresh_process(sweep, server, size, offered=offered, growth=growth, most=most, seconds=seconds)


def sweep(server: Server, size: int, *, offered: float, growth: float, most: int, seconds: float) -> list[Step]:
    """Offer more and more polls per second, until two steps in a row are not sustained."""
    steps: list[Step] = []
    while len(steps) < most and (len(steps) < 2 or steps[-1].sustained or steps[-2].sustained):
        (point,) = measure(server, size, offered, 1, seconds)
        steps.append(Step(offered, point))
        offered *= growth
    return steps


def _step_table(steps: list[Step]) -> Table:
    table = Table(
        "increasing polls per second",
        ["offered, polls/s", "completed", "sustained", "lag, ms", "CPU per poll, us", "share of a core"],
    )
    for step in steps:
        point, verdict = step.point, "yes" if step.sustained else "no"
        figures = [
            f"{point.polls:.0f}",
            verdict,
            f"{1e3 * point.lag:.1f}",
            f"{1e6 * point.cpu:.1f}",
            f"{step.share:.0%}",
        ]
        table.rows.append([f"{step.offered:.0f}", *figures])
    return table


# -- many waits, polled at a steady rate


def measure(server: Server, size: int, rate: float, windows: int, seconds: float) -> list[Point]:
    """Return the measurements of this many waits and polls per second, one for each time window."""

    async def measure_points() -> list[Point]:
        async with _waiting_client(server, size, size / rate) as client:
            return [await _point(client, seconds) for _ in range(windows)]

    with Workload(server) as workload:
        points = asyncio.run(measure_points())
    if workload.bound:
        raise CannotMeasureError(f"the server was the bottleneck ({workload.share:.0%} of its core)")
    return points


@contextlib.asynccontextmanager
async def _waiting_client(server: Server, size: int, interval: float) -> AsyncIterator[KeylessClient]:
    """Start waits that are polled at random times, on average every ``interval``; yield when each was polled once.

    With a fixed interval, a few waits would become synchronized after many polls, and simultaneous polls are cheaper.
    """
    schedule = wait_chain(wait_random(0, interval), wait_random(0.5 * interval, 1.5 * interval))
    async with KeylessClient(
        API_KEY, base_url=server.base_url, schedule=schedule, max_in_flight=_IN_FLIGHT, max_polls_per_second=None
    ) as client:
        tasks = [asyncio.create_task(client.wait_for_approval(str(uuid.uuid4()), timeout=3600.0)) for _ in range(size)]
        try:
            async with asyncio.timeout(_START_WITHIN):
                while client.statistics.polls < size:  # noqa: ASYNC110  # there is no event to wait for
                    await asyncio.sleep(_LAG_INTERVAL)
            await asyncio.sleep(min(interval, _SETTLE))  # let the backlog of the start be worked off
            yield client
        finally:
            await waits.cancel(tasks)


async def _point(client: KeylessClient, seconds: float) -> Point:
    lags: list[float] = []
    polls, cpu, wall = client.statistics.polls, time.process_time(), time.perf_counter()
    while time.perf_counter() - wall < seconds:
        await asyncio.sleep(_LAG_INTERVAL)
        lags.append(client.statistics.lag)
    polls, cpu, wall = client.statistics.polls - polls, time.process_time() - cpu, time.perf_counter() - wall
    return Point(polls / wall, cpu / polls, statistics.median(lags))


# -- CPU by package

_PACKAGES: Final = {
    "aiokeyless": "aiokeyless",
    "tenacity": "tenacity, for the schedule",
    "aiohttp": "aiohttp",
    "yarl": "aiohttp's yarl and multidict",
    "multidict": "aiohttp's yarl and multidict",
    "asyncio": "asyncio, with the system calls for sockets",
}
_OTHER: Final = "other"


def _profile_packages(bench: Bench, server: Server, report: Report) -> None:
    """Add the table of CPU by package; the client is overloaded, so that there are many samples."""
    bench.progress("  CPU by package")
    size, rate, seconds = bench.pick(full=(10_000, 50_000.0, 8.0), quick=(1_000, 50_000.0, 0.8), smoke=(50, 500.0, 0.2))
    try:
        point, samples = bench.in_fresh_process(profile, server, size, rate, seconds)
    except CannotMeasureError as error:
        report.notes.append(f"CPU by package: not measured, {error}")
        return
    total = sum(samples.values())
    table = Table(
        f"CPU by package: {size} waits, {point.polls:.0f} polls per second ({total} samples)",
        ["", "share", "standard error", "us per poll"],
    )
    for package in [*dict.fromkeys(_PACKAGES.values()), _OTHER]:
        share = samples.get(package, 0) / total
        uncertain = math.sqrt(share * (1 - share) / total)
        table.rows.append([package, f"{share:.1%}", f"{uncertain:.1%}", f"{1e6 * share * point.cpu:.1f}"])
    report.tables.append(table)
    report.raw["packages"] = {**samples}
    report.notes.append("aiokeyless includes reading and decoding the answer, which every client has to do")


def profile(server: Server, size: int, rate: float, seconds: float) -> tuple[Point, dict[str, int]]:
    """Return the number of samples of each package."""
    if not hasattr(signal, "setitimer"):
        raise CannotMeasureError("this system has no CPU time timer")

    async def profile_point() -> tuple[Point, dict[str, int]]:
        async with _waiting_client(server, size, size / rate) as client:
            with _sampling() as samples:
                point = await _point(client, seconds)
        return point, dict(samples)

    point, samples = asyncio.run(profile_point())
    if not samples:
        raise CannotMeasureError("the timer never fired: the client used too little CPU")
    return point, samples


@contextlib.contextmanager
def _sampling() -> Iterator[Counter[str]]:
    """Sample the stack by CPU time, and count each sample for the innermost frame of a package that is listed here.

    C code and the standard library therefore count for their caller.
    """
    samples: Counter[str] = Counter()

    def sample(_signal: int, frame: FrameType | None) -> None:
        while frame is not None:
            name = str(frame.f_globals.get("__name__")).partition(".")[0]
            if name in _PACKAGES:
                samples[_PACKAGES[name]] += 1
                return
            frame = frame.f_back
        samples[_OTHER] += 1

    before = signal.signal(signal.SIGPROF, sample)
    signal.setitimer(signal.ITIMER_PROF, _SAMPLE, _SAMPLE)
    try:
        yield samples
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


# -- the picture


def draw(raw: dict[str, Any]) -> Figure:
    """Draw cost against waits, and completed against offered polls."""
    figure, (by_waits, by_polls) = pictures.panels(2)
    _draw_sizes(by_waits, raw)
    offered = [step["offered"] for step in raw["steps"]]
    done = [step["polls"] for step in raw["steps"]]
    by_polls.plot([0, max(offered)], [0, max(offered)], "--", color=pictures.OTHERS[0], label="offered")
    by_polls.plot(offered, done, "o-", color=pictures.OURS, label="completed")
    by_polls.set_xlabel("polls per second offered")
    by_polls.set_ylabel("polls per second completed, one core")
    by_polls.legend()
    return figure


def _draw_sizes(ax: Axes, raw: dict[str, Any]) -> None:
    sizes, slopes = raw["sizes"], raw["slopes"]
    waiting = [size["waits"] for size in sizes]
    cpu = [size["waits"] * size["cpu"] for size in sizes]
    memory = [size["waits"] * size["memory"] / 1e6 for size in sizes]
    name = f"CPU to poll each wait once, s (slope {slopes['CPU over waits']:.2f})"
    ax.plot(waiting, cpu, "o-", color=pictures.OURS, label=name)
    name = f"memory, MB (slope {slopes['memory over waits']:.2f})"
    ax.plot(waiting, memory, "o-", color=pictures.OTHERS[1], label=name)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("waits")
    ax.legend()
