"""Workers on a broker: what a look costs, what waiting requests hold, and how late an approval is noticed.

The broker is a real nats-server with its streams on disk; it, each worker and the service are processes of their own.
CPU is counted for each of them, so that it means the same however many share a core. Lateness is of the same approvals
as the in-process poller's, at the same ages, in turn.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
import time
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tenacity import wait_chain, wait_fixed

from aiokeyless import KeylessClient
from aiokeyless.worker import Outcome, approval_outcomes
from benchmarks import pictures
from benchmarks.bench import order
from benchmarks.fleet import EXPIRES_IN, Fleet, Shares, fleet
from benchmarks.people import seeded
from benchmarks.report import CannotMeasureError, Goal, Report, Spread, Table
from benchmarks.server import (
    API_KEY,
    EXTERNAL_USER_ID,
    OPERATION_PAYLOAD,
    USER_ID,
    Server,
    Workload,
    approved_after,
    serving,
    split_cores,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmarks.bench import Bench

_ENOUGH_WORK: Final = 0.8  # of the looks that are due: with more of them done, the schedule may have been the limit
_FULL: Final = 0.9  # of all cores: with less in use, something else was in the way
_GLANCES: Final = 10
_PATIENCE: Final = 20.0  # seconds after which an approval that nobody noticed is lost

POLLER: Final = "in-process poller"
WORKER: Final = "worker"
AGAIN: Final = "in-process poller, once more"


class Window(NamedTuple):
    """What workers did in a stretch of time."""

    looks: float  # a second, all workers together
    worker: float  # seconds of CPU a look, all workers together
    broker: float
    service: float

    @property
    def cores(self) -> float:
        """How many cores all processes together used."""
        return self.looks * (self.worker + self.broker + self.service)


class Holding(NamedTuple):
    """What waiting requests hold, in bytes."""

    broker: float  # resident
    worker: float  # resident
    disk: float


class Crowd(NamedTuple):
    """Requests whose approvals are to be noticed."""

    every: float  # seconds between two looks
    starts: list[float]  # seconds from the first
    ages: list[float]  # seconds from an operation's creation to its approval


class Noticed(NamedTuple):
    """How one approval was noticed."""

    late: float  # seconds from the approval until the application knew
    handed: float  # seconds of these from the answer that said so
    looks: int


def run(bench: Bench) -> Report:
    """Measure looks a second, memory, and lateness."""
    report = Report("distributed: workers on a broker")
    with serving() as server:
        asyncio.run(_measure(bench, server, report))
    return report


async def _measure(bench: Bench, server: Server, report: Report) -> None:
    await _measure_looks(bench, server, report)
    await _measure_memory(bench, server, report)
    await _measure_lateness(bench, server, report)


# -- looks a second


async def _measure_looks(bench: Bench, server: Server, report: Report) -> None:
    waiting, every, first = bench.pick(full=(4_000, 0.2, 3.0), quick=(1_000, 0.05, 0.5), smoke=(300, 0.02, 0.2))
    most, rounds, seconds = bench.pick(full=(3, 3, 3.0), quick=(3, 1, 0.4), smoke=(1, 1, 0.1))
    windows: dict[int, list[Window]] = {count + 1: [] for count in range(most)}
    # The broker prefers what it delivers again, and workers space their looks out while new requests wait for their
    # turn: so all are created first, and what is measured is looks and nothing else.
    async with fleet(server, wait_chain(wait_fixed(first), wait_fixed(every)), most) as workers:
        requests = server.facts().requests
        await workers.submit(waiting)
        await workers.until(lambda facts: facts.requests - requests > waiting)
        for k in range(rounds):
            for count in order([*windows][::-1], k):  # they start together, which takes less time
                bench.say(f"  looks, round {k + 1} of {rounds}: {count} of {most} workers")
                await workers.resize(count)
                await asyncio.sleep(seconds / 4)
                windows[count].append(await _window(workers, seconds, due=waiting / every))
    report.tables.append(_looks_table(windows, waiting))
    report.raw["cores"] = _cores()
    report.raw["looks"] = {str(count): [{**window._asdict()} for window in of] for count, of in windows.items()}
    report.notes += _cores_notes(windows)


async def _window(workers: Fleet, seconds: float, *, due: float) -> Window:
    with Workload(workers.server) as service:
        before = workers.cpu()
        await asyncio.sleep(seconds)
    spent = Shares(*(b - a for a, b in zip(before, workers.cpu(), strict=True)))
    looks = service.requests
    if service.bound:
        raise CannotMeasureError(f"the server was the bottleneck ({service.share:.0%} of its core)")
    if looks > _ENOUGH_WORK * due * service.wall:
        raise CannotMeasureError("the workers were at the end of their work: more requests must wait")
    return Window(looks / service.wall, spent.workers / looks, spent.broker / looks, service.cpu / looks)


def _looks_table(windows: dict[int, list[Window]], waiting: int) -> Table:
    cores = _cores()
    table = Table(
        f"looks: {waiting} requests wait, more are due than can be looked at; {cores} cores for all processes",
        ["workers", "looks/s", "CPU a look, us: worker", "broker", "service", "of a core, each worker", "cores in use"],
    )
    for count, of in windows.items():
        cells = [
            Spread.of([window.looks for window in of]).text(0),
            *(Spread.of([1e6 * getattr(window, who) for window in of]).text(0) for who in ("worker", "broker")),
            Spread.of([1e6 * window.service for window in of]).text(1),
            f"{Spread.of([window.looks * window.worker / count for window in of]).median:.0%}",
            f"{Spread.of([window.cores for window in of]).median:.2f} of {cores}",
        ]
        table.rows.append([str(count), *cells])
    return table


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cores_notes(windows: dict[int, list[Window]]) -> list[str]:
    cores, (_, services) = _cores(), split_cores()
    where = f", the service on core {', '.join(map(str, services))}" if services else ""
    notes = [f"workers and broker run on any of the {cores} cores{where}"]
    crowded = [count for count in windows if count + 2 > cores]  # the broker, and the service
    if crowded:
        notes.append(
            f"as workers, broker and service are more processes than cores with {crowded[0]} or more of the workers, "
            "looks/s is what this machine can do there, and does not show what a worker adds where there is room for it"
        )
    most = max(Spread.of([window.cores for window in of]).median for of in windows.values())
    if crowded and most < _FULL * cores:
        notes.append(
            f"but all of them together used no more than {most:.2f} of {cores} cores: they waited, or other programs "
            "took the rest, and the machine can do more"
        )
    return notes


# -- memory


async def _measure_memory(bench: Bench, server: Server, report: Report) -> None:
    sizes = bench.pick(full=[10_000, 100_000], quick=[2_000], smoke=[100])
    every, settle = bench.pick(full=(40.0, 2.0), quick=(0.7, 0.1), smoke=(0.2, 0.05))
    async with fleet(server, wait_fixed(every)) as workers:
        requests = server.facts().requests
        holdings = {0: await _holding(workers, settle)}
        for waiting, size in itertools.pairwise([0, *sizes]):
            bench.say(f"  memory: {size} waiting requests")
            await workers.submit(size - waiting)
            holdings[size] = await _holding(workers, settle)
        await workers.until(lambda facts: facts.requests - requests > size // 2)
        at_work = await _holding(workers, settle)
    report.tables.append(_memory_table(holdings, at_work, every))
    report.raw["memory"] = {str(waiting): {**holding._asdict()} for waiting, holding in holdings.items()}
    report.raw["memory at work"] = {**at_work._asdict()}
    if len(sizes) > 1:  # against nothing, the first requests would pay for what a broker needs to work at all
        few, many = sizes[-2:]
        broker, _, disk = ((b - a) / (many - few) for a, b in zip(holdings[few], holdings[many], strict=True))
        report.notes.append(
            f"a waiting request more takes {disk:.0f} B of the broker's disk, and about {broker:.0f} B of its memory, "
            "of which its garbage collector decides when it is given back"
        )


def _memory_table(holdings: dict[int, Holding], at_work: Holding, every: float) -> Table:
    table = Table(
        f"memory: waiting requests, each looked at every {every:g} s (MB)",
        ["waiting", "broker, resident", "one worker, resident", "broker, on disk"],
    )
    rows = {str(waiting): holding for waiting, holding in holdings.items()}
    rows["the same, while they are looked at"] = at_work
    table.rows.extend([name, *(f"{size / 1e6:.1f}" for size in holding)] for name, holding in rows.items())
    return table


async def _holding(workers: Fleet, settle: float) -> Holding:
    """Return the most that is held within so many seconds."""
    glances = []
    for _ in range(_GLANCES):
        await asyncio.sleep(settle / _GLANCES)
        glances.append(workers.resident())
    most = Shares(*(max(glance) for glance in zip(*glances, strict=True)))
    return Holding(most.broker, most.workers, workers.on_disk())


# -- lateness


async def _measure_lateness(bench: Bench, server: Server, report: Report) -> None:
    crowd = _crowd(*bench.pick(full=(500, 1.0, 8), quick=(200, 0.2, 3), smoke=(40, 0.05, 2)))
    sides: dict[str, list[Noticed | None]] = {}
    async with fleet(server, wait_fixed(crowd.every)) as workers:
        ways: dict[str, Callable[[Fleet, Crowd], Awaitable[list[Noticed | None]]]] = {
            POLLER: _by_poller,
            WORKER: _by_worker,
            AGAIN: _by_poller,
        }
        for name in bench.pick(full=[*ways], quick=[POLLER, WORKER], smoke=[POLLER, WORKER]):
            bench.say(f"  lateness: {name}")
            sides[name] = await ways[name](workers, crowd)
    report.tables.append(_lateness_table(crowd, sides))
    report.raw["lateness"] = {
        name: [None if noticed is None else {**noticed._asdict()} for noticed in of] for name, of in sides.items()
    }
    report.raw["every"] = crowd.every
    report.goals.append(Goal(f"approvals lost by the worker, of {len(crowd.ages)}", 0, sides[WORKER].count(None)))


def _crowd(count: int, every: float, intervals: int) -> Crowd:
    """Return requests that begin within one interval, and are approved at any moment of the next so many."""
    chance = seeded(1)
    starts = sorted(chance.uniform(0, every) for _ in range(count))
    return Crowd(every, starts, [chance.uniform(every, (1 + intervals) * every) for _ in range(count)])


async def _by_poller(workers: Fleet, crowd: Crowd) -> list[Noticed | None]:
    operation_ids, known = _operation_ids(crowd), dict[str, float]()
    async with KeylessClient(API_KEY, base_url=workers.server.base_url, schedule=wait_fixed(crowd.every)) as client:

        async def ask(operation_id: str) -> None:
            await client.request_approval(
                USER_ID,
                operation_id=operation_id,
                operation_payload=OPERATION_PAYLOAD,
                external_user_id=EXTERNAL_USER_ID,
                expires_in=EXPIRES_IN,
            )
            known[operation_id] = time.perf_counter()

        await _ask(operation_ids, crowd, ask)
    return _noticed(workers.server, operation_ids, known)


async def _by_worker(workers: Fleet, crowd: Crowd) -> list[Noticed | None]:
    operation_ids, known = _operation_ids(crowd), dict[str, float]()

    async def read() -> None:
        async with aclosing(approval_outcomes(workers.connection, "benchmark")) as events:
            async for event in events:
                if event.outcome is Outcome.APPROVED and event.operation_id is not None:
                    known[event.operation_id] = time.perf_counter()
                if len(known) == len(operation_ids):
                    return

    with suppress(TimeoutError):  # what is not known by then is lost
        async with asyncio.timeout(crowd.every + max(crowd.ages) + _PATIENCE), asyncio.TaskGroup() as group:
            group.create_task(read())
            await _ask(operation_ids, crowd, workers.request)
    return _noticed(workers.server, operation_ids, known)


def _operation_ids(crowd: Crowd) -> list[str]:
    return [approved_after(age) for age in crowd.ages]


async def _ask(operation_ids: list[str], crowd: Crowd, ask: Callable[[str], Awaitable[None]]) -> None:
    """Ask for all approvals, each at its time."""

    async def one(start: float, operation_id: str) -> None:
        await asyncio.sleep(start)
        await ask(operation_id)

    await asyncio.gather(*map(one, crowd.starts, operation_ids))


def _noticed(server: Server, operation_ids: list[str], known: dict[str, float]) -> list[Noticed | None]:
    """Set when the application knew of approvals against when they were given; None for one that was lost."""
    approvals = server.approvals()

    def one(operation_id: str) -> Noticed | None:
        approval = approvals.get(operation_id)
        if approval is None or approval.told is None or operation_id not in known:
            return None
        at = known[operation_id]
        return Noticed(at - approval.due, at - approval.told, approval.looks)

    return [one(operation_id) for operation_id in operation_ids]


def _lateness_table(crowd: Crowd, sides: dict[str, list[Noticed | None]]) -> Table:
    table = Table(
        f"lateness: {len(crowd.ages)} approvals, a look every {crowd.every:g} s",
        ["", "looks a wait", "late, s", "p95, s", "after the answer, ms", f"later than the {POLLER}, ms", "lost"],
    )
    for name, of in sides.items():
        known = [noticed for noticed in of if noticed is not None]
        if len(known) < 2:
            raise CannotMeasureError(f"{name}: {len(known)} of {len(of)} approvals were noticed")
        late = [noticed.late for noticed in known]
        cells = [
            f"{statistics.fmean(noticed.looks for noticed in known):.2f}",
            Spread.of(late).text(3),
            f"{statistics.quantiles(late, n=20, method='inclusive')[-1]:.3f}",
            Spread.of([1e3 * noticed.handed for noticed in known]).text(1),
            "" if name == POLLER else Spread.of(_later(of, sides[POLLER])).text(1),
            str(of.count(None)),
        ]
        table.rows.append([name, *cells])
    return table


def _later(these: Sequence[Noticed | None], those: Sequence[Noticed | None]) -> list[float]:
    """Return by how many ms these were noticed later than those, approval by approval."""
    pairs = zip(these, those, strict=True)
    return [1e3 * (this.late - that.late) for this, that in pairs if this is not None and that is not None]


# -- the picture


def draw(raw: dict[str, Any]) -> Figure:
    """Draw what a look costs, by the number of workers, and how late approvals were noticed."""
    figure, (costs, lateness) = pictures.panels(2)
    _draw_costs(costs, raw)
    for colour, (name, of) in zip((pictures.OTHERS[1], pictures.OURS), raw["lateness"].items(), strict=False):
        late = sorted(noticed["late"] for noticed in of if noticed is not None)
        lateness.plot(late, [(k + 1) / len(late) for k in range(len(late))], color=colour, label=name)
    lateness.set_xlabel(f"seconds until an approval is noticed, a look every {raw['every']:g} s")
    lateness.set_ylabel("part of the approvals")
    lateness.legend()
    return figure


_PARTS: Final = {"worker": pictures.OURS, "broker": pictures.OTHERS[2], "service": pictures.OTHERS[0]}


def _draw_costs(ax: Axes, raw: dict[str, Any]) -> None:
    counts = [*raw["looks"]]
    bottom = [0.0] * len(counts)
    for who, colour in _PARTS.items():
        micros = [1e6 * Spread.of([window[who] for window in raw["looks"][count]]).median for count in counts]
        ax.bar(counts, micros, 0.6, bottom, color=colour, label=f"{who} (a stand-in)" if who == "service" else who)
        bottom = [a + b for a, b in zip(bottom, micros, strict=True)]
    for count, top in zip(counts, bottom, strict=True):
        looks = Spread.of([window["looks"] for window in raw["looks"][count]]).median
        text = f"{looks:,.0f}".replace(",", " ")
        ax.annotate(f"{text} looks/s", (count, top), (0, 3), textcoords="offset points", ha="center")
    ax.set_ylim(top=1.35 * max(bottom))
    ax.grid(visible=False, axis="x")
    ax.set_xlabel(f"workers; they, broker and service share {raw['cores']} cores")
    ax.set_ylabel("CPU a look, µs")
    ax.legend(loc="upper left", ncols=3, fontsize=8)
