"""Bad weather: answers that fail, are refused or never come, and outages, beside loops of one poll a second.

The real poller of a default client against a simulated service (`benchmarks.simulation`), with round trips of 50 ms if
nothing else is said. The clock is moved, so the figures do not depend on the machine.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Final, NamedTuple

from aiokeyless import wait_adaptive
from aiokeyless._rules.budget import PER_SECOND, Budget
from aiokeyless.events import PollEnded, PollResult
from benchmarks.approval_times import EAGER, seeded_random
from benchmarks.beside_loops import ARRIVALS, TIMEOUT, Weather, brown_out, compare, dead_shard, flapping, limited, share
from benchmarks.report import Goal, Report, Table, p95
from benchmarks.simulation import GOOD, HANGING, Answer, Simulation, failing

if TYPE_CHECKING:
    from benchmarks.bench import Bench

_WARM: Final = 20.0  # seconds before an outage


def run(bench: Bench) -> Report:
    """Simulate all of it."""
    report = Report("weather: answers that fail, are refused or never come, and outages")
    _beside_hanging(bench, report)
    _beside_loops(bench, report)
    _short_outages(bench, report)
    _long_outages(bench, report)
    return report


# -- operations that hang


def beside(bad: int, answer: Answer, *, healthy: int = 200, within: float = 5.0) -> list[float]:
    """Return how late healthy waits are beside operations that always get this answer, and start within so long."""
    source = seeded_random(1)
    starts = [(source.uniform(0, ARRIVALS), f"good-{k}", EAGER.draw(source)) for k in range(healthy)]
    starts += [(within * k / bad, f"bad-{k}", math.inf) for k in range(bad)]

    async def scenario() -> None:
        for at, name, approved_in in sorted(starts):
            await simulation.sleep_until(at)
            simulation.start(name, approved_in=approved_in, timeout=TIMEOUT)
        await simulation.sleep_until(ARRIVALS + TIMEOUT + 3)

    simulation = Simulation(lambda name, _: answer if name.startswith("bad") else GOOD, wait_adaptive())
    simulation.run(scenario())
    return [*simulation.lateness.values()]  # no bad one is approved


def _beside_hanging(bench: Bench, report: Report) -> None:
    report.tables.append(table := Table("healthy waits, 20 arrivals a second", ["", "late, mean s", "p95 s"]))
    arrivals = bench.pick(full=round(20 * ARRIVALS), smoke=60)
    for name, bad in ("none hangs", 0), ("a third hang", arrivals // 3):
        bench.progress(f"  {name}")
        late = beside(bad, HANGING, healthy=arrivals - bad, within=ARRIVALS)
        table.rows.append([name, f"{statistics.mean(late):.2f}", f"{p95(late):.2f}"])
        report.goals.append(Goal(f"{name}: late, mean", 0.8, statistics.mean(late), " s"))
        report.raw[name] = late


# -- beside loops


class _Case(NamedTuple):
    """Weather, how late ours may be (times the loop's, and seconds more), and how many waits there are, and when."""

    weather: Weather
    times: float = 1.0
    more: float = 0.0
    waits: int = 300
    arrivals: float = ARRIVALS


_BESIDE_LOOPS: Final = {
    "half of the answers are 503": _Case(brown_out()),
    "the same, and 5 % of the requests hang": _Case(brown_out(hanging=0.05), 1.1),
    "70 % of the answers are 502": _Case(share(of=failing(502), at=0.7)),
    "half are 503 with Retry-After: 30, for 20 s": _Case(
        share(of=failing(503, retry_after=30), at=0.5, between=(50.0, 70.0)), 1.2
    ),
    "503 with Retry-After: 10 for 2 s of each 5": _Case(
        flapping(of=failing(503, retry_after=10), down=2.0, every=5.0), 2.0
    ),
    "the same, three waits": _Case(
        flapping(of=failing(503, retry_after=10), down=2.0, every=5.0), 2.5, waits=3, arrivals=5.0
    ),
    "403 for 10 s": _Case(share(of=failing(403), at=1.0, between=(50.0, 60.0)), 1.2),
    "5 % of the answers are 429": _Case(share(of=failing(429), at=0.05), 1.2),
    "20 % of the answers are 429": _Case(share(of=failing(429), at=0.2), 1.3),
    "a limit of 50 a second, a neighbour sends 25": _Case(limited(50.0, neighbour=25.0), more=0.3),
    "a limit of 20 a second": _Case(limited(20.0)),
    "a limit of 20 a second from the middle on": _Case(limited(20.0, since=60.0)),
    "round trips of 400 ms, 660 waits in 5 s": _Case(lambda _: lambda *_: (0.4, None), 1.2, waits=660, arrivals=5.0),
    "a fifth of the operations always get 503 with Retry-After: 60": _Case(
        dead_shard(of=failing(503, retry_after=60)), 1.3
    ),
}


def _beside_loops(bench: Bench, report: Report) -> None:
    columns = ["", "late, mean s", "p95", "of loops", "p95", "lost", "by loops", "requests, of the loops'"]
    report.tables.append(table := Table("waits of ours, and loops of one poll a second", columns))
    seeds = bench.pick(full=8, smoke=1)
    for name, case in _BESIDE_LOOPS.items():
        bench.progress(f"  {name}")
        ours, loops = compare(case.weather, waits=case.waits, arrivals=case.arrivals, seeds=seeds)
        late = [f"{figure:.2f}" for found in (ours, loops) for figure in (found.late, found.p95)]
        table.rows.append([name, *late, str(ours.lost), str(loops.lost), f"{ours.requests / loops.requests:.2f}"])
        report.goals.append(Goal(f"{name}: late, mean", case.times * loops.late + case.more, ours.late, " s"))
        report.goals.append(Goal(f"{name}: lost", loops.lost, ours.lost))
        report.raw[name] = {"ours": ours._asdict(), "loops": loops._asdict()}


# -- outages


def short_outage(down: float, *, waits: int, seed: int) -> tuple[float, float]:
    """Let all answers be 503 for some seconds, in which all approve.

    Return the mean seconds from its end to the notice of an approval, and the requests a second while it lasted.
    """
    source, end = seeded_random(seed), _WARM + down

    async def scenario() -> None:
        for number in range(waits):
            await simulation.sleep_until(5 * number / waits)
            simulation.start(str(number), approved_in=_WARM + source.uniform(0, down) - simulation.now)
        await simulation.sleep_until(end + 60)

    simulation = Simulation(lambda _, now: failing(503) if _WARM <= now < end else GOOD, wait_adaptive(), seed=seed)
    simulation.run(scenario())
    transport = simulation.transport
    noticed = statistics.mean(transport.approved_at[name] + late for name, late in simulation.lateness.items())
    return noticed - end, sum(_WARM <= at < end for at in transport.sent) / down


def _short_outages(bench: Bench, report: Report) -> None:
    columns = ["", "late after it, mean s", "requests a second"]
    report.tables.append(table := Table("short outages, in which all approve", columns))
    budget = Budget()
    for down in (4.0, 10.0, 20.0):
        for waits in (1, 3, 30, 200):
            name = f"an outage of {down:g} s, {waits} waits"
            bench.progress(f"  {name}")
            # Many seeds: when the next poll is due at its end is chance, and worth up to a second.
            seeds = range(bench.pick(full=64, smoke=1))
            found = [short_outage(down, waits=waits, seed=seed) for seed in seeds]
            late, requests = map(statistics.mean, zip(*found, strict=True))
            table.rows.append([name, f"{late:.2f}", f"{requests:.1f}"])
            budget.waits = waits
            most = min(1.4 * waits, 1.05 * (budget.capacity / down + PER_SECOND))
            report.goals.append(Goal(f"{name}: late after it", 0.9, late, " s"))
            report.goals.append(Goal(f"{name}: requests a second", most, requests))
            report.raw[name] = found


def outage(down: float, answer: Answer = HANGING, *, waits: int = 300, seed: int = 1) -> tuple[float, int]:
    """Return when the end of an outage was noticed, in seconds after it, and how many requests were sent in it."""
    end, noticed = _WARM + down, math.inf

    def on_event(event: object) -> None:
        nonlocal noticed
        is_good = isinstance(event, PollEnded) and event.result is PollResult.PENDING
        if is_good and simulation.now > end:
            noticed = min(noticed, simulation.now - end)

    async def scenario() -> None:
        for k in range(waits):
            await simulation.sleep_until(5 * k / waits)
            simulation.start(f"op-{k}", timeout=end + 60 - simulation.now)
        await simulation.sleep_until(end + 63)

    simulation = Simulation(
        lambda _, now: answer if _WARM <= now < end else GOOD, wait_adaptive(), seed=seed, listeners=(on_event,)
    )
    simulation.run(scenario())
    return noticed, sum(_WARM <= at < end for at in simulation.transport.sent)


def _long_outages(bench: Bench, report: Report) -> None:
    bench.progress("  long outages")
    found = [outage(down) for down in bench.pick(full=[33.0, 40.3, 48.7, 55.1, 62.9, 70.0], smoke=[5.0])]
    noticed = [seconds for seconds, _ in found]
    mean = statistics.mean(noticed)
    table = Table("long outages, in which the service hangs", ["", "noticed after, mean s", "at most"])
    table.rows.append(["300 waits", f"{mean:.1f}", f"{max(noticed):.1f}"])
    report.tables.append(table)
    report.goals.append(Goal("the end of a long outage: noticed after, mean", 3.05, mean, " s"))
    report.raw["long outages"] = noticed
