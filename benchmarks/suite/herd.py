"""Many waits due at the same time: how long the event loop is blocked.

All waits are started and polled once, sleep until the same time, then find their operations approved. The baselines
are one coroutine per wait, asleep until the same time; they differ in how they limit their requests. Each run has a
process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import selectors
import time
import uuid
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import aiohttp
from tenacity.wait import wait_base

from aiokeyless import KeylessClient
from benchmarks import pictures
from benchmarks.baselines import OURS, BareClient, bare_session
from benchmarks.bench import cancel, order
from benchmarks.report import CannotMeasureError, Goal, Report, Spread, Table
from benchmarks.server import API_KEY, Server, allow_many_sockets, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from contextlib import AbstractAsyncContextManager

    from matplotlib.figure import Figure
    from tenacity import RetryCallState

    from benchmarks.bench import Bench

    Start = Callable[[str], Coroutine[None, None, object]]

_IN_FLIGHT: Final = 16
_BATCH: Final = 64
_MARGIN: Final = 0.2  # seconds: all waits must have started this long before they are due
_SPARE_SOCKETS: Final = 1000
_START: Final = 1.0  # seconds that there are to start the waits
_START_ONE: Final = 0.001  # and for each of them
_GOALS: Final = {10_000: 5.0, 100_000: 10.0}  # ms of the longest block

SEMAPHORE: Final = "a semaphore"
LIMIT: Final = "TCPConnector(limit=100)"
UNBOUNDED: Final = "unbounded"


class Blocks(NamedTuple):
    """How long the event loop was blocked, at most, in seconds of CPU of its thread.

    A *block* is the time between two checks of the loop's sockets: from the return of one ``select`` to the call of the
    next. No other work waits longer than that. Other programs cannot lengthen the CPU time. The garbage collector
    counts separately: its pauses grow with the size of the whole process.
    """

    block: float
    collection: float


class _Selector(selectors.DefaultSelector):
    def __init__(self, on_wake: Callable[[], None], on_sleep: Callable[[], None]) -> None:
        super().__init__()
        self._on_wake = on_wake
        self._on_sleep = on_sleep

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._on_sleep()
        ready = super().select(timeout)
        self._on_wake()
        return ready


class Probe:
    """Measures the blocks of the event loop that it runs, which is asyncio's own."""

    def __init__(self) -> None:
        self._on = False
        self._since = self._collecting_since = self._collected = 0.0
        self.blocks = Blocks(0.0, 0.0)
        """What was measured so far."""

    def run(self, main: Coroutine[None, None, None]) -> None:
        """Run a coroutine as ``asyncio.run`` does, in a loop that can be measured."""
        with asyncio.Runner(
            loop_factory=lambda: asyncio.SelectorEventLoop(_Selector(self._on_wake, self._on_sleep))
        ) as runner:
            runner.run(main)

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure from this iteration of the loop until the end of the ``with`` block."""
        gc.callbacks.append(self._collector)
        self._on_wake()
        self._on = True
        try:
            yield
        finally:
            self._on_sleep()
            self._on = False
            gc.callbacks.remove(self._collector)

    def _on_wake(self) -> None:
        self._since, self._collected = time.thread_time(), 0.0

    def _on_sleep(self) -> None:
        if self._on:
            block = time.thread_time() - self._since - self._collected
            self.blocks = self.blocks._replace(block=max(self.blocks.block, block))

    def _collector(self, phase: str, _info: object) -> None:
        if phase == "start":
            self._collecting_since = time.thread_time()
            return
        seconds = time.thread_time() - self._collecting_since
        self._collected += seconds
        self.blocks = self.blocks._replace(collection=max(self.blocks.collection, seconds))


def run(bench: Bench) -> Report:
    """Measure herds of 10 000, and ours of 100 000, for which the others take minutes."""
    report = Report(f"herd: waits due at the same time, ours and the semaphore with {_IN_FLIGHT} in flight")
    for size, names in bench.pick(full={10_000: [*_HERDS], 100_000: [OURS]}, smoke={200: [OURS, LIMIT]}).items():
        blocks = _measure_all(bench, size, names, report)
        report.tables.append(_table(size, blocks))
        report.raw[str(size)] = {name: [each._asdict() for each in of] for name, of in blocks.items()}
        longest = Spread.of([1e3 * each.block for each in blocks[OURS]]).median
        report.goals.append(Goal(f"longest block, {size} waits", _GOALS.get(size, 5.0), longest, " ms"))
    return report


def _measure_all(bench: Bench, size: int, names: list[str], report: Report) -> dict[str, list[Blocks]]:
    blocks: dict[str, list[Blocks]] = {name: [] for name in names}
    rounds = bench.pick(full=3, smoke=1)
    for k in range(rounds):
        for name in order(names, k):
            bench.progress(f"  {size} waits, round {k + 1} of {rounds}: {name}")
            try:
                with serving() as server:
                    blocks[name].append(bench.in_fresh_process(measure, server, name, size))
            except CannotMeasureError as error:
                report.notes.append(f"{size} waits, {name}: not measured, {error}")
    if not blocks[OURS]:
        raise CannotMeasureError("; ".join(report.notes))
    return {name: of for name, of in blocks.items() if of}


def _table(size: int, blocks: dict[str, list[Blocks]]) -> Table:
    columns = ["", "block, ms CPU", "collector, ms CPU", f"block over {OURS}"]
    table = Table(f"{size} waits (the longest of each run, median of the runs)", columns)
    for name, of in blocks.items():
        cells = [Spread.of([1e3 * value for value in values]).text(2) for values in zip(*of, strict=True)]
        ratio = Spread.of([a.block / b.block for a, b in zip(of, blocks[OURS], strict=False)])
        table.rows.append([name, *cells, "1" if name == OURS else ratio.text(1)])
    return table


def measure(server: Server, name: str, size: int) -> Blocks:
    """Run one herd."""
    allowed = allow_many_sockets() - _SPARE_SOCKETS
    if name == UNBOUNDED and size > allowed:
        raise CannotMeasureError(f"it needs {size} sockets, and this system allows {allowed}")
    herd = _Herd(server, size)
    try:
        herd.probe.run(_HERDS[name](herd))
    except aiohttp.ClientError as error:
        raise CannotMeasureError(f"its requests failed ({type(error).__name__})") from error
    return herd.probe.blocks


class _Herd:
    """The waits, the time at which all are due, and the measurement."""

    def __init__(self, server: Server, size: int) -> None:
        self.server = server
        self.size = size
        self.probe = Probe()
        self.due_at = math.inf
        self.left = size
        self._ended = asyncio.Event()

    def time_left(self) -> float:
        """Return the seconds until the waits are due."""
        return max(0.0, self.due_at - asyncio.get_running_loop().time())

    async def measure(self, start: Start, polled: Callable[[], int]) -> None:
        """Start the waits, a few at a time, and measure the loop from just before they are due until the last one ends.

        Args:
            start: Waits for one operation.
            polled: Returns the number of waits that have been polled once, and sleep.
        """
        loop = asyncio.get_running_loop()
        self.server.approve(approved=True)
        self.due_at = loop.time()
        await asyncio.gather(*(start(str(uuid.uuid4())) for _ in range(_BATCH)))  # opens the connections
        self.server.approve(approved=False)
        before, self.due_at = polled(), loop.time() + _START + self.size * _START_ONE
        tasks: list[asyncio.Task[None]] = []
        try:
            for k in range(self.size):
                tasks.append(asyncio.create_task(self._run_one(start)))
                while k - (polled() - before) > _BATCH:  # noqa: ASYNC110  # there is no event to wait for
                    await asyncio.sleep(0)
            while polled() - before < self.size:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            if self.time_left() < _MARGIN:
                raise CannotMeasureError("the waits did not start before they were due")
            self.server.approve(approved=True)
            await asyncio.sleep(self.time_left() - 0.02)
            with self.probe.measuring():
                await self._ended.wait()
            await asyncio.gather(*tasks)
        finally:
            await cancel(tasks)

    async def _run_one(self, start: Start) -> None:
        try:
            await start(str(uuid.uuid4()))
        finally:
            self.left -= 1
            if not self.left:
                self._ended.set()


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


async def _coroutines(herd: _Herd, gate: AbstractAsyncContextManager[object] | None = None, limit: int = 0) -> None:
    """Run a hand-written loop for each wait."""
    polls = 0
    async with bare_session(limit=limit) as session:
        client = BareClient(session, herd.server)

        async def wait(operation_id: str) -> None:
            nonlocal polls
            while True:
                async with gate or contextlib.nullcontext():
                    operation = await client.get_operation(operation_id)
                polls += 1
                if operation.state == "approved":
                    return
                await asyncio.sleep(herd.time_left())

        await herd.measure(wait, lambda: polls)


_HERDS: Final[dict[str, Callable[[_Herd], Coroutine[None, None, None]]]] = {
    OURS: _ours,
    SEMAPHORE: lambda herd: _coroutines(herd, asyncio.Semaphore(_IN_FLIGHT)),
    LIMIT: lambda herd: _coroutines(herd, limit=100),
    UNBOUNDED: _coroutines,
}


def draw(raw: dict[str, Any]) -> Figure:
    """Draw the longest block of each side, at the size that all sides could run."""
    size = min(raw, key=int)
    blocks = {name: 1e3 * Spread.of([each["block"] for each in of]).median for name, of in raw[size].items()}
    figure, (ax,) = pictures.panels(1, width=7.0, height=2.4)
    bars = ax.barh([*blocks], [*blocks.values()], color=[pictures.OURS, *pictures.OTHERS[:1] * (len(blocks) - 1)])
    labels = [f"{block:.1f} ms" if block < 100 else f"{block:.0f} ms" for block in blocks.values()]
    ax.bar_label(bars, labels, padding=4, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    ax.set(xscale="log", xlim=(min(0.5, *blocks.values()), 5 * max(blocks.values())))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    count = f"{int(size):,}".replace(",", " ")
    ax.set_xlabel(f"longest block of the event loop, ms; {count} waits due at once")
    return figure
