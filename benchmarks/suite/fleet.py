"""Workers on NATS: what a poll costs, what waiting requests occupy, and how late an approval is noticed.

The broker is a real nats-server with its streams on disk; it, each worker and the service are processes of their own.
CPU is measured for each process, so that it does not depend on how many share a core. Lateness is compared with the
in-process poller, with the same approvals at the same ages, in turn.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tenacity import wait_chain, wait_fixed

from aiokeyless import KeylessClient
from benchmarks import fleet_load, pictures
from benchmarks.approval_times import seeded_random
from benchmarks.bench import order
from benchmarks.fleet import EXPIRES_IN, Fleet, Pace, Shares, fleet
from benchmarks.noticing import Noticed, Plan, by_worker, known_of, noticed, request_all
from benchmarks.report import CannotMeasureError, Goal, Report, Spread, Table, p95
from benchmarks.server import (
    API_KEY,
    EXTERNAL_USER_ID,
    OPERATION_PAYLOAD,
    USER_ID,
    Server,
    Workload,
    serving,
    split_cores,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from tenacity.wait import wait_base

    from benchmarks.bench import Bench

_ENOUGH_WORK: Final = 0.8  # of the due polls: if more of them were sent, the schedule may have been the limit
_FULL: Final = 0.9  # of all cores: with less in use, something else was the limit
_SAMPLES: Final = 10

POLLER: Final = "in-process poller"
WORKER: Final = "worker"
REPEATED: Final = "in-process poller, repeated"


class Window(NamedTuple):
    """The measurements of one time window."""

    polls: float  # per second, all workers together
    worker: float  # CPU seconds per poll, all workers together
    broker: float
    service: float

    @property
    def cores(self) -> float:
        """The number of cores that all processes used."""
        return self.polls * (self.worker + self.broker + self.service)


class Holding(NamedTuple):
    """Memory and disk of waiting requests, in bytes."""

    broker: float  # resident
    worker: float  # resident
    disk: float


def run(bench: Bench) -> Report:
    """Measure polls per second, memory, and lateness."""
    report = Report("fleet: workers on NATS")
    with serving() as server:
        asyncio.run(_measure(bench, server, report))
    return report


async def _measure(bench: Bench, server: Server, report: Report) -> None:
    await _measure_polls(bench, server, report)
    await _measure_memory(bench, server, report)
    await _measure_lateness(bench, server, report)
    await fleet_load.measure(bench, server, report)


# -- polls per second


async def _measure_polls(bench: Bench, server: Server, report: Report) -> None:
    waiting, interval, first = bench.pick(full=(4_000, 0.2, 3.0), quick=(1_000, 0.05, 0.5), smoke=(300, 0.02, 0.2))
    most, rounds, seconds = bench.pick(full=(3, 3, 3.0), quick=(3, 1, 0.4), smoke=(1, 1, 0.1))
    windows: dict[int, list[Window]] = {count + 1: [] for count in range(most)}
    # The broker prefers redeliveries, and workers poll less often while new requests are waiting. So all operations are
    # created first, and nothing but polls is measured.
    async with fleet(server, Pace(wait_chain(wait_fixed(first), wait_fixed(interval))), most) as workers:
        requests = server.statistics().requests
        await workers.submit(waiting)
        await workers.until(lambda statistics: statistics.requests - requests > waiting)
        for k in range(rounds):
            for count in order([*windows][::-1], k):  # the most first: workers that start together start faster
                bench.progress(f"  polls, round {k + 1} of {rounds}: {count} of {most} workers")
                await workers.resize(count)
                await workers.until_polled()
                await asyncio.sleep(seconds / 4)
                windows[count].append(await _window(workers, seconds, due=waiting / interval))
    report.tables.append(_polls_table(windows, waiting))
    report.raw["cores"] = _cores()
    report.raw["polls"] = {str(count): [{**window._asdict()} for window in of] for count, of in windows.items()}
    report.notes += _cores_notes(windows)


async def _window(workers: Fleet, seconds: float, *, due: float) -> Window:
    with Workload(workers.server) as service:
        before = workers.cpu()
        await asyncio.sleep(seconds)
    cpu = Shares(*(b - a for a, b in zip(before, workers.cpu(), strict=True)))
    polls = service.requests
    if service.bound:
        raise CannotMeasureError(f"the server was the bottleneck ({service.share:.0%} of its core)")
    if not polls:
        raise CannotMeasureError("the workers made no poll: other programs took the machine")
    if polls > _ENOUGH_WORK * due * service.wall:
        raise CannotMeasureError("the workers ran out of due polls: more requests must wait")
    return Window(polls / service.wall, cpu.workers / polls, cpu.broker / polls, service.cpu / polls)


def _polls_table(windows: dict[int, list[Window]], waiting: int) -> Table:
    cores = _cores()
    table = Table(
        f"polls: {waiting} waiting requests, more polls due than can be sent; {cores} cores for all processes",
        [
            "workers",
            "polls/s",
            "CPU per poll, us: worker",
            "broker",
            "service",
            "share of a core per worker",
            "cores in use",
        ],
    )
    for count, of in windows.items():
        cells = [
            Spread.of([window.polls for window in of]).text(0),
            *(Spread.of([1e6 * getattr(window, who) for window in of]).text(0) for who in ("worker", "broker")),
            Spread.of([1e6 * window.service for window in of]).text(1),
            f"{Spread.of([window.polls * window.worker / count for window in of]).median:.0%}",
            f"{Spread.of([window.cores for window in of]).median:.2f} of {cores}",
        ]
        table.rows.append([str(count), *cells])
    return table


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cores_notes(windows: dict[int, list[Window]]) -> list[str]:
    cores, (_, services) = _cores(), split_cores()
    where = f", the service on core {', '.join(map(str, services))}" if services else ""
    notes = [f"workers and broker run on all {cores} cores{where}"]
    oversubscribed = [count for count in windows if count + 2 > cores]  # the broker, and the service
    if oversubscribed:
        notes.append(
            f"with {oversubscribed[0]} or more workers there are more processes than cores: polls/s is then the limit "
            "of this machine, and does not show what a worker adds on a free core"
        )
    most = max(Spread.of([window.cores for window in of]).median for of in windows.values())
    if oversubscribed and most < _FULL * cores:
        notes.append(
            f"but all processes together used at most {most:.2f} of {cores} cores: they waited, or other programs took "
            "the rest, and the machine can do more"
        )
    return notes


# -- memory


async def _measure_memory(bench: Bench, server: Server, report: Report) -> None:
    sizes = bench.pick(full=[10_000, 100_000, 200_000], quick=[2_000], smoke=[100])
    interval, settle = bench.pick(full=(80.0, 2.0), quick=(0.7, 0.1), smoke=(0.2, 0.05))
    async with fleet(server, Pace(wait_fixed(interval))) as workers:
        requests = server.statistics().requests
        holdings = {0: await _holding(workers, settle)}
        for waiting, size in itertools.pairwise([0, *sizes]):
            bench.progress(f"  memory: {size} waiting requests")
            await workers.submit(size - waiting)
            holdings[size] = await _holding(workers, settle)
        await workers.until(lambda statistics: statistics.requests - requests > size // 2)
        while_polled = await _holding(workers, settle)
    report.tables.append(_memory_table(holdings, while_polled, interval))
    report.raw["memory"] = {str(waiting): {**holding._asdict()} for waiting, holding in holdings.items()}
    report.raw["memory while polled"] = {**while_polled._asdict()}
    if len(sizes) > 1:  # the first requests would include the fixed cost of the broker
        few, many = sizes[-2:]
        broker, _, disk = ((b - a) / (many - few) for a, b in zip(holdings[few], holdings[many], strict=True))
        report.notes.append(
            f"each further waiting request takes {disk:.0f} B of the broker's disk and about {broker:.0f} B of its "
            "memory, which its garbage collector releases when it chooses"
        )


def _memory_table(holdings: dict[int, Holding], while_polled: Holding, interval: float) -> Table:
    table = Table(
        f"memory: waiting requests, each polled every {interval:g} s (MB)",
        ["waiting", "broker, resident", "one worker, resident", "broker, on disk"],
    )
    rows = {str(waiting): holding for waiting, holding in holdings.items()}
    rows["the same, while they are polled"] = while_polled
    table.rows.extend([name, *(f"{size / 1e6:.1f}" for size in holding)] for name, holding in rows.items())
    return table


async def _holding(workers: Fleet, settle: float) -> Holding:
    """Return the maximum within so many seconds."""
    samples = []
    for _ in range(_SAMPLES):
        await asyncio.sleep(settle / _SAMPLES)
        samples.append(workers.resident())
    most = Shares(*(max(values) for values in zip(*samples, strict=True)))
    return Holding(most.broker, most.workers, workers.storage.on_disk())


# -- lateness


async def _measure_lateness(bench: Bench, server: Server, report: Report) -> None:
    count, interval, intervals = bench.pick(full=(500, 1.0, 8), quick=(200, 0.2, 3), smoke=(40, 0.05, 2))
    plan = _plan(count, interval, intervals)
    sides: dict[str, list[Noticed | None]] = {}
    async with fleet(server, Pace(wait_fixed(interval))) as workers:
        by_poller = partial(_by_poller, schedule=wait_fixed(interval))
        by_side: dict[str, Callable[[Fleet, Plan], Awaitable[list[Noticed | None]]]] = {
            POLLER: by_poller,
            WORKER: by_worker,
            REPEATED: by_poller,
        }
        for name in bench.pick(full=[*by_side], quick=[POLLER, WORKER], smoke=[POLLER, WORKER]):
            bench.progress(f"  lateness: {name}")
            sides[name] = await by_side[name](workers, plan)
    report.tables.append(_lateness_table(plan, interval, sides))
    report.raw["lateness"] = {
        name: [None if one is None else {**one._asdict()} for one in of] for name, of in sides.items()
    }
    report.raw["interval"] = interval
    report.goals.append(Goal(f"approvals lost by the worker, of {len(plan.ages)}", 0, sides[WORKER].count(None)))


def _plan(count: int, interval: float, intervals: int) -> Plan:
    """Return a plan: requests start within one interval, and are approved at random in the following intervals."""
    source = seeded_random(1)
    starts = sorted(source.uniform(0, interval) for _ in range(count))
    return Plan(starts, [source.uniform(interval, (1 + intervals) * interval) for _ in range(count)])


async def _by_poller(workers: Fleet, plan: Plan, *, schedule: wait_base) -> list[Noticed | None]:
    operation_ids, known = plan.operation_ids(), dict[str, float]()
    base_url = workers.server.base_url
    async with KeylessClient(API_KEY, base_url=base_url, schedule=schedule, max_polls_per_second=None) as client:

        async def request(operation_id: str) -> None:
            await client.request_approval(
                USER_ID,
                operation_id=operation_id,
                operation_payload=OPERATION_PAYLOAD,
                external_user_id=EXTERNAL_USER_ID,
                expires_in=EXPIRES_IN,
            )
            known[operation_id] = time.perf_counter()

        await request_all(operation_ids, plan, request)
    return noticed(workers.server, operation_ids, known)


def _lateness_table(plan: Plan, interval: float, sides: dict[str, list[Noticed | None]]) -> Table:
    table = Table(
        f"lateness: {len(plan.ages)} approvals, a poll every {interval:g} s",
        ["", "polls per wait", "late, s", "p95, s", "after the answer, ms", f"later than the {POLLER}, ms", "lost"],
    )
    for name, of in sides.items():
        known = known_of(name, of)
        late = [one.late for one in known]
        cells = [
            f"{statistics.fmean(one.polls for one in known):.2f}",
            Spread.of(late).text(3),
            f"{p95(late):.3f}",
            Spread.of([1e3 * one.delivery for one in known]).text(1),
            "" if name == POLLER else Spread.of(_later(of, sides[POLLER])).text(1),
            str(of.count(None)),
        ]
        table.rows.append([name, *cells])
    return table


def _later(these: Sequence[Noticed | None], those: Sequence[Noticed | None]) -> list[float]:
    """Return how many ms later these were noticed than those, approval by approval."""
    pairs = zip(these, those, strict=True)
    return [1e3 * (this.late - that.late) for this, that in pairs if this is not None and that is not None]


# -- the picture


def draw(raw: dict[str, Any]) -> Figure:
    """Draw the cost of a poll by the number of workers, and the lateness of the approvals."""
    figure, (costs, lateness) = pictures.panels(2)
    _draw_costs(costs, raw)
    for color, (name, of) in zip((pictures.OTHERS[1], pictures.OURS), raw["lateness"].items(), strict=False):
        late = sorted(one["late"] for one in of if one is not None)
        lateness.plot(late, [(k + 1) / len(late) for k in range(len(late))], color=color, label=name)
    lateness.set_xlabel(f"seconds until an approval is noticed, a poll every {raw['interval']:g} s")
    lateness.set_ylabel("share of the approvals")
    lateness.legend()
    return figure


_PARTS: Final = {"worker": pictures.OURS, "broker": pictures.OTHERS[2], "service": pictures.OTHERS[0]}


def _draw_costs(ax: Axes, raw: dict[str, Any]) -> None:
    counts = [*raw["polls"]]
    bottom = [0.0] * len(counts)
    for who, color in _PARTS.items():
        microseconds = [1e6 * Spread.of([window[who] for window in raw["polls"][count]]).median for count in counts]
        ax.bar(counts, microseconds, 0.6, bottom, color=color, label=f"{who} (a stand-in)" if who == "service" else who)
        bottom = [a + b for a, b in zip(bottom, microseconds, strict=True)]
    for count, top in zip(counts, bottom, strict=True):
        polls = Spread.of([window["polls"] for window in raw["polls"][count]]).median
        text = f"{polls:,.0f}".replace(",", " ")
        ax.annotate(f"{text} polls/s", (count, top), (0, 3), textcoords="offset points", ha="center")
    ax.set_ylim(top=1.35 * max(bottom))
    ax.grid(visible=False, axis="x")
    ax.set_xlabel(f"workers; they, broker and service share {raw['cores']} cores")
    ax.set_ylabel("CPU per poll, µs")
    ax.legend(loc="upper left", ncols=3, fontsize=8)
