"""Many waits due at the same moment: how long the event loop is blocked.

All waits are begun and looked at once, sleep until one and the same moment, then find their operations approved. The
rivals are a coroutine a wait that sleeps until that moment too and differ in what bounds their requests. Each run is a
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
from benchmarks.bench import order
from benchmarks.memory import forget_peak, peak, resident
from benchmarks.probe import Blocks, Probe
from benchmarks.report import CannotMeasureError, Goal, Report, Spread, Table
from benchmarks.rivals import BareClient, bare_session
from benchmarks.server import API_KEY, Server, Workload, allow_many_sockets, serving
from benchmarks.suite.waits import cancel

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from matplotlib.figure import Figure
    from tenacity import RetryCallState

    from benchmarks.bench import Bench

_IN_FLIGHT: Final = 16
_BATCH: Final = 64
_HASTE: Final = 0.2  # seconds before the moment by which all must have been begun
_SPARE_SOCKETS: Final = 1000
_FEW: Final = 10_000  # up to here there is time for all to have rounds
_SPARES: Final = (1.3, 2.5)  # times as long as estimated: to begin the waits in, before they are due
_GOALS: Final = {10_000: 0.005, 100_000: 0.010}  # seconds of block
_GOAL: Final = 0.005  # for any other size

OURS: Final = "aiokeyless"
SEMAPHORE: Final = "a semaphore"
LIMIT: Final = "TCPConnector(limit=100)"
UNBOUNDED: Final = "unbounded"


class Outcome(NamedTuple):
    """What one herd did."""

    blocks: Blocks
    total: float  # seconds from the moment until the last wait has ended
    memory: float  # bytes by which the process grew, at its peak
    sockets: int
    server_share: float
    server_bound: bool


def run(bench: Bench) -> Report:
    """Measure herds of 10 000 and of 100 000."""
    report = Report(f"herd: waits that are due at the same moment, ours and the semaphore with {_IN_FLIGHT} in flight")
    for size in bench.pick(full=[10_000, 100_000], quick=[2_000], smoke=[200]):
        outcomes = _measured(bench, size, report)
        report.tables.append(_table(size, outcomes))
        report.raw[str(size)] = {
            name: [{**outcome._asdict(), "blocks": outcome.blocks._asdict()} for outcome in of]
            for name, of in outcomes.items()
        }
        block = Spread.of([outcome.blocks.block for outcome in outcomes[OURS]]).median
        report.goals.append(Goal(f"longest block, {size} waits", 1e3 * _GOALS.get(size, _GOAL), 1e3 * block, " ms"))
    return report


def _measured(bench: Bench, size: int, report: Report) -> dict[str, list[Outcome]]:
    outcomes: dict[str, list[Outcome]] = {}
    rounds = bench.pick(full=3, quick=1, smoke=1)
    names = bench.pick(full=[*_HERDS], quick=[OURS, SEMAPHORE, UNBOUNDED], smoke=[OURS, LIMIT])
    for k in range(rounds):
        for name in order(names, k):
            if k and name != OURS and size > _FEW:
                continue  # it would take minutes
            bench.say(f"  {size} waits, round {k + 1} of {rounds}: {name}")
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
    """Run one herd, a second time with a later moment where the waits were not begun by the first one."""
    for spare in _SPARES:
        with serving() as server, contextlib.suppress(_TooLateError):
            return bench.apart(measure, server, name, size, spare)
    raise CannotMeasureError("the waits were not begun before they were due")


class _TooLateError(Exception):
    """Not all waits were begun before they were due."""


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
        f"{size} waits (in all columns but the last: the longest of a run; median of the runs)",
        ["", *_COLUMNS, f"block over {OURS}", "sockets", "memory, MB", "server busy"],
    )
    for name, of in outcomes.items():
        ratio = Spread.of([a.blocks.block / b.blocks.block for a, b in zip(of, outcomes[OURS], strict=False)])
        # The answers come as fast as the server gives them: where it was the bottleneck, the total is its own.
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


def measure(server: Server, name: str, size: int, spare: float) -> Outcome:
    """Run one herd, with this much spare time to begin it in."""
    allowed = allow_many_sockets() - _SPARE_SOCKETS
    if name == UNBOUNDED and size > allowed:
        raise CannotMeasureError(f"it opens {size} sockets, and this system allows {allowed}")
    herd = _Herd(server, size, spare)
    try:
        herd.probe.run(_HERDS[name](herd))
    except aiohttp.ClientError as error:
        raise CannotMeasureError(f"its requests failed ({type(error).__name__})") from error
    return herd.outcome


class _Herd:
    """The moment that all wait for, and what happens then."""

    outcome: Outcome

    def __init__(self, server: Server, size: int, spare: float) -> None:
        self.server = server
        self.size = size
        self.spare = spare
        self.probe = Probe()
        self.moment = math.inf
        self.left = size

    def sleep(self) -> float:
        """Return the seconds until the moment."""
        return max(0.0, self.moment - asyncio.get_running_loop().time())

    async def set_moment(self, begin: Callable[[str], Coroutine[None, None, object]]) -> None:
        """Choose the moment late enough for all to have been begun by then: as fast as the first ones are."""
        loop = asyncio.get_running_loop()
        self.server.approve(approved=True)
        self.moment = loop.time()
        await self._batch(begin)  # it connects
        started = loop.time()
        count = min(self.size, 10 * _BATCH)
        for _ in range(count // _BATCH + 1):
            await self._batch(begin)
        self.moment = loop.time() + 0.4 + self.spare * (loop.time() - started) * self.size / count

    async def _batch(self, begin: Callable[[str], Coroutine[None, None, object]]) -> None:
        await asyncio.gather(*(begin(str(uuid.uuid4())) for _ in range(_BATCH)))

    async def charge(self, begin: Callable[[str], Coroutine[None, None, object]], begun: Callable[[], int]) -> None:
        """Begin the waits, a few at a time, and watch the loop from just before the moment until the last has ended.

        Args:
            begin: Waits for one operation.
            begun: How many waits have been looked at once, and sleep.
        """
        await self.set_moment(begin)
        self.server.approve(approved=False)
        self.left = self.size
        ended = asyncio.Event()
        tasks: list[asyncio.Task[None]] = []
        try:
            await self._begin(begin, begun, tasks, ended)
            self.server.approve(approved=True)
            await asyncio.sleep(self.sleep() - 0.1)
            self.outcome = await self._watched(ended)
            await asyncio.gather(*tasks)
        finally:
            await cancel(tasks)

    async def _begin(
        self,
        begin: Callable[[str], Coroutine[None, None, object]],
        begun: Callable[[], int],
        tasks: list[asyncio.Task[None]],
        ended: asyncio.Event,
    ) -> None:
        before = begun()
        for k in range(self.size):
            tasks.append(asyncio.create_task(self._one(begin, ended)))
            while k - (begun() - before) > _BATCH:  # noqa: ASYNC110  # statistics are no event
                await asyncio.sleep(0)
            self._must_have_time()
        while begun() - before < self.size:
            await asyncio.sleep(0.01)
            self._must_have_time()

    def _must_have_time(self) -> None:
        if self.sleep() < _HASTE:
            raise _TooLateError

    async def _watched(self, ended: asyncio.Event) -> Outcome:
        forget_peak()
        memory = resident()
        with Workload(self.server) as workload:
            await asyncio.sleep(self.sleep() - 0.02)
            with self.probe.watching():
                await ended.wait()
            total = asyncio.get_running_loop().time() - self.moment
        return Outcome(
            self.probe.blocks(),
            total,
            peak() - memory,
            self.server.facts().most_connections,
            workload.share,
            workload.bound,
        )

    async def _one(self, begin: Callable[[str], Coroutine[None, None, object]], ended: asyncio.Event) -> None:
        try:
            await begin(str(uuid.uuid4()))
        finally:
            self.left -= 1
            if not self.left:
                ended.set()


class _Until(wait_base):
    """The schedule of our waits: they all look at the moment."""

    def __init__(self, herd: _Herd) -> None:
        self._herd = herd

    def __call__(self, _retry_state: RetryCallState) -> float:
        return self._herd.sleep()


async def _ours(herd: _Herd) -> None:
    async with KeylessClient(
        API_KEY, base_url=herd.server.base_url, schedule=_Until(herd), max_in_flight=_IN_FLIGHT
    ) as client:
        await herd.charge(
            lambda operation_id: client.wait_for_approval(operation_id, timeout=3600.0),
            lambda: client.statistics.polls - client.statistics.in_flight,
        )


async def _coroutines(herd: _Herd, gate: contextlib.AbstractAsyncContextManager[None], limit: int) -> None:
    looks = 0
    async with bare_session(limit=limit) as session:
        client = BareClient(session, herd.server)

        async def wait(operation_id: str) -> None:
            nonlocal looks
            while True:
                async with gate:
                    operation = await client.get_operation(operation_id)
                looks += 1
                if operation.state == "approved":
                    return
                await asyncio.sleep(herd.sleep())

        await herd.charge(wait, lambda: looks)


_HERDS: Final[dict[str, Callable[[_Herd], Coroutine[None, None, None]]]] = {
    OURS: _ours,
    SEMAPHORE: lambda herd: _coroutines(herd, asyncio.Semaphore(_IN_FLIGHT), limit=0),
    LIMIT: lambda herd: _coroutines(herd, contextlib.nullcontext(), limit=100),
    UNBOUNDED: lambda herd: _coroutines(herd, contextlib.nullcontext(), limit=0),
}


def draw(raw: dict[str, Any]) -> Figure:
    """Draw the longest block of each way, at the largest of the sizes that most ways could do."""
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
