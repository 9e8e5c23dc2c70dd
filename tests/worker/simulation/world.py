"""The world of a story: one database, one wall clock, and processes that die or fail at any of their steps.

All processes share a database in memory. A dead process still runs its error handling, but nothing that it does has an
effect. So it leaves behind what a killed process leaves behind. A process may also end as `asyncio.run` ends: all its
tasks are cancelled, in any order, and their error handling has its effects.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import sqlite3
import warnings
from contextlib import closing
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar
from unittest import mock

import aiohttp
from simulation.history import History
from simulation.service import SimulatedSession
from simulation.world import EPOCH, VirtualLoop

from aiokeyless.worker.broker import UnavailableError
from aiokeyless.worker.messages import read_event
from aiokeyless.worker.sqlite import SqliteBroker, schema, store

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from datetime import datetime

    from simulation.service import Service
    from yarl import URL

    from aiokeyless.worker import ApprovalWorker, WorkerStatistics
    from aiokeyless.worker.broker import ExchangeResult
    from aiokeyless.worker.messages import ApprovalEvent, Message

T = TypeVar("T")

#: Seconds after which a process sees what another one stored. A broker in a file checks each 0.1 s.
_NOTICED_AFTER: Final = 0.05
#: Seconds between two checks without a change: for clocks that were set, and for takes that broke off.
_CHECKS_EVERY: Final = 5.0
#: Seconds that something takes in a broker's thread, at most, and until a process ends.
_MOMENT: Final = 0.0005
#: Seconds within which all tasks of a process end after they were cancelled.
_ENDS_WITHIN: Final = 5.0
#: What a failover may lose of a request.
_STATE: Final = """
    SELECT operation_id, name, asked, decided_at,
        (SELECT group_concat(reader || failures, ' ') FROM unread WHERE unread.id = request.id)
    FROM request
"""
_WRITES: Final = ("INSERT", "UPDATE", "REPLACE", "DELETE")
#: Of a mishap, how the statements begin that fail, and with which error.
_FAILING: Final = {
    "full": (_WRITES, sqlite3.SQLITE_FULL),
    "nearly full": (("INSERT",), sqlite3.SQLITE_FULL),
    "read-only": (_WRITES, sqlite3.SQLITE_IOERR),
    "not cleaned": (("UPDATE request SET body",), sqlite3.SQLITE_CORRUPT),
    "not corrected": (("UPDATE waiting SET due_at = ? WHERE due_at >",), sqlite3.SQLITE_IOERR),
}
#: Seconds after which a call to a broker that has vanished fails.
GIVEN_UP_AFTER: Final = 10.0
#: The process whose code runs.
_PROCESS: ContextVar[Process] = ContextVar("_PROCESS")


@dataclass(frozen=True)
class Life:
    """How a process fares. Its steps are SQL statements, and requests to the service."""

    after: float = 0.0
    """Seconds until it starts, from the end of the process before it."""
    dies_at: int = 0
    """The step that it does not do any more; 0: none."""
    dies_after: float = math.inf
    stops_after: float = math.inf
    """Seconds after which it is told to stop."""
    errors: tuple[int, ...] = ()
    """Steps at which SQLite reports an I/O error. A COMMIT takes effect nevertheless, if the number is even."""
    is_cancelled: bool = False
    """Whether it is not killed, but ends as `asyncio.run` does."""


@dataclass(frozen=True)
class Mishap:
    """What goes wrong with the broker for some time, or with the client's key."""

    kind: str
    """One of these, of all processes or of one:

    - failover: at its end the database is again what it was at its begin, so ids are given out again
    - full: no write fits on the disk
    - nearly full: nothing new fits on the disk
    - read-only: all writes fail
    - not cleaned, not corrected: a step of the housekeeping fails
    - silent: the broker answers nothing
    - away: a call to the broker fails at once
    - frozen: all processes stand still
    - vanishes: a call to the broker has no answer, and half of them have an effect
    - forgets: put-offs are confirmed, and have no effect
    - doubts: put-offs are not confirmed, and half of them have no effect
    - deleted: at its begin all readers are deleted
    - rotation: Keyless accepts a new key from its begin on, and no other; workers have it from its end on
    - no key: the function for the key raises, or returns nothing
    """
    begins: float
    ends: float
    who: str = ""
    """How the names begin of the processes that have it."""

    def concerns(self, name: str, at: float) -> bool:
        """Return whether the process of a name has it at a time."""
        return self.begins <= at < self.ends and name.startswith(self.who)


@dataclass(slots=True)
class Decided:
    """An outcome as it was stored."""

    event: ApprovalEvent
    at: float
    by: str


