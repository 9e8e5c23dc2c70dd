"""A worker as in production: a process of its own, on a real broker, with the benchmark server as the service.

A benchmark submits requests to it and measures its CPU. Only the server is pinned to a core: worker and broker run on
any free core.
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
from aiokeyless.worker import ApprovalWorker, request_to_json, submit_approval

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


class Worker:
    """A worker that runs; made by `working`."""

    def __init__(self, server: Server, storage: Storage, broker: Broker, process: SpawnProcess) -> None:
        self.server = server
        self.storage = storage
        self.broker = broker
        self._process = process

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

    def cpu(self) -> tuple[float, float]:
        """Return the CPU seconds that the worker and the broker used so far."""
        return cpu(self._living()), total(self.storage.processes(), cpu)

    def logged(self) -> float:
        """Return how many bytes were written so far: see `Storage`."""
        return self.storage.logged(self._living())

    def _living(self) -> psutil.Process:
        if not self._process.is_alive():
            raise CannotMeasureError("the worker died")
        return psutil.Process(self._process.pid)


@contextlib.asynccontextmanager
async def working(server: Server, storage: type[Storage], **options: Any) -> AsyncIterator[Worker]:
    """Run a broker that has stored nothing yet, and a worker with these options."""
    async with storage() as stored, stored.broker() as broker:
        await asyncio.to_thread(server.require_creation)  # a worker creates what is missing
        process, ready = spawn_server(_work, server, stored.url, options)
        try:
            try:
                await asyncio.to_thread(ready.recv)
            except EOFError:
                raise CannotMeasureError("the worker did not start") from None
            yield Worker(server, stored, broker, process)
        finally:
            process.terminate()
            await asyncio.to_thread(process.join)


async def submit_to(broker: Broker, count: int) -> None:
    """Submit this many requests to a broker."""
    for k in range(0, count, _BATCH):
        await asyncio.gather(*(submit(broker, str(uuid.uuid4())) for _ in range(min(_BATCH, count - k))))


def new_request() -> str:
    """Return one more request, as JSON."""
    return request_to_json(**_request(str(uuid.uuid4())))


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
