"""A server on loopback that answers with any bytes, or with none, and tells what it was sent: for the tests of HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
from typing import TYPE_CHECKING, Self

import msgspec
import pytest
from ports import own_port

from aiokeyless import KeylessError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable, Iterator

    Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class RawServer:
    """Answers each request with the next of its answers, with the last one from then on.

    Bytes are sent as they are and the connection is closed; a handler is given the streams, and the connection is
    closed when it returns.
    """

    def __init__(self, *answers: bytes | Handler, tls: ssl.SSLContext | None = None) -> None:
        self._answers = list(answers)
        self._tls = tls
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._news = asyncio.Condition()
        self.url = ""
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []

    @property
    def connections(self) -> int:
        """How many connections are open now."""
        return len(self._tasks)

    @property
    def methods(self) -> list[str]:
        """The methods of the requests that came, in order."""
        return [head.split()[0].decode() for head in self.heads]

    async def asked(self, times: int) -> None:
        """Wait until it was asked so many times, while the loop's clock goes on."""
        async with self._news:
            await self._news.wait_for(lambda: len(self.heads) >= times)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=self._tls)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for _turn in range(3):  # what was accepted just now still arrives at _connected
            await asyncio.sleep(0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:  # a task that was cancelled before it began closed nothing
            writer.transport.abort()
        await asyncio.sleep(0)
        await self._server.wait_closed()

    async def stop_listening(self) -> None:
        """Refuse connections from now on."""
        assert self._server is not None
        self._server.close()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        self._writers.add(writer)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            # The client leaves whenever it likes; that is no failure of the server's.
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                head = await reader.readuntil(b"\r\n\r\n")
                length = _LENGTH.search(head)
                body = await reader.readexactly(int(length[1])) if length else b""
                self.heads.append(head)
                self.bodies.append(body)
                async with self._news:
                    self._news.notify_all()
                answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
                if isinstance(answer, bytes):
                    writer.write(answer)
                    await writer.drain()
                else:
                    await answer(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            self._writers.discard(writer)


def answer(body: bytes = b"", *headers: bytes, status: bytes = b"200 OK", length: int | None = None) -> bytes:
    """Build the bytes of an answer, as a rule of a right one, that closes the connection."""
    size = b"Content-Length: %d" % (len(body) if length is None else length)
    return b"\r\n".join([b"HTTP/1.1 " + status, size, b"Connection: close", *headers, b"", body])


def operation(**fields: object) -> bytes:
    """Build the body of a right answer to `get_operation`, with other fields where they are given."""
    plain = {
        "id": 1,
        "timestamp": "2020-01-02T03:04:05.68",
        "nodeId": "n",
        "userId": "C0FFEE",
        "apiKey": "sdk-key",
        "operationId": "a",
        "result": False,
        "state": "pending",
    }
    return msgspec.json.encode(plain | fields)


def kept_open(name: str) -> bytes:
    """Build the bytes of a right answer about this operation that leaves the connection open."""
    body = operation(operationId=name)
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


async def hang(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    """Answer nothing, until the client leaves."""
    await reader.read()


def then_hang(start: bytes) -> Handler:
    """Answer the start of something, and no more."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(start)
        await hang(reader, writer)

    return handler


def drip(start: bytes, drop: bytes, every: float = 0.25) -> Handler:
    """Answer without end, a drop at a time."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(start)
        while not reader.at_eof():
            writer.write(drop)
            await writer.drain()
            await asyncio.sleep(every)

    return handler


def tunnel_to(server: RawServer) -> Handler:
    """Connect to this server as a proxy does, whatever the name that is asked for."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
        there, back = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
        await asyncio.gather(_copy(reader, back), _copy(there, writer))

    return handler


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(1 << 16):
                sink.write(data)
    finally:
        sink.close()


async def reset(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reset the connection."""
    peer: socket.socket = writer.get_extra_info("socket")
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextlib.contextmanager
def unanswered() -> Iterator[str]:
    """Give the URL of a host to which nobody can connect, and who does not refuse either."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):  # the queue of a listener who accepts nobody is full then
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)  # noqa: FBT003  # the socket's own way
            caller.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def refused() -> str:
    """Give the URL of a port at which nobody listens."""
    return f"http://127.0.0.1:{own_port()}"


def now() -> float:
    """Return the loop's time."""
    return asyncio.get_running_loop().time()


async def failure(call: Awaitable[object]) -> KeylessError:
    """Return the error with which a call fails."""
    with pytest.raises(KeylessError) as caught:
        await call
    return caught.value
