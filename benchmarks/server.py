"""The service: a process that answers keep-alive GETs of operations, with as little work as possible for each.

It accepts POSTs of new operations too, whose ids can set when they are approved: see `approved_after`. It understands
only what the clients of the benchmarks send: it is not a general HTTP server. It reports its own load, see
`Server.statistics`, so that a benchmark can discard a figure if the server was the bottleneck.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import resource
import time
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, NamedTuple, Self, cast

from .programs import spawn_server
from .report import CannotMeasureError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

#: As long as a UUID: a short key would make each answer cheaper to search for it.
API_KEY: Final = "7c9e6679-7425-40de-944b-e07fc1f90ae7"
OPERATIONS: Final = "/v2/operations/"
#: The user and the payload of all operations: the answers for a ticket are checked against them.
USER_ID: Final = "0123456789ABCDEF0123456789ABCDEF"
EXTERNAL_USER_ID: Final = "alice@example.com"
OPERATION_PAYLOAD: Final = "Approve wire transfer of $500 to account 1234"
_CONTROL: Final = b"/-/"
_APPROVED_AFTER: Final = "approved-after-"
_POST: Final = ord("P")  # comparing one byte is faster, and nearly all requests are GETs
_END_OF_HEAD: Final = b"\r\n\r\n"
_TOO_BUSY: Final = 0.85  # of a core: above it, the server may limit the figure of the client


class ServerStatistics(NamedTuple):
    """The work of the server since its start."""

    wall: float
    cpu: float
    requests: int
    created: int


def approved_after(seconds: float) -> str:
    """Return an operation id; an operation created with it is approved this many seconds later."""
    return f"{_APPROVED_AFTER}{seconds:.6f}-{uuid.uuid4()}"


class _Template(NamedTuple):
    text: bytes  # a format for the length of the body and the id
    length: int  # of the body without the id


def _operation(*, approved: bool) -> _Template:
    operation: dict[str, object] = {
        "id": 123456,
        "timestamp": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}.678",
        "nodeId": "operations-service-7d9f",
        "userId": USER_ID,
        "apiKey": "f1e2d3c4b5a69788796a5b4c3d2e1f00",
        "externalUserId": EXTERNAL_USER_ID,
        "operationPayload": OPERATION_PAYLOAD,
        "result": approved,
        "state": "approved" if approved else "pending",
        "operationId": "%b",
    }
    body = json.dumps(operation, separators=(",", ":")).encode()
    return _Template(_OK + body, len(body) - len(b"%b"))


def _ok(body: bytes) -> bytes:
    return _OK % len(body) + body


_OK: Final = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
_PENDING: Final = _operation(approved=False)
_APPROVED: Final = _operation(approved=True)
_CREATED: Final = _ok(b'{"success":true}')
_MISSING: Final = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"


class _Service:
    """The state that all connections share: counts and operations."""

    def __init__(self) -> None:
        self.requests = 0
        self._created = 0
        self._operation = _PENDING
        self._timed: dict[bytes, float] = {}  # when these are approved, by `time.perf_counter`
        self._known: set[bytes] | None = None  # the operations that were created; None: every operation exists

    def answer(self, operation_id: bytes) -> bytes:
        """Return the whole answer."""
        self.requests += 1
        if self._known is not None and operation_id not in self._known:
            return _MISSING
        text, length = self._template(operation_id) if self._timed else self._operation
        return text % (length + len(operation_id), operation_id)

    def _template(self, operation_id: bytes) -> _Template:
        due = self._timed.get(operation_id)
        return self._operation if due is None else _APPROVED if time.perf_counter() >= due else _PENDING

    def create(self, body: bytes) -> bytes:
        """Create an operation, and return the whole answer."""
        self._created += 1
        operation_id: str = json.loads(body)["operationId"]
        if self._known is not None:
            self._known.add(operation_id.encode())
        if operation_id.startswith(_APPROVED_AFTER):
            seconds = float(operation_id.removeprefix(_APPROVED_AFTER).partition("-")[0])
            self._timed[operation_id.encode()] = time.perf_counter() + seconds
        return _CREATED

    def control(self, command: str) -> bytes:
        if command == "create-first":
            self._known = set()
        elif command in {"approved", "pending"}:
            self._operation = _APPROVED if command == "approved" else _PENDING
        elif command == "approvals":
            timed, self._timed = self._timed, {}
            return json.dumps({name.decode(): due for name, due in timed.items()}).encode()
        counted = ServerStatistics(time.perf_counter(), time.process_time(), self.requests, self._created)
        return json.dumps(counted).encode()


class _Connection(asyncio.Protocol):
    def __init__(self, service: _Service) -> None:
        self._service = service
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # a TCP transport; uvloop's is not a subclass

    def data_received(self, data: bytes) -> None:
        received = self._rest + data
        if received[0] == _POST:
            self._post(received)
        else:
            *heads, self._rest = received.split(_END_OF_HEAD)
            self._transport.write(b"".join(map(self._answer, heads)))

    def _post(self, received: bytes) -> None:
        """Create an operation once the whole request is there; clients send nothing more before the answer."""
        head, end_of_head, body = received.partition(_END_OF_HEAD)
        if end_of_head and len(body) >= int(head.partition(b"\r\nContent-Length: ")[2].partition(b"\r\n")[0]):
            self._rest = b""
            self._transport.write(self._service.create(body))
        else:
            self._rest = received

    def _answer(self, head: bytes) -> bytes:
        target = head[4 : head.index(b" ", 4)]  # after b"GET "
        if target.startswith(_CONTROL):
            return _ok(self._service.control(target.removeprefix(_CONTROL).decode()))
        return self._service.answer(target.rpartition(b"/")[2])


async def _listen(started: Connection) -> None:
    service = _Service()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(service), "127.0.0.1", 0, backlog=65535)
    started.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def _serve(cores: set[int], started: Connection) -> None:
    pin(cores)
    allow_many_sockets()
    import uvloop  # noqa: PLC0415  # clients whose memory is measured import this module

    uvloop.run(_listen(started))  # it takes a third of the time of asyncio's


class Server:
    """A client for the server; only the port is needed, so that other processes can use one too."""

    def __init__(self, port: int) -> None:
        self.port = port

    @property
    def base_url(self) -> str:
        """The base URL for a client."""
        return f"http://127.0.0.1:{self.port}"

    def statistics(self) -> ServerStatistics:
        """Request the statistics. Blocks."""
        return ServerStatistics(*json.loads(self._control("statistics")))

    def approve(self, *, approved: bool) -> None:
        """Make all operations approved or pending from now on. Blocks."""
        self._control("approved" if approved else "pending")

    def require_creation(self) -> None:
        """Answer 404 about operations that were not created from now on. Blocks."""
        self._control("create-first")

    def approvals(self) -> dict[str, float]:
        """Return when operations with chosen times are approved, by id, and forget them. Blocks.

        The times are those of `time.perf_counter`, the same clock in all processes.
        """
        approvals: dict[str, float] = json.loads(self._control("approvals"))
        return approvals

    def _control(self, command: str) -> bytes:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request("GET", f"/-/{command}")
            return connection.getresponse().read()


class Workload:
    """The load of the server during a ``with`` block: ``with Workload(server) as workload: ...``."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def __enter__(self) -> Self:
        self._before = self._server.statistics()
        return self

    def __exit__(self, *_: object) -> None:
        after = self._server.statistics()
        self.requests = after.requests - self._before.requests
        self.wall = after.wall - self._before.wall
        self.cpu = after.cpu - self._before.cpu
        self.share = self.cpu / self.wall

    def check(self) -> None:
        """Raise CannotMeasureError if the server was the bottleneck."""
        if self.share > _TOO_BUSY:
            raise CannotMeasureError(f"the server was the bottleneck ({self.share:.0%} of its core)")


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """Run a server, on another core than the clients if there are two."""
    _, cores = split_cores()
    process, ready = spawn_server(_serve, cores)
    try:
        yield Server(ready.recv())
    finally:
        process.terminate()
        process.join()


def split_cores() -> tuple[set[int], set[int]]:
    """Return the cores for clients and for the server: one each, or the same if there is only one."""
    cores = sorted(os.sched_getaffinity(0))
    return {cores[-1]}, {cores[0]}


def pin(cores: set[int]) -> None:
    """Pin this process to these cores."""
    os.sched_setaffinity(0, cores)


def allow_many_sockets() -> int:
    """Raise the limit on open files to its maximum, and return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
