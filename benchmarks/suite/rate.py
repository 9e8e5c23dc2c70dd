"""More polls due than may start: how late they are, how a service's limit is found, and what is left of the core.

The first two run on a virtual clock, with an answer after 20 ms and no socket: what they show is the rate. The third is
a real server and a real clock.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import looptime
from tenacity import wait_fixed

from aiokeyless import KeylessClient, Operation, RateLimitError, wait_adaptive
from aiokeyless.schedule import next_delay
from benchmarks.approval_times import TYPICAL, seeded_random
from benchmarks.report import Goal, Report, Table
from benchmarks.server import API_KEY, Server, serving
from benchmarks.simulation import operation

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from benchmarks.bench import Bench

T = TypeVar("T")

_LIMIT: Final = 100.0  # polls a second, of the client
_SERVICE_LIMIT: Final = 50  # polls a second, of the service that answers 429
_ANSWER: Final = 0.02  # seconds
_TIMEOUT: Final = 120.0
_WARM_UP: Final = 60.0  # seconds for the search, which are not counted


class Found(NamedTuple):
    """How a client polls a service that has a limit, after a minute."""

    waits: int
    answered: float  # polls a second
    refused: float
    lost: int


def run(bench: Bench) -> Report:
    """Measure lateness, the search for a limit, and the share of the core."""
    report = Report(f"rate: more polls due than may start, {_LIMIT:.0f} a second")
    _lateness(bench, report)
    _service_limit(bench, report)
    _idle(bench, report)
    return report


# -- lateness


def _lateness(bench: Bench, report: Report) -> None:
    seconds = bench.pick(full=300.0, quick=150.0, smoke=40.0)
    table = Table(
        f"users with a median of 8 s, {_LIMIT:.0f} polls a second, mean lateness in seconds",
        ["arrivals a second", "with the limit", "without"],
    )
    for arrivals in bench.pick(full=[10.0, 20.0, 50.0], quick=[20.0, 50.0], smoke=[2.0]):
        bench.progress(f"  {arrivals:.0f} arrivals a second")
        limited = bench.in_fresh_process(lateness, arrivals, seconds, _LIMIT)
        unlimited = bench.in_fresh_process(lateness, arrivals, seconds, None)
        table.rows.append([f"{arrivals:.0f}", f"{limited:.2f}", f"{unlimited:.2f}"])
        report.raw[f"lateness at {arrivals:.0f}"] = [limited, unlimited]
    report.tables.append(table)


def lateness(arrivals: float, seconds: float, limit: float | None) -> float:
    """Return the mean lateness of a client with this limit."""
    return _on_virtual_clock(lambda: _notice(arrivals, seconds, limit))


async def _notice(arrivals: float, seconds: float, limit: float | None) -> float:
    loop = asyncio.get_running_loop()
    source = seeded_random(1)
    approved_at: dict[str, float] = {}
    late: list[float] = []

    async def wait(client: KeylessClient, number: int) -> None:
        started_at, operation_id = loop.time(), str(number)
        approved_at[operation_id] = started_at + TYPICAL.draw(source)
        # Not at once: as for a ticket, the schedule sets the first poll.
        await asyncio.sleep(next_delay(schedule, attempt_number=1, since_start=0.0))
        try:
            await client.wait_for_approval(operation_id, timeout=_TIMEOUT)
        except TimeoutError:
            return
        if seconds / 3 < started_at < seconds * 3 / 4:  # in a steady state, and with time to be noticed
            late.append(loop.time() - approved_at[operation_id])

    schedule = wait_adaptive(poll_cost=0.02)
    async with KeylessClient(
        API_KEY, base_url="http://localhost:1", schedule=schedule, max_polls_per_second=limit
    ) as client:
        _answer_by(client, lambda operation_id: loop.time() >= approved_at[operation_id])
        waits: list[asyncio.Task[None]] = []
        while loop.time() < seconds:
            await asyncio.sleep(source.expovariate(arrivals))
            waits.append(asyncio.create_task(wait(client, len(waits))))
        for task in waits:
            task.cancel()
        await asyncio.wait(waits)
    return statistics.fmean(late)


# -- a service with a limit


def _service_limit(bench: Bench, report: Report) -> None:
    table = Table(
        f"a service that answers 429 beyond {_SERVICE_LIMIT} polls in any second, after a minute",
        ["waits, polled every second", "answered, polls/s", "refused, polls/s", "lost"],
    )
    for waits in bench.pick(full=[75, 200, 1000], quick=[200], smoke=[20]):
        bench.progress(f"  a service with a limit, {waits} waits")
        found = bench.in_fresh_process(find_limit, waits, bench.pick(full=300.0, quick=120.0, smoke=65.0))
        table.rows.append([f"{waits}", f"{found.answered:.1f}", f"{found.refused:.2f}", f"{found.lost}"])
        report.raw[f"limit with {waits}"] = list(found)
        report.goals.append(Goal(f"waits lost, {waits} waits", 0, found.lost))
    report.tables.append(table)


def find_limit(waits: int, seconds: float) -> Found:
    """Poll a service with a limit for so long, then let everybody approve."""
    return _on_virtual_clock(lambda: _find_limit(waits, seconds))


async def _find_limit(waits: int, seconds: float) -> Found:
    loop = asyncio.get_running_loop()
    answered: deque[float] = deque()
    counts = {"answered": 0, "refused": 0}
    is_approved = False

    def answer(_operation_id: str) -> bool:
        now = loop.time()
        while answered and answered[0] <= now - 1:
            answered.popleft()
        good = len(answered) < _SERVICE_LIMIT
        if now > _WARM_UP:
            counts["answered" if good else "refused"] += 1
        if not good:
            raise RateLimitError(status=429, method="GET", path="/")
        answered.append(now)
        return is_approved

    async with KeylessClient(API_KEY, base_url="http://localhost:1") as client:
        _answer_by(client, answer)
        tasks = [
            asyncio.create_task(client.wait_for_approval(str(k), timeout=seconds + 600, schedule=wait_fixed(1)))
            for k in range(waits)
        ]
        await asyncio.sleep(seconds)
        counted = seconds - _WARM_UP
        found = counts["answered"] / counted, counts["refused"] / counted
        is_approved = True
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    return Found(waits, *found, sum(not isinstance(end, Operation) for end in ends))


# -- the core


def _idle(bench: Bench, report: Report) -> None:
    waits = bench.pick(full=100_000, quick=5_000, smoke=200)
    bench.progress(f"  {waits} waits on one core")
    with serving() as server:
        share, polls = bench.in_fresh_process(busy, server, waits, bench.pick(full=20.0, quick=2.0, smoke=0.2))
    report.tables.append(
        Table(
            "waits on one core with the default of 1000 polls a second",
            ["waits", "polls/s", "share of the core"],
            [[f"{waits}", f"{polls:.0f}", f"{share:.0%}"]],
        )
    )
    report.raw["busy"] = [waits, polls, share]
    report.goals.append(Goal(f"share of the core, {waits} waits", 0.5, share))


def busy(server: Server, waits: int, seconds: float) -> tuple[float, float]:
    """Return the share of the core that so many waits use, and their polls a second."""
    return asyncio.run(_busy(server, waits, seconds))


async def _busy(server: Server, waits: int, seconds: float) -> tuple[float, float]:
    async with KeylessClient(API_KEY, base_url=server.base_url) as client:
        targets = [str(k) for k in range(waits)]
        outcomes = client.wait_for_approvals(targets, timeout=None, schedule=wait_fixed(5), if_missing="wait")
        waiting = asyncio.ensure_future(anext(outcomes))
        while client.statistics.waiting < waits:  # noqa: ASYNC110  # they are started in batches, by nobody's signal
            await asyncio.sleep(0.05)
        await asyncio.sleep(1.0)
        cpu, wall, polls = time.process_time(), time.perf_counter(), client.statistics.polls
        await asyncio.sleep(seconds)
        passed = time.perf_counter() - wall
        measured = (time.process_time() - cpu) / passed, (client.statistics.polls - polls) / passed
        waiting.cancel()
        await asyncio.wait([waiting])
        await outcomes.aclose()
    return measured


def _answer_by(client: KeylessClient, is_approved: Callable[[str], bool]) -> None:
    """Let polls be answered without a socket, 20 ms later, by the state at their start."""
    transport, _ = client._open()  # noqa: SLF001  # what is measured lies above it

    async def poll(operation_id: str) -> Operation:
        try:
            approved = is_approved(operation_id)
        finally:
            await asyncio.sleep(_ANSWER)
        return operation(operation_id, is_approved=approved)

    transport.poll = poll  # type: ignore[method-assign]  # stands in for the network


def _on_virtual_clock(main: Callable[[], Coroutine[object, object, T]]) -> T:
    loop = looptime.patch_event_loop(asyncio.SelectorEventLoop())
    try:
        return loop.run_until_complete(main())
    finally:
        loop.close()
