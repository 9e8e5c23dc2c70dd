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

OURS: Final = "aiokeyless"
URLS: Final = "URL objects alone"
LOOP: Final = "a hand-written loop"
TENACITY: Final = "tenacity a wait"


class Growth(NamedTuple):
    """What one wait costs: bytes of memory as it is asked for, seconds of CPU to begin it and look once."""

    memory: float
    cpu: float


def run(bench: Bench) -> Report:
    """Measure each way to wait at 1 000, 10 000 and 100 000 waits, by resident memory and by allocations."""
    report = Report("waits: memory of a sleeping wait, in bytes")
    sizes = bench.pick(full=[1_000, 10_000, 100_000], quick=[5_000], smoke=[200])
    with serving() as server:
        measured = {size: _measured(bench, server, size, bench.pick(full=3, quick=1, smoke=1)) for size in sizes}
    for size, growths in measured.items():
        report.tables.append(_table(size, growths))
        report.raw[str(size)] = {name: [list(growth) for growth in of] for name, of in growths.items()}
    size = sizes[-1]
    growths = measured[size]
    net = _net(growths)
    rival = Spread.of([growth.memory for growth in growths[TENACITY]]).median
    report.goals += [
        Goal(f"{size} waits, the URL not counted", 1700, net, " B"),
        Goal("the same, stretch", 1300, net, " B"),
        Goal(f"{size} waits, the URL counted, over {TENACITY}", 0.25, _memory(growths, OURS) / rival, "x"),
    ]
    return report


def _measured(bench: Bench, server: Server, size: int, rounds: int) -> dict[str, list[Growth]]:
    growths: dict[str, list[Growth]] = {name: [] for name in [*_WAYS, *map(_traced, (OURS, URLS))]}
    for k in range(rounds):
        for name in order(list(growths), k):
            bench.say(f"  {size} waits, round {k + 1} of {rounds}: {name}")
            growths[name].append(bench.apart(measure, server, name, size))
    return growths


def _traced(name: str) -> str:
    return f"{name}, by tracemalloc"


def _memory(growths: dict[str, list[Growth]], name: str) -> float:
    return Spread.of([growth.memory for growth in growths[name]]).median


def _net(growths: dict[str, list[Growth]]) -> float:
    return _memory(growths, OURS) - _memory(growths, URLS)


def _table(size: int, growths: dict[str, list[Growth]]) -> Table:
    table = Table(f"{size} waits", ["", "B a wait", f"over {OURS}", "CPU to begin it, us"])
    for name, of in growths.items():
        traced = name.removeprefix(OURS).removeprefix(URLS) == _traced("")
        ratio = Spread.of([a.memory / b.memory for a, b in zip(of, growths[OURS], strict=True)])
        cpu = Spread.of([1e6 * growth.cpu for growth in of])
        table.rows.append(
            [
                name,
                Spread.of([growth.memory for growth in of]).text(0),
                "" if traced or name == OURS else ratio.text(2),
                "" if traced else cpu.text(0),
            ]
        )
    traced_net = _memory(growths, _traced(OURS)) - _memory(growths, _traced(URLS))
    table.rows.append([f"{OURS} without its URL", f"{_net(growths):.0f}", "", ""])
    table.rows.append([_traced(f"{OURS} without its URL"), f"{traced_net:.0f}", "", ""])
    return table


def measure(server: Server, name: str, size: int) -> Growth:
    """Return what one of so many waits costs."""
    way = name.removesuffix(_traced(""))
    return asyncio.run(_WAYS[way](server, _Meter(size, traced=way != name)))


class _Meter:
    """Begins waits, and measures what that costs.

    Args:
        size: How many waits.
        traced: Whether to count what is allocated, to the byte, instead of what the process holds.
    """

    def __init__(self, size: int, *, traced: bool) -> None:
        self._size = size
        self._traced = traced
        # A slot for each wait, made beforehand: the list that holds the tasks is not the waits'.
        self._held: list[object] = [None] * size

    async def growth(self, begin: Callable[[str], object], looked: Callable[[], int]) -> Growth:
        """Begin the waits.

        Args:
            begin: Begins the wait for an operation, and returns what must be held.
            looked: How many looks have been answered, of all waits so far.
        """
        warm = [begin(str(uuid.uuid4())) for _ in range(4 * _BATCH)]
        await _until(lambda: looked() >= 4 * _BATCH)
        await _cancel(warm)
        del warm
        answered = looked()
        if self._traced:
            tracemalloc.start()
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
        resident: int = psutil.Process().memory_info().rss
        return tracemalloc.get_traced_memory()[0] if self._traced else resident


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
