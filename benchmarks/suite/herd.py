"""Many waits due at the same time: how long the event loop is blocked.

All waits are started and polled once, sleep until the same time, then find their operations approved. The baselines
are one coroutine per wait, asleep until the same time; they differ in how they limit their requests. Each run has a
process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import uuid
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import aiohttp
from tenacity.wait import wait_base

from aiokeyless import KeylessClient
from benchmarks import pictures
from benchmarks.baselines import OURS, BareClient, bare_session
from benchmarks.bench import order
from benchmarks.memory import forget_peak, peak, resident
from benchmarks.probe import Blocks, Probe
from benchmarks.report import CannotMeasureError, Goal, Report, Spread, Table
from benchmarks.server import API_KEY, Server, Workload, allow_many_sockets, serving
from benchmarks.suite.waits import cancel

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from matplotlib.figure import Figure
    from tenacity import RetryCallState

    from benchmarks.bench import Bench

_IN_FLIGHT: Final = 16
_BATCH: Final = 64
_MARGIN: Final = 0.2  # seconds: all waits must have started this long before they are due
_SPARE_SOCKETS: Final = 1000
_FEW: Final = 10_000  # up to here there is time for several rounds of each side
_START_FACTORS: Final = (1.3, 2.5)  # the time to start the waits, relative to the estimate; one per try
_GOALS: Final = {10_000: 0.005, 100_000: 0.010}  # seconds of the longest block
_GOAL: Final = 0.005  # for other sizes

SEMAPHORE: Final = "a semaphore"
LIMIT: Final = "TCPConnector(limit=100)"
UNBOUNDED: Final = "unbounded"


class Outcome(NamedTuple):
    """The measurements of one herd."""

    blocks: Blocks
    total: float  # seconds from the due time to the end of the last wait
    memory: float  # bytes: the growth of the process at its peak
    sockets: int
    server_share: float
    server_bound: bool


def run(bench: Bench) -> Report:
    """Measure herds of 10 000 and of 100 000."""
    report = Report(f"herd: waits due at the same time, ours and the semaphore with {_IN_FLIGHT} in flight")
    for size in bench.pick(full=[10_000, 100_000], quick=[2_000], smoke=[200]):
        outcomes = _measure_all(bench, size, report)
        report.tables.append(_table(size, outcomes))
        report.raw[str(size)] = {
            name: [{**outcome._asdict(), "blocks": outcome.blocks._asdict()} for outcome in of]
            for name, of in outcomes.items()
        }
        block = Spread.of([outcome.blocks.block for outcome in outcomes[OURS]]).median
        report.goals.append(Goal(f"longest block, {size} waits", 1e3 * _GOALS.get(size, _GOAL), 1e3 * block, " ms"))
    return report


def _measure_all(bench: Bench, size: int, report: Report) -> dict[str, list[Outcome]]:
    outcomes: dict[str, list[Outcome]] = {}
    rounds = bench.pick(full=3, quick=1, smoke=1)
    names = bench.pick(full=[*_HERDS], quick=[OURS, SEMAPHORE, UNBOUNDED], smoke=[OURS, LIMIT])
    for k in range(rounds):
        for name in order(names, k):
            if k and name != OURS and size > _FEW:
                continue  # that would take minutes
            bench.progress(f"  {size} waits, round {k + 1} of {rounds}: {name}")
            try:
                outcome = _in_time(bench, name, size)
            except CannotMeasureError as error:
                report.notes.append(f"{size} waits, {name}: not measured, {error}")
                continue
            outcomes.setdefault(name, []).append(outcome)
    if OURS not in outcomes:
        raise CannotMeasureError("; ".join(report.notes))
    return {name: outcomes[name] for name in _HERDS if name in outcomes}


def _in_time(bench: Bench, name: str, size: int) -> Outcome:
    """Run one herd; once more with a later due time if the waits did not start in time."""
    for start_factor in _START_FACTORS:
        with serving() as server, contextlib.suppress(_TooLateError):
            return bench.in_fresh_process(measure, server, name, size, start_factor)
    raise CannotMeasureError("the waits did not start before they were due")


class _TooLateError(Exception):
    """Not all waits started before they were due."""


_COLUMNS: Final[dict[str, Callable[[Outcome], float]]] = {
    "block, ms CPU": lambda o: 1e3 * o.blocks.block,
    "block, ms": lambda o: 1e3 * o.blocks.wall_block,
    "callback, ms CPU": lambda o: 1e3 * o.blocks.callback,
    "heartbeat late, ms": lambda o: 1e3 * o.blocks.late,
    "p99": lambda o: 1e3 * o.blocks.late_p99,
    "collector, ms": lambda o: 1e3 * o.blocks.collection,
    "total, s": lambda o: o.total,
}


def _table(size: int, outcomes: dict[str, list[Outcome]]) -> Table:
    table = Table(
        f"{size} waits (the longest of each run, median of the runs)",
        ["", *_COLUMNS, f"block over {OURS}", "sockets", "memory, MB", "server busy"],
    )
    for name, of in outcomes.items():
        ratio = Spread.of([a.blocks.block / b.blocks.block for a, b in zip(of, outcomes[OURS], strict=False)])
        # If the server was the bottleneck, the total measures the server.
        total_is_ours = not any(outcome.server_bound for outcome in of)
        table.rows.append(
            [
                name,
                *(
                    Spread.of([figure(outcome) for outcome in of]).text(2)
                    if total_is_ours or column != "total, s"
                    else "server-bound"
                    for column, figure in _COLUMNS.items()
                ),
                "1" if name == OURS else ratio.text(1),
                str(max(outcome.sockets for outcome in of)),
                f"{Spread.of([outcome.memory for outcome in of]).median / 1e6:.0f}",
                f"{max(outcome.server_share for outcome in of):.0%}",
            ]
        )
    return table


def measure(server: Server, name: str, size: int, start_factor: float) -> Outcome:
    """Run one herd; ``start_factor`` scales the estimated time to start it."""
    allowed = allow_many_sockets() - _SPARE_SOCKETS
    if name == UNBOUNDED and size > allowed:
        raise CannotMeasureError(f"it needs {size} sockets, and this system allows {allowed}")
    herd = _Herd(server, size, start_factor)
    try:
        herd.probe.run(_HERDS[name](herd))
    except aiohttp.ClientError as error:
        raise CannotMeasureError(f"its requests failed ({type(error).__name__})") from error
    return herd.outcome


class _Herd:
    """The waits, the time at which all are due, and the measurement."""

    outcome: Outcome

    def __init__(self, server: Server, size: int, start_factor: float) -> None:
        self.server = server
        self.size = size
        self.start_factor = start_factor
        self.probe = Probe()
        self.due_at = math.inf
        self.left = size

    def time_left(self) -> float:
        """Return the seconds until the waits are due."""
        return max(0.0, self.due_at - asyncio.get_running_loop().time())

    async def set_due_at(self, start: Callable[[str], Coroutine[None, None, object]]) -> None:
        """Set a due time by which all waits will have started, extrapolated from the first ones."""
        loop = asyncio.get_running_loop()
        self.server.approve(approved=True)
        self.due_at = loop.time()
        await self._batch(start)  # opens the connections
        started = loop.time()
        count = min(self.size, 10 * _BATCH)
        for _ in range(count // _BATCH + 1):
            await self._batch(start)
        self.due_at = loop.time() + 0.4 + self.start_factor * (loop.time() - started) * self.size / count

    async def _batch(self, start: Callable[[str], Coroutine[None, None, object]]) -> None:
        await asyncio.gather(*(start(str(uuid.uuid4())) for _ in range(_BATCH)))

    async def measure(self, start: Callable[[str], Coroutine[None, None, object]], polled: Callable[[], int]) -> None:
        """Start the waits, a few at a time, and measure the loop from just before they are due until the last one ends.

        Args:
            start: Waits for one operation.
            polled: Returns the number of waits that have been polled once, and sleep.
        """
        await self.set_due_at(start)
        self.server.approve(approved=False)
        self.left = self.size
        ended = asyncio.Event()
        tasks: list[asyncio.Task[None]] = []
        try:
            await self._start(start, polled, tasks, ended)
            self.server.approve(approved=True)
            await asyncio.sleep(self.time_left() - 0.1)
            self.outcome = await self._measured_outcome(ended)
            await asyncio.gather(*tasks)
        finally:
            await cancel(tasks)

    async def _start(
        self,
        start: Callable[[str], Coroutine[None, None, object]],
        polled: Callable[[], int],
        tasks: list[asyncio.Task[None]],
        ended: asyncio.Event,
    ) -> None:
        before = polled()
        for k in range(self.size):
            tasks.append(asyncio.create_task(self._run_one(start, ended)))
            while k - (polled() - before) > _BATCH:  # noqa: ASYNC110  # there is no event to wait for
                await asyncio.sleep(0)
            self._check_time_left()
        while polled() - before < self.size:
            await asyncio.sleep(0.01)
            self._check_time_left()

    def _check_time_left(self) -> None:
        if self.time_left() < _MARGIN:
            raise _TooLateError

    async def _measured_outcome(self, ended: asyncio.Event) -> Outcome:
        forget_peak()
        memory = resident()
        with Workload(self.server) as workload:
            await asyncio.sleep(self.time_left() - 0.02)
            with self.probe.measuring():
                await ended.wait()
            total = asyncio.get_running_loop().time() - self.due_at
        return Outcome(
            self.probe.blocks(),
            total,
            peak() - memory,
            self.server.statistics().most_connections,
            workload.share,
            workload.bound,
        )

    async def _run_one(self, start: Callable[[str], Coroutine[None, None, object]], ended: asyncio.Event) -> None:
        try:
            await start(str(uuid.uuid4()))
        finally:
            self.left -= 1
            if not self.left:
                ended.set()


class _AtDueTime(wait_base):
    """The schedule of our waits: all poll at the due time."""

    def __init__(self, herd: _Herd) -> None:
        self._herd = herd

    def __call__(self, _retry_state: RetryCallState) -> float:
        return self._herd.time_left()


async def _ours(herd: _Herd) -> None:
    async with KeylessClient(
        API_KEY,
        base_url=herd.server.base_url,
        schedule=_AtDueTime(herd),
        max_in_flight=_IN_FLIGHT,
        max_polls_per_second=None,
    ) as client:
        await herd.measure(
            lambda operation_id: client.wait_for_approval(operation_id, timeout=3600.0),
            lambda: client.statistics.polls - client.statistics.in_flight,
        )


async def _coroutines(herd: _Herd, gate: contextlib.AbstractAsyncContextManager[None], limit: int) -> None:
    polls = 0
    async with bare_session(limit=limit) as session:
        client = BareClient(session, herd.server)

        async def wait(operation_id: str) -> None:
            nonlocal polls
            while True:
                async with gate:
                    operation = await client.get_operation(operation_id)
                polls += 1
                if operation.state == "approved":
                    return
                await asyncio.sleep(herd.time_left())

        await herd.measure(wait, lambda: polls)


_HERDS: Final[dict[str, Callable[[_Herd], Coroutine[None, None, None]]]] = {
    OURS: _ours,
    SEMAPHORE: lambda herd: _coroutines(herd, asyncio.Semaphore(_IN_FLIGHT), limit=0),
    LIMIT: lambda herd: _coroutines(herd, contextlib.nullcontext(), limit=100),
    UNBOUNDED: lambda herd: _coroutines(herd, contextlib.nullcontext(), limit=0),
}


def draw(raw: dict[str, Any]) -> Figure:
    """Draw the longest block of each side, at the largest size that most sides could run."""
    size = max(raw, key=lambda size: (len(raw[size]), int(size)))
    blocks = {
        name: 1e3 * Spread.of([outcome["blocks"]["block"] for outcome in of]).median for name, of in raw[size].items()
    }
    figure, (ax,) = pictures.panels(1, width=7.0, height=2.4)
    goal = 1e3 * _GOALS.get(int(size), _GOAL)
    ax.axvline(goal, color="black", lw=1, ls="--", zorder=0.9)
    ax.annotate(f"goal: {goal:g} ms", (goal, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom")
    bars = ax.barh([*blocks], [*blocks.values()], color=[pictures.OURS, *pictures.OTHERS[:1] * (len(blocks) - 1)])
    labels = [f"{block:.1f} ms" if block < 100 else f"{block:.0f} ms" for block in blocks.values()]
    ax.bar_label(bars, labels, padding=4, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    ax.set_xscale("log")
    ax.set_xlim(min(0.5, *blocks.values()), 5 * max(blocks.values()))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    count = f"{int(size):,}".replace(",", " ")
    ax.set_xlabel(f"longest block of the event loop, ms; {count} waits due at once")
    return figure
