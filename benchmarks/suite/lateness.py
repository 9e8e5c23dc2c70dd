"""How late an approval is noticed, and how many requests that takes, under common schedules.

Computed, not timed: the cost of a sequence of polls is the exact average over the distribution of approval times. Only
the jitter and the approvals from which our schedule learns are random, with the same seeds for each variant.
"""

from __future__ import annotations

import contextlib
import random
import statistics
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
from matplotlib.ticker import FixedLocator, NullLocator
from tenacity import wait_fixed

from aiokeyless import wait_adaptive
from benchmarks import pictures
from benchmarks.approval_times import SLOW, TWO_GROUPS, TYPICAL, ApprovalTimes, seeded_random
from benchmarks.baselines import OURS
from benchmarks.labels import label
from benchmarks.optimum import best_poll_times, least_cost
from benchmarks.polling import TIMEOUT, Cost, cost, lateness_quantile, poll_times, simulate_waits
from benchmarks.report import Goal, Report, Spread, Table
from benchmarks.schedules import BASELINES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from tenacity.wait import wait_base

    from benchmarks.bench import Bench
    from benchmarks.report import Json

_POLL_COST: Final = 0.3
_FRONT: Final = (0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0, 10.0, 20.0)  # poll costs of the line
_DISTRIBUTIONS: Final = (TYPICAL, SLOW, TWO_GROUPS)

_CAP: Final = 60.0  # max_interval of ours: a lower cap costs requests in waits without approval; the optimum has none
_TRAINING: Final = {0: "untrained", 30: "after 30 waits", 100: "after 100", 1000: "after 1 000"}
_MOST_OVER: Final = {0: 1.20, 30: 1.07, 100: 1.06}

_SHIFTS: Final = ((TYPICAL, SLOW), (SLOW, TYPICAL), (TYPICAL, TWO_GROUPS))
_BEFORE_SHIFT: Final = 1000
_WINDOW: Final = 100
_WINDOWS: Final = 8
_BACK_AFTER: Final = 500
_BACK_UNDER: Final = 1.15

OURS_BY_DEFAULT: Final = f"{OURS}, max_interval=20, after 1 000"
BEST_FIXED: Final = "the best fixed interval, found in hindsight"
OPTIMUM: Final = "the optimum"


class Figures(NamedTuple):
    """The figures of a schedule, averaged over the approval times."""

    polls: float  # per wait
    lateness: float  # seconds per approval
    p95: float
    cost: float
    over_optimum: float


class Distribution(msgspec.Struct):
    """All figures for one distribution: for each schedule one per seed, or a single one if nothing is random."""

    approved: float  # share of the waits
    schedules: dict[str, list[Figures]]
    front: list[tuple[float, float]]  # polls and lateness of the optimum at other poll costs


class Results(msgspec.Struct):
    """The raw numbers."""

    poll_cost: float
    distributions: dict[str, Distribution]
    shifts: dict[str, list[list[float]]]  # for each seed: cost over the new optimum, window by window


def run(bench: Bench) -> Report:
    """Compare all schedules on all distributions, and ours when the distribution changes."""
    results = measure(bench)
    report = Report(f"lateness: time until an approval is noticed, and requests (a wait of {TIMEOUT:g} s)")
    report.tables = [
        *(_table(name, distribution) for name, distribution in results.distributions.items()),
        _shift_table(results.shifts),
    ]
    for name, distribution in results.distributions.items():
        report.goals += [
            Goal(
                f"{name}: cost over the optimum, {_TRAINING[waits]}",
                most,
                _over_optimum(distribution, _ours(waits)),
                "x",
            )
            for waits, most in _MOST_OVER.items()
        ]
    window = _BACK_AFTER // _WINDOW - 1
    report.goals += [
        Goal(
            f"{name}: cost over the new optimum, waits {window * _WINDOW + 1} to {_BACK_AFTER}",
            _BACK_UNDER,
            Spread.of([windows[window] for windows in of]).median,
            "x",
        )
        for name, of in results.shifts.items()
    ]
    report.notes.append(
        "requests and cost are per wait, lateness and p95 per approval; "
        f"cost = {_POLL_COST:g} s * requests + lateness, which counts as 0 without an approval"
    )
    report.raw = msgspec.to_builtins(results)
    return report


