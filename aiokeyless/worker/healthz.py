"""``/livez``, ``/readyz`` and ``/healthz``: whether a worker works, for the orchestrator that starts and stops it.

Anything that reaches the port can connect, and takes descriptors that the exchanges with Keyless need. So few
connections are open at once, each for a short time, whatever is sent over them.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING, Final

import msgspec
from aiohttp import web

from aiokeyless.errors import BrokerError

from .logs import Seldom

if TYPE_CHECKING:
    from .service import ApprovalWorker

_MOST_CONNECTIONS: Final = 32
_LIFETIME: Final = 2.0  # seconds that a connection has, for its request and the answer together
_MAX_LINE: Final = 4 << 10  # bytes of a line of the request's head
_MAX_HEADERS: Final = 64
_BACKLOG: Final = 128
_PAUSE: Final = 1.0  # seconds, where the process has no descriptor left


async def serve_health(worker: ApprovalWorker, port: int, host: str = "127.0.0.1") -> HealthServer:
    """Serve what an orchestrator asks for, by GET.

    ``/livez`` answers 200 while the event loop of the process turns. ``/readyz`` answers 200 while the worker takes
    requests, and else 503 with a line for each of its problems. ``/healthz`` has the status of ``/readyz``, and the
    worker's statistics as JSON.

    Restart a worker by ``/livez`` alone: where the broker is away or a stream is full, another one would fare no
    better. It is ready while Keyless is down, for the same reason.

    Args:
        worker: The worker.
        port: Port to listen on; 0 takes a free one.
        host: Address to listen on. Default: this machine only.

    Returns:
        What serves; the caller ends it with ``await server.cleanup()``.

    Raises:
        BrokerError: The port cannot be bound.
    """

    async def livez(_request: web.Request) -> web.Response:
        return _once(web.Response(text="ok\n"))

    async def readyz(_request: web.Request) -> web.Response:
        problems = worker.statistics.problems
        lines = problems or ("ok",)
        return _once(web.Response(text="".join(f"{line}\n" for line in lines), status=503 if problems else 200))

    async def healthz(_request: web.Request) -> web.Response:
        statistics = worker.statistics
        body = {"status": "ok" if statistics.is_ready else "unavailable", **msgspec.structs.asdict(statistics)}
        status = 200 if statistics.is_ready else 503
        return _once(web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json"))

    app = web.Application()
    app.router.add_get("/livez", livez)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/healthz", healthz)
    try:
        listeners = await _listen(host, port)
    except OSError as error:
        raise BrokerError(f"cannot serve the probes on {host} port {port}: {error.strerror}") from None
    runner = web.AppRunner(
        app,
        access_log=None,
        logger=_bad_requests(),
        max_line_size=_MAX_LINE,
        max_field_size=_MAX_LINE,
        max_headers=_MAX_HEADERS,
    )
    await runner.setup()
    return HealthServer(runner, listeners)


def _once(response: web.Response) -> web.Response:
    """End the connection with the answer."""
    response.force_close()
    return response


def _bad_requests() -> logging.Logger:
    """Make the logger of a server to which anything can be sent, HTTP or not: aiohttp logs a traceback each time."""
    seldom = Seldom(logging.WARNING, "healthz.bad_request")

    def log_seldom(record: logging.LogRecord) -> bool:
        error = record.exc_info[0] if record.exc_info else None
        seldom.log({"error": record.getMessage() if error is None else error.__name__})
        return False

    logger = logging.Logger(__name__)  # noqa: LOG001  # not the process's: of this server alone
    logger.addFilter(log_seldom)
    return logger


async def _listen(host: str, port: int) -> list[socket.socket]:
    """Listen on each address of a host, as asyncio's own servers do."""
    loop = asyncio.get_running_loop()
    listeners: list[socket.socket] = []
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    try:
        for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
            listener = socket.create_server(address, family=family, backlog=_BACKLOG)
            listener.setblocking(False)  # noqa: FBT003  # a positional argument of the standard library's
            listeners.append(listener)
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


class HealthServer:
    """What serves the probes.

    asyncio's own servers take connections without a bound, and log it 128 times a second, and more each second, while
    no descriptor is left. So connections are accepted here.

    Args:
        runner: What answers, set up.
        listeners: Where it listens.
    """

    def __init__(self, runner: web.AppRunner, listeners: list[socket.socket]) -> None:
        assert runner.server is not None  # noqa: S101  # it was set up
        self._runner = runner
        self._answer = runner.server
        self._listeners = listeners
        self._refused = Seldom(logging.WARNING, "healthz.refused")
        loop = asyncio.get_running_loop()
        self._accepting = [loop.create_task(self._accept(listener)) for listener in listeners]

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Where it listens: host and port of each socket."""
        return [listener.getsockname()[:2] for listener in self._listeners]

    async def cleanup(self) -> None:
        """End it, and the connections that are open."""
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        for listener in self._listeners:
            listener.close()
        await self._runner.cleanup()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:  # no descriptor is left
                self._refused.log({"error": f"{type(error).__name__}: {error}"})
                await asyncio.sleep(_PAUSE)
                continue
            if len(self._answer.connections) >= _MOST_CONNECTIONS:
                connection.close()
                self._refused.log({"error": f"{_MOST_CONNECTIONS} connections are open"})
                await asyncio.sleep(0)  # accepting does not wait where many come at once: others have their turn
            else:
                transport, _ = await loop.connect_accepted_socket(self._answer, connection)
                loop.call_later(_LIFETIME, transport.abort)
