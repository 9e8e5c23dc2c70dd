"""HTTP clients other than aiohttp, each with fast settings, and msgspec as the decoder.

`MinimalClient` is not for use: it is a lower bound, without nearly everything that an HTTP client does.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self, cast
from urllib.parse import quote

import httpx
import httpx2
import niquests

from .baselines import HEADERS, PlainOperation, decode
from .server import API_KEY, OPERATIONS

if TYPE_CHECKING:
    from types import TracebackType

    from .server import Server


def httpx_client(connections: int) -> httpx.AsyncClient:
    """Make a client that keeps this many connections open, also between its turns."""
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=None)
    return httpx.AsyncClient(headers=HEADERS, limits=limits, trust_env=False)


def httpx2_client(connections: int) -> httpx2.AsyncClient:
    """Make a client as `httpx_client` does, of the package that continues httpx."""
    limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=None)
    return httpx2.AsyncClient(headers=HEADERS, limits=limits, trust_env=False)


def niquests_session(connections: int) -> niquests.AsyncSession:
    """Make a session that keeps this many connections open."""
    session = niquests.AsyncSession(pool_maxsize=connections, headers=HEADERS)
    session.trust_env = False  # otherwise it searches the environment for proxies on each call
    return session


class ContentClient:
    """httpx, httpx2 or niquests, which share the methods used here."""

    def __init__(self, session: httpx.AsyncClient | httpx2.AsyncClient | niquests.AsyncSession, server: Server) -> None:
        self._session = session
        self._base = server.base_url + OPERATIONS

    async def get_operation(self, operation_id: str) -> PlainOperation:
        """Get an operation."""
        url = self._base + quote(operation_id, safe="")
        response = await self._session.get(url)
        if response.status_code != 200:
            raise RuntimeError(f"{url} answered {response.status_code}")
        return decode(response.content or b"")


class MinimalClient:
    """The minimum: keep-alive, request, decode. No timeouts, limits, TLS, redirects or chunked bodies."""

    def __init__(self, server: Server) -> None:
        self._port = server.port
        host = f"127.0.0.1:{server.port}"
        self._head = f"GET {OPERATIONS}".encode()
        self._tail = f" HTTP/1.1\r\nHost: {host}\r\nX-Api-Key: {API_KEY}\r\n\r\n".encode()
        self._connections: list[_Connection] = []
        self._idle: list[_Connection] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        for connection in self._connections:
            connection.transport.close()

    async def get_operation(self, operation_id: str) -> PlainOperation:
        """Get an operation."""
        connection = self._idle.pop() if self._idle else await self._connect()
        body = await connection.send(b"%b%b%b" % (self._head, quote(operation_id, safe="").encode(), self._tail))
        self._idle.append(connection)
        return decode(body)

    async def _connect(self) -> _Connection:
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, "127.0.0.1", self._port)
        self._connections.append(connection)
        return connection


class _Connection(asyncio.Protocol):
    """A keep-alive connection with one exchange at a time."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # a TCP transport; uvloop's is not a subclass
        self._loop = asyncio.get_running_loop()
        self._answer: asyncio.Future[bytes] | None = None

    def send(self, request: bytes) -> asyncio.Future[bytes]:
        self._received = b""
        self._answer = self._loop.create_future()
        self.transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end_of_head, body = self._received.partition(b"\r\n\r\n")
        if not end_of_head or self._answer is None or self._answer.done():
            return
        if not head.startswith(b"HTTP/1.1 200 "):
            self._answer.set_exception(RuntimeError(f"answered {head[:40]!r}"))
        elif len(body) >= int(head.partition(b"\r\nContent-Length: ")[2].partition(b"\r\n")[0]):
            self._answer.set_result(body)

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error or ConnectionError("closed before the answer"))
