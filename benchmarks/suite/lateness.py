"""How late an approval is noticed, and how many requests that takes, under common schedules.

Computed, not timed: the cost of a sequence of polls is the exact average over the distribution of approval times. Only
the jitter and the approvals from which our schedule learns are random, with the same seeds for each variant.

The front is what a schedule can reach: the lateness for each number of requests, as the cost of a request varies.
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
from benchmarks.approval_times import QUICK, SLOW, TWO_GROUPS, TYPICAL, ApprovalTimes, seeded_random
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

_POLL_COST: Final = 0.02  # ours by default
_FRONT: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)  # poll costs
_FIXED: Final = (0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0, 7.0)  # intervals in seconds
_FRONT_AFTER: Final = 100  # waits from which ours has learned
_SECOND: Final = "every 1 s"
_SLOWER: Final = (TYPICAL, SLOW, TWO_GROUPS)  # the prior expects nobody in less than a second
_DISTRIBUTIONS: Final = (QUICK, *_SLOWER)

_TRAINING: Final = {0: "untrained", 30: "after 30 waits", 100: "after 100", 1000: "after 1 000"}
#: Approval times, waits learned from; at most: lateness, its 95th percentile, requests.
_PROMPT: Final = (
    (QUICK, 100, 0.5, 1.0, 12.0),
    (TYPICAL, 0, 0.62, 1.4, 22.5),
    (TYPICAL, 100, 0.5, 1.15, 21.0),
)
_MOST_OVER: Final = {0: 1.20, 30: 1.07, 100: 1.06}

_SHIFTS: Final = ((TYPICAL, SLOW), (SLOW, TYPICAL), (TYPICAL, TWO_GROUPS))
_BEFORE_SHIFT: Final = 1000
_WINDOW: Final = 100
_WINDOWS: Final = 8
_BACK_AFTER: Final = 500
_BACK_UNDER: Final = 1.15

BEST_FIXED: Final = "the best fixed interval, found in hindsight"
OPTIMUM: Final = "the optimum"
FIXED: Final = "fixed intervals"


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
    shifts: dict[str, list[list[float]]]  # for each seed: cost over the new optimum, window by window


def run(bench: Bench) -> Report:
    """Compare all schedules on all distributions, and ours when the distribution changes."""
    results = measure(bench)
    report = Report(f"lateness: time until an approval is noticed, and requests (a wait of {TIMEOUT:g} s)")
    report.tables = [
        *(_table(name, distribution) for name, distribution in results.distributions.items()),
        *(_front_table(name, distribution.fronts) for name, distribution in results.distributions.items()),
        _shift_table(results.shifts),
    ]
    for name in map(str, _SLOWER):
        distribution = results.distributions[name]
        report.goals += [
            Goal(
                f"{name}: cost over the optimum, {_TRAINING[waits]}",
                most,
                _over_optimum(distribution, _ours(waits)),
                "x",
            )
            for waits, most in _MOST_OVER.items()
        ]
    report.goals += _promptness(results)
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


def _promptness(results: Results) -> list[Goal]:
    """Return the goals of the default: as prompt as a loop of one poll a second, for 40% fewer requests."""
    goals = []
    for approvals, waits, *most in _PROMPT:
        of = results.distributions[str(approvals)].schedules[_ours(waits)]
        figures = Figures(*(Spread.of([*values]).median for values in zip(*of, strict=True)))
        for what, limit, figure in zip(
            ("lateness", "p95", "requests"), most, (figures.lateness, figures.p95, figures.polls), strict=True
        ):
            unit = "" if what == "requests" else " s"
            goals.append(Goal(f"{approvals}: {what}, {_TRAINING[waits]}", limit, figure, unit))
    return goals


def measure(bench: Bench) -> Results:
    """Compute all figures."""
    seeds = range(bench.pick(full=32, quick=8, smoke=1))
    draws = bench.pick(full=8, quick=4, smoke=1)
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


def _trained(approvals: ApprovalTimes, seed: int, poll_cost: float) -> wait_adaptive:
    schedule = wait_adaptive(poll_cost=poll_cost)
    with _seeded_jitter(seed):
        simulate_waits(schedule, approvals, _FRONT_AFTER, seeded_random(seed))
    return schedule


def _ours(waits: int) -> str:
    return f"{OURS}, {_TRAINING[waits]}"


def _train(approvals: ApprovalTimes, seed: int, draws: int) -> dict[str, Figures]:
    """Let our schedule learn from waits; return its figures untrained and after each number of waits."""
    schedule = wait_adaptive()
    figures = {}
    source, learned = seeded_random(seed), 0
    with _seeded_jitter(seed):
        for waits in _TRAINING:
            simulate_waits(schedule, approvals, waits - learned, source)
            learned = waits
            figures[_ours(waits)] = _sampled(schedule, approvals, seed, draws)
    return figures


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


def _front_table(name: str, fronts: Mapping[str, list[tuple[float, float]]]) -> Table:
    table = Table(
        f"approval times: {name}; the front: {OURS} after {_FRONT_AFTER} waits",
        [
            "poll_cost, s",
            *(f"{side}: {figure}" for side in (OURS, OPTIMUM) for figure in ("requests", "lateness, s")),
        ],
    )
    for poll_cost, ours, best in zip(_FRONT, fronts[OURS], fronts[OPTIMUM], strict=True):
        table.rows.append([f"{poll_cost:g}", *(f"{figure:.2f}" for figure in (*ours, *best))])
    return table


def _shift_table(shifts: Mapping[str, list[list[float]]]) -> Table:
    table = Table(
        f"the distribution changes after {_BEFORE_SHIFT} waits: cost over the new optimum, while {OURS} learns",
        ["waits since the change", *shifts],
    )
    for k in range(_WINDOWS):
        cells = [_text([windows[k] for windows in of], 3) for of in shifts.values()]
        table.rows.append([f"{k * _WINDOW + 1} to {(k + 1) * _WINDOW}", *cells])
    return table


_REQUESTS: Final = (1.3, 130.0)
_LATENESS: Final = (0.15, 30.0)


def draw(raw: dict[str, Json]) -> Figure:
    """Draw lateness against requests, one diagram per distribution."""
    results = msgspec.convert(raw, Results)
    drawn = {name: results.distributions[name] for name in map(str, _SLOWER)}
    figure, axes = pictures.panels(len(drawn), width=3.6, height=4.8)
    figure.supxlabel("requests per wait, on average (1 in 5 is never approved)", fontsize=10)
    axes[0].set_ylabel("seconds until an approval is noticed, on average")
    for name, diagram in zip(drawn, axes, strict=True):
        diagram.set_title(name, fontsize=10)
        _scales(diagram)
    # Labels come last: their positions depend on the layout.
    for distribution, diagram in zip(drawn.values(), axes, strict=True):
        _diagram(diagram, distribution)
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
    dots = {baseline.label: _point(distribution.schedules[name]) for name, baseline in BASELINES.items()}
    axes.plot(*zip(*dots.values(), strict=True), "o", markersize=4, color=pictures.OTHERS[2])
    second, default = _point(distribution.schedules[_SECOND]), _point(distribution.schedules[_ours(_FRONT_AFTER)])
    axes.plot(*second, "o", markersize=8, color=pictures.OTHERS[1], zorder=4)
    axes.plot(*default, "*", markersize=14, color=pictures.OURS, zorder=4)
    del dots[BASELINES[_SECOND].label]  # it has a callout
    label(axes, dots, [*ours, *best, *fixed, default], "#333333")
    _callout(axes, f"{OURS}, 0.005 to 1 s\na request;\nstar: the default", default, (-12, -38), pictures.OURS)
    _callout(axes, OPTIMUM, best[-3], (-16, -16), "black")
    _callout(axes, "a loop of one\npoll a second", second, (24, 44), pictures.OTHERS[1])


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


def _point(of: list[Figures]) -> tuple[float, float]:
    polls = Spread.of([figures.polls for figures in of]).median
    return polls, Spread.of([figures.lateness for figures in of]).median
