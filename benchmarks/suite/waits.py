"""Memory and CPU of sleeping waits, against a coroutine a wait.

Each measurement is a process of its own: some waits first, to warm up and be cancelled; then all of them, each with an
operation id of its own and in a task of its own, each answered "pending" once and then asleep. What the process grew
by is divided by their number. Sleeping costs no CPU; what waking up, looking and going to sleep again costs is measured
with waits that sleep for a moment only.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import time
import tracemalloc
import uuid
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import anyio
from tenacity import AsyncRetrying, retry_if_result, stop_after_delay, wait_fixed

from aiokeyless import KeylessClient, protocol
from benchmarks import pictures
from benchmarks.bench import Pairs, order
from benchmarks.memory import resident
from benchmarks.report import CannotMeasureError, Goal, Report, Spread, Table
from benchmarks.rivals import BareClient, PlainOperation, bare_session
from benchmarks.server import API_KEY, Server, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

    from matplotlib.figure import Figure

    from benchmarks.bench import Bench

_SLEEP: Final = 3000.0  # seconds: none wakes up while it is measured
_TIMEOUT: Final = 4000.0
_BATCH: Final = 64  # waits under way at once while they are begun, so that all sides use as many connections
_BEGIN_WITHIN: Final = 600.0
_FEW: Final = 1_000  # up to here allocations are counted: of more it takes long

OURS: Final = "aiokeyless"
URLS: Final = "URL objects alone"
LOOP: Final = "a hand-written loop"
TENACITY: Final = "tenacity a wait"


class Growth(NamedTuple):
    """What one wait costs: bytes of memory as it is asked for, seconds of CPU to begin it and look once."""

    memory: float
    cpu: float


class Method(StrEnum):
    """How memory is counted."""

    ALLOCATED = "allocated"  # what Python asked its allocators for: to the byte, but slow
    RESIDENT = "resident"  # what the process holds, gaps between objects included: rough, where the waits are few


def run(bench: Bench) -> Report:
    """Measure each way to wait at 1 000, 10 000 and 100 000 waits."""
    report = Report("waits: memory and CPU of a sleeping wait")
    sizes = bench.pick(full=[1_000, 10_000, 100_000], quick=[500], smoke=[200])
    with serving() as server:
        measured = {size: _measured(bench, server, size) for size in sizes}
        wakings = _wakings(bench, server)
    for size, growths in measured.items():
        report.tables.append(_table(size, growths))
        report.raw[str(size)] = {
            "method": _method(size),
            "ways": {name: {**growth._asdict()} for name, growth in growths.items()},
        }
    report.tables.append(_waking_table(wakings))
    report.raw["waking"] = {name: [*seconds] for name, seconds in wakings.items()}
    size = sizes[-1]
    growths, method = measured[size], _method(size)
    net = growths[OURS].memory - growths[URLS].memory
    over_tenacity = growths[OURS].memory / growths[TENACITY].memory
    report.goals += [
        Goal(f"{size} waits, {method}, the URL not counted", 1700, net, " B"),
        Goal("the same, stretch", 1300, net, " B"),
        Goal(f"{size} waits, {method}, the URL counted, over {TENACITY}", 0.25, over_tenacity, "x"),
    ]
    report.notes.append("our waits keep their last answer and their URL; the coroutines keep their last operation")
    return report


def _method(size: int) -> Method:
    return Method.ALLOCATED if size <= _FEW else Method.RESIDENT


def _measured(bench: Bench, server: Server, size: int) -> dict[str, Growth]:
    """Measure each way once: so many waits average by themselves, and allocations are counted to the byte."""
    growths = {}
    for name in bench.pick(full=[*_WAYS], quick=[*_WAYS], smoke=[OURS, URLS, TENACITY]):
        bench.say(f"  {size} waits: {name}")
        growths[name] = bench.apart(measure, server, name, size, _method(size))
    return growths


def _table(size: int, growths: dict[str, Growth]) -> Table:
    method = _method(size)
    columns = ["", f"{method}, B", f"over {OURS}"]
    # Counting allocations makes them slow.
    table = Table(f"{size} waits", columns + ["CPU to begin it, us"] * (method is Method.RESIDENT))
    for name, growth in growths.items():
        row = [name, f"{growth.memory:.0f}", f"{growth.memory / growths[OURS].memory:.2f}"]
        table.rows.append(row + [f"{1e6 * growth.cpu:.0f}"] * (method is Method.RESIDENT))
    net = [f"{OURS} without its URL", f"{growths[OURS].memory - growths[URLS].memory:.0f}", ""]
    table.rows.append(net + [""] * (method is Method.RESIDENT))
    return table


def _wakings(bench: Bench, server: Server) -> dict[str, list[float]]:
    """Return seconds of CPU a wake-up, round by round."""
    size, rounds = bench.pick(full=(2_000, 3), quick=(500, 1), smoke=(50, 1))
    wakings: dict[str, list[float]] = {name: [] for name in bench.pick(full=[*_WAYS], quick=[OURS, LOOP], smoke=[OURS])}
    wakings.pop(URLS, None)  # it does not wake up
    for k in range(rounds):
        bench.say(f"  waking up, round {k + 1} of {rounds}")
        for name in order([*wakings], k):
            wakings[name].append(bench.apart(wake, server, name, size, bench.pick(full=0.5, quick=0.2, smoke=0.1)))
    return wakings


def _waking_table(wakings: dict[str, list[float]]) -> Table:
    table = Table("to wake up, look and go to sleep again", ["", "CPU, us", f"over {OURS}"])
    for name, seconds in wakings.items():
        micros = Spread.of([1e6 * value for value in seconds])
        table.rows.append([name, micros.text(0), "1" if name == OURS else Pairs(seconds, wakings[OURS]).ratio.text(2)])
    return table


def measure(server: Server, name: str, size: int, method: Method) -> Growth:
    """Return what one of so many waits costs."""
    meter = _Meter(size, method)
    asyncio.run(_WAYS[name](server, meter))
    return meter.growth


def wake(server: Server, name: str, size: int, pause: float) -> float:
    """Return the seconds of CPU for which one of so many waits wakes up, once in each pause."""
    alarm = _Alarm(size, pause)
    asyncio.run(_WAYS[name](server, alarm))
    return alarm.cpu


class _Gauge(Protocol):
    """What is measured of waits, and how long they sleep meanwhile."""

    pause: float

    async def measure(self, begin: Callable[[str], object], looked: Callable[[], int]) -> None:
        """Begin the waits, and measure.

        Args:
            begin: Begins the wait for an operation, and returns what must be held.
            looked: How many looks have been answered, of all waits so far.
        """


class _Alarm:
    """Measures what it costs to wake up.

    Args:
        size: How many waits.
        pause: Seconds that they sleep.
    """

    cpu: float

    def __init__(self, size: int, pause: float) -> None:
        self._size = size
        self.pause = pause

    async def measure(self, begin: Callable[[str], object], looked: Callable[[], int]) -> None:
        held = [begin(str(uuid.uuid4())) for _ in range(self._size)]
        await _until(functools.partial(_reached, looked, self._size))
        await asyncio.sleep(2 * self.pause)
        gc.collect()
        looks, cpu = looked(), time.process_time()
        await asyncio.sleep(4 * self.pause)
        self.cpu = (time.process_time() - cpu) / (looked() - looks)
        await cancel(held)


class _Meter:
    """Begins waits, and measures what that costs.

    Args:
        size: How many waits.
        method: How memory is counted.
    """

    pause = _SLEEP
    growth: Growth

    def __init__(self, size: int, method: Method) -> None:
        self._size = size
        self._method = method
        # A slot for each wait, made beforehand: the list that holds the tasks is not the waits'.
        self._held: list[object] = [None] * size

    async def measure(self, begin: Callable[[str], object], looked: Callable[[], int]) -> None:
        if self._method is Method.ALLOCATED:
            tracemalloc.start()  # before the warm-up: what takes the place of its leftovers is no growth
        warm = [begin(str(uuid.uuid4())) for _ in range(_BATCH)]
        await _until(lambda: looked() >= _BATCH)
        await cancel(warm)
        del warm
        await asyncio.sleep(0.01)  # the loop and the connections let go of them
        answered = looked()
        before, cpu_before = self._memory(), time.process_time()
        for k in range(0, self._size, _BATCH):
            for i in range(k, min(k + _BATCH, self._size)):
                self._held[i] = begin(str(uuid.uuid4()))
            await _until(functools.partial(_reached, looked, answered + min(k + _BATCH, self._size)))
        cpu = time.process_time() - cpu_before
        self.growth = Growth((self._memory() - before) / self._size, cpu / self._size)
        await cancel(self._held)

    def _memory(self) -> int:
        gc.collect()
        if self._method is Method.ALLOCATED:
            return tracemalloc.get_traced_memory()[0]
        return resident()


async def cancel(held: Iterable[object]) -> None:
    """Cancel the tasks among these, and wait until they have ended, in whatever way."""
    tasks = [task for task in held if isinstance(task, asyncio.Task)]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _until(done: Callable[[], bool]) -> None:
    until = time.monotonic() + _BEGIN_WITHIN
    while not done():
        if time.monotonic() > until:
            raise CannotMeasureError("the waits were not begun in time")
        await asyncio.sleep(0.0005)


def _reached(looked: Callable[[], int], count: int) -> bool:
    return looked() >= count


async def _ours(server: Server, gauge: _Gauge) -> None:
    async with KeylessClient(API_KEY, base_url=server.base_url, schedule=wait_fixed(gauge.pause)) as client:
        await gauge.measure(
            lambda operation_id: asyncio.create_task(client.wait_for_approval(operation_id, timeout=_TIMEOUT)),
            lambda: client.statistics.polls - client.statistics.in_flight,
        )


async def _urls(server: Server, gauge: _Gauge) -> None:
    """Hold nothing but URLs of the kind that our waits hold, each used for one request as theirs is."""
    count = itertools.count(1)
    answered = 0
    looks: set[asyncio.Task[None]] = set()
    async with KeylessClient(API_KEY, base_url=server.base_url) as client:
        transport, _ = client._open()  # noqa: SLF001  # the poller's own way to make and to use a URL

        def begin(operation_id: str) -> object:
            url = transport.url(protocol.get_operation(operation_id))

            async def look() -> None:
                nonlocal answered
                await transport.look(url)
                answered = next(count)

            task = asyncio.create_task(look())
            looks.add(task)
            task.add_done_callback(looks.discard)
            return url

        await gauge.measure(begin, lambda: answered)


class _Coroutines:
    """A coroutine a wait, of four kinds: what bounds it, and what repeats it, differ."""

    def __init__(self, client: BareClient, pause: float) -> None:
        self.client = client
        self.pause = pause
        self.answered = 0

    async def look(self, operation_id: str) -> PlainOperation:
        operation = await self.client.get_operation(operation_id)
        self.answered += 1
        return operation

    async def loop(self, operation_id: str) -> PlainOperation:
        deadline = time.monotonic() + _TIMEOUT
        while True:
            operation = await self.look(operation_id)
            if operation.state == "approved":
                return operation
            if time.monotonic() + self.pause > deadline:
                raise TimeoutError
            await asyncio.sleep(self.pause)

    async def asyncio_timeout(self, operation_id: str) -> PlainOperation:
        async with asyncio.timeout(_TIMEOUT):
            while (operation := await self.look(operation_id)).state != "approved":  # noqa: ASYNC110
                await asyncio.sleep(self.pause)
        return operation

    async def fail_after(self, operation_id: str) -> PlainOperation:
        with anyio.fail_after(_TIMEOUT):
            while (operation := await self.look(operation_id)).state != "approved":  # noqa: ASYNC110
                await anyio.sleep(self.pause)
        return operation

    async def tenacity(self, operation_id: str) -> PlainOperation:
        retrying = AsyncRetrying(
            stop=stop_after_delay(_TIMEOUT),
            wait=wait_fixed(self.pause),
            retry=retry_if_result(lambda operation: operation.state != "approved"),
        )
        return await retrying(self.look, operation_id)


def _coroutine(
    kind: Callable[[_Coroutines, str], Coroutine[None, None, PlainOperation]],
) -> Callable[[Server, _Gauge], Coroutine[None, None, None]]:
    async def measured(server: Server, gauge: _Gauge) -> None:
        async with bare_session() as session:
            waits = _Coroutines(BareClient(session, server), gauge.pause)
            await gauge.measure(
                lambda operation_id: asyncio.create_task(kind(waits, operation_id)), lambda: waits.answered
            )

    return measured


_WAYS: Final[dict[str, Callable[[Server, _Gauge], Coroutine[None, None, None]]]] = {
    OURS: _ours,
    URLS: _urls,
    LOOP: _coroutine(_Coroutines.loop),
    "asyncio.timeout": _coroutine(_Coroutines.asyncio_timeout),
    "anyio.fail_after": _coroutine(_Coroutines.fail_after),
    TENACITY: _coroutine(_Coroutines.tenacity),
}


def draw(raw: dict[str, Any]) -> Figure:
    """Draw the memory of a wait, at the largest size."""
    size = max((key for key in raw if key.isdigit()), key=int)
    memory = {name: growth["memory"] for name, growth in raw[size]["ways"].items() if name != URLS}
    figure, (ax,) = pictures.panels(1, width=7.0, height=2.6)
    bars = ax.barh([*memory], [*memory.values()], color=[pictures.OURS, *pictures.OTHERS[:1] * (len(memory) - 1)])
    ax.barh([OURS], [raw[size]["ways"][URLS]["memory"]], color="#78b39e", label="of which its URL")
    ax.bar_label(bars, [f"{each:.0f}" for each in memory.values()], padding=4)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set_xlim(right=1.12 * max(memory.values()))
    count = f"{int(size):,}".replace(",", " ")
    ax.set_xlabel(f"bytes for each of {count} sleeping waits ({raw[size]['method']})")
    ax.legend()
    return figure
