"""How late an approval is noticed, and how many requests that takes, under common schedules.

Computed, not timed: the cost of a sequence of polls is the exact average over the distribution of approval times. Only
the jitter and the approvals from which our schedule learns are random, with the same seeds for each variant.

The front is what a schedule can reach: the lateness for each number of requests, as the cost of a request varies.
"""

from __future__ import annotations

import contextlib
import random
import statistics
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
from matplotlib.ticker import FixedLocator, NullLocator
from tenacity import wait_exponential, wait_fixed, wait_random_exponential

from aiokeyless import wait_adaptive
from benchmarks import pictures
from benchmarks.approval_times import QUICK, SLOW, TWO_GROUPS, TYPICAL, ApprovalTimes, seeded_random
from benchmarks.baselines import OURS
from benchmarks.optimum import best_poll_times, least_cost
from benchmarks.polling import TIMEOUT, Cost, cost, lateness_quantile, poll_times, simulate_waits
from benchmarks.report import Goal, Report, Spread, Table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from tenacity.wait import wait_base

    from benchmarks.bench import Bench

_POLL_COST: Final = 0.02  # ours by default
_FRONT: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)  # poll costs
_FIXED: Final = (0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0, 7.0)  # intervals in seconds
_SLOWER: Final = (TYPICAL, SLOW, TWO_GROUPS)  # the prior expects nobody in less than a second
_DISTRIBUTIONS: Final = (QUICK, *_SLOWER)

_TRAINED: Final = 100  # waits from which ours has learned
_UNTRAINED: Final = f"{OURS}, untrained"
_AFTER: Final = f"{OURS}, after {_TRAINED}"
_MOST_OVER: Final = {_UNTRAINED: 1.20, _AFTER: 1.06}  # cost over the optimum
_MOST_LATE: Final = 0.5  # seconds, for typical users after 100 waits: as a loop of one poll a second
_MOST_REQUESTS: Final = 21.0  # likewise: 40% fewer than that loop

_SHIFT: Final = (TYPICAL, SLOW)
_BEFORE_SHIFT: Final = 1000
_WINDOW: Final = 100
_WINDOWS: Final = 5

OPTIMUM: Final = "the optimum"
FIXED: Final = "fixed intervals"


class Baseline(NamedTuple):
    """A schedule in common use, and its label in the picture."""

    schedule: wait_base
    label: str
    randomized: bool = False


#: All follow the same rules of a wait; only the delays differ. The caps of tenacity's own examples are 10 and 60 s:
#: https://tenacity.readthedocs.io/en/latest/#waiting-before-retrying
BASELINES: Final = {
    "every 1 s": Baseline(wait_fixed(1), "a loop of 1 s"),
    "every 2 s": Baseline(wait_fixed(2), "2 s"),
    "every 5 s": Baseline(wait_fixed(5), "5 s"),
    "1 s * 2^k, at most 30 s": Baseline(wait_exponential(1, max=30), "2^k ≤ 30 s"),
    "full jitter, 1 s * 2^k, at most 10 s": Baseline(
        wait_random_exponential(1, max=10), "full jitter ≤ 10 s", randomized=True
    ),
}


class Figures(NamedTuple):
    """The figures of a schedule, averaged over the approval times."""

    polls: float  # per wait
    lateness: float  # seconds per approval
    p95: float
    cost: float
    over_optimum: float


class Distribution(msgspec.Struct):
    """All figures for one distribution: for each schedule one per seed, or a single one if nothing is random."""

    schedules: dict[str, list[Figures]]
    fronts: dict[str, list[tuple[float, float]]]  # polls and lateness: ours and the optimum at other poll costs, fixed


class Results(msgspec.Struct):
    """The raw numbers."""

    poll_cost: float
    distributions: dict[str, Distribution]
    shift: list[list[float]]  # for each seed: cost over the new optimum, window by window


def run(bench: Bench) -> Report:
    """Compare all schedules on all distributions, and ours when the distribution changes."""
    results = measure(bench)
    report = Report(f"lateness: time until an approval is noticed, and requests (a wait of {TIMEOUT:g} s)")
    report.tables = [
        *(_table(name, distribution) for name, distribution in results.distributions.items()),
        _front_table(results.distributions[str(TYPICAL)].fronts),
        _shift_table(results.shift),
    ]
    for name in map(str, _SLOWER):
        of = results.distributions[name]
        report.goals += [
            Goal(f"{name}: cost of {side} over the optimum", most, _medians(of, side).over_optimum, "x")
            for side, most in _MOST_OVER.items()
        ]
    typical = _medians(results.distributions[str(TYPICAL)], _AFTER)
    report.goals += [
        Goal(f"{TYPICAL}: lateness of {_AFTER}", _MOST_LATE, typical.lateness, " s"),
        Goal(f"{TYPICAL}: requests of {_AFTER}", _MOST_REQUESTS, typical.polls),
    ]
    report.notes.append(
        "requests and cost are per wait, lateness and p95 per approval; "
        f"cost = {_POLL_COST:g} s * requests + lateness, which counts as 0 without an approval"
    )
    report.raw = msgspec.to_builtins(results)
    return report


