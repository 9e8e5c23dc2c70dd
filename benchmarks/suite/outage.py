"""A service that is down for a minute: the requests during the outage, and the time until all waits are polled again.

Each side has a process and a server of its own, and all outages run at the same time. The service fails in one of two
ways, then recovers with all operations pending; when all have been polled, they are approved. The server keeps a
journal of the requests.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import math
import random
import statistics
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import aiohttp
from tenacity import (
    retry,
    retry_if_exception_type,
    stop_after_attempt,
    stop_never,
    wait_chain,
    wait_fixed,
    wait_random,
    wait_random_exponential,
)

from aiokeyless import KeylessClient
from aiokeyless._rules.backoff import error_delay
from aiokeyless._rules.circuit import FAILURES_UNTIL_OPEN
from benchmarks import pictures
from benchmarks.baselines import LOOP, OURS, BareClient, PlainOperation, bare_session
from benchmarks.report import CannotMeasureError, Goal, Report, Spread, Table
from benchmarks.server import API_KEY, Failure, Journal, Server, Workload, serving
from benchmarks.suite.waits import cancel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Coroutine

    from matplotlib.figure import Figure
    from tenacity.stop import stop_base

    from benchmarks.bench import Bench

    _Poll = Callable[[str], Awaitable[PlainOperation | None]]

_IN_FLIGHT: Final = 16
_GOAL: Final = 10.0  # seconds from recovery until all waits have been polled
_START_WITHIN: Final = 120.0
_RECOVER_WITHIN: Final = 120.0
_CONFIDENCE: Final = 0.999  # of the bound on the requests
_FULLY_BUSY: Final = 0.9  # of the client's core: above it, the core was the bottleneck

_TRANSIENT: Final = (aiohttp.ClientError, RuntimeError, TimeoutError)  # BareClient raises RuntimeError for a status

TENACITY: Final = "tenacity on errors"
FIVE: Final = "tenacity, 5 attempts"


class Plan(NamedTuple):
    """One outage, and the sides that go through it."""

    failure: Failure
    waits: int
    interval: float  # seconds between two polls of one operation
    down: float  # seconds
    sides: list[str]  # ours several times: its recovery depends on chance


class Outcome(NamedTuple):
    """The measurements of one side."""

    down: float  # seconds, measured
    requests: int  # while the service was down
    cpu: float  # seconds, while the service was down
    noticed: float | None  # seconds from recovery to the first good answer; None if no wait lasted so long
    recovered: float | None  # seconds from recovery until all remaining waits have been polled
    first_second: int  # requests in the second after recovery
    busiest_second: int  # requests in the busiest second after it
    lost: int  # waits that ended with an error
    per_second: list[int]  # requests in each second from the start of the outage

    @property
    def swept(self) -> float | None:
        """Seconds from the first good answer until all waits have been polled."""
        return None if self.recovered is None or self.noticed is None else self.recovered - self.noticed


def run(bench: Bench) -> Report:
    """Measure an outage of a minute, and a shorter one with another kind of failure."""
    report = Report(f"outage: waits while the service is down, all with {_IN_FLIGHT} in flight")
    for plan in _plans(bench):
        bench.progress(f"  {plan.failure}, down for {plan.down:g} s: {', '.join(plan.sides)}, concurrently")
        outcomes = _measured(bench, plan, report)
        report.tables.append(_table(plan, outcomes))
        _judge(report, plan, outcomes[OURS])
        report.raw[plan.failure] = {
            "plan": {**plan._asdict()},
            "sides": {side: [{**outcome._asdict()} for outcome in of] for side, of in outcomes.items()},
        }
    report.notes.append("lost: ended with an error; all other waits were approved in the end")
    return report


def _plans(bench: Bench) -> list[Plan]:
    others = [LOOP, TENACITY, FIVE]
    minute = Plan(Failure.UNAVAILABLE, 10_000, interval=12.0, down=60.0, sides=[*[OURS] * 3, *others])
    dropped = Plan(Failure.DROPPED, 10_000, interval=12.0, down=8.0, sides=[OURS, OURS, LOOP])
    return bench.pick(
        full=[minute, dropped],
        quick=[Plan(Failure.UNAVAILABLE, 500, interval=0.5, down=2.0, sides=[OURS, LOOP])],
        smoke=[Plan(Failure.DROPPED, 50, interval=0.1, down=0.2, sides=[OURS, LOOP])],
    )


def _measured(bench: Bench, plan: Plan, report: Report) -> dict[str, list[Outcome]]:
    outcomes: dict[str, list[Outcome]] = {}
    with ThreadPoolExecutor(len(plan.sides)) as pool:
        runs = [(side, pool.submit(_run_side, bench, plan, side)) for side in plan.sides]
    for side, outcome in runs:
        try:
            outcomes.setdefault(side, []).append(outcome.result())
        except CannotMeasureError as error:
            report.notes.append(f"{plan.failure}, {side}: not measured, {error}")
    if not outcomes[OURS]:
        raise CannotMeasureError("; ".join(report.notes))
    return {side: of for side, of in outcomes.items() if of}


def _run_side(bench: Bench, plan: Plan, side: str) -> Outcome:
    with serving() as server:
        return bench.in_fresh_process(measure, server, plan, side)


_COLUMNS: Final[dict[str, Callable[[Outcome], float | None]]] = {
    "requests while down": lambda o: o.requests,
    "CPU while down, s": lambda o: o.cpu,
    "first good answer, s": lambda o: o.noticed,
    "all polled, s": lambda o: o.recovered,
    "between the two, s": lambda o: o.swept,
    "requests in the first second": lambda o: o.first_second,
    "in the busiest second": lambda o: o.busiest_second,
    "lost": lambda o: o.lost,
}
_WHOLE: Final = ("requests", "in the", "lost")  # columns with whole numbers


def _table(plan: Plan, outcomes: dict[str, list[Outcome]]) -> Table:
    table = Table(
        f"{plan.failure}: {plan.waits} waits, each polled every {plan.interval:g} s; down for {plan.down:g} s "
        "(times are from recovery)",
        ["", *_COLUMNS],
    )
    for side, of in outcomes.items():
        name = side if len(of) == 1 else f"{side} ({len(of)} runs)"
        row = [
            _cell([figure(outcome) for outcome in of], 0 if column.startswith(_WHOLE) else 2)
            for column, figure in _COLUMNS.items()
        ]
        table.rows.append([name, *row])
    return table


def _cell(values: list[float | None], digits: int) -> str:
    known = _known(values)
    if not known:
        return "never"
    return Spread.of(known).text(digits) if len(values) > 1 else f"{known[0]:.{digits}f}"


def _known(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _median(values: list[float | None]) -> float | None:
    known = _known(values)
    return Spread.of(known).median if known else None


# -- the limits that follow from the rules of a wait


def _judge(report: Report, plan: Plan, ours: list[Outcome]) -> None:
    """Compare the measurements with the rules of a wait, and report how much depends on chance."""
    down = Spread.of([outcome.down for outcome in ours]).median
    probes, late = zip(*(_simulated_outage(down) for _ in range(5000)), strict=True)
    likely_probes = sorted(probes)[math.ceil(_CONFIDENCE * len(probes)) - 1]
    # aiohttp itself repeats a GET once if its connection was closed, even a new one.
    times = 2 if plan.failure is Failure.DROPPED else 1
    bound = times * (FAILURES_UNTIL_OPEN + (_IN_FLIGHT - 1) + likely_probes)
    swept = _median([outcome.swept for outcome in ours])
    recovered = _median([outcome.recovered for outcome in ours])
    report.goals += [
        Goal(f"{plan.failure}: most requests while down", bound, max(outcome.requests for outcome in ours)),
        Goal(f"{plan.failure}: waits lost", 0, max(outcome.lost for outcome in ours)),
        Goal(f"{plan.failure}: all polled again, from recovery", _GOAL, recovered, " s"),
        Goal(f"{plan.failure}: the same, from the first good answer", _GOAL, swept, " s"),
    ]
    repeated = ", each sent twice by aiohttp" if times > 1 else ""
    report.notes.append(
        f"{plan.failure}: the bound on the requests is {FAILURES_UNTIL_OPEN} failures, {_IN_FLIGHT - 1} more that were "
        f"in flight, {likely_probes} probes ({_CONFIDENCE:.1%} of simulated outages have no more; median "
        f"{statistics.median(probes):.0f}){repeated}"
    )
    if swept is None:
        return
    in_time = sum(seconds + swept <= _GOAL for seconds in late) / len(late)
    report.notes.append(
        f"{plan.failure}: recovery is noticed by the next probe, at a random time: with this backoff after "
        f"{_typical(late)}; all polled within {_GOAL:g} s in {in_time:.0%} of outages"
    )


def _simulated_outage(down: float) -> tuple[int, float]:
    """Simulate the backoff of the probes: return their number in the outage, and the delay of the next one after it."""
    at = 0.0
    for probes in itertools.count():
        at += error_delay(probes + 1)
        if at >= down:
            return probes, at - down
    raise AssertionError


def _typical(late: Collection[float]) -> str:
    tenths = statistics.quantiles(late, n=10, method="inclusive")
    return f"{tenths[4]:.1f} s (median), {tenths[8]:.1f} s (one in ten later)"


# -- one outage


def measure(server: Server, plan: Plan, side: str) -> Outcome:
    """Run one side through one outage."""
    return asyncio.run(_SIDES[side](server, plan))


async def _outage(server: Server, plan: Plan, start: Callable[[str], Coroutine[Any, Any, object]]) -> Outcome:
    """Start the waits, let the service fail and recover, and wait for the end of all waits.

    Args:
        server: The service.
        plan: The outage.
        start: Waits for one operation.
    """
    server.keep_journal()
    tasks = [asyncio.create_task(start(str(uuid.uuid4()))) for _ in range(plan.waits)]
    try:
        await _until_all_polled(server, tasks, _START_WITHIN, "started")
        cpu = await _down(server, plan)
        with Workload(server) as workload:
            await _until_all_polled(server, tasks, plan.interval + _RECOVER_WITHIN, "polled again")
        if workload.bound:
            raise CannotMeasureError(
                f"the server was the bottleneck of the recovery ({workload.share:.0%} of its core)"
            )
        journal = server.journal()
        server.approve(approved=True)
        async with asyncio.timeout(plan.interval + _RECOVER_WITHIN):
            endings = await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        await cancel(tasks)
    return _outcome(journal, cpu, lost=sum(isinstance(ending, BaseException) for ending in endings))


async def _down(server: Server, plan: Plan) -> float:
    """Let the service fail for the planned time, and return the CPU seconds of this process."""
    cpu = time.process_time()
    server.fail(plan.failure)
    await asyncio.sleep(plan.down)
    server.approve(approved=False)
    cpu = time.process_time() - cpu
    if cpu > _FULLY_BUSY * plan.down:
        raise CannotMeasureError(f"the process was busy for {cpu / plan.down:.0%} of the outage")
    return cpu


async def _until_all_polled(server: Server, tasks: list[asyncio.Task[object]], seconds: float, what: str) -> None:
    """Wait until each wait that has not ended has been polled since the last change."""
    deadline = time.monotonic() + seconds
    while (await asyncio.to_thread(server.statistics)).polled < len(tasks) - sum(task.done() for task in tasks):
        if time.monotonic() > deadline:
            raise CannotMeasureError(f"not all waits were {what} within {seconds:g} s")
        await asyncio.sleep(0.1)


def _outcome(journal: Journal, cpu: float, *, lost: int) -> Outcome:
    down, up = journal.changes
    requests, first_polls = journal.requests, sorted(journal.first_polls)

    def count(since: float, until: float) -> int:
        return bisect.bisect_left(requests, until) - bisect.bisect_left(requests, since)

    return Outcome(
        down=up - down,
        requests=count(down, up),
        cpu=cpu,
        noticed=first_polls[0] - up if first_polls else None,
        recovered=first_polls[-1] - up if first_polls else None,
        first_second=count(up, up + 1),
        busiest_second=max((count(at, at + 1) for at in requests if at >= up), default=0),
        lost=lost,
        per_second=[count(down + k, down + k + 1) for k in range(int(requests[-1] - down) + 1)],
    )


async def _ours(server: Server, plan: Plan) -> Outcome:
    schedule = wait_chain(wait_random(0, plan.interval), wait_fixed(plan.interval))  # spread the waits after the start
    async with KeylessClient(
        API_KEY, base_url=server.base_url, schedule=schedule, max_in_flight=_IN_FLIGHT, max_polls_per_second=None
    ) as client:
        return await _outage(server, plan, lambda operation_id: client.wait_for_approval(operation_id, timeout=3600.0))


async def _coroutines(server: Server, plan: Plan, handle_errors: Callable[[_Poll], _Poll]) -> Outcome:
    """Run one coroutine per wait, whose polls share a semaphore.

    Args:
        server: The service.
        plan: The outage.
        handle_errors: Wraps a poll with error handling; the wrapped poll returns None for "no answer".
    """
    gate = asyncio.Semaphore(_IN_FLIGHT)
    async with bare_session() as session:
        client = BareClient(session, server)

        async def bare_poll(operation_id: str) -> PlainOperation | None:
            async with gate:
                return await client.get_operation(operation_id)

        poll = handle_errors(bare_poll)

        async def wait(operation_id: str) -> None:
            pause = random.uniform(0, plan.interval)  # noqa: S311  # spread the waits after the start
            while (operation := await poll(operation_id)) is None or operation.state != "approved":
                await asyncio.sleep(pause)
                pause = plan.interval

        return await _outage(server, plan, wait)


def _as_pending(poll: _Poll) -> _Poll:
    """Treat an error as "pending", as most loops do."""

    async def poll_or_none(operation_id: str) -> PlainOperation | None:
        try:
            return await poll(operation_id)
        except _TRANSIENT:
            return None

    return poll_or_none


def _with_tenacity(stop: stop_base) -> Callable[[_Poll], _Poll]:
    """Repeat a poll with the same error backoff as ours, but for each wait separately."""
    return retry(
        wait=wait_random_exponential(multiplier=0.5, max=30),
        retry=retry_if_exception_type(_TRANSIENT),
        stop=stop,
        reraise=True,
    )


_SIDES: Final[dict[str, Callable[[Server, Plan], Coroutine[None, None, Outcome]]]] = {
    OURS: _ours,
    LOOP: lambda server, plan: _coroutines(server, plan, _as_pending),
    TENACITY: lambda server, plan: _coroutines(server, plan, _with_tenacity(stop_never)),
    FIVE: lambda server, plan: _coroutines(server, plan, _with_tenacity(stop_after_attempt(5))),
}


# -- the picture


def draw(raw: dict[str, Any]) -> Figure:
    """Draw the requests per second, one diagram per kind of failure."""
    figure, axes = pictures.panels(len(raw), width=5.4)
    for ax, (failure, measured) in zip(axes, raw.items(), strict=True):
        down = measured["plan"]["down"]
        ax.axvspan(0, down, color="#f6e3de", lw=0)
        for color, (side, of) in zip((pictures.OURS, *pictures.OTHERS), measured["sides"].items(), strict=False):
            for outcome in of:
                ax.step(range(len(outcome["per_second"])), outcome["per_second"], where="post", color=color)
            ax.plot([], [], color=color, label=side)
        ax.set_yscale("symlog", linthresh=10)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("seconds from the start of the outage")
        ax.set_ylabel("requests per second")
        waits = f"{measured['plan']['waits']:,}".replace(",", " ")
        ax.set_title(f"{failure}: {waits} waits, down for {down:g} s")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