@dataclass(slots=True)
class Delivered:
    """An outcome in the hands of a reader."""

    reader: str
    number: int
    """Of the request."""
    event: ApprovalEvent
    began_at: float
    ended_at: float = math.inf
    result: str = "died"
    """handled, failed, cancelled, unknown (the broker did not confirm that it is handled), or died."""
    put_off: tuple[float, int] | None = None
    """Of a body that was cancelled: in how many seconds it comes again, and how often it was delivered; None if another
    process has handled it, if SQLite may have failed, or if the body had failed before."""


@dataclass(slots=True)
class Told:
    """A call of `on_created`."""

    operation_id: str
    at: float
    ended_at: float = math.inf


class Seen(NamedTuple):
    """What a worker said of itself and of its fleet."""

    by: str
    at: float
    statistics: WorkerStatistics


@dataclass(slots=True)
class WorkerHistory(History):
    """What happened, as an observer outside of the library saw it; all times are the event loop's."""

    decided: list[Decided] = field(default_factory=list)
    delivered: list[Delivered] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    submitted: list[tuple[int, str]] = field(default_factory=list)
    """Numbers of requests, and: stored, duplicate, refused, unknown."""
    asked: dict[int, tuple[bool, bool]] = field(default_factory=dict)
    """Of each POST, by its number: whether its request was claimed, and whether it was decided."""
    deliveries: dict[int, asyncio.Task[Any]] = field(default_factory=dict)
    """Of each exchange, by its number: the delivery of its request, by identity."""
    stored: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    """Of each operation: when its request was stored, also by the wall clock, and its deadline by the wall clock."""
    torn: set[str] = field(default_factory=set)
    """The operations of which a failover lost something."""
    deaths: int = 0
    left: dict[str, int] = field(default_factory=dict)
    """What was counted at the end, and should be zero."""


class World:
    """The machine on which all processes of a story run."""

    def __init__(self, service: Service, history: WorkerHistory, mishaps: tuple[Mishap, ...] = ()) -> None:
        self.mishaps = mishaps
        self.service = service
        self.history = history
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.loop = loop
        self.clock_error = 0.0
        self.database = schema.connect(schema.MEMORY, now=self.now().timestamp())
        self.processes: list[Process] = []
        self.workers: dict[Process, ApprovalWorker] = {}
        for mishap in mishaps:
            if mishap.kind == "failover":
                self.loop.call_at(mishap.begins, self._fall_back_later, mishap.ends)
            elif mishap.kind == "frozen":
                self.loop.call_at(mishap.begins, self.loop.stand_still, mishap.ends)
            elif mishap.kind == "deleted":
                self.loop.call_at(mishap.begins, self.database.executescript, "DELETE FROM reader; DELETE FROM unread")

    def has(self, kind: str, process: Process) -> Mishap | None:
        """Return a mishap of a kind that a process has now; None if there is none."""
        found = (mishap for mishap in self.mishaps if mishap.kind == kind)
        return next((mishap for mishap in found if mishap.concerns(process.name, self.loop.time())), None)

    def key(self, process: Process) -> str:
        """Return the client's key, if the process has any."""
        if self.has("no key", process):
            if random.random() < 0.5:  # noqa: S311
                raise OSError("no such file")
            return ""
        return f"key {sum(each.kind == 'rotation' and each.ends <= self.loop.time() for each in self.mishaps)}"

    def accepts_until(self, key: str) -> float:
        """Return until when Keyless accepts a key."""
        ends = [each.begins for each in self.mishaps if each.kind == "rotation"]
        return [*ends, math.inf][int(key.removeprefix("key "))]

    def _fall_back_later(self, at: float) -> None:
        standby = sqlite3.connect(":memory:")
        self.database.backup(standby)
        self.loop.call_at(at, self._fall_back, standby, set(self.database.execute(_STATE)))

    def _fall_back(self, standby: sqlite3.Connection, before: set[tuple[Any, ...]]) -> None:
        self.history.torn |= {row[0] for row in before ^ set(self.database.execute(_STATE))}
        with closing(standby):
            standby.backup(self.database)
        self.notify()

    def now(self) -> datetime:
        """Return what the wall clock shows."""
        return EPOCH + timedelta(seconds=self.loop.time() + self.clock_error + 1e-6)

    def set_clock(self, seconds: float) -> None:
        """Set the clock forward, or back if negative."""
        self.clock_error += seconds

    def put_off(self, delivered: Delivered) -> tuple[float, int] | None:
        """Return in how many seconds an outcome comes again, and how often it was delivered; None if it is handled."""
        query = "SELECT due_at, failures FROM unread NATURAL JOIN request WHERE reader = ? AND operation_id = ?"
        found = self.database.execute(query, (delivered.reader, delivered.event.operation_id)).fetchone()
        return found and (found[0] - self.now().timestamp(), found[1])

    def deliver_twice(self) -> None:
        """Make every request due, also those that a worker is busy with."""
        self.database.execute("UPDATE waiting SET due_at = 0")
        self.notify()

    def count(self, rows: str) -> int:
        """Return how many rows there are: of a table, and perhaps under a condition."""
        return int(self.database.execute(f"SELECT count(*) FROM {rows}").fetchone()[0])  # noqa: S608

    def look(self) -> None:
        """Look at what the workers say."""
        now = self.loop.time()
        living = [each for each in self.workers.items() if not each[0].is_dead]
        self.history.seen += [Seen(process.name, now, worker.statistics) for process, worker in living]

    def notify(self) -> None:
        """Let the processes check, a little later."""
        self.loop.call_later(_NOTICED_AFTER, self._notify)

    def _notify(self) -> None:
        for process in self.processes:
            process.broker._due.notify()
            process.broker._decided.notify()


