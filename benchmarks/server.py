"""The other side: a process that answers keep-alive GETs of operations, and does as little as it can for each.

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
from typing import TYPE_CHECKING, Final, NamedTuple, Self, cast

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

API_KEY: Final = "benchmark-key"
OPERATIONS: Final = "/v2/operations/"
_CONTROL: Final = b"/-/"
_TOO_BUSY: Final = 0.85  # of a core: beyond it, the client's figure is the server's


class Facts(NamedTuple):
    """What the server has done since it was started."""

    wall: float
    cpu: float
    requests: int
    connections: int  # open now
    most_connections: int


class _Service:
    """What all connections share: the counts, and whether operations are approved."""

    def __init__(self) -> None:
        self.requests = 0
        self.connections = 0
        self.most_connections = 0
        self.approve(approved=False)

    def approve(self, *, approved: bool) -> None:
        answer: dict[str, object] = {
            "id": 123456,
            "timestamp": "2026-01-02T03:04:05.678",
            "nodeId": "operations-service-7d9f",
            "userId": "0123456789ABCDEF0123456789ABCDEF",
            "apiKey": "f1e2d3c4b5a69788796a5b4c3d2e1f00",
            "externalUserId": "alice@example.com",
            "operationPayload": "Approve wire transfer of $500 to account 1234",
            "result": approved,
            "state": "approved" if approved else "pending",
            "operationId": "?",
        }
        self.body_head, self.body_tail = json.dumps(answer, separators=(",", ":")).encode().rsplit(b"?", 1)

    def control(self, command: bytes) -> bytes:
        if command != b"facts":
            self.approve(approved=command == b"approved")
        facts = Facts(time.perf_counter(), time.process_time(), self.requests, self.connections, self.most_connections)
        return json.dumps(facts).encode()


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
        *heads, self._rest = (self._rest + data).split(b"\r\n\r\n")
        self._transport.write(b"".join(map(self._answer, heads)))

    def _answer(self, head: bytes) -> bytes:
        service = self._service
        target = head[4 : head.index(b" ", 4)]  # after b"GET "
        if target.startswith(_CONTROL):
            body = service.control(target.removeprefix(_CONTROL))
        else:
            service.requests += 1
            body = b"%b%b%b" % (service.body_head, target.rpartition(b"/")[2], service.body_tail)
        return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


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
        return self._control("facts")

    def approve(self, *, approved: bool) -> None:
        """Have all operations approved, or pending, from now on. Blocks."""
        self._control("approved" if approved else "pending")

    def _control(self, command: str) -> Facts:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request("GET", f"/-/{command}")
            return Facts(*json.loads(connection.getresponse().read()))


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
        self.share = (after.cpu - self._before.cpu) / (after.wall - self._before.wall)

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
