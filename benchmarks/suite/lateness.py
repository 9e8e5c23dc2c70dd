"""How late an approval is noticed, and how many requests that takes, under schedules that people use.

Computed, not timed: what a sequence of looks costs is averaged over the distribution of the people, exactly. Drawn are
only the jitter and the people of whom ours learns, the same for each variant of a seed.
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
from benchmarks.labels import label
from benchmarks.looks import TIMEOUT, Toll, latest, live, looks, toll
from benchmarks.optimum import best_looks, least_cost
from benchmarks.people import SLOW, TWO_GROUPS, TYPICAL, People, seeded
from benchmarks.report import Goal, Report, Spread, Table
from benchmarks.schedules import RIVALS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from tenacity.wait import wait_base

    from benchmarks.bench import Bench
    from benchmarks.report import Json

_POLL_COST: Final = 0.3
_FRONT: Final = (0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0, 10.0, 20.0)  # other poll costs of the optimum
_CROWDS: Final = (TYPICAL, SLOW, TWO_GROUPS)

_CAP: Final = 60.0  # of ours: a lower one costs something when nobody comes, and the optimum has none
_LESSONS: Final = {0: "untaught", 30: "after 30 waits", 100: "after 100", 1000: "after 1 000"}
_MOST_OVER: Final = {0: 1.20, 30: 1.07, 100: 1.06}

_SHIFTS: Final = ((TYPICAL, SLOW), (SLOW, TYPICAL), (TYPICAL, TWO_GROUPS))
_BEFORE_SHIFT: Final = 1000
_WINDOW: Final = 100
_WINDOWS: Final = 8
_BACK_AFTER: Final = 500
_BACK_UNDER: Final = 1.15

OURS: Final = "aiokeyless"
OURS_BY_DEFAULT: Final = f"{OURS}, max_interval=20, after 1 000"
BEST_FIXED: Final = "the best fixed interval, found in hindsight"
OPTIMUM: Final = "the optimum"


class Figures(NamedTuple):
    """What a schedule does, averaged over all people."""

    polls: float  # a wait
    lateness: float  # seconds an approval
    p95: float
    cost: float
    over_optimum: float


class Crowd(msgspec.Struct):
    """All figures for one kind of people: for each schedule one a seed, or a single one where nothing is drawn."""

    approving: float
    schedules: dict[str, list[Figures]]
    front: list[tuple[float, float]]  # polls and lateness of the optimum at other poll costs


class Results(msgspec.Struct):
    """The raw numbers."""

    poll_cost: float
    crowds: dict[str, Crowd]
    shifts: dict[str, list[list[float]]]  # for each seed: cost over the new optimum, window by window


def run(bench: Bench) -> Report:
    """Measure all schedules for all people, and ours when people change."""
    results = measure(bench)
    report = Report(f"lateness: how late an approval is noticed, for how many requests (a wait of {TIMEOUT:g} s)")
    report.tables = [*(_table(name, crowd) for name, crowd in results.crowds.items()), _shift_table(results.shifts)]
    for name, crowd in results.crowds.items():
        report.goals += [
            Goal(f"{name}: cost over the optimum, {_LESSONS[waits]}", most, _over_optimum(crowd, _ours(waits)), "x")
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
        f"requests and cost are those of a wait, lateness and p95 those of an approval; "
        f"cost = {_POLL_COST:g} s * requests + lateness, which counts as 0 where nobody approves"
    )
    report.raw = msgspec.to_builtins(results)
    return report


def measure(bench: Bench) -> Results:
    """Compute all figures."""
    seeds = range(bench.pick(full=100, quick=8, smoke=1))
    draws = bench.pick(full=20, quick=8, smoke=1)
    crowds = {}
    for people in _CROWDS:
        bench.say(f"  {people}: {len(seeds)} seeds")
        crowds[str(people)] = _crowd(people, seeds, draws)
    shifts = {}
    for before, after in _SHIFTS:
        bench.say(f"  {before}, then {after}")
        shifts[f"{before}, then {after}"] = [_shifted(before, after, seed) for seed in seeds[: len(seeds) // 2 + 1]]
    return Results(_POLL_COST, crowds, shifts)


def _crowd(people: People, seeds: range, draws: int) -> Crowd:
    schedules: dict[str, list[Figures]] = {}
    for name, rival in RIVALS.items():
        schedules[name] = [
            _drawn(rival.schedule, people, seed, draws if rival.by_chance else 1)
            for seed in (seeds if rival.by_chance else seeds[:1])
        ]
    lessons = [_lessons(people, seed, draws) for seed in seeds]
    schedules |= {name: [of[name] for of in lessons] for name in lessons[0]}
    schedules[BEST_FIXED] = [_best_fixed(people)]
    schedules[OPTIMUM] = [_figures([best_looks(people, _POLL_COST)], people)]
    front = [toll(best_looks(people, poll_cost), people) for poll_cost in _FRONT]
    approving = people.approved_by(TIMEOUT)
    return Crowd(approving, schedules, [(at.polls, at.lateness / approving) for at in front])


def _ours(waits: int) -> str:
    return f"{OURS}, {_LESSONS[waits]}"


def _lessons(people: People, seed: int, draws: int) -> dict[str, Figures]:
    """Let ours wait for people and learn from them; return what it does untaught and after so many of them."""
    schedule = wait_adaptive(poll_cost=_POLL_COST, max_interval=_CAP)
    by_default = wait_adaptive(poll_cost=_POLL_COST)
    figures = {}
    crowd, learned = seeded(seed), 0
    with _chance(seed):
        for waits in _LESSONS:
            live(schedule, people, waits - learned, crowd)
            learned = waits
            figures[_ours(waits)] = _drawn(schedule, people, seed, draws)
        live(by_default, people, learned, seeded(seed))
    figures[OURS_BY_DEFAULT] = _drawn(by_default, people, seed, draws)
    return figures


def _shifted(before: People, after: People, seed: int) -> list[float]:
    """Return what ours costs over the optimum for the new people, window by window, while it learns from them."""
    schedule = wait_adaptive(poll_cost=_POLL_COST, max_interval=_CAP)
    crowd = seeded(seed)
    windows = []
    with _chance(seed):
        live(schedule, before, _BEFORE_SHIFT, crowd)
        for _ in range(_WINDOWS):
            cost = 0.0
            for _ in range(_WINDOW):
                cost += toll(looks(schedule), after).cost(_POLL_COST)
                live(schedule, after, 1, crowd)
            windows.append(cost / _WINDOW / least_cost(after, _POLL_COST))
    return windows


@contextlib.contextmanager
def _chance(seed: int) -> Iterator[None]:
    """Have delays drawn from a seed, and not from that of the people, or both would move together."""
    before = random.getstate()
    random.seed(f"delays {seed}")
    try:
        yield
    finally:
        random.setstate(before)


def _drawn(schedule: wait_base, people: People, seed: int, draws: int) -> Figures:
    with _chance(seed):
        return _figures([[*looks(schedule)] for _ in range(draws)], people)


def _figures(waits: Sequence[Sequence[float]], people: People) -> Figures:
    tolls = [toll(wait, people) for wait in waits]
    mean = Toll(statistics.fmean(of.polls for of in tolls), statistics.fmean(of.lateness for of in tolls))
    cost = mean.cost(_POLL_COST)
    return Figures(
        mean.polls,
        mean.lateness / people.approved_by(TIMEOUT),
        latest(waits, people, 0.95),
        cost,
        cost / least_cost(people, _POLL_COST),
    )


def _best_fixed(people: People) -> Figures:
    """Try intervals from 0.5 to 20 s: what somebody could set who knew the people, but only one delay."""
    best = min(
        (wait_fixed(quarters / 4) for quarters in range(2, 81)),
        key=lambda fixed: toll(looks(fixed), people).cost(_POLL_COST),
    )
    return _figures([[*looks(best)]], people)


def _over_optimum(crowd: Crowd, name: str) -> float:
    return Spread.of([figures.over_optimum for figures in crowd.schedules[name]]).median


_COLUMNS: Final = {"requests": 2, "lateness, s": 2, "p95, s": 2, "cost, s": 2, f"over {OPTIMUM}": 3}


def _table(name: str, crowd: Crowd) -> Table:
    table = Table(f"people: {name}; 1 in 5 never approves", ["", *_COLUMNS])
    for schedule, of in crowd.schedules.items():
        cells = [_text([figures[k] for figures in of], digits) for k, digits in enumerate(_COLUMNS.values())]
        table.rows.append([schedule, *cells])
    return table


def _text(values: list[float], digits: int) -> str:
    """Write what was drawn with its spread, what was computed without."""
    return f"{values[0]:.{digits}f}" if len(values) == 1 else Spread.of(values).text(digits)


def _shift_table(shifts: Mapping[str, list[list[float]]]) -> Table:
    table = Table(
        f"people change after {_BEFORE_SHIFT} waits: cost over the new optimum, while {OURS} waits and learns",
        ["waits since", *shifts],
    )
    for k in range(_WINDOWS):
        cells = [_text([windows[k] for windows in of], 3) for of in shifts.values()]
        table.rows.append([f"{k * _WINDOW + 1} to {(k + 1) * _WINDOW}", *cells])
    return table


_TIMES_OPTIMUM: Final = (1.5, 2.5, 5.0)
_REQUESTS: Final = (1.3, 80.0)
_LATENESS: Final = (0.38, 30.0)


def draw(raw: dict[str, Json]) -> Figure:
    """Draw lateness against requests, one diagram for each kind of people."""
    results = msgspec.convert(raw, Results)
    figure, axes = pictures.panels(len(results.crowds), width=3.6, height=4.8)
    multiples = ", ".join(f"{times:g}" for times in _TIMES_OPTIMUM)
    figure.supxlabel(
        f"requests a wait, on average (1 in 5 never approves); grey: equal cost, {multiples} times the optimum's",
        fontsize=10,
    )
    axes[0].set_ylabel("seconds until an approval is noticed, on average")
    for name, diagram in zip(results.crowds, axes, strict=True):
        diagram.set_title(name, fontsize=10)
        _scales(diagram)
    # Labels come last: where there is room for them follows from the layout.
    for crowd, diagram in zip(results.crowds.values(), axes, strict=True):
        _diagram(diagram, crowd, results.poll_cost)
    return figure


def _scales(axes: Axes) -> None:
    axes.set(xscale="log", yscale="log", xlim=_REQUESTS, ylim=_LATENESS)
    for axis, ticks in ((axes.xaxis, (2, 5, 10, 20, 50)), (axes.yaxis, (0.5, 1, 2, 5, 10, 20))):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.grid(visible=False)


def _diagram(axes: Axes, crowd: Crowd, poll_cost: float) -> None:
    _equal_costs(axes, crowd, poll_cost)
    axes.plot(*zip(*crowd.front, strict=True), color="black", linewidth=1)
    dots = {rival.label: _point(crowd.schedules[name]) for name, rival in RIVALS.items()}
    axes.plot(*zip(*dots.values(), strict=True), "o", markersize=4, color=pictures.OTHERS[2])
    path = [_point(crowd.schedules[_ours(waits)]) for waits in _LESSONS]
    axes.plot(*zip(*path, strict=True), "o-", markersize=4, color=pictures.OURS, linewidth=1.5, zorder=3)
    label(axes, dots, [*path, *crowd.front], "#333333")
    _pointed(axes, f"{OURS},\nuntaught to\n1 000 waits", path[-1], (-10, -46), pictures.OURS)
    _pointed(axes, OPTIMUM, crowd.front[2], (-14, -14), "black")


def _pointed(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], color: str) -> None:
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


def _equal_costs(axes: Axes, crowd: Crowd, poll_cost: float) -> None:
    least = crowd.schedules[OPTIMUM][0].cost
    low, high = _LATENESS
    lateness = [low * (high / low) ** (k / 200) for k in range(201)]
    for times in _TIMES_OPTIMUM:
        line = [((times * least - crowd.approving * y) / poll_cost, y) for y in lateness]
        axes.plot(*zip(*[at for at in line if at[0] > 0], strict=True), color="#c8c8c8", linewidth=0.7, zorder=0)
        axes.annotate(f"{times:g}x", line[0], (1, 2), textcoords="offset points", fontsize=7.5, color="#888888")


def _point(of: list[Figures]) -> tuple[float, float]:
    polls = Spread.of([figures.polls for figures in of]).median
    return polls, Spread.of([figures.lateness for figures in of]).median
