"""Workers as they are run: each a process of its own, all on one real broker, with the server as their Keyless.

A fleet is what a benchmark submits requests to, and whose CPU, memory and disk it counts. Nothing is pinned but the
server: workers and broker run on whatever core is free, as they do elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import nats
import psutil  # type: ignore[import-untyped]  # it comes without types

from aiokeyless import KeylessClient
from aiokeyless.worker import ApprovalWorker, submit_approval

from .broker import NatsServer
from .report import CannotMeasureError
from .server import API_KEY, EXTERNAL_USER_ID, OPERATION_PAYLOAD, USER_ID

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

    from nats.aio.client import Client
    from tenacity.wait import wait_base

    from .server import Facts, Server

EXPIRES_IN: Final = 3600.0  # seconds: no request ends before the benchmark does
_BATCH: Final = 256  # requests submitted at once
_PATIENCE: Final = 240.0  # seconds
_BLOCK: Final = 512  # bytes: what a file's blocks are counted in, whatever the disk's are


class Shares(NamedTuple):
    """Something of all workers together, and of the broker."""

    workers: float
    broker: float


class Fleet:
    """Workers on one broker, as many as are wanted just now; made by `fleet`.

    Args:
        server: What they look at.
        broker: What they are delivered by.
        folder: Where the broker keeps its files.
        connection: The broker, as an application is connected to it.
        schedule: When they look.
    """

    def __init__(
        self, server: Server, broker: NatsServer, folder: Path, connection: Client, schedule: wait_base
    ) -> None:
        self.server = server
        self.connection = connection
        self._broker = broker
        self._folder = folder
        self._schedule = schedule
        self._workers: list[SpawnProcess] = []

    async def resize(self, count: int) -> None:
        """Start workers, or end them in good order, and return when so many are at work."""
        while len(self._workers) > count:
            worker = self._workers.pop()
            worker.terminate()
            await asyncio.to_thread(worker.join)
        for ready in [self._start() for _ in range(count - len(self._workers))]:
            try:
                await asyncio.to_thread(ready.recv)
            except EOFError:
                raise CannotMeasureError("a worker did not start") from None

    def _start(self) -> Connection:
        spawn = multiprocessing.get_context("spawn")
        here, there = spawn.Pipe()
        worker = spawn.Process(target=_work, args=(self.server, self._broker.url, self._schedule, there), daemon=True)
        worker.start()
        there.close()
        self._workers.append(worker)
        return here

    async def submit(self, count: int) -> None:
        """Have so many more requests, and return when all of their operations are created."""
        before = self.server.facts().created
        for k in range(0, count, _BATCH):
            await asyncio.gather(*(self.request() for _ in range(min(_BATCH, count - k))))
        await self.until(lambda facts: facts.created - before >= count)

    async def request(self, operation_id: str | None = None) -> None:
        """Submit one request, as an application does."""
        await submit_approval(
            self.connection,
            USER_ID,
            operation_id=operation_id,
            operation_payload=OPERATION_PAYLOAD,
            external_user_id=EXTERNAL_USER_ID,
            expires_in=EXPIRES_IN,
        )

    async def until(self, reached: Callable[[Facts], bool]) -> None:
        """Wait until the server has seen enough of the workers."""
        until = time.monotonic() + _PATIENCE
        while not reached(await asyncio.to_thread(self.server.facts)):
            if time.monotonic() > until:
                raise CannotMeasureError(f"the workers were not that far within {_PATIENCE:g} s")
            await asyncio.sleep(0.02)

    def cpu(self) -> Shares:
        """Return the seconds of CPU that have been used."""
        return self._shares(_cpu)

    def resident(self) -> Shares:
        """Return the bytes that are resident."""
        return self._shares(_resident)

    def _shares(self, of: Callable[[psutil.Process], float]) -> Shares:
        if not all(worker.is_alive() for worker in self._workers):
            raise CannotMeasureError("a worker has died")
        workers = sum(of(psutil.Process(worker.pid)) for worker in self._workers)
        return Shares(workers, of(psutil.Process(self._broker.pid)))

    def on_disk(self) -> int:
        """Return the bytes that the system has set aside for the broker's files."""
        return sum(_BLOCK * path.stat().st_blocks for path in self._folder.rglob("*") if path.is_file())


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    seconds: float = times.user + times.system
    return seconds


def _resident(process: psutil.Process) -> float:
    held: int = process.memory_info().rss
    return held


@contextlib.asynccontextmanager
async def fleet(server: Server, schedule: wait_base, workers: int = 1) -> AsyncIterator[Fleet]:
    """Run a broker with no stream in it yet, and workers."""
    with tempfile.TemporaryDirectory() as folder:
        broker = NatsServer(Path(folder))
        try:
            await broker.start()
        except (OSError, TimeoutError) as error:
            raise CannotMeasureError(f"there is no broker: {error}") from error
        try:
            async with await nats.connect(broker.url) as connection:
                at_work = Fleet(server, broker, Path(folder), connection, schedule)
                try:
                    await at_work.resize(workers)
                    yield at_work
                finally:
                    await at_work.resize(0)
        finally:
            broker.stop()


def _work(server: Server, nats_url: str, schedule: wait_base, ready: Connection) -> None:
    """Be a worker, until the system asks the process to end."""

    async def working() -> None:
        async with KeylessClient(API_KEY, base_url=server.base_url, max_attempts=1) as client:
            worker = ApprovalWorker(client, nats_url, schedule=schedule)
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
            async with asyncio.TaskGroup() as group:
                group.create_task(worker.run())
                while not worker.statistics.is_ready:  # noqa: ASYNC110  # statistics are no event
                    await asyncio.sleep(0.01)
                ready.send(None)

    asyncio.run(working())
