"""Very many waits that end, leave or are cancelled at once: how long they block the event loop.

The real poller with exchanges in memory, on the machine's own clock. A block is the CPU time of one turn of the event
loop, from the return of its selector to the next call of it: for so long nobody else is served. Where callers are tasks
or futures that asyncio itself wakes up all in one turn, plain futures are measured beside them: that much no library
can avoid. The garbage collector is off meanwhile: its pauses grow with all that a process holds, and are not ours.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tenacity import wait_fixed

from aiokeyless import KeylessClient
from aiokeyless._waits.poller import Poller
from aiokeyless.errors import AuthenticationError
from benchmarks import pictures
from benchmarks.report import CannotMeasureError, Goal, Report, Table
from benchmarks.simulation import GOOD, HANGING, Answer, SimulatedTransport

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from matplotlib.figure import Figure

    from aiokeyless._http.transport import Transport
    from aiokeyless._waits.poller import FutureWait
    from aiokeyless.reports import ApprovalOutcome
    from benchmarks.bench import Bench

_SHARED: Final = "op-shared"
_LONG: Final = 1000.0  # seconds: no deadline passes meanwhile
_MARGIN: Final = 0.1  # seconds before a common deadline by which all waits must have been started
_BLOCK: Final = 0.01  # seconds: no turn of the loop may take longer, but for what asyncio does itself
_REFUSED: Final[Answer] = (0.05, AuthenticationError(status=401, method="GET", path="/v2/operations/x"))


class Ending(NamedTuple):
    """The measurements of one crowd."""

    block: float  # seconds, CPU of the longest turn of the loop
    until: float  # seconds until the last one had ended: after the deadline, the answer, the cancellation


Scenario = Callable[..., Coroutine[Any, Any, Ending]]


class Turns:
    """The longest turn of an event loop since the last reset, in CPU seconds of its thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._longest = 0.0
        self._since = time.thread_time()
        selector: Any = loop._selector  # type: ignore[attr-defined]  # noqa: SLF001  # asyncio has no hook for a turn
        self._select: Callable[[float | None], Any] = selector.select
        selector.select = self._selected

    def reset(self) -> None:
        """Forget what was, this very turn included up to now; from here on there is no garbage collection."""
        gc.collect()
        gc.disable()
        self._longest = 0.0
        self._since = time.thread_time()

    def longest(self) -> float:
        """Return its seconds; the turn that runs now counts."""
        self._longest = max(self._longest, time.thread_time() - self._since)
        return self._longest

    def _selected(self, timeout: float | None) -> Any:
        self.longest()
        events = self._select(timeout)
        self._since = time.thread_time()
        return events


class InMemoryClient(KeylessClient):
    """A client whose poller has no network below it."""

    def __init__(self, answer: Answer) -> None:
        super().__init__("no-key")
        self.transport = SimulatedTransport(lambda _, __: answer)
        self.poller = Poller(self.transport, schedule=wait_fixed(5), max_in_flight=64)
        self.turns = Turns(asyncio.get_running_loop())

    def _open(self) -> tuple[Transport, Poller]:
        return self.transport, self.poller

    def start(self, operation_id: str, timeout: float = _LONG) -> FutureWait:
        """Start a wait for a bare id."""
        return self.poller.start(operation_id, ticket=None, timeout=timeout, schedule=None, may_be_missing=False)

    async def until(self, waiting: int, *, every: float = 0.0) -> None:
        """Let time pass until so many waits are under way."""
        while self.poller.statistics().waiting != waiting:  # noqa: ASYNC110  # no event of the poller tells that
            await asyncio.sleep(every)

    async def caller(self, operation_id: str) -> None:
        """Wait as `wait_for_approval` does."""
        wait = self.start(operation_id)
        try:
            await wait
        finally:
            self.poller.leave(wait)


async def one_deadline(waits: int, patience: float) -> Ending:
    """Let all waits have one deadline, on a service that hangs."""
    loop = asyncio.get_running_loop()
    client = InMemoryClient(HANGING)
    deadline = loop.time() + patience
    for k in range(waits):
        if (left := deadline - loop.time()) < _MARGIN:
            raise CannotMeasureError("the machine is too slow to start all waits before their deadline")
        client.start(f"op-{k}", left)
        if k % 128 == 0:
            await asyncio.sleep(0)
    client.turns.reset()
    await client.until(0, every=0.001)
    until = loop.time() - deadline
    await client.poller.aclose()
    return Ending(client.turns.longest(), until)


async def cancelled_callers(waits: int) -> Ending:
    """Cancel the tasks of all callers in one turn of the loop."""
    loop = asyncio.get_running_loop()
    client = InMemoryClient(GOOD)
    tasks = [asyncio.create_task(client.caller(f"op-{k}")) for k in range(waits)]
    await asyncio.sleep(0.5)
    client.turns.reset()
    now = loop.time()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await client.until(0)
    ending = Ending(client.turns.longest(), loop.time() - now)
    await client.poller.aclose()
    return ending


async def cancelled_futures(waits: int) -> Ending:
    """Cancel as many tasks that await plain futures: what asyncio takes for that alone."""
    loop = asyncio.get_running_loop()

    async def caller() -> None:
        await loop.create_future()

    return await _cancelled([asyncio.create_task(caller()) for _ in range(waits)])


class _Idle(asyncio.Future[None]):
    """A future of a subclass, as a wait is."""

    __slots__ = ()

    def leave(self) -> None:
        """Do nothing."""


async def cancelled_idle(waits: int) -> Ending:
    """Cancel as many tasks that await as callers do, and do nothing else: a future of a subclass, and a `finally`."""
    loop = asyncio.get_running_loop()

    async def caller() -> None:
        idle = _Idle(loop=loop)
        try:
            await idle
        finally:
            idle.leave()

    return await _cancelled([asyncio.create_task(caller()) for _ in range(waits)])