class Task(asyncio.Task[Any]):
    """A task that knows its process, and its place among all tasks."""

    _numbers = count()

    def __init__(self, work: Coroutine[Any, Any, Any], **options: Any) -> None:
        self.process = _PROCESS.get(None)
        self.number = next(self._numbers)
        super().__init__(work, **options)


class Process:
    """A process while it lives."""

    broker: Broker
    _task: asyncio.Task[None]

    def __init__(self, world: World, name: str, life: Life) -> None:
        self.world = world
        self.name = name
        self.life = life
        self.is_dead = False
        self.stop: Callable[[], None] = self.die
        self.steps = 0
        self._end: asyncio.Future[None] = world.loop.create_future()

    async def run(self, main: Callable[[Process], Coroutine[Any, Any, None]]) -> None:
        """Live to the end of a coroutine, or to the death."""
        world, life = self.world, self.life
        self.broker = Broker(self)
        world.processes.append(self)
        token = _PROCESS.set(self)
        self._task = asyncio.create_task(self._main(main))
        _PROCESS.reset(token)
        timers = [world.loop.call_later(min(life.dies_after, 1e9), self.die)]
        timers.append(world.loop.call_later(min(life.stops_after, 1e9), self._stop))
        try:
            await asyncio.wait({self._task, self._end}, return_when=asyncio.FIRST_COMPLETED)
            if not self._task.done():
                await self._cancel_all()
        finally:
            for timer in timers:
                timer.cancel()
            self._kill()
            await asyncio.wait({self._task, *self._tasks()})
            world.processes.remove(self)
        if not (self._task.cancelled() or self._end.done()):
            self._task.result()

    async def _main(self, main: Callable[[Process], Coroutine[Any, Any, None]]) -> None:
        async with self.broker:
            await main(self)

    def _stop(self) -> None:
        self.stop()

    def die(self) -> None:
        """Be killed, or end as `asyncio.run` does, in one of the next turns of the event loop."""
        if not self.life.is_cancelled:
            self._kill()
        elif not self._end.done():
            self._end.set_result(None)

    def _kill(self) -> None:
        """Have no effect any more."""
        if not self.is_dead:
            self.is_dead = True
            if self.world.database.in_transaction:
                self.world.database.rollback()
            for task in self._tasks():
                task.cancel()

    async def _cancel_all(self) -> None:
        """End as `asyncio.run` does, which neither cancels nor awaits the tasks that begin meanwhile."""
        await _pass()
        tasks = self._tasks()
        random.shuffle(tasks)
        for task in tasks:
            task.cancel()
        _, left = await asyncio.wait(tasks, timeout=_ENDS_WITHIN) if tasks else ((), ())
        problems = [f"does not end: {task!r}" for task in tasks if task in left]
        problems += [f"ends with an error: {task!r}" for task in tasks if _failed(task)]
        self.world.history.problems += [f"{self.name} {problem}" for problem in problems]

    def _tasks(self) -> list[Task]:
        """Return its tasks, the oldest first."""
        tasks = [task for task in asyncio.all_tasks() if isinstance(task, Task) and task.process is self]
        return sorted(tasks, key=lambda task: task.number)

    def step(self) -> str:
        """Return what keeps the process from its next step: "dead", "error", or nothing."""
        self.steps += 1
        if self.steps == self.life.dies_at and not self.is_dead:
            self.world.history.deaths += 1
            self.die()
        return "dead" if self.is_dead else "error" if self.steps in self.life.errors else ""


async def _pass() -> None:
    """Let a moment pass: a turn of the event loop, or a little time."""
    await asyncio.sleep(random.choice((0.0, random.uniform(0.0, _MOMENT))))  # noqa: S311


