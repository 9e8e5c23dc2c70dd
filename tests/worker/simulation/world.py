"""The world of a story: one database, one wall clock, and processes that die or fail at any of their steps.

All processes share a database in memory. A dead process still runs its error handling, but nothing that it does has an
effect. So it leaves behind what a killed process leaves behind.
"""

from __future__ import annotations

import asyncio
import json
import math
import sqlite3
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

import aiohttp
from simulation.history import History
from simulation.service import SimulatedSession
from simulation.world import EPOCH

from aiokeyless.worker.messages import read_event
from aiokeyless.worker.sqlite import SqliteBroker, schema, store

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from datetime import datetime

    from simulation.service import Service
    from yarl import URL

    from aiokeyless.worker.messages import ApprovalEvent

#: Seconds after which a process sees what another one stored. A broker in a file looks each 0.1 s.
_NOTICED_AFTER: Final = 0.05
#: Seconds between two looks without a change: for clocks that were set, and for takes that broke off.
_LOOKS_EVERY: Final = 5.0


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
    """handled, failed, unknown (the broker did not confirm that it is handled), or died."""


@dataclass(slots=True)
class WorkerHistory(History):
    """What happened, as an observer outside of the library saw it; all times are the event loop's."""

    decided: list[Decided] = field(default_factory=list)
    delivered: list[Delivered] = field(default_factory=list)
    submitted: list[tuple[int, str]] = field(default_factory=list)
    """Numbers of requests, and: stored, duplicate, refused, unknown."""
    asked: dict[int, tuple[bool, bool]] = field(default_factory=dict)
    """Of each POST, by its number: whether its request was claimed, and whether it was decided."""
    deliveries: dict[int, object] = field(default_factory=dict)
    """Of each exchange, by its number: the delivery of its request, by identity."""
    stored: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    """Of each operation: when its request was stored, also by the wall clock, and its deadline by the wall clock."""
    deaths: int = 0
    left: dict[str, int] = field(default_factory=dict)
    """What was counted at the end, and should be zero."""


class World:
    """The machine on which all processes of a story run."""

    def __init__(self, service: Service, history: WorkerHistory) -> None:
        self.service = service
        self.history = history
        self.loop = asyncio.get_running_loop()
        self.clock_error = 0.0
        self.database = schema.connect(schema.MEMORY, now=self.now().timestamp())
        self.processes: list[Process] = []

    def now(self) -> datetime:
        """Return what the wall clock shows."""
        return EPOCH + timedelta(seconds=self.loop.time() + self.clock_error + 1e-6)

    def set_clock(self, seconds: float) -> None:
        """Set the clock forward, or back if negative."""
        self.clock_error += seconds

    def deliver_twice(self) -> None:
        """Make every request due, also those that a worker is busy with."""
        self.database.execute("UPDATE waiting SET due_at = 0")
        self.notify()

    def count(self, rows: str) -> int:
        """Return how many rows there are: of a table, and perhaps under a condition."""
        return int(self.database.execute(f"SELECT count(*) FROM {rows}").fetchone()[0])  # noqa: S608

    def notify(self) -> None:
        """Let the processes look, a little later."""
        self.loop.call_later(_NOTICED_AFTER, self._notify)

    def _notify(self) -> None:
        for process in self.processes:
            process.broker._due.notify()
            process.broker._decided.notify()


class Process:
    """A process while it lives."""

    broker: Broker
    _task: asyncio.Task[None]

    def __init__(self, world: World, name: str, life: Life) -> None:
        self.world = world
        self.name = name
        self.is_dead = False
        self.stop: Callable[[], None] = self.die
        self.steps = 0
        self._life = life

    async def run(self, main: Callable[[Process], Coroutine[Any, Any, None]]) -> None:
        """Live to the end of a coroutine, or to the death."""
        world, life = self.world, self._life
        self.broker = Broker(self)
        async with self.broker:
            world.processes.append(self)
            self._task = asyncio.create_task(main(self))
            timers = [world.loop.call_later(min(life.dies_after, 1e9), self.die)]
            timers.append(world.loop.call_later(min(life.stops_after, 1e9), self._stop))
            try:
                await asyncio.wait({self._task})
            finally:
                for timer in timers:
                    timer.cancel()
                self.die()
                await asyncio.wait({self._task})
                world.processes.remove(self)
        if not self._task.cancelled():
            self._task.result()

    def _stop(self) -> None:
        self.stop()

    def die(self) -> None:
        """Have no effect any more."""
        if not self.is_dead:
            self.is_dead = True
            if self.world.database.in_transaction:
                self.world.database.rollback()
            self._task.cancel()

    def step(self) -> str:
        """Return what keeps the process from its next step: "dead", "error", or nothing."""
        self.steps += 1
        if self.steps == self._life.dies_at and not self.is_dead:
            self.world.history.deaths += 1
            self.die()
        return "dead" if self.is_dead else "error" if self.steps in self._life.errors else ""


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
            error = sqlite3.OperationalError(f"{fate} at: {statement}")
            if fate == "error":
                error.sqlite_errorcode = sqlite3.SQLITE_IOERR
            raise error
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


class Broker(SqliteBroker):
    """A process's broker: the real one, on the world's database and clock."""

    def __init__(self, process: Process) -> None:
        super().__init__(schema.MEMORY)
        self._process = process

    async def open(self) -> None:
        with mock.patch.object(store, "connect", return_value=Link(self._process)):
            await super().open()
        self._clock = self._process.world.now

    async def _wait_for(self, changed: asyncio.Event, most: float | None) -> None:
        await super()._wait_for(changed, _LOOKS_EVERY if most is None else min(most, _LOOKS_EVERY))


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # aiohttp advises against subclasses

    class Session(SimulatedSession):
        """A process's session to the service."""

        def __init__(self, process: Process) -> None:
            super().__init__(process.world.service, process.name)
            self._process = process

        async def request(self, method: str, url: URL, **options: Any) -> Any:  # type: ignore[override]  # as its base
            history, database = self._process.world.history, self._process.world.database
            if self._process.step() == "dead":
                raise aiohttp.ServerDisconnectedError
            history.deliveries[history._events + 1] = asyncio.current_task()
            if method == "POST":
                query = "SELECT asked IS NOT NULL, decided_at IS NOT NULL FROM request WHERE operation_id = ?"
                operation_id = json.loads(options["data"])["operationId"]
                history.asked[history._events + 1] = database.execute(query, (operation_id,)).fetchone()
            return await super().request(method, url, **options)
