"""The other side: a process that answers keep-alive GETs of operations, and does as little as it can for each.

It takes POSTs of new operations too, and whoever names an operation chooses when it is approved: see `approved_after`.
It understands what the clients of the benchmarks send, and nothing else: it is no HTTP server. How much it worked is
asked of it with `Server.facts`, so that a benchmark can refuse to print what was the server's figure.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import multiprocessing
import os
import time
import uuid
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple, Self, cast

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

API_KEY: Final = "benchmark-key"
OPERATIONS: Final = "/v2/operations/"
#: Whose operations all of them are, and what they are about: a ticket's answers are checked for it.
USER_ID: Final = "0123456789ABCDEF0123456789ABCDEF"
EXTERNAL_USER_ID: Final = "alice@example.com"
OPERATION_PAYLOAD: Final = "Approve wire transfer of $500 to account 1234"
_CONTROL: Final = b"/-/"
_APPROVED_AFTER: Final = "approved-after-"
_POST: Final = ord("P")  # a byte is looked at sooner than a word, and nearly all requests are GETs
_END_OF_HEAD: Final = b"\r\n\r\n"
_TOO_BUSY: Final = 0.85  # of a core: beyond it, the client's figure is the server's


class Facts(NamedTuple):
    """What the server has done since it was started."""

    wall: float
    cpu: float
    requests: int
    connections: int  # open now
    most_connections: int
    looked_at: int  # operations answered since the last change, where a journal is kept
    created: int


class Failure(StrEnum):
    """How a service is down."""

    UNAVAILABLE = "503"  # it answers that it cannot
    DROPPED = "dropped"  # it closes the connection of each request, unanswered


class Journal(NamedTuple):
    """What came to the server, in seconds of its own clock."""

    changes: list[float]  # when it was told to behave in another way
    requests: list[float]
    looked_at: list[float]  # for each operation, when it was first answered since the last change


class _Journal:
    """A journal while it is kept."""

    def __init__(self) -> None:
        self._changes: list[float] = []
        self._requests: list[float] = []
        self._looked_at: dict[bytes, float] = {}

    @property
    def looked_at(self) -> int:
        return len(self._looked_at)

    def change(self) -> None:
        self._changes.append(time.perf_counter())
        self._looked_at.clear()

    def request(self, operation_id: bytes, *, answered: bool) -> None:
        now = time.perf_counter()
        self._requests.append(now)
        if answered:
            self._looked_at.setdefault(operation_id, now)

    def closed(self) -> Journal:
        return Journal(self._changes, self._requests, [*self._looked_at.values()])


class Approval(NamedTuple):
    """What became of an operation whose moment was chosen; by `time.perf_counter`, the same clock in all processes."""

    due: float  # approved from then on
    told: float | None  # when an answer first said so
    looks: int


class _Timed:
    """An operation that is approved from a moment on."""

    def __init__(self, due: float) -> None:
        self._due = due
        self._told: float | None = None
        self._looks = 0

    def look(self) -> _Template:
        now = time.perf_counter()
        self._looks += 1
        if now < self._due:
            return _PENDING
        if self._told is None:
            self._told = now
        return _APPROVED

    def approval(self) -> Approval:
        return Approval(self._due, self._told, self._looks)


def approved_after(seconds: float) -> str:
    """Return an operation id; the operation that is created with it is approved so many seconds later."""
    return f"{_APPROVED_AFTER}{seconds:.6f}-{uuid.uuid4()}"


class _Template(NamedTuple):
    """An answer but for the operation's id."""

    text: bytes  # to be filled in with the length of the body, and the id
    length: int  # of a body without its id


