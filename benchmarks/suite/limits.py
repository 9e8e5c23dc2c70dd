"""How much one process bears, and what happens beyond: by waits, by arrivals, and by polls that are due.

Everything is CPU of the client's process, which other programs on the machine disturb little.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import time
import uuid
from typing import TYPE_CHECKING, Any, Final

from tenacity import wait_chain, wait_random

from aiokeyless import ApprovalTimeoutError, KeylessClient, KeylessError
from benchmarks import pictures
from benchmarks.approval_times import EAGER, seeded_random
from benchmarks.bench import cancel
from benchmarks.programs import until
from benchmarks.report import Report, Table, quantile
from benchmarks.server import API_KEY, OPERATION_PAYLOAD, USER_ID, Server, Workload, approved_after, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from matplotlib.figure import Figure

    from benchmarks.bench import Bench

    Row = dict[str, Any]

_START_WITHIN: Final = 900.0
_POLL_EVERY: Final = 0.02  # seconds between two checks of whether all waits have started
_BEAT: Final = 0.01  # seconds between two readings of the event loop's lag
_LONGEST: Final = 25.0  # seconds: the slowest users are cut off there, so that the number of waits settles

#: The columns of the tables, with the formats of their figures; "late by" is how late the oldest due poll was (median).
_SIZE: Final = {
    "waits": "d",
    "polls/s": ".0f",
    "CPU a poll, us": ".0f",
    "share of a core": ".0%",
    "loop lag 99%, ms": ".1f",
}
_ARRIVAL: Final = {"arrivals/s": ".0f", "waiting": "d", "polls/s": ".0f", "share of a core": ".0%", "failed": "d"}
_OVERLOAD: Final = {
    "polls due/s": ".0f",
    "limit": "",
    "sent/s": ".0f",
    "share of a core": ".0%",
    "late by, s": ".2f",
    "approvals found": "",
    "noticed after, s": ".2f",
    "longest": ".1f",
    "beyond a deadline, s": ".2f",
    "polls failed": "d",
    "waits failed": "d",
    "loop lag 99%, ms": ".1f",
}


def run(bench: Bench) -> Report:
    """Measure by waits, by arrivals, and beyond the capacity."""
    report = Report("limits: what one process bears, and what happens beyond")
    counts = bench.pick(full=[1_000, 10_000, 50_000, 100_000, 200_000], smoke=[50, 100])
    rate = bench.pick(full=200.0, smoke=20.0)
    offered = bench.pick(full=[2e3, 5e3, 1e4, 2e4, 4e4], smoke=[300.0])
    polled = bench.pick(full=(1000.0, 10.0), smoke=(200.0, 0.2))
    measured = bench.pick(full=(30.0, 15.0), smoke=(0.3, 0.3))
    beyond = bench.pick(full=(10_000, 15.0, 300), smoke=(100, 1.0, 10))
    with serving() as server:

        def measure(what: str, main: Any, *arguments: Any) -> Row:
            bench.progress(f"  {what}")
            row: Row = bench.in_fresh_process(_measured, server, main, *arguments)
            return row

        sizes = [measure(f"{count} waits", _size, count, *polled) for count in counts]
        arrivals = [measure(f"{rate:.0f} arrivals a second", _arrivals, rate, *measured)]
        overloads = [
            measure(f"{due:.0f} polls a second due", _overload, beyond, due, limit)
            for limit, due in itertools.product([None, 1000.0], offered)
        ]
    title = f"by arrivals: created, waited for with the default schedule, approved ({EAGER})"
    report.tables += [
        Table.of("by waits, each polled at random times", _SIZE, sizes),
        Table.of(title, _ARRIVAL, arrivals),
        Table.of("beyond: more polls due than can be sent", _OVERLOAD, overloads),
    ]
    report.raw = {"sizes": sizes, "arrivals": arrivals, "overloads": overloads}
    return report


def _measured(server: Server, main: Any, *arguments: Any) -> Row:
    """Run a measurement, unless the server was its bottleneck."""
    with Workload(server) as workload:
        row: Row = asyncio.run(main(server, *arguments))
    workload.check()
    return row


@contextlib.asynccontextmanager
async def _waiting(client: KeylessClient, count: int, interval: float) -> AsyncIterator[None]:
    """Start waits that are never approved, polled at random times, on average every ``interval`` seconds."""
    schedule = wait_chain(wait_random(0, interval), wait_random(0.5 * interval, 1.5 * interval))
    before = client.statistics.polls
    tasks = [
        asyncio.create_task(client.wait_for_approval(str(uuid.uuid4()), timeout=7200.0, schedule=schedule))
        for _ in range(count)
    ]
    try:
        await until(lambda: client.statistics.polls >= before + count, within=_START_WITHIN, every=_POLL_EVERY)
        yield
    finally:
        await cancel(tasks)


async def _window(client: KeylessClient, seconds: float) -> Row:
    """Measure the client for so long."""
    loop = asyncio.get_running_loop()
    lags: list[float] = []
    loop_lags: list[float] = []
    before, cpu, wall = client.statistics, time.process_time(), loop.time()
    while loop.time() - wall < seconds:
        due = loop.time() + _BEAT
        await asyncio.sleep(_BEAT)
        loop_lags.append(loop.time() - due)
        lags.append(client.statistics.lag)
    now, passed, cpu = client.statistics, loop.time() - wall, time.process_time() - cpu
    return {
        "polls/s": (now.polls - before.polls) / passed,
        "share of a core": cpu / passed,
        "CPU a poll, us": 1e6 * cpu / max(now.polls - before.polls, 1),
        "polls failed": now.transient_failures - before.transient_failures,
        "late by, s": quantile(lags, 0.5),
        "loop lag 99%, ms": 1e3 * quantile(loop_lags, 0.99),
    }


async def _size(server: Server, count: int, rate: float, seconds: float) -> Row:
    """Return what this many waits take, at this many polls a second."""
    async with (
        KeylessClient(API_KEY, base_url=server.base_url, max_polls_per_second=None) as client,
        _waiting(client, count, count / rate),
    ):
        gc.collect()
        await asyncio.sleep(0.5)  # what was late at the start is sent
        window = await _window(client, seconds)
    return {"waits": count, **window}


async def _arrivals(server: Server, rate: float, warm_up: float, seconds: float) -> Row:
    """Return what new requests cost, from their creation to their approval, once as many end as begin."""
    source, failed = seeded_random(1), 0

    async def request() -> None:
        nonlocal failed
        operation_id = approved_after(min(EAGER.draw(source), _LONGEST))
        try:
            await client.request_approval(USER_ID, operation_id=operation_id, operation_payload=OPERATION_PAYLOAD)
        except KeylessError:
            failed += 1

    async def arrive() -> None:
        due = time.perf_counter()
        async with asyncio.TaskGroup() as requests:
            while True:
                due += source.expovariate(rate)
                await asyncio.sleep(max(due - time.perf_counter(), 0.0))
                requests.create_task(request())

    async with KeylessClient(API_KEY, base_url=server.base_url, max_polls_per_second=None) as client:
        arriving = asyncio.create_task(arrive())
        await asyncio.sleep(warm_up)
        window = await _window(client, seconds)
        waiting = client.statistics.waiting
        await cancel([arriving])
    return {"arrivals/s": rate, "waiting": waiting, **window, "failed": failed}


async def _overload(server: Server, plan: tuple[int, float, int], offered: float, limit: float | None) -> Row:
    """Return what becomes of users' waits with a deadline, while more polls are due than can be sent."""
    waits, seconds, users = plan
    source, overrun, failed = seeded_random(1), 0.0, 0
    lateness: list[float] = []
    # Every fifth user comes too late.
    ages = [source.uniform(0.0, seconds) if k % 5 else 2 * seconds for k in range(users)]
    interval = waits / offered
    schedule = wait_random(0.5 * interval, 1.5 * interval)

    async def wait(waiting: Awaitable[object], due: float, deadline: float) -> None:
        nonlocal overrun, failed
        try:
            await waiting
            lateness.append(time.perf_counter() - due)
        except ApprovalTimeoutError as error:
            failed += type(error) is not ApprovalTimeoutError  # the final poll got no answer
        except KeylessError:
            failed += 1
        overrun = max(overrun, time.perf_counter() - deadline)

    async with (
        KeylessClient(API_KEY, base_url=server.base_url, max_polls_per_second=limit) as client,
        _waiting(client, waits, interval),
        asyncio.TaskGroup() as group,
    ):
        measuring = group.create_task(_window(client, seconds))
        for age in ages:
            created = time.perf_counter()
            ticket = await client.create_operation(
                USER_ID, operation_id=approved_after(age), operation_payload=OPERATION_PAYLOAD, expires_in=seconds
            )
            waiting = client.wait_for_approval(ticket, schedule=schedule)
            group.create_task(wait(waiting, created + age, time.perf_counter() + ticket.remaining()))
    window, in_time = measuring.result(), sum(age < seconds for age in ages)
    return {
        "polls due/s": offered,
        "limit": "none" if limit is None else f"{limit:.0f}",
        **window,
        "sent/s": window["polls/s"],
        "approvals found": f"{len(lateness)} of {in_time}",
        "noticed after, s": quantile(lateness, 0.5),
        "longest": quantile(lateness, 1.0),
        "beyond a deadline, s": overrun,
        "waits failed": failed,
    }