def measure(bench: Bench) -> Results:
    """Compute all figures."""
    seeds = range(bench.pick(full=100, quick=8, smoke=1))
    draws = bench.pick(full=20, quick=8, smoke=1)
    distributions = {}
    for approvals in _DISTRIBUTIONS:
        bench.progress(f"  {approvals}: {len(seeds)} seeds")
        distributions[str(approvals)] = _distribution(approvals, seeds, draws)
    shifts = {}
    for before, after in _SHIFTS:
        bench.progress(f"  {before}, then {after}")
        shifts[f"{before}, then {after}"] = [_shifted(before, after, seed) for seed in seeds[: len(seeds) // 2 + 1]]
    return Results(_POLL_COST, distributions, shifts)


def _distribution(approvals: ApprovalTimes, seeds: range, draws: int) -> Distribution:
    schedules: dict[str, list[Figures]] = {}
    for name, baseline in BASELINES.items():
        schedules[name] = [
            _sampled(baseline.schedule, approvals, seed, draws if baseline.randomized else 1)
            for seed in (seeds if baseline.randomized else seeds[:1])
        ]
    trained = [_train(approvals, seed, draws) for seed in seeds]
    schedules |= {name: [of[name] for of in trained] for name in trained[0]}
    schedules[BEST_FIXED] = [_best_fixed(approvals)]
    schedules[OPTIMUM] = [_figures([best_poll_times(approvals, _POLL_COST)], approvals)]
    front = [cost(best_poll_times(approvals, poll_cost), approvals) for poll_cost in _FRONT]
    approved = approvals.approved_by(TIMEOUT)
    return Distribution(approved, schedules, [(at.polls, at.lateness / approved) for at in front])


def _ours(waits: int) -> str:
    return f"{OURS}, {_TRAINING[waits]}"


def _train(approvals: ApprovalTimes, seed: int, draws: int) -> dict[str, Figures]:
    """Let our schedule learn from waits; return its figures untrained and after each number of waits."""
    schedule = wait_adaptive(poll_cost=_POLL_COST, max_interval=_CAP)
    by_default = wait_adaptive(poll_cost=_POLL_COST)
    figures = {}
    source, learned = seeded_random(seed), 0
    with _seeded_jitter(seed):
        for waits in _TRAINING:
            simulate_waits(schedule, approvals, waits - learned, source)
            learned = waits
            figures[_ours(waits)] = _sampled(schedule, approvals, seed, draws)
        simulate_waits(by_default, approvals, learned, seeded_random(seed))
    figures[OURS_BY_DEFAULT] = _sampled(by_default, approvals, seed, draws)
    return figures


def _shifted(before: ApprovalTimes, after: ApprovalTimes, seed: int) -> list[float]:
    """Return the cost of ours over the optimum of the new distribution, window by window, while it learns."""
    schedule = wait_adaptive(poll_cost=_POLL_COST, max_interval=_CAP)
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


def _best_fixed(approvals: ApprovalTimes) -> Figures:
    """Try intervals from 0.5 to 20 s: the best single delay for a known distribution."""
    best = min(
        (wait_fixed(quarters / 4) for quarters in range(2, 81)),
        key=lambda fixed: cost(poll_times(fixed), approvals).total(_POLL_COST),
    )
    return _figures([[*poll_times(best)]], approvals)


def _over_optimum(distribution: Distribution, name: str) -> float:
    return Spread.of([figures.over_optimum for figures in distribution.schedules[name]]).median


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


def _shift_table(shifts: Mapping[str, list[list[float]]]) -> Table:
    table = Table(
        f"the distribution changes after {_BEFORE_SHIFT} waits: cost over the new optimum, while {OURS} learns",
        ["waits since the change", *shifts],
    )
    for k in range(_WINDOWS):
        cells = [_text([windows[k] for windows in of], 3) for of in shifts.values()]
        table.rows.append([f"{k * _WINDOW + 1} to {(k + 1) * _WINDOW}", *cells])
    return table


_TIMES_OPTIMUM: Final = (1.5, 2.5, 5.0)
_REQUESTS: Final = (1.3, 80.0)
_LATENESS: Final = (0.38, 30.0)


def draw(raw: dict[str, Json]) -> Figure:
    """Draw lateness against requests, one diagram per distribution."""
    results = msgspec.convert(raw, Results)
    figure, axes = pictures.panels(len(results.distributions), width=3.6, height=4.8)
    multiples = ", ".join(f"{times:g}" for times in _TIMES_OPTIMUM)
    figure.supxlabel(
        f"requests per wait, on average (1 in 5 is never approved); grey: equal cost, {multiples} times the optimum's",
        fontsize=10,
    )
    axes[0].set_ylabel("seconds until an approval is noticed, on average")
    for name, diagram in zip(results.distributions, axes, strict=True):
        diagram.set_title(name, fontsize=10)
        _scales(diagram)
    # Labels come last: their positions depend on the layout.
    for distribution, diagram in zip(results.distributions.values(), axes, strict=True):
        _diagram(diagram, distribution, results.poll_cost)
    return figure


def _scales(axes: Axes) -> None:
    axes.set(xscale="log", yscale="log", xlim=_REQUESTS, ylim=_LATENESS)
    for axis, ticks in ((axes.xaxis, (2, 5, 10, 20, 50)), (axes.yaxis, (0.5, 1, 2, 5, 10, 20))):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.grid(visible=False)


def _diagram(axes: Axes, distribution: Distribution, poll_cost: float) -> None:
    _equal_costs(axes, distribution, poll_cost)
    axes.plot(*zip(*distribution.front, strict=True), color="black", linewidth=1)
    dots = {baseline.label: _point(distribution.schedules[name]) for name, baseline in BASELINES.items()}
    axes.plot(*zip(*dots.values(), strict=True), "o", markersize=4, color=pictures.OTHERS[2])
    path = [_point(distribution.schedules[_ours(waits)]) for waits in _TRAINING]
    axes.plot(*zip(*path, strict=True), "o-", markersize=4, color=pictures.OURS, linewidth=1.5, zorder=3)
    label(axes, dots, [*path, *distribution.front], "#333333")
    _callout(axes, f"{OURS},\nuntrained to\n1 000 waits", path[-1], (-10, -46), pictures.OURS)
    _callout(axes, OPTIMUM, distribution.front[2], (-14, -14), "black")


def _callout(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], color: str) -> None:
    axes.annotate(
        text,
        at,
        offset,
        textcoords="offset points",
        ha="right",
        fontsize=8.5,
        fontweight="bold",
        color=color,
        arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.8},
    )


def _equal_costs(axes: Axes, distribution: Distribution, poll_cost: float) -> None:
    least = distribution.schedules[OPTIMUM][0].cost
    low, high = _LATENESS
    lateness = [low * (high / low) ** (k / 200) for k in range(201)]
    for times in _TIMES_OPTIMUM:
        line = [((times * least - distribution.approved * y) / poll_cost, y) for y in lateness]
        axes.plot(*zip(*[at for at in line if at[0] > 0], strict=True), color="#c8c8c8", linewidth=0.7, zorder=0)
        axes.annotate(f"{times:g}x", line[0], (1, 2), textcoords="offset points", fontsize=7.5, color="#888888")


def _point(of: list[Figures]) -> tuple[float, float]:
    polls = Spread.of([figures.polls for figures in of]).median
    return polls, Spread.of([figures.lateness for figures in of]).median
