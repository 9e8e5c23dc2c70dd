"""Workers as in production: one process each, all on one real broker, with the benchmark server as the service.

A benchmark submits requests to a fleet and measures its CPU. Only the server is pinned to a core:
workers and broker run on any free core.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import psutil  # type: ignore[import-untyped]  # it has no type hints

from aiokeyless import KeylessClient
from aiokeyless.worker import ApprovalWorker, approval_request, submit_approval

from .programs import spawn_server, until
from .report import CannotMeasureError
from .server import API_KEY, EXTERNAL_USER_ID, OPERATION_PAYLOAD, USER_ID
from .storages import cpu, total

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

    from aiokeyless.worker import Broker

    from .server import Server, ServerStatistics
    from .storages import Storage

EXPIRES_IN: Final = 3600.0  # seconds: longer than the benchmark takes
_BATCH: Final = 256  # requests submitted concurrently
_TIMEOUT: Final = 240.0  # seconds


class Fleet:
    """A changing number of workers on one broker; made by `fleet`."""

    def __init__(self, server: Server, storage: Storage, broker: Broker, **options: Any) -> None:
        self.server = server
        self.storage = storage
        self.broker = broker
        self._options = options
        self._workers: list[SpawnProcess] = []

    async def resize(self, count: int) -> None:
        """Start or gracefully stop workers, and return when this many are running."""
        while len(self._workers) > count:
            worker = self._workers.pop()
            worker.terminate()
            await asyncio.to_thread(worker.join)
        arguments = self.server, self.storage.url, self._options
        started = [spawn_server(_work, *arguments) for _ in range(count - len(self._workers))]
        self._workers += [worker for worker, _ in started]
        for _, ready in started:
            try:
                await asyncio.to_thread(ready.recv)
            except EOFError:
                raise CannotMeasureError("a worker did not start") from None

    async def submit(self, count: int) -> None:
        """Submit this many requests, and return when all their operations are created."""
        before = self.server.statistics().created
        await submit_to(self.broker, count)
        await self.until_created(before + count)

    async def until(self, reached: Callable[[ServerStatistics], bool]) -> None:
        """Wait until the statistics of the server meet a condition."""
        await until(partial(asyncio.to_thread, lambda: reached(self.server.statistics())), within=_TIMEOUT)

    async def until_created(self, count: int) -> None:
        """Wait until the server has created this many operations since its start."""
        await self.until(lambda statistics: statistics.created >= count)

    async def until_polled(self) -> None:
        """Wait until the workers, which may have just started, poll."""
        before = self.server.statistics().requests
        await self.until(lambda statistics: statistics.requests > before)

    def cpu(self) -> tuple[float, float]:
        """Return the CPU seconds that the workers and the broker used so far."""
        return (total(self._processes(), cpu), total(self.storage.processes(), cpu))

    def logged(self) -> float:
        """Return how many bytes were written so far: see `Storage`."""
        return self.storage.logged(self._processes())

    def _processes(self) -> list[psutil.Process]:
        if not all(worker.is_alive() for worker in self._workers):
            raise CannotMeasureError("a worker died")
        return [psutil.Process(worker.pid) for worker in self._workers]


@contextlib.asynccontextmanager
async def fleet(server: Server, workers: int, storage: type[Storage], **options: Any) -> AsyncIterator[Fleet]:
    """Run a broker that has stored nothing yet, and workers with these options."""
    async with storage() as stored, stored.broker() as broker:
        running = Fleet(server, stored, broker, **options)
        await asyncio.to_thread(server.require_creation)  # a worker creates what is missing
        try:
            await running.resize(workers)
            yield running
        finally:
            await running.resize(0)


async def submit_to(broker: Broker, count: int) -> None:
    """Submit this many requests to a broker."""
    for k in range(0, count, _BATCH):
        await asyncio.gather(*(submit(broker, str(uuid.uuid4())) for _ in range(min(_BATCH, count - k))))


def new_request() -> str:
    """Return one more request, as text."""
    return approval_request(**_request(str(uuid.uuid4())))


async def submit(broker: Broker, operation_id: str) -> None:
    """Submit one request, as an application would."""
    await submit_approval(broker, **_request(operation_id))


def _request(operation_id: str) -> dict[str, Any]:
    return {
        "user_id": USER_ID,
        "operation_id": operation_id,
        "operation_payload": OPERATION_PAYLOAD,
        "external_user_id": EXTERNAL_USER_ID,
        "expires_in": EXPIRES_IN,
    }


def _work(server: Server, url: str, options: dict[str, Any], ready: Connection) -> None:
    """Run a worker until SIGTERM."""

    async def work() -> None:
        async with KeylessClient(API_KEY, base_url=server.base_url, max_attempts=1) as client:
            worker = ApprovalWorker(client, url, **options)
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
            async with asyncio.TaskGroup() as group:
                group.create_task(worker.run())
                await until(lambda: worker.statistics.is_ready, within=_TIMEOUT)
                ready.send(None)

    asyncio.run(work())