def draw(raw: dict[str, list[Row]]) -> Figure:
    """Draw the CPU of a poll by waits; and by polls that are due, what is sent and how late."""
    figure, (by_waits, by_polls, late) = pictures.panels(3, width=3.8)
    beyond = [each for each in raw["overloads"] if each["limit"] == "none"]
    due, sent, late_by, overrun = (
        [each[name] for each in beyond] for name in ("polls due/s", "sent/s", "late by, s", "beyond a deadline, s")
    )
    sizes = raw["sizes"]
    by_waits.plot(
        [each["waits"] for each in sizes], [each["CPU a poll, us"] for each in sizes], "o-", color=pictures.OURS
    )
    by_waits.set(xscale="log", xlabel="waits", ylabel="CPU of a poll, us")
    by_waits.set_ylim(bottom=0)
    by_polls.plot([0, max(due)], [0, max(due)], "--", color=pictures.OTHERS[0], label="due")
    by_polls.plot(due, sent, "o-", color=pictures.OURS, label="sent")
    by_polls.set_xlabel("polls per second due")
    by_polls.legend()
    late.plot(due, late_by, "o-", color=pictures.OURS, label="a poll is late by")
    late.plot(due, overrun, "s-", color=pictures.OTHERS[1], label="past a deadline, at most")
    late.set(xlabel="polls per second due", ylabel="seconds")
    late.set_ylim(bottom=0)
    late.legend()
    return figure