def _operation(*, approved: bool) -> _Template:
    operation: dict[str, object] = {
        "id": 123456,
        "timestamp": "2026-01-02T03:04:05.678",
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
#: Answers of a service that is down; nothing where the connection is to be closed instead.
_FAILED: Final = {
    Failure.UNAVAILABLE: b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
    Failure.DROPPED: b"",
}


class _Service:
    """What all connections share: the counts, and how operations and the service itself are."""

    def __init__(self) -> None:
        self.requests = 0
        self._created = 0
        self.connections = 0
        self.most_connections = 0
        self._failure: Failure | None = None
        self._journal: _Journal | None = None
        self._operation = _PENDING
        self._timed: dict[bytes, _Timed] = {}

    def answer(self, operation_id: bytes) -> bytes:
        """Return the whole answer; nothing where the connection is to be closed instead."""
        self.requests += 1
        if self._journal is not None:
            self._journal.request(operation_id, answered=self._failure is None)
        if self._failure is not None:
            return _FAILED[self._failure]
        text, length = self._look(operation_id) if self._timed else self._operation
        return text % (length + len(operation_id), operation_id)

    def _look(self, operation_id: bytes) -> _Template:
        timed = self._timed.get(operation_id)
        return self._operation if timed is None else timed.look()

    def create(self, body: bytes) -> bytes:
        """Take a new operation, and return the whole answer as above."""
        if self._failure is not None:
            return _FAILED[self._failure]
        self._created += 1
        operation_id: str = json.loads(body)["operationId"]
        if operation_id.startswith(_APPROVED_AFTER):
            seconds = float(operation_id.removeprefix(_APPROVED_AFTER).partition("-")[0])
            self._timed[operation_id.encode()] = _Timed(time.perf_counter() + seconds)
        return _CREATED

    def control(self, command: str) -> bytes:
        if command == "keep":
            self._journal = _Journal()
        elif command == "journal" and self._journal is not None:
            journal, self._journal = self._journal.closed(), None
            return json.dumps(journal).encode()
        elif command == "approvals":
            timed, self._timed = self._timed, {}
            return json.dumps({name.decode(): operation.approval() for name, operation in timed.items()}).encode()
        elif command != "facts":
            self._change(command)
        looked_at = 0 if self._journal is None else self._journal.looked_at
        counts = (self.requests, self.connections, self.most_connections, looked_at, self._created)
        return json.dumps(Facts(time.perf_counter(), time.process_time(), *counts)).encode()

    def _change(self, command: str) -> None:
        if command in {*Failure}:
            self._failure = Failure(command)
        else:
            self._failure = None
            self._operation = _APPROVED if command == "approved" else _PENDING
        if self._journal is not None:
            self._journal.change()


class _Connection(asyncio.Protocol):
    def __init__(self, service: _Service) -> None:
        self._service = service
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # what a TCP server is given; uvloop's is no subclass
        self._service.connections += 1
        self._service.most_connections = max(self._service.most_connections, self._service.connections)

    def connection_lost(self, _error: Exception | None) -> None:
        self._service.connections -= 1

    def data_received(self, data: bytes) -> None:
        received = self._rest + data
        if received[0] == _POST:
            answers = self._posted(received)
        else:
            *heads, self._rest = received.split(_END_OF_HEAD)
            answers = [self._answer(head) for head in heads]
        if b"" in answers:
            self._transport.abort()
        else:
            self._transport.write(b"".join(answers))

    def _posted(self, received: bytes) -> list[bytes]:
        """Create an operation, once all of the request is here; nothing follows before it is answered."""
        head, end_of_head, body = received.partition(_END_OF_HEAD)
        if not end_of_head or len(body) < int(head.partition(b"\r\nContent-Length: ")[2].partition(b"\r\n")[0]):
            self._rest = received
            return []
        self._rest = b""
        return [self._service.create(body)]

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


def _serve(started: Connection, cores: set[int]) -> None:
    pin(cores)
    allow_many_sockets()
    try:
        import uvloop  # noqa: PLC0415  # where there is one, the server takes a third of the time
    except ImportError:
        asyncio.run(_listen(started))
    else:
        uvloop.run(_listen(started))


class Server:
    """The server as the benchmarks see it; the address alone is enough to make one, in another process too."""

    def __init__(self, port: int) -> None:
        self.port = port

    @property
    def base_url(self) -> str:
        """The base URL for a client."""
        return f"http://127.0.0.1:{self.port}"

    def facts(self) -> Facts:
        """Ask what it has done so far. Blocks."""
        return Facts(*json.loads(self._control("facts")))

    def approve(self, *, approved: bool) -> None:
        """Have all operations approved, or pending, from now on; a service that is down is up again. Blocks."""
        self._control("approved" if approved else "pending")

    def fail(self, failure: Failure) -> None:
        """Be down from now on. Blocks."""
        self._control(failure)

    def keep_journal(self) -> None:
        """Begin a journal. Blocks."""
        self._control("keep")

    def journal(self) -> Journal:
        """End the journal, and return it. Blocks."""
        return Journal(*json.loads(self._control("journal")))

    def approvals(self) -> dict[str, Approval]:
        """Tell of the operations whose moments were chosen, by their ids, and forget them. Blocks."""
        return {name: Approval(*of) for name, of in json.loads(self._control("approvals")).items()}

    def _control(self, command: str) -> bytes:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request("GET", f"/-/{command}")
            return connection.getresponse().read()


class Workload:
    """How much the server worked between entering and leaving: ``with Workload(server) as workload: ...``."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def __enter__(self) -> Self:
        self._before = self._server.facts()
        return self

    def __exit__(self, *_: object) -> None:
        after = self._server.facts()
        self.requests = after.requests - self._before.requests
        self.wall = after.wall - self._before.wall
        self.cpu = after.cpu - self._before.cpu
        self.share = self.cpu / self.wall

    @property
    def bound(self) -> bool:
        """Whether the server was the bottleneck."""
        return self.share > _TOO_BUSY


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """Run a server, on another core than this process where there is one."""
    _, cores = split_cores()
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(there, cores), daemon=True)
    process.start()
    there.close()
    try:
        yield Server(here.recv())
    finally:
        process.terminate()
        process.join()


def split_cores() -> tuple[set[int], set[int]]:
    """Return the cores for clients and for the server: one each, or the same where there is but one."""
    if not hasattr(os, "sched_getaffinity"):
        return set(), set()
    cores = sorted(os.sched_getaffinity(0))
    return {cores[-1]}, {cores[0]}


def pin(cores: set[int]) -> None:
    """Keep this process on these cores, where the system can."""
    if cores:
        os.sched_setaffinity(0, cores)


def allow_many_sockets() -> int:
    """Raise the limit on open files as far as it goes, and return it."""
    import resource  # noqa: PLC0415  # not on Windows, where it is not needed to import this

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