async def _cancelled(tasks: list[asyncio.Task[None]]) -> Ending:
    loop = asyncio.get_running_loop()
    turns = Turns(loop)
    await asyncio.sleep(0.5)
    turns.reset()
    now = loop.time()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return Ending(turns.longest(), loop.time() - now)


async def many_at_the_call(waits: int) -> Ending:
    """Call `wait_for_approvals` with very many, and let them start; `until` is the CPU of the call."""
    client = InMemoryClient(GOOD)
    targets = [f"op-{k}" for k in range(waits)]
    client.transport.approved_at["first"] = 0.0
    _ = [outcome async for outcome in client.wait_for_approvals(["first"])]  # which imports some modules
    client.turns.reset()
    outcomes = client.wait_for_approvals(targets, timeout=_LONG)
    called = client.turns.longest()
    first = asyncio.ensure_future(anext(outcomes))
    await client.until(waits)
    block = client.turns.longest()
    await client.poller.aclose()
    await first
    await outcomes.aclose()
    return Ending(block, called)


async def many_left(waits: int) -> Ending:
    """Close the iterator of `wait_for_approvals` while very many are under way."""
    loop = asyncio.get_running_loop()
    client = InMemoryClient(GOOD)
    outcomes = client.wait_for_approvals([f"op-{k}" for k in range(waits)], timeout=_LONG)
    first = asyncio.ensure_future(_next(outcomes))
    await client.until(waits, every=0.01)
    client.turns.reset()
    now = loop.time()
    first.cancel()
    await asyncio.wait([first])
    await client.until(0)
    ending = Ending(client.turns.longest(), loop.time() - now)
    await client.poller.aclose()
    return ending


async def one_answer(waits: int, answer: Answer, *, approved: bool) -> Ending:
    """Let all waits be for one operation, and end with the same answer."""
    loop = asyncio.get_running_loop()
    client = InMemoryClient(answer)
    if approved:
        client.transport.approved_at[_SHARED] = 0.0
    for _ in range(waits):
        client.poller.start(_SHARED, ticket=None, timeout=1000.0, schedule=None, may_be_missing=False)
    client.turns.reset()
    now = loop.time()
    await client.until(0, every=0.001)
    ending = Ending(client.turns.longest(), loop.time() - now)
    await client.poller.aclose()
    return ending


async def _next(outcomes: AsyncGenerator[ApprovalOutcome, None]) -> None:
    try:
        await anext(outcomes)
    finally:
        await outcomes.aclose()


def _run(scenario: Scenario, *args: Any, **options: Any) -> Ending:
    return asyncio.run(scenario(*args, **options))


def run(bench: Bench) -> Report:
    """Measure each crowd, in a process of its own."""
    report = Report("endings: very many waits that end, leave or are cancelled at once")
    report.tables.append(table := Table("CPU of the longest turn of the loop", ["", "block, ms", "until, s"]))
    many = bench.pick(full=100_000, quick=20_000, smoke=200)
    some = bench.pick(full=10_000, quick=5_000, smoke=100)
    same = bench.pick(full=20_000, quick=5_000, smoke=100)
    patience = bench.pick(full=20.0, quick=10.0, smoke=1.0)

    def measure(what: str, scenario: Scenario, *args: Any, **options: Any) -> Ending:
        bench.progress(f"  {what}")
        ending = bench.in_fresh_process(_run, scenario, *args, **options)
        table.rows.append([what, f"{1e3 * ending.block:.1f}", f"{ending.until:.2f}"])
        report.raw[what] = [*ending]
        return ending

    few = measure(f"{some} deadlines, service hangs", one_deadline, some, patience)
    all_ = measure(f"{many} deadlines, service hangs", one_deadline, many, patience)
    asyncio_alone = measure(f"{many} tasks cancelled, asyncio alone", cancelled_futures, many)
    measure(f"{many} tasks cancelled, as callers but idle", cancelled_idle, many)
    cancelled = measure(f"{many} callers cancelled", cancelled_callers, many)
    called = measure(f"wait_for_approvals of {many}: started", many_at_the_call, many)
    left = measure(f"wait_for_approvals of {many}: left", many_left, many)
    refused = measure(f"{same} waits of one operation: 401", one_answer, same, _REFUSED, approved=False)
    approved = measure(f"{same} waits of one operation: approved", one_answer, same, GOOD, approved=True)
    beyond = cancelled.block - asyncio_alone.block
    report.goals += [
        Goal(f"{some} waits with one deadline: last end after it", 2.1, few.until, " s"),
        Goal(f"{many} waits with one deadline: last end after it", 4.0, all_.until, " s"),
        Goal(
            "callers cancelled: block beyond that of asyncio",
            1e3 * _BLOCK,
            1e3 * beyond,
            " ms",
        ),
        Goal("wait_for_approvals: the call", 1e3 * _BLOCK, 1e3 * called.until, " ms"),
    ]
    for what, ending in {
        "one deadline": all_,
        "started": called,
        "left": left,
        "401": refused,
        "approved": approved,
    }.items():
        report.goals.append(Goal(f"block, {what}", 1e3 * _BLOCK, 1e3 * ending.block, " ms"))
    return report


def draw(raw: dict[str, Any]) -> Figure:
    """Draw the longest turn of each crowd."""
    figure, (ax,) = pictures.panels(1, width=7.0, height=2.4)
    ax.barh([*raw], [1e3 * block for block, _ in raw.values()], color=pictures.OURS)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("longest turn of the event loop, CPU ms")
    return figure
