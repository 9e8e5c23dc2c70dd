"""How much one process bears, and what happens beyond: by waits, by arrivals, and by polls that are due.

Everything is CPU of the client's process, which other programs on the machine disturb little. The page that the
documentation includes is written from the figures, see `page`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import time
import uuid
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tenacity import wait_chain, wait_random

from aiokeyless import ApprovalTimeoutError, KeylessClient, KeylessError
from benchmarks import pictures
from benchmarks.approval_times import ApprovalTimes, seeded_random
from benchmarks.bench import Effort
from benchmarks.memory import resident
from benchmarks.report import CannotMeasureError, Report, Table
from benchmarks.server import API_KEY, OPERATION_PAYLOAD, USER_ID, Server, Workload, approved_after, serving
from benchmarks.soak.histogram import Histogram
from benchmarks.suite import waits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence

    from matplotlib.figure import Figure

    from benchmarks.bench import Bench

#: Not part of "all benchmarks": it takes minutes, and the documentation includes its table.
ONLY_BY_NAME: Final = True

_FORGIVEN: Final = 2.0  # seconds that a wait may last beyond its deadline: rule 3
_FEW: Final = 5_000  # waits; the memory of fewer is lost in that of the process
_START_WITHIN: Final = 900.0
_POLL_EVERY: Final = 0.02  # seconds between two checks of whether all waits have started
_BEAT: Final = 0.01  # seconds between two readings of the event loop's lag
_USERS: Final = ApprovalTimes(((1.0, 8.0, 0.8),), never=0.0)
_LONGEST: Final = 25.0  # seconds: the slowest users are cut off there, so that the number of waits settles


class Window(NamedTuple):
    """A client in one time window."""

    polls: float  # per second
    cpu: float  # seconds per second: the share of a core
    failures: int  # polls that failed
    lag: float  # seconds by which the oldest due poll was late, the median
    loop_lag: float  # seconds by which a timer of the event loop was late, 99%


class Size(NamedTuple):
    """A number of waits, polled at a moderate rate."""

    waits: int
    memory: float  # bytes per wait, resident
    start: float  # CPU seconds to start a wait and poll it once
    window: Window


class Arrivals(NamedTuple):
    """New requests a second, each created, waited for and approved."""

    rate: float
    waiting: int  # at the end
    window: Window
    lateness: float  # seconds, the median
    failed: int


class Plan(NamedTuple):
    """What is measured beyond the capacity."""

    waits: int  # that are never approved
    seconds: float  # also the lifetime of the users' tickets
    users: int


class Overload(NamedTuple):
    """More polls due than can be sent, and users who approve meanwhile."""

    offered: float  # polls per second
    limit: float | None  # max_polls_per_second
    window: Window
    approved: int
    in_time: int  # of these users: those who approved before the deadline
    lateness: float  # seconds, the median
    latest: float
    overrun: float  # the longest time from a deadline until its wait was over
    failed: int  # waits that ended otherwise than approved or timed out


def run(bench: Bench) -> Report:
    """Measure by waits, by arrivals, and beyond the capacity."""
    report = Report("limits: what one process bears, and what happens beyond")
    with serving() as server:
        sizes = _sizes(bench, server)
        arrivals = _arrivals(bench, server)
        overloads = _overloads(bench, server)
    report.tables += [_size_table(sizes), _arrival_table(arrivals), _overload_table(overloads)]
    report.raw["effort"] = bench.effort
    report.raw["sizes"] = [{**size._asdict(), "window": size.window._asdict()} for size in sizes]
    report.raw["arrivals"] = [{**each._asdict(), "window": each.window._asdict()} for each in arrivals]
    report.raw["overloads"] = [{**each._asdict(), "window": each.window._asdict()} for each in overloads]
    return report


def _measured(server: Server, main: Coroutine[Any, Any, Any]) -> Any:
    """Run a measurement, unless the server was its bottleneck."""
    with Workload(server) as workload:
        result = asyncio.run(main)
    if workload.bound:
        raise CannotMeasureError(f"the server was the bottleneck ({workload.share:.0%} of its core)")
    return result


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
        async with asyncio.timeout(_START_WITHIN):
            while client.statistics.polls < before + count:  # noqa: ASYNC110  # there is no event to wait for
                await asyncio.sleep(_POLL_EVERY)
        yield
    finally:
        await waits.cancel(tasks)


async def _window(client: KeylessClient, seconds: float) -> Window:
    loop = asyncio.get_running_loop()
    lags, loop_lags = Histogram(), Histogram()
    before, cpu, wall = client.statistics, time.process_time(), loop.time()
    while loop.time() - wall < seconds:
        due = loop.time() + _BEAT
        await asyncio.sleep(_BEAT)
        loop_lags.add(loop.time() - due)
        lags.add(client.statistics.lag)
    now, passed = client.statistics, loop.time() - wall
    return Window(
        (now.polls - before.polls) / passed,
        (time.process_time() - cpu) / passed,
        now.transient_failures - before.transient_failures,
        lags.quantile(0.5),
        loop_lags.quantile(0.99),
    )


# -- by waits


def _sizes(bench: Bench, server: Server) -> list[Size]:
    counts = bench.pick(full=[1_000, 10_000, 50_000, 100_000, 200_000], quick=[1_000, 10_000], smoke=[50, 100])
    rate, seconds = bench.pick(full=(1000.0, 10.0), quick=(500.0, 1.0), smoke=(200.0, 0.2))
    sizes = []
    for count in counts:
        bench.progress(f"  {count} waits")
        sizes.append(bench.in_fresh_process(measure_size, server, count, rate, seconds))
    return sizes


def measure_size(server: Server, count: int, rate: float, seconds: float) -> Size:
    """Return what this many waits take, at this many polls a second."""
    measured: Size = _measured(server, _measure_size(server, count, rate, seconds))
    return measured


async def _measure_size(server: Server, count: int, rate: float, seconds: float) -> Size:
    async with KeylessClient(API_KEY, base_url=server.base_url, max_polls_per_second=None) as client:
        async with _waiting(client, 200, 0.1):  # warm up
            pass
        gc.collect()
        memory, cpu, polls = resident(), time.process_time(), client.statistics.polls
        async with _waiting(client, count, count / rate):
            start = (time.process_time() - cpu) / (client.statistics.polls - polls)
            gc.collect()
            each = (resident() - memory) / count
            await asyncio.sleep(0.5)  # what was late at the start is sent
            return Size(count, each, start, await _window(client, seconds))


def _size_table(sizes: Sequence[Size]) -> Table:
    table = Table(
        "by waits, each polled at random times",
        [
            "waits",
            "KB a wait",
            "CPU to start one, us",
            "polls/s",
            "CPU a poll, us",
            "share of a core",
            "loop lag 99%, ms",
        ],
    )
    for size in sizes:
        window = size.window
        memory = f"{size.memory / 1e3:.1f}" if size.waits >= _FEW else "-"
        figures = [memory, f"{1e6 * size.start:.0f}", f"{window.polls:.0f}", f"{1e6 * window.cpu / window.polls:.0f}"]
        table.rows.append([f"{size.waits}", *figures, f"{window.cpu:.0%}", f"{1e3 * window.loop_lag:.1f}"])
    return table


# -- by arrivals


def _arrivals(bench: Bench, server: Server) -> list[Arrivals]:
    rates = bench.pick(full=[10.0, 50.0, 200.0], quick=[20.0], smoke=[20.0])
    warm_up, seconds = bench.pick(full=(30.0, 15.0), quick=(3.0, 2.0), smoke=(0.3, 0.3))
    found = []
    for rate in rates:
        bench.progress(f"  {rate:.0f} arrivals a second")
        found.append(bench.in_fresh_process(measure_arrivals, server, rate, warm_up, seconds))
    return found


def measure_arrivals(server: Server, rate: float, warm_up: float, seconds: float) -> Arrivals:
    """Return what new requests cost, from their creation to their approval, once as many end as begin."""
    measured: Arrivals = _measured(server, _measure_arrivals(server, rate, warm_up, seconds))
    return measured


async def _measure_arrivals(server: Server, rate: float, warm_up: float, seconds: float) -> Arrivals:
    source, lateness, failed = seeded_random(1), Histogram(), 0

    async def request(client: KeylessClient) -> None:
        nonlocal failed
        after = min(_USERS.draw(source), _LONGEST)
        try:
            started = time.perf_counter()
            await client.request_approval(
                USER_ID, operation_id=approved_after(after), operation_payload=OPERATION_PAYLOAD
            )
            lateness.add(time.perf_counter() - started - after)
        except KeylessError:
            failed += 1

    async with KeylessClient(API_KEY, base_url=server.base_url, max_polls_per_second=None) as client:
        tasks: set[asyncio.Task[None]] = set()
        arriving = asyncio.create_task(_arrive(tasks, rate, lambda: request(client), source.expovariate))
        await asyncio.sleep(warm_up)
        window = await _window(client, seconds)
        waiting = client.statistics.waiting
        arriving.cancel()
        await waits.cancel([arriving, *tasks])
    return Arrivals(rate, waiting, window, lateness.quantile(0.5), failed)


async def _arrive(
    tasks: set[asyncio.Task[None]],
    rate: float,
    request: Callable[[], Coroutine[Any, Any, None]],
    pause: Callable[[float], float],
) -> None:
    """Start a request at random times, until cancelled."""
    loop = asyncio.get_running_loop()
    due = loop.time()
    while True:
        due += pause(rate)
        await asyncio.sleep(max(due - loop.time(), 0.0))
        task = asyncio.create_task(request())
        tasks.add(task)
        task.add_done_callback(tasks.discard)


def _arrival_table(arrivals: Sequence[Arrivals]) -> Table:
    table = Table(
        f"by arrivals: created, waited for with the default schedule, approved ({_USERS})",
        ["arrivals/s", "waiting", "polls/s", "CPU an arrival, ms", "share of a core", "noticed after, s", "failed"],
    )
    for each in arrivals:
        figures = [f"{each.waiting}", f"{each.window.polls:.0f}", f"{1e3 * each.window.cpu / each.rate:.2f}"]
        ends = [f"{each.window.cpu:.0%}", f"{each.lateness:.2f}", f"{each.failed}"]
        table.rows.append([f"{each.rate:.0f}", *figures, *ends])
    return table


# -- beyond


def _overloads(bench: Bench, server: Server) -> list[Overload]:
    plan = bench.pick(full=Plan(10_000, 15.0, 300), quick=Plan(1_000, 4.0, 50), smoke=Plan(100, 1.0, 10))
    offered = bench.pick(
        full=[2_000.0, 5_000.0, 10_000.0, 20_000.0, 40_000.0], quick=[2_000.0, 20_000.0], smoke=[300.0]
    )
    found = []
    for rate, limit in itertools.product(offered, [None, 1000.0]):
        bench.progress(f"  {rate:.0f} polls a second due, {'no limit' if limit is None else f'at most {limit:.0f}'}")
        found.append(bench.in_fresh_process(measure_overload, server, plan, rate, limit))
    return sorted(found, key=lambda each: (each.limit is not None, each.offered))


def measure_overload(server: Server, plan: Plan, offered: float, limit: float | None) -> Overload:
    """Return what becomes of waits with a deadline, while more polls are due than can be sent."""
    measured: Overload = _measured(server, _measure_overload(server, plan, offered, limit))
    return measured


async def _measure_overload(server: Server, plan: Plan, offered: float, limit: float | None) -> Overload:
    source, ended, seconds = seeded_random(1), _Ends(), plan.seconds
    # Every fifth user comes too late.
    ages = [source.uniform(0.0, seconds) if k % 5 else 2 * seconds for k in range(plan.users)]
    interval = plan.waits / offered
    schedule = wait_random(0.5 * interval, 1.5 * interval)
    async with (
        KeylessClient(API_KEY, base_url=server.base_url, max_polls_per_second=limit) as client,
        _waiting(client, plan.waits, interval),
        asyncio.TaskGroup() as group,
    ):
        measuring = group.create_task(_window(client, seconds))
        for age in ages:
            created = time.perf_counter()
            ticket = await client.create_operation(
                USER_ID,
                operation_id=approved_after(age),
                operation_payload=OPERATION_PAYLOAD,
                expires_in=seconds,
            )
            waiting = client.wait_for_approval(ticket, schedule=schedule)
            group.create_task(ended.wait(waiting, created + age, time.perf_counter() + ticket.remaining()))
    window = measuring.result()
    in_time = sum(age < seconds for age in ages)
    late = ended.lateness
    return Overload(
        offered, limit, window, late.total, in_time, late.quantile(0.5), late.quantile(1.0), ended.overrun, ended.failed
    )


class _Ends:
    """How waits with a deadline ended."""

    def __init__(self) -> None:
        self.lateness = Histogram()
        self.overrun = 0.0
        self.failed = 0

    async def wait(self, waiting: Awaitable[object], due: float, deadline: float) -> None:
        """Wait for an approval that is due at this time, and count the end."""
        try:
            await waiting
            self.lateness.add(time.perf_counter() - due)
        except ApprovalTimeoutError as error:
            self.failed += type(error) is not ApprovalTimeoutError  # the final poll got no answer
        except KeylessError:
            self.failed += 1
        self.overrun = max(self.overrun, time.perf_counter() - deadline)


def _overload_table(overloads: Sequence[Overload]) -> Table:
    table = Table(
        "beyond: more polls due than can be sent",
        [
            "polls due/s",
            "limit",
            "sent/s",
            "share of a core",
            "late by, s",
            "approvals found",
            "noticed after, s",
            "longest",
            "beyond a deadline, s",
            "polls failed",
            "waits failed",
            "loop lag 99%, ms",
        ],
    )
    for each in overloads:
        window = each.window
        table.rows.append(
            [
                f"{each.offered:.0f}",
                "none" if each.limit is None else f"{each.limit:.0f}",
                f"{window.polls:.0f}",
                f"{window.cpu:.0%}",
                f"{window.lag:.2f}",
                f"{each.approved} of {each.in_time}",
                f"{each.lateness:.2f}",
                f"{each.latest:.1f}",
                f"{each.overrun:.2f}",
                f"{window.failures}",
                f"{each.failed}",
                f"{1e3 * window.loop_lag:.1f}",
            ]
        )
    return table


# -- the picture and the page


def draw(raw: dict[str, Any]) -> Figure:
    """Draw the CPU of a poll by waits; and by polls that are due, what is sent and how late."""
    figure, (by_waits, by_polls, late) = pictures.panels(3, width=3.8)
    sizes, beyond = raw["sizes"], [each for each in raw["overloads"] if each["limit"] is None]
    cpu = [1e6 * size["window"]["cpu"] / size["window"]["polls"] for size in sizes]
    by_waits.plot([size["waits"] for size in sizes], cpu, "o-", color=pictures.OURS)
    by_waits.set_xscale("log")
    by_waits.set_ylim(bottom=0)
    by_waits.set_xlabel("waits")
    by_waits.set_ylabel("CPU of a poll, us")
    due = [each["offered"] for each in beyond]
    by_polls.plot([0, max(due)], [0, max(due)], "--", color=pictures.OTHERS[0], label="due")
    by_polls.plot(due, [each["window"]["polls"] for each in beyond], "o-", color=pictures.OURS, label="sent")
    by_polls.set_xlabel("polls per second due")
    by_polls.legend()
    late.plot(due, [each["window"]["lag"] for each in beyond], "o-", color=pictures.OURS, label="a poll is late by")
    late.plot(
        due, [each["overrun"] for each in beyond], "s-", color=pictures.OTHERS[1], label="past a deadline, at most"
    )
    late.set_ylim(bottom=0)
    late.set_xlabel("polls per second due")
    late.set_ylabel("seconds")
    late.legend()
    return figure


def page(raw: dict[str, Any]) -> str:
    """Write the tables that docs/explanation/limits.md includes."""
    sizes = [Size(**{**size, "window": Window(**size["window"])}) for size in raw["sizes"]]
    arrivals = [Arrivals(**{**each, "window": Window(**each["window"])}) for each in raw["arrivals"]]
    overloads = [Overload(**{**each, "window": Window(**each["window"])}) for each in raw["overloads"]]
    tables = (_size_table(sizes), _arrival_table(arrivals), _overload_table(overloads))
    parts = [_summary(sizes, overloads), *(table.markdown() for table in tables)]
    if raw["effort"] != Effort.FULL:
        parts.insert(0, "*A short run, on a machine that was busy otherwise: the full one will take its place.*")
    return "\n\n".join(parts) + "\n"


def _summary(sizes: Sequence[Size], overloads: Sequence[Overload]) -> str:
    """Say in words what the tables show; the numbers are theirs."""
    cpu = [size.window.cpu / size.window.polls for size in sizes]
    least, most = sizes[0].waits, sizes[-1].waits
    last = max(overloads, key=lambda each: (each.limit is None, each.offered))
    most_sent = max(each.window.polls for each in overloads)
    approved, in_time = sum(each.approved for each in overloads), sum(each.in_time for each in overloads)
    return (
        f"With {least} to {most} waits a poll takes {1e6 * min(cpu):.0f} to {1e6 * max(cpu):.0f} us of CPU; the more "
        f"polls a second, the less each. The most that one core sent is {most_sent:.0f} polls a second. {most} waits "
        f"take {most * sizes[-1].memory / 1e6:.0f} MB. Where {last.offered:.0f} polls a second were due, "
        f"{last.window.polls:.0f} were sent, {last.window.lag:.1f} s late. Of {in_time} users who approved in time, at "
        f"all of these rates, {approved} were noticed."
    )
