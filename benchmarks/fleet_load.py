"""A fleet under load: bursts, new requests behind a backlog, and a service that has bad moments."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import TYPE_CHECKING, Final

from .approval_times import seeded_random
from .fleet import Pace, fleet
from .noticing import Noticed, Plan, by_worker, known_of, request_all
from .report import Goal, Report, Spread, Table, p95
from .server import Failure

if TYPE_CHECKING:
    from .bench import Bench
    from .fleet import Fleet
    from .server import Server

_RATE: Final = 1000.0  # polls of a worker in a second: its default
_LOST_AFTER: Final = 180.0  # seconds after which an unnoticed approval counts as lost
_ALL_ASKED: Final = 60.0  # seconds, for a backlog of 20 000 requests
_LONG: Final = 600.0  # seconds: longer than is measured


async def measure(bench: Bench, server: Server, report: Report) -> None:
    """Add a table for each."""
    await _measure_bursts(bench, server, report)
    await _measure_newcomers(bench, server, report)
    await _measure_bad_moments(bench, server, report)


# -- bursts


async def _measure_bursts(bench: Bench, server: Server, report: Report) -> None:
    """Submit many requests at once, to one worker that was idle, with load shedding and without it."""
    sizes, ages = bench.pick(
        full=((1_000, 10_000), (5.0, 15.0)), quick=((1_000,), (2.0, 6.0)), smoke=((50,), (0.1, 0.5))
    )
    columns = ["requests", "load shedding", "all asked, s", "late, s", "p95, s"]
    columns += ["asked late and late, s", "polls per wait", "lost"]
    table = Table(f"bursts: requests at once, to one idle worker of {_RATE:g} polls/s", columns)
    for size in sizes:
        late: dict[bool, float] = {}
        for sheds in (True, False):
            bench.progress(f"  burst of {size}, load shedding {'on' if sheds else 'off'}")
            source = seeded_random(size)
            plan = Plan([0.0] * size, [source.uniform(*ages) for _ in range(size)])
            async with fleet(server, Pace(None, _RATE, sheds)) as workers:
                began = time.perf_counter()
                asked, noticed = await _burst(workers, plan)
            known = known_of(f"burst of {size}", noticed)
            pairs = zip(noticed, plan.ages, strict=True)
            in_all = [one.at - began - age for one, age in pairs if one is not None]
            seconds = [one.late for one in known]
            late[sheds] = statistics.median(seconds)
            table.rows.append(
                [
                    f"{size}",
                    "on" if sheds else "off",
                    f"{asked:.1f}",
                    Spread.of(seconds).text(2),
                    f"{p95(seconds):.2f}",
                    Spread.of(in_all).text(1),
                    f"{statistics.fmean(one.polls for one in known):.1f}",
                    f"{noticed.count(None)}",
                ]
            )
        ratio = late[True] / late[False]
        report.goals.append(Goal(f"lateness in a burst of {size}, load shedding on / off", 3, ratio))
    report.tables.append(table)


async def _burst(workers: Fleet, plan: Plan) -> tuple[float, list[Noticed | None]]:
    """Return the seconds until all users were asked, and what became of the approvals."""
    before, began = workers.server.statistics().created, time.perf_counter()

    async def until_all_are_asked() -> float:
        await workers.until_created(before + len(plan.ages))
        return time.perf_counter() - began

    async with asyncio.TaskGroup() as group:
        asked = group.create_task(until_all_are_asked())
        noticed = group.create_task(by_worker(workers, plan, lost_after=_LOST_AFTER))
    return asked.result(), noticed.result()


# -- a backlog, and new requests


async def _measure_newcomers(bench: Bench, server: Server, report: Report) -> None:
    """Submit a backlog of requests that nobody approves, and then new ones for a minute."""
    backlog, rate, seconds = bench.pick(full=(20_000, 5.0, 60.0), quick=(2_000, 5.0, 5.0), smoke=(100, 20.0, 0.5))
    columns = ["load shedding", "backlog: all asked, s", "new ones: asked after, s", "p95, s"]
    table = Table(
        f"{backlog} requests at once, and {rate:g} new ones a second behind them for {seconds:g} s; one worker", columns
    )
    for sheds in (True, False):
        bench.progress(f"  {backlog} waiting and new ones coming, load shedding {'on' if sheds else 'off'}")
        async with fleet(server, Pace(None, _RATE, sheds)) as workers:
            asked, new = await _newcomers(workers, backlog, [k / rate for k in range(round(rate * seconds))])
        table.rows.append(["on" if sheds else "off", f"{asked:.1f}", Spread.of(new).text(2), f"{p95(new):.2f}"])
        report.raw[f"newcomers, load shedding {'on' if sheds else 'off'}"] = [asked, *new]
        if sheds:
            report.goals.append(Goal(f"seconds until a backlog of {backlog} is asked", _ALL_ASKED, asked))
    report.tables.append(table)


async def _newcomers(workers: Fleet, backlog: int, starts: list[float]) -> tuple[float, list[float]]:
    """Return the seconds until the whole backlog was asked, and for each new request those until its user was.

    All are asked in the end, or nothing is measured.
    """
    began = time.perf_counter()
    old = Plan([0.0] * backlog, [_LONG] * backlog)
    new = Plan(starts, [_LONG] * len(starts))
    old_ids, new_ids, submitted = old.operation_ids(), new.operation_ids(), dict[str, float]()
    before = workers.server.statistics().created

    async def request(operation_id: str) -> None:
        submitted[operation_id] = time.perf_counter()
        await workers.request(operation_id)

    async with asyncio.TaskGroup() as group:
        group.create_task(request_all(new_ids, new, request))
        await request_all(old_ids, old, workers.request)
    await workers.until_created(before + backlog + len(starts))
    approvals = workers.server.approvals()
    asked = {operation_id: approval.due - _LONG for operation_id, approval in approvals.items()}
    after = [asked[new_id] - submitted[new_id] for new_id in new_ids]
    return max(asked[old_id] for old_id in old_ids) - began, after


# -- a service that has bad moments


async def _measure_bad_moments(bench: Bench, server: Server, report: Report) -> None:
    """Let the service, or what stands before it, answer wrongly for a while under requests that wait."""
    size, seconds, later = bench.pick(full=(300, 5.0, 20.0), quick=(100, 2.0, 3.0), smoke=(20, 0.3, 0.3))
    table = Table(
        f"{seconds:g} s of wrong answers, under {size} requests that wait; users approve within {later:g} s of its end",
        ["the service answers", "late, s", "p95, s", "polls per wait", "lost"],
    )
    kinds: list[Failure | None] = [None, *Failure]
    for kind in bench.pick(full=kinds, quick=kinds, smoke=[None, Failure.FORBIDDEN]):
        name = "as ever" if kind is None else kind
        bench.progress(f"  {seconds:g} s of answers: {name}")
        source = seeded_random(size)
        plan = Plan([0.0] * size, [seconds + source.uniform(0.0, later) for _ in range(size)])
        async with fleet(server, Pace(None, _RATE)) as workers:
            noticed = await _through(workers, plan, kind, seconds)
        known = known_of(name, noticed)
        late = [one.late for one in known]
        polls = statistics.fmean(one.polls for one in known)
        table.rows.append([name, Spread.of(late).text(2), f"{p95(late):.2f}", f"{polls:.1f}", f"{noticed.count(None)}"])
        report.goals.append(Goal(f"approvals lost, the service answers {name}", 0, noticed.count(None)))
    report.tables.append(table)


async def _through(workers: Fleet, plan: Plan, kind: Failure | None, seconds: float) -> list[Noticed | None]:
    """Return what became of the approvals, where the service fails from the time on when all users were asked."""
    before = workers.server.statistics().created

    async def fail() -> None:
        await workers.until_created(before + len(plan.ages))
        if kind is not None:
            await asyncio.to_thread(workers.server.fail, kind)
            await asyncio.sleep(seconds)
            await asyncio.to_thread(workers.server.approve, approved=False)

    async with asyncio.TaskGroup() as group:
        group.create_task(fail())
        noticed = group.create_task(by_worker(workers, plan))
    return noticed.result()
