"""Many waits due at the same moment: how long the event loop is blocked.

All waits are begun and looked at once, sleep until one and the same moment, then find their operations approved. The
rivals are a coroutine a wait that sleeps until that moment too and differ in what bounds their requests. Each run is a
process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import resource
import sys
import uuid
from typing import TYPE_CHECKING, Final, NamedTuple

import aiohttp
from tenacity.wait import wait_base

from aiokeyless import KeylessClient
from benchmarks.bench import order
from benchmarks.probe import Blocks, Probe
from benchmarks.report import CannotMeasureError, Goal, Report, Spread, Table
from benchmarks.rivals import BareClient, bare_session
from benchmarks.server import API_KEY, Server, Workload, allow_many_sockets, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from tenacity import RetryCallState

    from benchmarks.bench import Bench

_IN_FLIGHT: Final = 16
_BATCH: Final = 64
_SPARE_SOCKETS: Final = 1000

OURS: Final = "aiokeyless"
SEMAPHORE: Final = "a semaphore"
LIMIT: Final = "TCPConnector(limit=100)"
UNBOUNDED: Final = "unbounded"


class Outcome(NamedTuple):
    """What one herd did."""

    blocks: Blocks
    total: float  # seconds from the moment until the last wait has ended
    memory: float  # bytes by which the peak of the process grew
    sockets: int
    server_share: float
    server_bound: bool


def run(bench: Bench) -> Report:
    """Measure herds of 10 000 and of 100 000."""
    report = Report(f"herd: waits that are due at the same moment, ours and the semaphore with {_IN_FLIGHT} in flight")
    goals = {10_000: 0.005, 100_000: 0.010}
    for size in bench.pick(full=[10_000, 100_000], quick=[3_000], smoke=[200]):
        rounds = bench.pick(full=5 if size <= 10_000 else 1, quick=1, smoke=1)
        outcomes = _measured(bench, size, rounds, report)
        report.tables.append(_table(size, outcomes))
        report.raw[str(size)] = {
            name: [{**outcome._asdict(), "blocks": outcome.blocks._asdict()} for outcome in of]
            for name, of in outcomes.items()
        }
        block = Spread.of([outcome.blocks.block for outcome in outcomes[OURS]]).median
        report.goals.append(Goal(f"longest block, {size} waits", 1e3 * goals.get(size, 0.005), 1e3 * block, " ms"))
    return report


def _measured(bench: Bench, size: int, rounds: int, report: Report) -> dict[str, list[Outcome]]:
    outcomes: dict[str, list[Outcome]] = {}
    for k in range(rounds):
        for name in order(bench.pick(full=[*_HERDS], quick=[*_HERDS], smoke=[OURS, LIMIT]), k):
            bench.say(f"  {size} waits, round {k + 1} of {rounds}: {name}")
            try:
                with serving() as server:
                    outcome = bench.apart(measure, server, name, size)
            except CannotMeasureError as error:
                report.notes.append(f"{size} waits, {name}: not measured, {error}")
                continue
            outcomes.setdefault(name, []).append(outcome)
    if OURS not in outcomes:
        raise CannotMeasureError("; ".join(report.notes))
    return {name: outcomes[name] for name in _HERDS if name in outcomes}


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


def measure(server: Server, name: str, size: int) -> Outcome:
    """Run one herd."""
    allowed = allow_many_sockets() - _SPARE_SOCKETS
    if name == UNBOUNDED and size > allowed:
        raise CannotMeasureError(f"it opens {size} sockets, and this system allows {allowed}")
    herd = _Herd(server, size)
    try:
        herd.probe.run(_HERDS[name](herd))
    except aiohttp.ClientError as error:
        raise CannotMeasureError(f"its requests failed ({type(error).__name__})") from error
    return herd.outcome


class _Herd:
    """The moment that all wait for, and what happens then."""

    outcome: Outcome

    def __init__(self, server: Server, size: int) -> None:
        self.server = server
        self.size = size
        self.probe = Probe()
        self.moment = math.inf
        self.left = size

    def sleep(self) -> float:
        """Return the seconds until the moment."""
        return max(0.0, self.moment - asyncio.get_running_loop().time())

    async def set_moment(self, begin: Callable[[str], Coroutine[None, None, object]]) -> None:
        """Choose the moment late enough for all to have been begun by then: as fast as the first ones are."""
        loop = asyncio.get_running_loop()
        count = min(self.size, 10 * _BATCH)
        self.server.approve(approved=True)
        started = loop.time()
        self.moment = started
        for _ in range(count // _BATCH + 1):
            await asyncio.gather(*(begin(str(uuid.uuid4())) for _ in range(_BATCH)))
        self.moment = loop.time() + 0.4 + 1.6 * (loop.time() - started) * self.size / count

    async def charge(self, begin: Callable[[str], Coroutine[None, None, object]], begun: Callable[[], int]) -> None:
        """Begin the waits, a few at a time, and watch the loop from just before the moment until the last has ended.

        Args:
            begin: Waits for one operation.
            begun: How many waits have been looked at once, and sleep.
        """
        loop = asyncio.get_running_loop()
        await self.set_moment(begin)
        self.server.approve(approved=False)
        before, self.left = begun(), self.size
        ended = asyncio.Event()
        tasks = []
        for k in range(self.size):
            tasks.append(loop.create_task(self._one(begin, ended)))
            while k - (begun() - before) > _BATCH:  # noqa: ASYNC110  # statistics are no event
                await asyncio.sleep(0)
        while begun() - before < self.size:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        if self.sleep() < 0.2:
            raise CannotMeasureError("the waits were not begun before they were due")
        self.server.approve(approved=True)
        await asyncio.sleep(self.sleep() - 0.1)
        memory = _peak()
        with Workload(self.server) as workload:
            await asyncio.sleep(self.sleep() - 0.02)
            with self.probe.watching():
                await ended.wait()
            total = loop.time() - self.moment
        await asyncio.gather(*tasks)
        self.outcome = Outcome(
            self.probe.blocks(),
            total,
            _peak() - memory,
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


def _peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


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
