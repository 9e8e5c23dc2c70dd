"""Bad operations and bad minutes: what they cost the other waits of a client, in simulated time.

The real poller against a simulated service (`benchmarks.simulation`): operations that fail beside others that are well,
outages, and a service of which a share of the answers fails at random. Nothing is timed, so the figures do not depend
on the machine; what is random has a seed for each run.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tenacity import wait_fixed

from aiokeyless import ApprovalTimeoutError, wait_adaptive
from benchmarks import pictures
from benchmarks.approval_times import ApprovalTimes, seeded_random
from benchmarks.report import Goal, Report, Table
from benchmarks.simulation import GOOD, HANGING, Answer, Simulation, failing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from benchmarks.bench import Bench

_EVERYBODY: Final = ApprovalTimes(((1.0, 8.0, 0.8),), never=0.0)
_ARRIVALS: Final = 120.0  # seconds in which the healthy waits start
_AT_FIRST: Final = 5.0  # seconds in which those of the bad ones do, unless they come like the others
_TIMEOUT: Final = 120.0
_LONG: Final = 90.0  # seconds: of a wait that outlasts what happens beside it
_WARM: Final = 20.0  # seconds before an outage or a brown-out starts
_SPREAD: Final = 5.0  # seconds in which the waits of an outage start

_REQUESTS: Final = 34  # a minute, while the service is down

FAILS: Final = failing()
REFUSED: Final = failing(503, seconds=0.002)
ASKS_FOR_A_PAUSE: Final = failing(503, retry_after=30)
KINDS: Final = {"500": FAILS, "hangs": HANGING, "503, Retry-After 30": ASKS_FOR_A_PAUSE}


class Outage(NamedTuple):
    """The measurements of one outage."""

    requests: int  # while it lasted
    first_good: float  # seconds from its end to the first good answer


class Resumed(NamedTuple):
    """The measurements of expired waits that are resumed at once."""

    unknown: int  # those that were not told that their operation is pending
    seconds: float  # until the last one had ended


class BrownOut(NamedTuple):
    """The measurements of a service of which a share of the answers fails."""

    polls: float  # a second
    good: float  # of them, good answers a second
    lag: float  # seconds, mean


def lateness_beside(
    bad: int, answer: Answer, *, seed: int, healthy: int = 200, bad_within: float = _AT_FIRST
) -> list[float]:
    """Return how late the approvals of healthy operations are noticed while others always fail, or hang.

    Args:
        bad: Operations that never get a good answer; their waits do not end.
        answer: What they get.
        seed: Of all that is random.
        healthy: Operations that are well; their waits start over 120 s.
        bad_within: Seconds over which the waits of the bad ones start.
    """
    source = seeded_random(seed)
    starts = [(source.uniform(0, _ARRIVALS), _EVERYBODY.draw(source), f"op-{k}") for k in range(healthy)]
    starts += [(source.uniform(0, bad_within), math.inf, f"bad-{k}") for k in range(bad)]

    async def scenario() -> None:
        for at, approved_in, name in sorted(starts):
            await simulation.sleep_until(at)
            simulation.start(name, approved_in=approved_in, timeout=_TIMEOUT if name.startswith("op") else math.inf)
        await simulation.sleep_until(_ARRIVALS + _TIMEOUT + 3)

    simulation = Simulation(lambda name, _: answer if name.startswith("bad") else GOOD, wait_adaptive(), seed=seed)
    simulation.run(scenario())
    return list(simulation.lateness.values())


def outage(down: float, *, seed: int, waits: int = 1000, answer: Answer = REFUSED, every: float = 5.0) -> Outage:
    """Let the service fail for a while, under waits that poll every so many seconds."""
    start = _WARM + seeded_random(seed).random()
    end = start + down

    async def scenario() -> None:
        for k in range(waits):
            await simulation.sleep_until(_SPREAD * k / waits)
            simulation.start(f"op-{k}")
        await simulation.sleep_until(end + 15)

    simulation = Simulation(lambda _, now: answer if start <= now < end else GOOD, wait_fixed(every), seed=seed)
    simulation.run(scenario())
    sent = simulation.transport.sent
    return Outage(
        sum(start <= poll.at < end for poll in sent),
        next(poll.at for poll in sent if poll.at >= end and not poll.failed) - end,
    )


def brown_out(share: float, *, seed: int, waits: int = 1000, seconds: float = 60.0) -> BrownOut:
    """Let a share of the answers fail, at random, under waits that poll every 2 s."""
    source = seeded_random(seed)
    lags: list[float] = []

    def service(_: str, now: float) -> Answer:
        return failing() if now >= _WARM and source.random() < share else GOOD

    async def scenario() -> None:
        for k in range(waits):
            await simulation.sleep_until(2.0 * k / waits)
            simulation.start(f"op-{k}")
        for second in range(round(seconds)):
            await simulation.sleep_until(_WARM + second)
            lags.append(simulation.poller.statistics().lag)

    simulation = Simulation(service, wait_fixed(2), seed=seed)
    simulation.run(scenario())
    sent = [poll for poll in simulation.transport.sent if poll.at >= _WARM]
    return BrownOut(
        len(sent) / seconds, sum(not poll.failed for poll in sent) / seconds, statistics.mean(lags[len(lags) // 2 :])
    )


def resumed(waits: int, *, seed: int) -> Resumed:
    """Resume waits whose time is over, all at once, with a service that is well."""

    async def scenario() -> None:
        for k in range(waits):
            simulation.start(f"op-{k}", timeout=0.0)
        await simulation.sleep_until(300)

    simulation = Simulation(lambda *_: GOOD, wait_fixed(5), seed=seed)
    simulation.run(scenario())
    outcomes = simulation.outcomes.values()
    return Resumed(
        sum(kind is not ApprovalTimeoutError for _, kind in outcomes) + waits - len(outcomes),
        max(ended for ended, _ in outcomes),
    )


def late_beside_final_polls(*, seed: int) -> float:
    """Return how late an ordinary wait is noticed while more final polls are due than fit: 50 a second, and 40 do."""

    async def scenario() -> None:
        simulation.start("ordinary", approved_in=12, timeout=_LONG)
        for k in range(1500):
            await simulation.sleep_until(10 + k / 50)
            simulation.start(f"op-{k}", timeout=0.5)
        await simulation.sleep_until(_LONG)

    simulation = Simulation(lambda *_: GOOD, wait_fixed(2), seed=seed, max_in_flight=2)
    simulation.run(scenario())
    return simulation.lateness.get("ordinary", math.inf)


def run(bench: Bench) -> Report:
    """Simulate all of it."""
    report = Report("crowd: bad operations and bad minutes, simulated")
    seeds = bench.pick(full=range(1, 6), quick=range(1, 2), smoke=range(1, 2))
    healthy = bench.pick(full=200, quick=60, smoke=10)
    _bad_operations(report, seeds, healthy, bench.pick(full=[1, 5, 20], quick=[5], smoke=[1]))
    _outages(report, seeds, bench.pick(full=[30, 60, 120, 600], quick=[60], smoke=[1]))
    _requests_in_an_outage(report, seeds, bench.pick(full=10_000, quick=1000, smoke=100))
    _brown_outs(report, seeds, bench.pick(full=1000, quick=200, smoke=10))
    _deadlines(report, bench.pick(full=10_000, quick=10_000, smoke=100))
    return report


def _bad_operations(report: Report, seeds: range, healthy: int, counts: list[int]) -> None:
    report.tables.append(table := Table(f"{healthy} healthy waits beside bad ones", ["", "late, mean s", "over none"]))

    def late(bad: int, answer: Answer, bad_within: float = _AT_FIRST) -> float:
        runs = [lateness_beside(bad, answer, seed=seed, healthy=healthy, bad_within=bad_within) for seed in seeds]
        return statistics.mean([seconds for run in runs for seconds in run])

    none = late(0, GOOD)
    table.rows.append(["none bad", f"{none:.2f}", "1"])

    def add(name: str, seconds: float, at_most: float) -> None:
        table.rows.append([name, f"{seconds:.2f}", f"{seconds / none:.2f}"])
        report.goals.append(Goal(f"lateness beside {name}, over that beside none", at_most, seconds / none, "x"))
        report.raw[name] = seconds

    for kind, answer in KINDS.items():
        for bad in counts:
            add(f"{bad}: {kind}", late(bad, answer), 1.2 if bad == 1 else 1.5)
        add(f"30% bad: {kind}", late(round(healthy * 3 / 7), answer, _ARRIVALS), 1.5)


def _outages(report: Report, seeds: range, lengths: list[int]) -> None:
    columns = ["", "requests", "a minute", "first good answer, mean s", "at most"]
    report.tables.append(table := Table("1000 waits in an outage", columns))
    for down in lengths:
        outages = [outage(down, seed=seed) for seed in seeds]
        requests = statistics.mean(o.requests for o in outages)
        first = [o.first_good for o in outages]
        rate = 60 * requests / down
        table.rows.append(
            [f"{down} s", f"{requests:.0f}", f"{rate:.0f}", f"{statistics.mean(first):.1f}", f"{max(first):.1f}"]
        )
        report.goals.append(
            Goal(f"first good answer after an outage of {down} s, mean", 3, statistics.mean(first), " s")
        )
        report.goals.append(Goal(f"the same, at most, {down} s", 6, max(first), " s"))
        report.raw[f"outage of {down} s"] = [*first]


def _requests_in_an_outage(report: Report, seeds: range, waits: int) -> None:
    report.tables.append(
        table := Table(f"{waits} waits that poll every 30 s, in an outage of 60 s", ["the service answers", "requests"])
    )
    # They come quickly, so that what was in flight when the outage started does not count much.
    kinds = {
        "503": REFUSED,
        "503, Retry-After 30": failing(503, seconds=0.002, retry_after=30),
        "429": failing(429, seconds=0.002),
    }
    for kind, answer in kinds.items():
        requests = statistics.mean(outage(60, seed=s, waits=waits, answer=answer, every=30).requests for s in seeds)
        table.rows.append([kind, f"{requests:.0f}"])
        report.goals.append(Goal(f"requests in an outage of 60 s, {kind}", _REQUESTS, requests))
        report.raw[f"requests in an outage, {kind}"] = [requests]


def _deadlines(report: Report, waits: int) -> None:
    report.tables.append(table := Table("deadlines, with a service that is well", ["", ""]))
    unknown, seconds = resumed(waits, seed=1)
    late = late_beside_final_polls(seed=1)
    table.rows.append([f"{waits} expired waits resumed at once: of unknown outcome", f"{unknown}"])
    table.rows.append(["until the last one had ended, s", f"{seconds:.1f}"])
    table.rows.append(["an ordinary wait beside more final polls than fit: late, s", f"{late:.1f}"])
    report.goals.append(Goal("expired waits resumed at once: of unknown outcome", 0, unknown))
    report.goals.append(Goal("an ordinary wait beside more final polls than fit: late", 10, late, " s"))
    report.raw["deadlines"] = [unknown, seconds, late]


def _brown_outs(report: Report, seeds: range, waits: int) -> None:
    wanted = waits / 2
    report.tables.append(
        table := Table(f"{wanted:.0f} polls a second wanted, some fail", ["", "polls a second", "good", "lag, mean s"])
    )
    for share, least in ((0.3, 0.9), (0.5, 0.6), (0.7, 0.24), (0.9, 0.0)):
        runs = [brown_out(share, seed=seed, waits=waits) for seed in seeds]
        polls, good, lag = (statistics.mean(column) for column in zip(*runs, strict=True))
        table.rows.append([f"{share:.0%} fail", f"{polls:.0f}", f"{good:.0f}", f"{lag:.2f}"])
        report.goals.append(
            Goal(f"{share:.0%} fail: polls missing of {least:.0%} of those wanted", 0, max(0.0, least * wanted - polls))
        )
        report.raw[f"{share:.0%} fail"] = [polls, good, lag]


def draw(raw: dict[str, Any]) -> Figure:
    """Draw how late healthy approvals are noticed beside bad operations."""
    bars = {name: value for name, value in raw.items() if isinstance(value, float)}
    figure, (ax,) = pictures.panels(1, width=7.0, height=2.4)
    ax.barh([*bars], [*bars.values()], color=pictures.OURS)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("healthy approvals noticed after, mean s; beside operations that are bad")
    return figure
