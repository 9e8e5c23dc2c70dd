"""A TCP proxy between a client and a service that breaks connections in every way that networks do.

It knows nothing of HTTP: faults strike bytes. Requests are never changed, only kept from arriving whole: a request that
arrives as another one is what TLS prevents.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Self, cast

if TYPE_CHECKING:
    import random

#: Makes the end of a connection a reset: no data that is still under way, no goodbye.
_RESET: Final = struct.pack("ii", 1, 0)


class Fault(StrEnum):
    """What happens to bytes under way."""

    DROP = "drop"  # they vanish, and so does all that follows; the connection stays open
    RESET = "reset"  # both ends are told that the connection was reset
    DELAY = "delay"
    HALF_CLOSE = "half-close"  # the receiver is told that nothing more follows, and may go on sending
    GARBAGE = "garbage"  # random bytes in their place
    EXTRA = "extra garbage"  # random bytes after them
    TRUNCATION = "truncation"  # the first part of them, then the end of the connection


#: What can happen to the bytes of a request.
REQUEST_FAULTS: Final = (Fault.DROP, Fault.RESET, Fault.DELAY, Fault.TRUNCATION)
ANSWER_FAULTS: Final = tuple(Fault)


class FaultyProxy:
    """Forwards connections to the port `target`, with faults that hit this share of the chunks of bytes.

    While there is no target, each connection is reset at once. Target and rate may be changed at any time.
    """

    def __init__(self, source: random.Random, *, rate: float = 0.0, longest_delay: float = 3.0) -> None:
        self.target: int | None = None
        self.rate = rate
        self.counts: Counter[Fault] = Counter()
        self.connections = 0
        self.source = source
        self._longest_delay = longest_delay
        self._server: asyncio.Server | None = None
        self.open_ends: set[_End] = set()
        self._connecting: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _End(self, ANSWER_FAULTS), "127.0.0.1", 0, backlog=1024)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._connecting:
            task.cancel()
        self.reset_all()
        await asyncio.gather(*self._connecting, return_exceptions=True)
        await asyncio.sleep(0)  # aborted transports close their sockets in the next turn

    @property
    def url(self) -> str:
        """The base URL for a client."""
        if self._server is None:
            raise RuntimeError("the proxy is not open")
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def reset_all(self) -> None:
        """Reset all connections that are open now."""
        for end in list(self.open_ends):
            end.reset()

    def draw(self, faults: tuple[Fault, ...]) -> Fault | None:
        """Return what happens to the next bytes, and count it; None: they are forwarded as they are."""
        if self.source.random() >= self.rate:
            return None
        fault = self.source.choice(faults)
        self.counts[fault] += 1
        return fault

    def delay(self) -> float:
        """Return how many seconds bytes are delayed."""
        return self.source.uniform(0.0, self._longest_delay)

    def connect(self, client: _End) -> None:
        """Connect a client, which was just accepted, to the service."""
        self.connections += 1
        task = asyncio.get_running_loop().create_task(self._connect(client))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, client: _End) -> None:
        if self.target is None:
            client.reset()
            return
        try:
            _, service = await asyncio.get_running_loop().create_connection(
                lambda: _End(self, REQUEST_FAULTS, client), "127.0.0.1", self.target
            )
        except OSError:
            client.reset()
        else:
            client.join(service)


class _End(asyncio.Protocol):
    """One end of a forwarded connection; without another one it is the client's, and there is no connection yet."""

    def __init__(self, proxy: FaultyProxy, faults: tuple[Fault, ...], other: _End | None = None) -> None:
        self._proxy = proxy
        self._faults = faults
        self._other = other
        self._early = b""  # what arrived before there was another end
        self._dead = False  # nothing more is sent to this end
        self._gone = False
        self._delayed: list[bytes] | None = None  # what waits for the end of a delay, in order

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._proxy.open_ends.add(self)
        if self._other is None:
            self._proxy.connect(self)

    def join(self, other: _End) -> None:
        """Take the other end, once there is one, and give it what arrived so far."""
        self._other = other
        if self._gone:
            other.reset()
        elif self._early:
            other.send(self._early)
            self._early = b""

    def data_received(self, data: bytes) -> None:
        if self._other is None:
            self._early += data
        else:
            self._other.send(data)

    def send(self, data: bytes) -> None:
        """Send bytes to this end, or let something happen to them."""
        if self._dead:
            return
        if self._delayed is not None:
            self._delayed.append(data)
            return
        fault = self._proxy.draw(self._faults)
        if fault is None:
            self._transport.write(data)
        else:
            self._strike(fault, data)

    def _strike(self, fault: Fault, data: bytes) -> None:
        match fault:
            case Fault.DROP:
                self._dead = True
            case Fault.RESET:
                self.reset()
            case Fault.DELAY:
                self._delayed = [data]
                asyncio.get_running_loop().call_later(self._proxy.delay(), self._send_delayed)
            case Fault.HALF_CLOSE:
                self._dead = True
                self._transport.write_eof()
            case Fault.GARBAGE:
                self._transport.write(self._garbage())
            case Fault.EXTRA:
                self._transport.write(data + self._garbage())
            case Fault.TRUNCATION:
                self._transport.write(data[: self._proxy.source.randrange(len(data))])
                self.close()

    def _garbage(self) -> bytes:
        return self._proxy.source.randbytes(self._proxy.source.randrange(1, 200))

    def _send_delayed(self) -> None:
        delayed, self._delayed = self._delayed or [], None
        if not self._dead:
            self._transport.write(b"".join(delayed))

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, _error: Exception | None) -> None:
        self._gone = self._dead = True
        self._proxy.open_ends.discard(self)
        if self._other is not None:
            self._other.close()

    def close(self) -> None:
        """Close this end, once what was sent to it has left."""
        self._dead = True
        self._transport.close()

    def reset(self) -> None:
        """Reset both ends."""
        self.abort()
        if self._other is not None:
            self._other.abort()

    def abort(self) -> None:
        """Reset this end."""
        self._dead = True
        if not self._transport.is_closing():
            peer = self._transport.get_extra_info("socket")
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._transport.abort()
