"""The service: the sandbox's API in a process of its own, whose record survives when it is killed.

The record is written before anything is answered, and is what the outcomes of all waits are compared with. Users
approve at times that are drawn when their operation is created; one whose time comes while the service is down approves
once it is back. The service itself fails a small share of the requests, as gateways and servers do that are ill.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from collections import deque
from typing import TYPE_CHECKING, Final, NoReturn, Self

from aiohttp import web

from aiokeyless.sandbox.api import KeylessApi
from aiokeyless.sandbox.store import OperationStore
from benchmarks.programs import spawn_server
from benchmarks.server import API_KEY, allow_many_sockets

from .journal import Reader, Writer
from .verdicts import Entry, Event

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess
    from pathlib import Path

    from aiokeyless.models import Operation
    from benchmarks.approval_times import ApprovalTimes

    from .proxy import FaultyProxy

_GATEWAY_PAGE: Final = "<html><body>one moment, please</body></html>"
_OPERATIONS: Final = "/v2/operations/"
_TOO_MANY: Final = 429
_TICK: Final = 0.02  # seconds between two checks of which users approve
_SWAP_AMONG: Final = 1000  # approved operations of others that can be answered in an operation's place


#: The share of the requests that fail, by how. Half of the POSTs that fail were stored before, but none with a 429.
_FAILURES: Final = {
    "500": 0.002,
    "503": 0.001,  # every third with Retry-After
    "429": 0.000_004,  # with Retry-After: it holds all polls of the client
    "page": 0.0005,  # 200 with a page of a gateway
    "slow": 0.002,  # answered after up to four seconds
}
_KINDS: Final = [*_FAILURES, "none"]
_WEIGHTS: Final = [*_FAILURES.values(), 1.0 - sum(_FAILURES.values())]
#: The share of the GETs of an operation that are answered with an approved operation of somebody else.
_SWAPPED: Final = 0.0001
#: Seconds after its creation for which an operation is remembered: no wait asks later.
MEMORY: Final = 1200.0


class Service:
    """Answers requests, keeps the record, and lets users approve; what the record says is restored."""

    def __init__(self, record: Path, approvals: ApprovalTimes, source: random.Random) -> None:
        self._approvals = approvals
        self._source = source
        self._store = OperationStore()
        self._api = KeylessApi(self._store, API_KEY, self._created)
        self._due: list[tuple[float, str]] = []  # a heap: when users approve
        self._ages: deque[tuple[float, str]] = deque()
        self._others: deque[str] = deque(maxlen=_SWAP_AMONG)  # approved ones
        self._restore(record)
        self._record = Writer(record)

    def _restore(self, record: Path) -> None:
        oldest = time.monotonic() - MEMORY
        for entry in Reader(record, Entry).read():
            if entry.event is Event.CREATED and entry.at > oldest:
                self._store.create(
                    entry.user_id,
                    entry.operation_id,
                    operation_payload=entry.payload or None,
                    external_user_id=entry.external_user_id,
                )
                self._remember(entry)
            elif entry.event is Event.APPROVED and entry.operation_id in self._store.operations:
                self._store.approve(entry.operation_id)

    def _remember(self, created: Entry) -> None:
        self._ages.append((created.at, created.operation_id))
        if created.due is not None:
            heapq.heappush(self._due, (created.due, created.operation_id))

    def _created(self, operation: Operation) -> None:
        now = time.monotonic()
        after = self._approvals.draw(self._source)
        entry = Entry(
            Event.CREATED,
            now,
            operation.operation_id,
            operation.user_id,
            operation.operation_payload or "",
            operation.external_user_id,
            now + after if after < MEMORY else None,
        )
        self._record.write(entry)
        self._remember(entry)

    async def approve_when_due(self) -> NoReturn:
        """Let users approve, until cancelled; forget what is old."""
        while True:
            now = time.monotonic()
            while self._due and self._due[0][0] <= now:
                self._approve(heapq.heappop(self._due)[1])
            while self._ages and self._ages[0][0] < now - MEMORY:
                self._store.forget(self._ages.popleft()[1])
            await asyncio.sleep(_TICK)

    def _approve(self, operation_id: str) -> None:
        operation = self._store.operations.get(operation_id)
        if operation is None or operation.is_approved:  # forgotten, or restored as approved
            return
        self._store.approve(operation_id)
        self._record.write(Entry(Event.APPROVED, time.monotonic(), operation_id))
        self._others.append(operation_id)

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request, or fail it."""
        try:
            body = await request.read()
        except ConnectionError:
            return web.Response(status=400)  # nobody is there to read it
        failure = await self._failure()
        if failure is not None and not self._strikes_late(request, failure):
            return failure
        target = request.raw_path
        if request.method == "GET" and self._others and self._source.random() < _SWAPPED:
            target = self._swap(target)
        answer = self._api.answer(
            request.method,
            target,
            api_key=request.headers.get("X-Api-Key", ""),
            accept=request.headers.get("Accept", ""),
            content_type=request.headers.get("Content-Type", ""),
            body=body,
        )
        return failure or web.Response(status=answer.status, body=answer.body, headers=answer.headers)

    def _strikes_late(self, request: web.BaseRequest, failure: web.Response) -> bool:
        """Whether a failure comes after the request took effect; a 429 says that it did not."""
        return request.method == "POST" and failure.status != _TOO_MANY and self._source.random() < 0.5

    def _swap(self, target: str) -> str:
        operation_id, other = target.removeprefix(_OPERATIONS), self._source.choice(self._others)
        if operation_id not in self._store.operations or other not in self._store.operations or operation_id == other:
            return target
        self._record.write(Entry(Event.SWAPPED, time.monotonic(), operation_id))
        return _OPERATIONS + other

    async def _failure(self) -> web.Response | None:
        """Return the answer of a request that fails, or None, after the time that the answer takes."""
        match self._source.choices(_KINDS, _WEIGHTS)[0]:
            case "500":
                return web.json_response({"error": "an internal error"}, status=500)
            case "503":
                pause = {"Retry-After": "1"} if self._source.random() < 1 / 3 else {}
                return web.Response(status=503, text=_GATEWAY_PAGE, content_type="text/html", headers=pause)
            case "429":
                return web.Response(status=_TOO_MANY, headers={"Retry-After": "1"})
            case "page":
                return web.Response(text=_GATEWAY_PAGE, content_type="text/html")
            case "slow":
                await asyncio.sleep(self._source.uniform(0.2, 4.0))
        return None


