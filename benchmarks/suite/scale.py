"""What the work costs as it grows: more waits, more polls a second, and whose part of it is ours.

Waits that are never approved are looked at again and again, at random moments, so that "waits" and "polls a
second" are chosen independently. CPU is that of the client's process, divided by the looks that it made meanwhile.
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
_STRAIGHT: Final = 1.05  # a line in a log-log diagram that is no steeper shows no growth worth the name
_FEW: Final = 3_000  # up to here memory is counted to the byte: what is resident says little about few waits
_MANY: Final = 10_000  # more than these take long to begin: once is enough
_LATE: Final = 0.02  # seconds: looks that are later than this, for long, are more than can be done
_FULL: Final = 0.9  # of a core: with less, a client at its limit has had neighbours
_SETTLE: Final = 0.7  # seconds
_BEGIN_WITHIN: Final = 300.0
_SAMPLE: Final = 0.001  # seconds of CPU between two samples
_LOOK: Final = 0.02  # seconds between two looks at the lag


class Point(NamedTuple):
    """What a crowd of waits did in one stretch of time."""

    polls: float  # a second
    cpu: float  # seconds a poll
    lag: float  # seconds by which the oldest due look was late, median of many glances


class Size(NamedTuple):
    """A number of waits, and what they cost."""

    waits: int
    points: list[Point]
    memory: float  # bytes a wait

    @property
    def cpu(self) -> Spread:
        """Seconds of CPU a look."""
        return Spread.of([point.cpu for point in self.points])


class Step(NamedTuple):
    """One step of the sweep upwards."""

    offered: float  # polls a second
    point: Point

    @property
    def sustained(self) -> bool:
        """Whether looks were made when they were due."""
        return self.point.lag <= _LATE

    @property
    def share(self) -> float:
        """The part of its core that the client had."""
        return self.point.polls * self.point.cpu


def run(bench: Bench) -> Report:
    """Measure by waits, by polls a second, and by who spends it."""
    report = Report(f"scale: cost as work grows, {_IN_FLIGHT} in flight")
    with serving() as server:
        rate = bench.pick(full=2000.0, quick=2000.0, smoke=500.0)
        sizes = _sizes(bench, server, rate)
        steps = _sweep(bench, server)
        report.tables += [_size_table(sizes, rate), _step_table(steps)]
        _judge(report, sizes, steps)
        _owners(bench, server, report)
    report.raw["rate"] = rate
    report.raw["sizes"] = [
        {"waits": size.waits, "cpu": size.cpu.median, "memory": size.memory, "points": [[*p] for p in size.points]}
        for size in sizes
    ]
    report.raw["steps"] = [{"offered": step.offered, **step.point._asdict()} for step in steps]
    return report


def _judge(report: Report, sizes: list[Size], steps: list[Step]) -> None:
    # The memory of the smallest crowd is partly room that the warm-up has left.
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
    report.notes.append("slopes are those of straight lines through the logarithms: 1 is in proportion")
    most = f"{done[-1].point.polls:.0f}" if done else "none"
    busiest = max(steps, key=lambda step: step.point.polls)
    report.notes.append(
        f"most polls a second that were sustained: {most}; most that were done: "
        f"{busiest.point.polls:.0f}, where a poll took 1/{1 / busiest.point.cpu:.0f} s of CPU"
    )
    if busiest.share < _FULL:
        report.notes.append(
            f"but the client had only {busiest.share:.0%} of its core then: other processes took the rest, "
            "and what one core can do is more"
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
                bench.say(f"  {count} waits, round {k + 1} of {rounds}")
                points[count] += bench.apart(measure, server, count, rate, windows, seconds)
    return [Size(count, points[count], _memory(bench, server, count)) for count in counts]


def _memory(bench: Bench, server: Server, count: int) -> float:
    bench.say(f"  {count} waits, memory")
    method = waits.Method.ALLOCATED if count <= _FEW else waits.Method.RESIDENT
    return bench.apart(waits.measure, server, waits.OURS, count, method).memory


def _size_table(sizes: list[Size], rate: float) -> Table:
    table = Table(
        f"{rate:.0f} polls a second, of more and more waits",
        ["waits", "polls/s", "CPU per look, us", f"over {sizes[0].waits} waits", "memory per wait, B"],
    )
    for size in sizes:
        polls = Spread.of([point.polls for point in size.points]).median
        cpu = Spread.of([1e6 * point.cpu for point in size.points]).text(1)
        over = size.cpu.median / sizes[0].cpu.median
        table.rows.append([f"{size.waits}", f"{polls:.0f}", cpu, f"{over:.2f}", f"{size.memory:.0f}"])
    return table


# -- by polls


def _sweep(bench: Bench, server: Server) -> list[Step]:
    bench.say("  more and more polls a second")
    size, offered, growth, most, seconds = bench.pick(
        full=(2_000, 2000.0, 1.25, 20, 2.0), quick=(1_000, 6000.0, 1.6, 10, 0.3), smoke=(200, 4000.0, 4.0, 2, 0.1)
    )
    return bench.apart(sweep, server, size, offered=offered, growth=growth, most=most, seconds=seconds)


def sweep(server: Server, size: int, *, offered: float, growth: float, most: int, seconds: float) -> list[Step]:
    """Offer more and more polls a second, until twice in a row it was too much."""
    steps: list[Step] = []
    while len(steps) < most and (len(steps) < 2 or steps[-1].sustained or steps[-2].sustained):
        (point,) = measure(server, size, offered, 1, seconds)
        steps.append(Step(offered, point))
        offered *= growth
    return steps


def _step_table(steps: list[Step]) -> Table:
    table = Table(
        "more and more polls a second",
        ["offered, polls/s", "done", "sustained", "lag, ms", "CPU per poll, us", "of its core"],
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


# -- a crowd of waits in full swing


def measure(server: Server, size: int, rate: float, windows: int, seconds: float) -> list[Point]:
    """Return what so many waits do at this many polls a second, in some stretches of time."""

    async def measured() -> list[Point]:
        async with _crowd(server, size, size / rate) as client:
            return [await _point(client, seconds) for _ in range(windows)]

    with Workload(server) as workload:
        points = asyncio.run(measured())
    if workload.bound:
        raise CannotMeasureError(f"the server was the bottleneck ({workload.share:.0%} of its core)")
    return points


@contextlib.asynccontextmanager
async def _crowd(server: Server, size: int, every: float) -> AsyncIterator[KeylessClient]:
    """Have waits that are looked at every so often, at random moments; go on when all have begun.

    With moments that only repeat, few waits would fall into step after many looks, and looks made together are cheaper.
    """
    schedule = wait_chain(wait_random(0, every), wait_random(0.5 * every, 1.5 * every))
    async with KeylessClient(API_KEY, base_url=server.base_url, schedule=schedule, max_in_flight=_IN_FLIGHT) as client:
        tasks = [asyncio.create_task(client.wait_for_approval(str(uuid.uuid4()), timeout=3600.0)) for _ in range(size)]
        try:
            async with asyncio.timeout(_BEGIN_WITHIN):
                while client.statistics.polls < size:  # noqa: ASYNC110  # statistics are no event
                    await asyncio.sleep(_LOOK)
            await asyncio.sleep(min(every, _SETTLE))  # what came due meanwhile is made up for
            yield client
        finally:
            await waits.cancel(tasks)


async def _point(client: KeylessClient, seconds: float) -> Point:
    lags: list[float] = []
    polls, cpu, wall = client.statistics.polls, time.process_time(), time.perf_counter()
    while time.perf_counter() - wall < seconds:
        await asyncio.sleep(_LOOK)
        lags.append(client.statistics.lag)
    polls, cpu, wall = client.statistics.polls - polls, time.process_time() - cpu, time.perf_counter() - wall
    return Point(polls / wall, cpu / polls, statistics.median(lags))


# -- whose CPU it is

_OWNERS: Final = {
    "aiokeyless": "aiokeyless",
    "tenacity": "tenacity, for the schedule",
    "aiohttp": "aiohttp",
    "yarl": "aiohttp's yarl and multidict",
    "multidict": "aiohttp's yarl and multidict",
    "asyncio": "asyncio, with the system calls for sockets",
}
_ELSE: Final = "anything else"


def _owners(bench: Bench, server: Server, report: Report) -> None:
    """Add the table of who spends the CPU; the client has all that it can do, so that there are many samples."""
    bench.say("  whose CPU it is")
    size, rate, seconds = bench.pick(full=(10_000, 50_000.0, 8.0), quick=(1_000, 50_000.0, 0.8), smoke=(50, 500.0, 0.2))
    try:
        point, samples = bench.apart(profile, server, size, rate, seconds)
    except CannotMeasureError as error:
        report.notes.append(f"whose CPU it is: not measured, {error}")
        return
    total = sum(samples.values())
    table = Table(
        f"whose CPU it is: {size} waits, {point.polls:.0f} polls a second ({total} samples)",
        ["", "part", "standard error", "us a poll"],
    )
    for owner in [*dict.fromkeys(_OWNERS.values()), _ELSE]:
        part = samples.get(owner, 0) / total
        uncertain = math.sqrt(part * (1 - part) / total)
        table.rows.append([owner, f"{part:.1%}", f"{uncertain:.1%}", f"{1e6 * part * point.cpu:.1f}"])
    report.tables.append(table)
    report.raw["owners"] = {**samples}
    report.notes.append("aiokeyless: reading and decoding the answer too, which any client has to do in some way")


def profile(server: Server, size: int, rate: float, seconds: float) -> tuple[Point, dict[str, int]]:
    """Return how often each owner was found at work."""
    if not hasattr(signal, "setitimer"):
        raise CannotMeasureError("this system has no timer of CPU time")

    async def profiled() -> tuple[Point, dict[str, int]]:
        async with _crowd(server, size, size / rate) as client:
            with _sampling() as samples:
                point = await _point(client, seconds)
        return point, dict(samples)

    return asyncio.run(profiled())


@contextlib.contextmanager
def _sampling() -> Iterator[Counter[str]]:
    """Count whom the clock of CPU time finds at work: the innermost frame of a package that has a name here.

    So what is done in C, or in the standard library, counts for whoever called it.
    """
    samples: Counter[str] = Counter()

    def sample(_signal: int, frame: FrameType | None) -> None:
        while frame is not None:
            package = str(frame.f_globals.get("__name__")).partition(".")[0]
            if package in _OWNERS:
                samples[_OWNERS[package]] += 1
                return
            frame = frame.f_back
        samples[_ELSE] += 1

    before = signal.signal(signal.SIGPROF, sample)
    signal.setitimer(signal.ITIMER_PROF, _SAMPLE, _SAMPLE)
    try:
        yield samples
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


# -- the picture


def draw(raw: dict[str, Any]) -> Figure:
    """Draw cost against waits, and polls done against polls offered."""
    figure, (by_waits, by_polls) = pictures.panels(2)
    _draw_sizes(by_waits, raw)
    offered = [step["offered"] for step in raw["steps"]]
    done = [step["polls"] for step in raw["steps"]]
    by_polls.plot([0, max(offered)], [0, max(offered)], "--", color=pictures.OTHERS[0], label="what was offered")
    by_polls.plot(offered, done, "o-", color=pictures.OURS, label="what was done")
    by_polls.set_xlabel("polls a second offered")
    by_polls.set_ylabel("polls a second done, one core")
    by_polls.legend()
    return figure


def _draw_sizes(ax: Axes, raw: dict[str, Any]) -> None:
    sizes, slopes = raw["sizes"], raw["slopes"]
    waiting = [size["waits"] for size in sizes]
    cpu = [size["waits"] * size["cpu"] for size in sizes]
    memory = [size["waits"] * size["memory"] / 1e6 for size in sizes]
    name = f"CPU for a look at each, s (slope {slopes['CPU over waits']:.2f})"
    ax.plot(waiting, cpu, "o-", color=pictures.OURS, label=name)
    name = f"memory, MB (slope {slopes['memory over waits']:.2f})"
    ax.plot(waiting, memory, "o-", color=pictures.OTHERS[1], label=name)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("waits")
    ax.legend()