def _medians(distribution: Distribution, schedule: str) -> Figures:
    of = distribution.schedules[schedule]
    return Figures(*(Spread.of([*values]).median for values in zip(*of, strict=True)))


def measure(bench: Bench) -> Results:
    """Compute all figures."""
    seeds = range(bench.pick(full=32, smoke=1))
    draws = bench.pick(full=8, smoke=1)
    distributions = {}
    for approvals in _DISTRIBUTIONS:
        bench.progress(f"  {approvals}: {len(seeds)} seeds")
        distributions[str(approvals)] = _distribution(approvals, seeds, draws)
    before, after = _SHIFT
    bench.progress(f"  {before}, then {after}")
    return Results(_POLL_COST, distributions, [_shifted(before, after, seed) for seed in seeds[: len(seeds) // 2 + 1]])


def _distribution(approvals: ApprovalTimes, seeds: range, draws: int) -> Distribution:
    schedules: dict[str, list[Figures]] = {}
    for name, baseline in BASELINES.items():
        schedules[name] = [
            _sampled(baseline.schedule, approvals, seed, draws if baseline.randomized else 1)
            for seed in (seeds if baseline.randomized else seeds[:1])
        ]
    schedules[_UNTRAINED] = [_sampled(wait_adaptive(), approvals, seed, draws) for seed in seeds]
    schedules[_AFTER] = [_sampled(_trained(approvals, seed), approvals, seed, draws) for seed in seeds]
    schedules[OPTIMUM] = [_figures([best_poll_times(approvals, _POLL_COST)], approvals)]
    return Distribution(schedules, _fronts(approvals, seeds, draws))


def _fronts(approvals: ApprovalTimes, seeds: range, draws: int) -> dict[str, list[tuple[float, float]]]:
    """Return the requests and the lateness that each kind of schedule can be set to."""
    ours = [
        _point([_sampled(_trained(approvals, seed, poll_cost), approvals, seed, draws) for seed in seeds])
        for poll_cost in _FRONT
    ]
    fixed = [_point([_figures([[*poll_times(wait_fixed(seconds))]], approvals)]) for seconds in _FIXED]
    best = [_point([_figures([best_poll_times(approvals, poll_cost)], approvals)]) for poll_cost in _FRONT]
    return {OURS: ours, FIXED: fixed, OPTIMUM: best}


def _trained(approvals: ApprovalTimes, seed: int, poll_cost: float = _POLL_COST) -> wait_adaptive:
    schedule = wait_adaptive(poll_cost=poll_cost)
    with _seeded_jitter(seed):
        simulate_waits(schedule, approvals, _TRAINED, seeded_random(seed))
    return schedule


def _shifted(before: ApprovalTimes, after: ApprovalTimes, seed: int) -> list[float]:
    """Return the cost of ours over the optimum of the new distribution, window by window, while it learns."""
    schedule = wait_adaptive()
    source = seeded_random(seed)
    windows = []
    with _seeded_jitter(seed):
        simulate_waits(schedule, before, _BEFORE_SHIFT, source)
        for _ in range(_WINDOWS):
            total = 0.0
            for _ in range(_WINDOW):
                total += cost(poll_times(schedule), after).total(_POLL_COST)
                simulate_waits(schedule, after, 1, source)
            windows.append(total / _WINDOW / least_cost(after, _POLL_COST))
    return windows


@contextlib.contextmanager
def _seeded_jitter(seed: int) -> Iterator[None]:
    """Seed the jitter, with another seed than the approval times: otherwise the two would be correlated."""
    before = random.getstate()
    random.seed(f"delays {seed}")
    try:
        yield
    finally:
        random.setstate(before)


def _sampled(schedule: wait_base, approvals: ApprovalTimes, seed: int, draws: int) -> Figures:
    with _seeded_jitter(seed):
        return _figures([[*poll_times(schedule)] for _ in range(draws)], approvals)


def _figures(waits: Sequence[Sequence[float]], approvals: ApprovalTimes) -> Figures:
    costs = [cost(wait, approvals) for wait in waits]
    mean = Cost(statistics.fmean(of.polls for of in costs), statistics.fmean(of.lateness for of in costs))
    total = mean.total(_POLL_COST)
    return Figures(
        mean.polls,
        mean.lateness / approvals.approved_by(TIMEOUT),
        lateness_quantile(waits, approvals, 0.95),
        total,
        total / least_cost(approvals, _POLL_COST),
    )


_COLUMNS: Final = {"requests": 2, "lateness, s": 2, "p95, s": 2, "cost, s": 2, f"over {OPTIMUM}": 3}


def _table(name: str, distribution: Distribution) -> Table:
    table = Table(f"approval times: {name}; 1 in 5 waits is never approved", ["", *_COLUMNS])
    for schedule, of in distribution.schedules.items():
        cells = [_text([figures[k] for figures in of], digits) for k, digits in enumerate(_COLUMNS.values())]
        table.rows.append([schedule, *cells])
    return table


def _text(values: list[float], digits: int) -> str:
    """Write sampled values with their spread, a computed one without."""
    return f"{values[0]:.{digits}f}" if len(values) == 1 else Spread.of(values).text(digits)


def _front_table(fronts: Mapping[str, list[tuple[float, float]]]) -> Table:
    table = Table(
        f"approval times: {TYPICAL}; the front: {OURS} after {_TRAINED} waits",
        ["poll_cost, s", *(f"{side}: {figure}" for side in (OURS, OPTIMUM) for figure in ("requests", "lateness, s"))],
    )
    for poll_cost, ours, best in zip(_FRONT, fronts[OURS], fronts[OPTIMUM], strict=True):
        table.rows.append([f"{poll_cost:g}", *(f"{figure:.2f}" for figure in (*ours, *best))])
    return table


def _shift_table(shift: list[list[float]]) -> Table:
    before, after = _SHIFT
    table = Table(
        f"the distribution changes after {_BEFORE_SHIFT} waits: cost over the new optimum, while {OURS} learns",
        ["waits since the change", f"{before}, then {after}"],
    )
    for k, windows in enumerate(zip(*shift, strict=True)):
        table.rows.append([f"{k * _WINDOW + 1} to {(k + 1) * _WINDOW}", _text([*windows], 3)])
    return table


_REQUESTS: Final = (1.3, 130.0)
_LATENESS: Final = (0.15, 30.0)


def draw(raw: dict[str, Any]) -> Figure:
    """Draw lateness against requests, one diagram per distribution."""
    results = msgspec.convert(raw, Results)
    figure, axes = pictures.panels(len(_SLOWER), width=3.6, height=4.8)
    figure.supxlabel("requests per wait, on average (1 in 5 is never approved)", fontsize=10)
    axes[0].set_ylabel("seconds until an approval is noticed, on average")
    for name, diagram in zip(map(str, _SLOWER), axes, strict=True):
        diagram.set_title(name, fontsize=10)
        _scales(diagram)
        _diagram(diagram, results.distributions[name])
    return figure


def _scales(axes: Axes) -> None:
    axes.set(xscale="log", yscale="log", xlim=_REQUESTS, ylim=_LATENESS)
    for axis, ticks in ((axes.xaxis, (2, 5, 10, 20, 50, 100)), (axes.yaxis, (0.2, 0.5, 1, 2, 5, 10, 20))):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.grid(visible=False)


def _diagram(axes: Axes, distribution: Distribution) -> None:
    ours, fixed, best = (distribution.fronts[name] for name in (OURS, FIXED, OPTIMUM))
    axes.plot(*zip(*fixed, strict=True), color=pictures.OTHERS[0], linewidth=1)
    axes.plot(*zip(*best, strict=True), color="black", linewidth=1)
    axes.plot(*zip(*ours, strict=True), color=pictures.OURS, linewidth=2.5, alpha=0.7, zorder=3)
    for name, baseline in BASELINES.items():
        dot = _point(distribution.schedules[name])
        axes.plot(*dot, "o", markersize=4, color=pictures.OTHERS[2])
        axes.annotate(baseline.label, dot, (5, 5), textcoords="offset points", fontsize=8)
    default = _point(distribution.schedules[_AFTER])
    axes.plot(*default, "*", markersize=14, color=pictures.OURS, zorder=4)
    _callout(axes, f"{OURS}, 0.005 to 1 s\na request;\nstar: the default", default, (-12, -38), pictures.OURS)
    _callout(axes, OPTIMUM, best[-3], (-16, -16), "black")


def _callout(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], color: str) -> None:
    line = {"arrowstyle": "-", "color": color, "linewidth": 0.8}
    style: dict[str, Any] = {"fontsize": 8.5, "fontweight": "bold", "color": color, "arrowprops": line}
    axes.annotate(text, at, offset, textcoords="offset points", ha="right", **style)


def _point(of: list[Figures]) -> tuple[float, float]:
    polls = Spread.of([figures.polls for figures in of]).median
    return polls, Spread.of([figures.lateness for figures in of]).median