def _failed(task: asyncio.Task[Any]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is not None


class Link:
    """A process's connection to the database."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._world = process.world
        self._changes: list[Callable[[], None]] = []

    @property
    def in_transaction(self) -> bool:
        return self._world.database.in_transaction and not self._process.is_dead

    def close(self) -> None:
        """Leave the database to the others."""

    def execute(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        fate, world = self._process.step(), self._world
        if fate == "error" and statement == "COMMIT" and self._process.steps % 2 == 0:
            self._do(statement, values)
        if fate == "dead" or (fate == "error" and statement != "ROLLBACK"):  # which SQLite does by itself then
            raise _error(f"{fate} at: {statement}", sqlite3.SQLITE_IOERR if fate == "error" else 0)
        for mishap in world.mishaps:
            statements, code = _FAILING.get(mishap.kind, ((), 0))
            if statement.startswith(statements) and mishap.concerns(self._process.name, world.loop.time()):
                self._do("ROLLBACK", ())  # which SQLite does by itself then
                raise _error(mishap.kind, code)
        if statement.startswith("INSERT INTO outcome"):
            decided = Decided(read_event(values[2]), world.loop.time(), self._process.name)
            self._changes.append(lambda: world.history.decided.append(decided))
        if statement.startswith("INSERT INTO request"):
            stored = (world.loop.time(), world.now().timestamp(), values[5])
            self._changes.append(lambda: world.history.stored.update({values[0]: stored}))
        return self._do(statement, values)

    def _do(self, statement: str, values: tuple[Any, ...]) -> sqlite3.Cursor:
        cursor = self._world.database.execute(statement, values)
        if statement == "COMMIT":
            for change in self._changes:
                change()
                self._world.notify()
        if statement in {"COMMIT", "ROLLBACK"}:
            self._changes.clear()
        return cursor


def _error(message: str, code: int) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError(message)
    if code:
        error.sqlite_errorcode = code
    return error


class Broker(SqliteBroker):
    """A process's broker: the real one, on the world's database and clock."""

    def __init__(self, process: Process) -> None:
        super().__init__(schema.MEMORY)
        self._process = process
        self._has_thread = False

    async def open(self) -> None:
        await self._wait_while_silent()
        with mock.patch.object(store, "connect", return_value=Link(self._process)):
            await super().open()
        self._clock = self._process.world.now
        self._has_thread = self._process.life.is_cancelled

    async def _wait_while_silent(self) -> None:
        silent = self._process.world.has("silent", self._process)
        if silent and not self._process.is_dead:
            await asyncio.sleep(silent.ends - self._process.world.loop.time() + _MOMENT)

    async def put_off(self, message: Message, delay: float, result: ExchangeResult) -> None:
        world, process = self._process.world, self._process
        doubts = world.has("doubts", process)
        if not (world.has("forgets", process) or (doubts and random.random() < 0.5)):  # noqa: S311
            await super().put_off(message, delay, result)
        if doubts:
            raise UnavailableError("no answer")

    async def _run(self, do: Callable[[], T]) -> T:
        """Do something, which takes a moment if there is a thread."""
        await self._wait_while_silent()
        is_known = self._is_open and not self._process.is_dead
        if is_known and self._process.world.has("away", self._process):
            raise UnavailableError("no connection")
        if is_known and self._process.world.has("vanishes", self._process):
            if random.random() < 0.5:  # noqa: S311
                do()
            await asyncio.sleep(GIVEN_UP_AFTER)
            raise UnavailableError("no answer")
        if not self._has_thread:
            return await super()._run(do)
        await _pass()  # a cancellation now comes before it
        result = do()
        await _pass()  # a cancellation now comes too late
        return result

    async def _wait_for(self, changed: asyncio.Event, most: float | None) -> None:
        await super()._wait_for(changed, _CHECKS_EVERY if most is None else min(most, _CHECKS_EVERY))


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # aiohttp advises against subclasses

    class Session(SimulatedSession):
        """A process's session to the service."""

        def __init__(self, process: Process, *, force_close: bool = False) -> None:
            super().__init__(
                process.world.service, process.name, force_close=force_close, accepts_until=process.world.accepts_until
            )
            self._process = process

        async def request(self, method: str, url: URL, **options: Any) -> Any:  # type: ignore[override]  # as its base
            history, database = self._process.world.history, self._process.world.database
            if self._process.step() == "dead":
                raise aiohttp.ServerDisconnectedError
            task = asyncio.current_task()
            assert task is not None
            history.deliveries[history._events + 1] = task
            if method == "POST":
                query = "SELECT asked IS NOT NULL, decided_at IS NOT NULL FROM request WHERE operation_id = ?"
                operation_id = json.loads(options["data"])["operationId"]
                asked = database.execute(query, (operation_id,)).fetchone()
                history.asked[history._events + 1] = asked or (True, False)  # it was lost since the claim
            return await super().request(method, url, **options)