class ServiceProcess:
    """The service as a process that can be killed and started again, behind a network; an async context manager."""

    def __init__(self, record: Path, approvals: ApprovalTimes, network: FaultyProxy) -> None:
        self.network = network
        self._arguments = record, approvals
        self._process: SpawnProcess | None = None
        self.starts = 0

    async def __aenter__(self) -> Self:
        await self.network.__aenter__()
        await self._start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._kill()
        await self.network.__aexit__()

    async def interrupt(self, seconds: float) -> None:
        """Kill it, without a chance to finish anything, and start it again after so many seconds."""
        self.network.target = None
        await self._kill()
        await asyncio.sleep(seconds)
        await self._start()

    async def _start(self) -> None:
        """Start it; it listens on another port each time."""
        self.starts += 1
        self._process, ready = spawn_server(_serve, *self._arguments, self.starts)
        self.network.target = await asyncio.to_thread(ready.recv)

    async def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            await asyncio.to_thread(self._process.join)
            self._process = None


def _serve(record: Path, approvals: ApprovalTimes, seed: int, started: Connection) -> None:
    allow_many_sockets()
    asyncio.run(_listen(Service(record, approvals, random.Random(seed)), started))  # noqa: S311  # simulated users, not keys


async def _listen(service: Service, started: Connection) -> None:
    runner = web.ServerRunner(web.Server(service.answer), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    started.send(runner.addresses[0][1])
    await service.approve_when_due()
