"""Memory of sleeping waits, against a coroutine a wait.

Each measurement is a process of its own: some waits first, to warm up and be cancelled; then all of them, each with an
operation id of its own and in a task of its own, each answered "pending" once and then asleep. What the process grew
by is divided by their number.
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
from typing import TYPE_CHECKING, Final, NamedTuple

import anyio
import psutil  # type: ignore[import-untyped]  # it comes without types
from tenacity import AsyncRetrying, retry_if_result, stop_after_delay, wait_fixed

from aiokeyless import KeylessClient, protocol
from benchmarks.bench import order
from benchmarks.report import CannotMeasureError, Goal, Report, Spread, Table
from benchmarks.rivals import BareClient, PlainOperation, bare_session
from benchmarks.server import API_KEY, Server, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from benchmarks.bench import Bench

_SLEEP: Final = 3000.0  # seconds: none wakes up while it is measured
_TIMEOUT: Final = 4000.0
_BATCH: Final = 64  # waits under way at once while they are begun, so that all sides use as many connections
_BEGIN_WITHIN: Final = 600.0
_FEW: Final = 10_000  # up to here allocations are counted, from here on what is resident

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


_Growths = dict[str, dict[Method, list[Growth]]]


def run(bench: Bench) -> Report:
    """Measure each way to wait at 1 000, 10 000 and 100 000 waits."""
    report = Report("waits: memory of a sleeping wait")
    sizes = bench.pick(full=[1_000, 10_000, 100_000], quick=[3_000], smoke=[200])
    with serving() as server:
        measured = {size: _measured(bench, server, size) for size in sizes}
    for size, growths in measured.items():
        report.tables.append(_table(size, growths))
        report.raw[str(size)] = {
            name: {method: [list(growth) for growth in of] for method, of in by_method.items()}
            for name, by_method in growths.items()
        }
    size = sizes[-1]
    growths = measured[size]
    method = _methods(size)[-1]
    net = _memory(growths, OURS, method) - _memory(growths, URLS, method)
    over_tenacity = _memory(growths, OURS, method) / _memory(growths, TENACITY, method)
    report.goals += [
        Goal(f"{size} waits, {method}, the URL not counted", 1700, net, " B"),
        Goal("the same, stretch", 1300, net, " B"),
        Goal(f"{size} waits, {method}, the URL counted, over {TENACITY}", 0.25, over_tenacity, "x"),
    ]
    report.notes.append("our waits keep their last answer and their URL; the coroutines keep their last operation")
    return report


def _methods(size: int) -> list[Method]:
    return [Method.ALLOCATED] * (size <= _FEW) + [Method.RESIDENT] * (size >= _FEW)


def _measured(bench: Bench, server: Server, size: int) -> _Growths:
    rounds = 1 if size > _FEW else bench.pick(full=3, quick=1, smoke=1)  # many average by themselves
    growths: _Growths = {name: {method: [] for method in _methods(size)} for name in _WAYS}
    for k in range(rounds):
        for name in order(list(_WAYS), k):
            bench.say(f"  {size} waits, round {k + 1} of {rounds}: {name}")
            for method in _methods(size):
                growths[name][method].append(bench.apart(measure, server, name, size, method))
    return growths


def _memory(growths: _Growths, name: str, method: Method) -> float:
    return Spread.of([growth.memory for growth in growths[name][method]]).median


def _table(size: int, growths: _Growths) -> Table:
    methods = _methods(size)
    table = Table(f"{size} waits", ["", *(f"{method}, B" for method in methods), f"over {OURS}", "CPU to begin it, us"])
    for name, by_method in growths.items():
        ratio = _memory(growths, name, methods[-1]) / _memory(growths, OURS, methods[-1])
        # Counting allocations makes them slow.
        cpu = [1e6 * growth.cpu for growth in by_method.get(Method.RESIDENT, [])]
        memory = [Spread.of([growth.memory for growth in of]).text(0) for of in by_method.values()]
        table.rows.append([name, *memory, f"{ratio:.2f}", Spread.of(cpu).text(0) if cpu else ""])
    net = [_memory(growths, OURS, method) - _memory(growths, URLS, method) for method in methods]
    table.rows.append([f"{OURS} without its URL", *(f"{memory:.0f}" for memory in net), "", ""])
    return table


def measure(server: Server, name: str, size: int, method: Method) -> Growth:
    """Return what one of so many waits costs."""
    return asyncio.run(_WAYS[name](server, _Meter(size, method)))


class _Meter:
    """Begins waits, and measures what that costs.

    Args:
        size: How many waits.
        method: How memory is counted.
    """

    def __init__(self, size: int, method: Method) -> None:
        self._size = size
        self._method = method
        # A slot for each wait, made beforehand: the list that holds the tasks is not the waits'.
        self._held: list[object] = [None] * size

    async def growth(self, begin: Callable[[str], object], looked: Callable[[], int]) -> Growth:
        """Begin the waits.

        Args:
            begin: Begins the wait for an operation, and returns what must be held.
            looked: How many looks have been answered, of all waits so far.
        """
        if self._method is Method.ALLOCATED:
            tracemalloc.start()  # before the warm-up: what takes the place of its leftovers is no growth
        warm = [begin(str(uuid.uuid4())) for _ in range(_BATCH)]
        await _until(lambda: looked() >= _BATCH)
        await _cancel(warm)
        del warm
        await asyncio.sleep(0.01)  # the loop and the connections let go of them
        answered = looked()
        before, cpu_before = self._memory(), time.process_time()
        for k in range(0, self._size, _BATCH):
            for i in range(k, min(k + _BATCH, self._size)):
                self._held[i] = begin(str(uuid.uuid4()))
            await _until(functools.partial(_reached, looked, answered + min(k + _BATCH, self._size)))
        cpu = time.process_time() - cpu_before
        growth = Growth((self._memory() - before) / self._size, cpu / self._size)
        await _cancel(self._held)
        return growth

    def _memory(self) -> int:
        gc.collect()
        if self._method is Method.ALLOCATED:
            return tracemalloc.get_traced_memory()[0]
        resident: int = psutil.Process().memory_info().rss
        return resident


async def _cancel(held: list[object]) -> None:
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


async def _ours(server: Server, meter: _Meter) -> Growth:
    async with KeylessClient(API_KEY, base_url=server.base_url, schedule=wait_fixed(_SLEEP)) as client:
        return await meter.growth(
            lambda operation_id: asyncio.create_task(client.wait_for_approval(operation_id, timeout=_TIMEOUT)),
            lambda: client.statistics.polls - client.statistics.in_flight,
        )


async def _urls(server: Server, meter: _Meter) -> Growth:
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

        return await meter.growth(begin, lambda: answered)


class _Coroutines:
    """A coroutine a wait, of four kinds: what bounds it, and what repeats it, differ."""

    def __init__(self, server: Server, client: BareClient) -> None:
        self.server = server
        self.client = client
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
            if time.monotonic() + _SLEEP > deadline:
                raise TimeoutError
            await asyncio.sleep(_SLEEP)

    async def asyncio_timeout(self, operation_id: str) -> PlainOperation:
        async with asyncio.timeout(_TIMEOUT):
            while (operation := await self.look(operation_id)).state != "approved":  # noqa: ASYNC110
                await asyncio.sleep(_SLEEP)
        return operation

    async def fail_after(self, operation_id: str) -> PlainOperation:
        with anyio.fail_after(_TIMEOUT):
            while (operation := await self.look(operation_id)).state != "approved":  # noqa: ASYNC110
                await anyio.sleep(_SLEEP)
        return operation

    async def tenacity(self, operation_id: str) -> PlainOperation:
        retrying = AsyncRetrying(
            stop=stop_after_delay(_TIMEOUT),
            wait=wait_fixed(_SLEEP),
            retry=retry_if_result(lambda operation: operation.state != "approved"),
        )
        return await retrying(self.look, operation_id)


def _coroutine(
    kind: Callable[[_Coroutines, str], Coroutine[None, None, PlainOperation]],
) -> Callable[[Server, _Meter], Coroutine[None, None, Growth]]:
    async def measured(server: Server, meter: _Meter) -> Growth:
        async with bare_session() as session:
            waits = _Coroutines(server, BareClient(session, server))
            return await meter.growth(
                lambda operation_id: asyncio.create_task(kind(waits, operation_id)), lambda: waits.answered
            )

    return measured


_WAYS: Final[dict[str, Callable[[Server, _Meter], Coroutine[None, None, Growth]]]] = {
    OURS: _ours,
    URLS: _urls,
    LOOP: _coroutine(_Coroutines.loop),
    "asyncio.timeout": _coroutine(_Coroutines.asyncio_timeout),
    "anyio.fail_after": _coroutine(_Coroutines.fail_after),
    TENACITY: _coroutine(_Coroutines.tenacity),
}
