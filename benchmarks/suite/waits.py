"""Memory and CPU of sleeping waits, against one coroutine per wait.

Each measurement has a process of its own: a few waits to warm up, which are cancelled; then all of them, each with its
own operation id and task, each answered "pending" once and then asleep. The growth of the process is divided by their
number. Sleeping costs no CPU; the cost of waking up, polling and going to sleep again is measured with waits that
sleep for a short time.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import time
import tracemalloc
import uuid
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import anyio
from tenacity import AsyncRetrying, retry_if_result, stop_after_delay, wait_fixed

from aiokeyless import KeylessClient
from benchmarks import pictures
from benchmarks.baselines import LOOP, OURS, BareClient, PlainOperation, bare_session
from benchmarks.bench import Pairs, order
from benchmarks.memory import resident
from benchmarks.report import CannotMeasureError, Goal, Report, Spread, Table
from benchmarks.server import API_KEY, Server, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

    from matplotlib.figure import Figure

    from benchmarks.bench import Bench

_SLEEP: Final = 3000.0  # seconds: no wait wakes up during the measurement
_TIMEOUT: Final = 4000.0
_BATCH: Final = 64  # waits started at once, so that all sides use the same number of connections
_START_WITHIN: Final = 600.0
_FEW: Final = 1_000  # up to here allocations are counted: for more it takes long

HOLDS: Final = f"{OURS}, hold_for_approval"
MANY: Final = f"{OURS}, wait_for_approvals"
TENACITY: Final = "tenacity per wait"


class Growth(NamedTuple):
    """The cost of one wait: bytes of memory, CPU seconds to start it and poll once."""

    memory: float
    cpu: float


class Method(StrEnum):
    """How memory is measured."""

    ALLOCATED = "allocated"  # what Python requested from its allocators: exact, but slow
    RESIDENT = "resident"  # what the process holds, gaps between objects included: rough if the waits are few


def run(bench: Bench) -> Report:
    """Measure each side with 1 000, 10 000 and 100 000 waits."""
    report = Report("waits: memory and CPU of a sleeping wait")
    sizes = bench.pick(full=[1_000, 10_000, 100_000], quick=[500], smoke=[200])
    with serving() as server:
        measured = {size: _measured(bench, server, size) for size in sizes}
        wake_ups = _wake_ups(bench, server)
    for size, growths in measured.items():
        report.tables.append(_table(size, growths))
        report.raw[str(size)] = {
            "method": _method(size),
            "sides": {name: {**growth._asdict()} for name, growth in growths.items()},
        }
    report.tables.append(_wake_up_table(wake_ups))
    report.raw["wake_ups"] = {name: [*seconds] for name, seconds in wake_ups.items()}
    size = sizes[-1]
    growths, method = measured[size], _method(size)
    over_tenacity = growths[OURS].memory / growths[TENACITY].memory
    report.goals += [
        Goal(f"{size} waits, {method}", 1750, growths[OURS].memory, " B"),
        Goal("the same, stretch", 1300, growths[OURS].memory, " B"),
        Goal(f"{size} waits, {method}, over {TENACITY}", 0.25, over_tenacity, "x"),
    ]
    report.notes.append("a coroutine keeps its last operation; a wait of aiokeyless keeps no answer")
    return report


def _method(size: int) -> Method:
    return Method.ALLOCATED if size <= _FEW else Method.RESIDENT


def _measured(bench: Bench, server: Server, size: int) -> dict[str, Growth]:
    """Measure each side once: many waits are an average already, and the count of allocations is exact."""
    growths = {}
    for name in bench.pick(full=[*_SIDES], quick=[*_SIDES], smoke=[OURS, HOLDS, MANY, TENACITY]):
        bench.progress(f"  {size} waits: {name}")
        growths[name] = bench.in_fresh_process(measure, server, name, size, _method(size))
    return growths


def _table(size: int, growths: dict[str, Growth]) -> Table:
    method = _method(size)
    columns = ["", f"{method}, B", f"over {OURS}"]
    # No CPU figure while allocations are counted: that makes them slow.
    table = Table(f"{size} waits", columns + ["CPU to start, us"] * (method is Method.RESIDENT))
    for name, growth in growths.items():
        row = [name, f"{growth.memory:.0f}", f"{growth.memory / growths[OURS].memory:.2f}"]
        table.rows.append(row + [f"{1e6 * growth.cpu:.0f}"] * (method is Method.RESIDENT))
    return table


def _wake_ups(bench: Bench, server: Server) -> dict[str, list[float]]:
    """Return CPU seconds per wake-up, round by round."""
    size, rounds = bench.pick(full=(2_000, 3), quick=(500, 1), smoke=(50, 1))
    wake_ups: dict[str, list[float]] = {
        name: [] for name in bench.pick(full=[*_SIDES], quick=[OURS, LOOP], smoke=[OURS])
    }
    for name in (HOLDS, MANY):  # they wake up as ours
        wake_ups.pop(name, None)
    for k in range(rounds):
        bench.progress(f"  wake-ups, round {k + 1} of {rounds}")
        for name in order([*wake_ups], k):
            wake_ups[name].append(
                bench.in_fresh_process(wake, server, name, size, bench.pick(full=0.5, quick=0.2, smoke=0.1))
            )
    return wake_ups


def _wake_up_table(wake_ups: dict[str, list[float]]) -> Table:
    table = Table("wake up, poll, sleep again", ["", "CPU, us", f"over {OURS}"])
    for name, seconds in wake_ups.items():
        microseconds = Spread.of([1e6 * value for value in seconds])
        table.rows.append(
            [name, microseconds.text(0), "1" if name == OURS else Pairs(seconds, wake_ups[OURS]).ratio.text(2)]
        )
    return table


def measure(server: Server, name: str, size: int, method: Method) -> Growth:
    """Return the cost of one wait among ``size``."""
    gauge = _GrowthGauge(size, method)
    asyncio.run(_SIDES[name](server, gauge))
    return gauge.growth


def wake(server: Server, name: str, size: int, pause: float) -> float:
    """Return the CPU seconds of one wake-up, of ``size`` waits that each wake up once per pause."""
    gauge = _WakeUpGauge(size, pause)
    asyncio.run(_SIDES[name](server, gauge))
    return gauge.cpu


class _Gauge(Protocol):
    """Measures waits, and sets how long they sleep."""

    pause: float

    async def measure(self, start: Callable[[str], object], polled: Callable[[], int]) -> None:
        """Start the waits, and measure.

        Args:
            start: Starts the wait for an operation, and returns an object to keep.
            polled: Returns the number of answered polls, of all waits so far.
        """


class _WakeUpGauge:
    """Measures the CPU of a wake-up.

    Args:
        size: Number of waits.
        pause: Seconds of sleep between two polls.
    """

    cpu: float

    def __init__(self, size: int, pause: float) -> None:
        self._size = size
        self.pause = pause

    async def measure(self, start: Callable[[str], object], polled: Callable[[], int]) -> None:
        held = [start(str(uuid.uuid4())) for _ in range(self._size)]
        await _until(functools.partial(_reached, polled, self._size))
        await asyncio.sleep(2 * self.pause)
        gc.collect()
        polls, cpu = polled(), time.process_time()
        await asyncio.sleep(4 * self.pause)
        self.cpu = (time.process_time() - cpu) / (polled() - polls)
        await cancel(held)


class _GrowthGauge:
    """Measures the memory and the CPU of starting waits.

    Args:
        size: Number of waits.
        method: How memory is measured.
    """

    pause = _SLEEP
    growth: Growth

    def __init__(self, size: int, method: Method) -> None:
        self._size = size
        self._method = method
        # Allocated beforehand: the list that holds the tasks does not count.
        self._held: list[object] = [None] * size

    async def measure(self, start: Callable[[str], object], polled: Callable[[], int]) -> None:
        if self._method is Method.ALLOCATED:
            tracemalloc.start()  # before the warm-up: reusing memory that it freed is not growth
        warm = [start(str(uuid.uuid4())) for _ in range(_BATCH)]
        await _until(lambda: polled() >= _BATCH)
        await cancel(warm)
        del warm
        await asyncio.sleep(0.01)  # until the loop and the connections have released them
        answered = polled()
        before, cpu_before = self._memory(), time.process_time()
        for k in range(0, self._size, _BATCH):
            for i in range(k, min(k + _BATCH, self._size)):
                self._held[i] = start(str(uuid.uuid4()))
            await _until(functools.partial(_reached, polled, answered + min(k + _BATCH, self._size)))
        cpu = time.process_time() - cpu_before
        self.growth = Growth((self._memory() - before) / self._size, cpu / self._size)
        await cancel(self._held)

    def _memory(self) -> int:
        gc.collect()
        if self._method is Method.ALLOCATED:
            return tracemalloc.get_traced_memory()[0]
        return resident()


async def cancel(held: Iterable[object]) -> None:
    """Cancel the tasks among these objects, and wait for their end; exceptions are ignored."""
    tasks = [task for task in held if isinstance(task, asyncio.Task)]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _START_WITHIN
    while not done():
        if time.monotonic() > deadline:
            raise CannotMeasureError("the waits did not start in time")
        await asyncio.sleep(0.0005)


def _reached(polled: Callable[[], int], count: int) -> bool:
    return polled() >= count


async def _ours(server: Server, gauge: _Gauge) -> None:
    async with KeylessClient(
        API_KEY, base_url=server.base_url, schedule=wait_fixed(gauge.pause), max_polls_per_second=None
    ) as client:
        await gauge.measure(
            lambda operation_id: asyncio.create_task(client.wait_for_approval(operation_id, timeout=_TIMEOUT)),
            lambda: client.statistics.polls - client.statistics.in_flight,
        )


async def _holds(server: Server, gauge: _Gauge) -> None:
    """Hold: a task each, as the requests of long polls have."""
    async with KeylessClient(API_KEY, base_url=server.base_url, schedule=wait_fixed(gauge.pause)) as client:
        await gauge.measure(
            lambda operation_id: asyncio.create_task(client.hold_for_approval(operation_id, seconds=_TIMEOUT)),
            lambda: client.statistics.polls - client.statistics.in_flight,
        )


async def _many(server: Server, gauge: _Gauge) -> None:
    """Wait for all that are started at once in one task, and not in a task each."""
    loop = asyncio.get_running_loop()
    started: list[str] = []
    tasks: list[asyncio.Task[None]] = []

    async def outcomes(operation_ids: list[str]) -> None:
        async for _ in client.wait_for_approvals(operation_ids, timeout=_TIMEOUT):
            pass

    def wait_for_all() -> None:
        tasks.append(asyncio.create_task(outcomes([*started])))
        started.clear()

    def start(operation_id: str) -> None:
        if not started:
            loop.call_soon(wait_for_all)
        started.append(operation_id)

    async with KeylessClient(API_KEY, base_url=server.base_url, schedule=wait_fixed(gauge.pause)) as client:
        await gauge.measure(start, lambda: client.statistics.polls - client.statistics.in_flight)
        await cancel(tasks)


class _Coroutines:
    """One coroutine per wait, in four variants that differ in the timeout and in the loop."""

    def __init__(self, client: BareClient, pause: float) -> None:
        self.client = client
        self.pause = pause
        self.answered = 0

    async def poll(self, operation_id: str) -> PlainOperation:
        operation = await self.client.get_operation(operation_id)
        self.answered += 1
        return operation

    async def loop(self, operation_id: str) -> PlainOperation:
        deadline = time.monotonic() + _TIMEOUT
        while True:
            operation = await self.poll(operation_id)
            if operation.state == "approved":
                return operation
            if time.monotonic() + self.pause > deadline:
                raise TimeoutError
            await asyncio.sleep(self.pause)

    async def asyncio_timeout(self, operation_id: str) -> PlainOperation:
        async with asyncio.timeout(_TIMEOUT):
            while (operation := await self.poll(operation_id)).state != "approved":  # noqa: ASYNC110
                await asyncio.sleep(self.pause)
        return operation

    async def fail_after(self, operation_id: str) -> PlainOperation:
        with anyio.fail_after(_TIMEOUT):
            while (operation := await self.poll(operation_id)).state != "approved":  # noqa: ASYNC110
                await anyio.sleep(self.pause)
        return operation

    async def tenacity(self, operation_id: str) -> PlainOperation:
        retrying = AsyncRetrying(
            stop=stop_after_delay(_TIMEOUT),
            wait=wait_fixed(self.pause),
            retry=retry_if_result(lambda operation: operation.state != "approved"),
        )
        return await retrying(self.poll, operation_id)


def _coroutine(
    kind: Callable[[_Coroutines, str], Coroutine[None, None, PlainOperation]],
) -> Callable[[Server, _Gauge], Coroutine[None, None, None]]:
    async def measure_side(server: Server, gauge: _Gauge) -> None:
        async with bare_session() as session:
            waits = _Coroutines(BareClient(session, server), gauge.pause)
            await gauge.measure(
                lambda operation_id: asyncio.create_task(kind(waits, operation_id)), lambda: waits.answered
            )

    return measure_side


_SIDES: Final[dict[str, Callable[[Server, _Gauge], Coroutine[None, None, None]]]] = {
    OURS: _ours,
    HOLDS: _holds,
    MANY: _many,
    LOOP: _coroutine(_Coroutines.loop),
    "asyncio.timeout": _coroutine(_Coroutines.asyncio_timeout),
    "anyio.fail_after": _coroutine(_Coroutines.fail_after),
    TENACITY: _coroutine(_Coroutines.tenacity),
}


def draw(raw: dict[str, Any]) -> Figure:
    """Draw the memory per wait, at the largest size."""
    size = max((key for key in raw if key.isdigit()), key=int)
    memory = {name: growth["memory"] for name, growth in raw[size]["sides"].items()}
    figure, (ax,) = pictures.panels(1, width=7.0, height=3.2)
    colors = [pictures.OURS if name in {OURS, HOLDS, MANY} else pictures.OTHERS[0] for name in memory]
    bars = ax.barh([*memory], [*memory.values()], color=colors)
    ax.bar_label(bars, [f"{each:.0f}" for each in memory.values()], padding=4)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set_xlim(right=1.12 * max(memory.values()))
    count = f"{int(size):,}".replace(",", " ")
    ax.set_xlabel(f"bytes per wait, {count} sleeping waits ({raw[size]['method']})")
    return figure
