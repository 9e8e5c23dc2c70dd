"""A service that is down for a minute: what is sent to it meanwhile, and how soon all waits are looked at again.

Each way to wait has a process and a server of its own, and all ways have their minute at the same time. The service is
down in one of two ways, then up again with all operations pending; when all have been looked at they are approved. The
server writes down what comes.
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
from aiokeyless.health import FAILURES_UNTIL_DOWN, error_delay
from benchmarks import pictures
from benchmarks.report import CannotMeasureError, Goal, Report, Spread, Table
from benchmarks.rivals import BareClient, PlainOperation, bare_session
from benchmarks.server import API_KEY, Failure, Journal, Server, Workload, serving
from benchmarks.suite.waits import cancel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Coroutine

    from matplotlib.figure import Figure
    from tenacity.stop import stop_base

    from benchmarks.bench import Bench

    _Look = Callable[[str], Awaitable[PlainOperation | None]]

_IN_FLIGHT: Final = 16
_GOAL: Final = 10.0  # seconds from recovery until all waits have been looked at
_BEGIN_WITHIN: Final = 120.0
_RECOVER_WITHIN: Final = 120.0
_CERTAIN: Final = 0.999  # how sure the bound on the requests is
_FULLY_BUSY: Final = 0.9  # of the client's core: beyond it, the process was slower than its way to wait

_PASSING: Final = (aiohttp.ClientError, RuntimeError, TimeoutError)  # RuntimeError: BareClient's, for a status

OURS: Final = "aiokeyless"
LOOP: Final = "a hand-written loop"
TENACITY: Final = "tenacity on errors"
FIVE: Final = "tenacity, 5 attempts"


class Plan(NamedTuple):
    """One outage, and for whom."""

    failure: Failure
    waits: int
    every: float  # seconds between two looks at one operation
    down: float  # seconds
    ways: list[str]  # ours several times: what it shows is by chance


class Outcome(NamedTuple):
    """What one way to wait did."""

    down: float  # seconds, as it came out
    requests: int  # while the service was down
    cpu: float  # seconds, meanwhile
    noticed: float | None  # seconds from recovery until the first good answer; None where no wait has lived so long
    recovered: float | None  # seconds from recovery until all waits that are left have been looked at
    first_second: int  # requests in the second after recovery
    busiest_second: int  # requests in the busiest second after it
    lost: int  # waits that ended with an error
    per_second: list[int]  # requests, second by second, from the moment when the service went down

    @property
    def swept(self) -> float | None:
        """Seconds from the first good answer until all waits have been looked at."""
        return None if self.recovered is None or self.noticed is None else self.recovered - self.noticed


def run(bench: Bench) -> Report:
    """Measure an outage of a minute, and a shorter one of another kind."""
    report = Report(f"outage: waits while the service is down, all with {_IN_FLIGHT} in flight")
    for plan in _plans(bench):
        bench.say(f"  {plan.failure}, down for {plan.down:g} s: {', '.join(plan.ways)}, all at once")
        outcomes = _measured(bench, plan, report)
        report.tables.append(_table(plan, outcomes))
        _judge(report, plan, outcomes[OURS])
        report.raw[plan.failure] = {
            "plan": {**plan._asdict()},
            "ways": {way: [{**outcome._asdict()} for outcome in of] for way, of in outcomes.items()},
        }
    report.notes.append("lost: ended by an error; all others found their approval in the end")
    return report


def _plans(bench: Bench) -> list[Plan]:
    rivals = [LOOP, TENACITY, FIVE]
    minute = Plan(Failure.UNAVAILABLE, 10_000, every=12.0, down=60.0, ways=[*[OURS] * 3, *rivals])
    dropped = Plan(Failure.DROPPED, 10_000, every=12.0, down=8.0, ways=[OURS, OURS, LOOP])
    return bench.pick(
        full=[minute, dropped],
        quick=[Plan(Failure.UNAVAILABLE, 500, every=0.5, down=2.0, ways=[OURS, LOOP])],
        smoke=[Plan(Failure.DROPPED, 50, every=0.1, down=0.2, ways=[OURS, LOOP])],
    )


def _measured(bench: Bench, plan: Plan, report: Report) -> dict[str, list[Outcome]]:
    outcomes: dict[str, list[Outcome]] = {}
    with ThreadPoolExecutor(len(plan.ways)) as pool:
        runs = [(way, pool.submit(_apart, bench, plan, way)) for way in plan.ways]
    for way, outcome in runs:
        try:
            outcomes.setdefault(way, []).append(outcome.result())
        except CannotMeasureError as error:
            report.notes.append(f"{plan.failure}, {way}: not measured, {error}")
    if not outcomes[OURS]:
        raise CannotMeasureError("; ".join(report.notes))
    return {way: of for way, of in outcomes.items() if of}


def _apart(bench: Bench, plan: Plan, way: str) -> Outcome:
    with serving() as server:
        return bench.apart(measure, server, plan, way)


_COLUMNS: Final[dict[str, Callable[[Outcome], float | None]]] = {
    "requests while down": lambda o: o.requests,
    "CPU meanwhile, s": lambda o: o.cpu,
    "first good answer, s": lambda o: o.noticed,
    "all looked at, s": lambda o: o.recovered,
    "between the two, s": lambda o: o.swept,
    "requests in the first second": lambda o: o.first_second,
    "in the busiest": lambda o: o.busiest_second,
    "lost": lambda o: o.lost,
}
_WHOLE: Final = ("requests", "in the", "lost")  # columns that count


def _table(plan: Plan, outcomes: dict[str, list[Outcome]]) -> Table:
    table = Table(
        f"{plan.failure}: {plan.waits} waits, each looked at every {plan.every:g} s; down for {plan.down:g} s "
        "(times are from recovery)",
        ["", *_COLUMNS],
    )
    for way, of in outcomes.items():
        name = way if len(of) == 1 else f"{way} ({len(of)} runs)"
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


# -- what the rules of a wait allow


def _judge(report: Report, plan: Plan, ours: list[Outcome]) -> None:
    """Set what was measured against the rules of a wait, and say how much of it is chance."""
    down = Spread.of([outcome.down for outcome in ours]).median
    probes, late = zip(*(_paced(down) for _ in range(5000)), strict=True)
    certain = sorted(probes)[math.ceil(_CERTAIN * len(probes)) - 1]
    # aiohttp itself sends a GET once more whose connection was closed, a new connection too.
    times = 2 if plan.failure is Failure.DROPPED else 1
    bound = times * (FAILURES_UNTIL_DOWN + (_IN_FLIGHT - 1) + certain)
    swept = _median([outcome.swept for outcome in ours])
    recovered = _median([outcome.recovered for outcome in ours])
    report.goals += [
        Goal(f"{plan.failure}: most requests while down", bound, max(outcome.requests for outcome in ours)),
        Goal(f"{plan.failure}: waits lost", 0, max(outcome.lost for outcome in ours)),
        Goal(f"{plan.failure}: all looked at again, from recovery", _GOAL, recovered, " s"),
        Goal(f"{plan.failure}: the same, from the first good answer", _GOAL, swept, " s"),
    ]
    again = ", each sent twice by aiohttp" if times > 1 else ""
    report.notes.append(
        f"{plan.failure}: the bound on the requests is {FAILURES_UNTIL_DOWN} failures, {_IN_FLIGHT - 1} more that were "
        f"in flight, {certain} probes ({_CERTAIN:.1%} of simulated outages have no more; median "
        f"{statistics.median(probes):.0f}){again}"
    )
    if swept is None:
        return
    in_time = sum(seconds + swept <= _GOAL for seconds in late) / len(late)
    report.notes.append(
        f"{plan.failure}: recovery is seen by the next probe, which comes at random: by the pace alone after "
        f"{_chance(late)}; all looked at within {_GOAL:g} s in {in_time:.0%} of outages"
    )


def _paced(down: float) -> tuple[int, float]:
    """Simulate an outage: how many probes the pace sends meanwhile, and how long after it the next one comes."""
    at = 0.0
    for probes in itertools.count():
        at += error_delay(probes + 1)
        if at >= down:
            return probes, at - down
    raise AssertionError


def _chance(late: Collection[float]) -> str:
    tenths = statistics.quantiles(late, n=10, method="inclusive")
    return f"{tenths[4]:.1f} s (median), {tenths[8]:.1f} s (one in ten later)"


# -- one outage


def measure(server: Server, plan: Plan, way: str) -> Outcome:
    """Live through one outage."""
    return asyncio.run(_WAYS[way](server, plan))


async def _outage(server: Server, plan: Plan, begin: Callable[[str], Coroutine[Any, Any, object]]) -> Outcome:
    """Begin the waits, take the service down and up, and see all waits to their end.

    Args:
        server: The service.
        plan: What happens to it.
        begin: Waits for one operation.
    """
    server.keep_journal()
    tasks = [asyncio.create_task(begin(str(uuid.uuid4()))) for _ in range(plan.waits)]
    try:
        await _all_looked_at(server, tasks, _BEGIN_WITHIN, "begun")
        cpu = await _down(server, plan)
        with Workload(server) as workload:
            await _all_looked_at(server, tasks, plan.every + _RECOVER_WITHIN, "looked at again")
        if workload.bound:
            raise CannotMeasureError(f"the server was the recovery's bottleneck ({workload.share:.0%} of its core)")
        journal = server.journal()
        server.approve(approved=True)
        async with asyncio.timeout(plan.every + _RECOVER_WITHIN):
            endings = await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        await cancel(tasks)
    return _outcome(journal, cpu, lost=sum(isinstance(ending, BaseException) for ending in endings))


async def _down(server: Server, plan: Plan) -> float:
    """Be down for a while, and return the seconds of CPU that were spent meanwhile."""
    cpu = time.process_time()
    server.fail(plan.failure)
    await asyncio.sleep(plan.down)
    server.approve(approved=False)
    cpu = time.process_time() - cpu
    if cpu > _FULLY_BUSY * plan.down:
        raise CannotMeasureError(f"the process was busy {cpu / plan.down:.0%} of the outage")
    return cpu


async def _all_looked_at(server: Server, tasks: list[asyncio.Task[object]], seconds: float, what: str) -> None:
    """Wait until each wait that has not ended has been looked at since the last change."""
    until = time.monotonic() + seconds
    while (await asyncio.to_thread(server.facts)).looked_at < len(tasks) - sum(task.done() for task in tasks):
        if time.monotonic() > until:
            raise CannotMeasureError(f"not all waits were {what} within {seconds:g} s")
        await asyncio.sleep(0.1)


def _outcome(journal: Journal, cpu: float, *, lost: int) -> Outcome:
    down, up = journal.changes
    came, looked_at = journal.requests, sorted(journal.looked_at)

    def count(since: float, until: float) -> int:
        return bisect.bisect_left(came, until) - bisect.bisect_left(came, since)

    return Outcome(
        down=up - down,
        requests=count(down, up),
        cpu=cpu,
        noticed=looked_at[0] - up if looked_at else None,
        recovered=looked_at[-1] - up if looked_at else None,
        first_second=count(up, up + 1),
        busiest_second=max((count(at, at + 1) for at in came if at >= up), default=0),
        lost=lost,
        per_second=[count(down + k, down + k + 1) for k in range(int(came[-1] - down) + 1)],
    )


async def _ours(server: Server, plan: Plan) -> Outcome:
    schedule = wait_chain(wait_random(0, plan.every), wait_fixed(plan.every))  # spread out, once they have begun
    async with KeylessClient(API_KEY, base_url=server.base_url, schedule=schedule, max_in_flight=_IN_FLIGHT) as client:
        return await _outage(server, plan, lambda operation_id: client.wait_for_approval(operation_id, timeout=3600.0))


async def _coroutines(server: Server, plan: Plan, patient: Callable[[_Look], _Look]) -> Outcome:
    """Have a coroutine a wait, which looks when a semaphore lets it.

    Args:
        server: The service.
        plan: What happens to it.
        patient: Makes a look that copes with errors of one that does not; it returns None for "no answer".
    """
    gate = asyncio.Semaphore(_IN_FLIGHT)
    async with bare_session() as session:
        client = BareClient(session, server)

        async def bare_look(operation_id: str) -> PlainOperation | None:
            async with gate:
                return await client.get_operation(operation_id)

        look = patient(bare_look)

        async def wait(operation_id: str) -> None:
            pause = random.uniform(0, plan.every)  # noqa: S311  # spread out, once they have begun
            while (operation := await look(operation_id)) is None or operation.state != "approved":
                await asyncio.sleep(pause)
                pause = plan.every

        return await _outage(server, plan, wait)


def _as_pending(look: _Look) -> _Look:
    """Take an error for "pending", as most loops do."""

    async def patient(operation_id: str) -> PlainOperation | None:
        try:
            return await look(operation_id)
        except _PASSING:
            return None

    return patient


def _with_tenacity(stop: stop_base) -> Callable[[_Look], _Look]:
    """Repeat a look on the error pace that ours has too, but for each wait by itself."""
    return retry(
        wait=wait_random_exponential(multiplier=0.5, max=30),
        retry=retry_if_exception_type(_PASSING),
        stop=stop,
        reraise=True,
    )


_WAYS: Final[dict[str, Callable[[Server, Plan], Coroutine[None, None, Outcome]]]] = {
    OURS: _ours,
    LOOP: lambda server, plan: _coroutines(server, plan, _as_pending),
    TENACITY: lambda server, plan: _coroutines(server, plan, _with_tenacity(stop_never)),
    FIVE: lambda server, plan: _coroutines(server, plan, _with_tenacity(stop_after_attempt(5))),
}


# -- the picture


def draw(raw: dict[str, Any]) -> Figure:
    """Draw the requests that came, second by second, one diagram for each kind of outage."""
    figure, axes = pictures.panels(len(raw), width=5.4)
    for ax, (failure, measured) in zip(axes, raw.items(), strict=True):
        down = measured["plan"]["down"]
        ax.axvspan(0, down, color="#f6e3de", lw=0)
        for colour, (way, of) in zip((pictures.OURS, *pictures.OTHERS), measured["ways"].items(), strict=False):
            for outcome in of:
                ax.step(range(len(outcome["per_second"])), outcome["per_second"], where="post", color=colour)
            ax.plot([], [], color=colour, label=way)
        ax.set_yscale("symlog", linthresh=10)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("seconds from the failure")
        ax.set_ylabel("requests per second")
        waits = f"{measured['plan']['waits']:,}".replace(",", " ")
        ax.set_title(f"{failure}: {waits} waits, down for {down:g} s")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
