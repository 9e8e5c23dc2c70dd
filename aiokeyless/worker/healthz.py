"""``/livez``, ``/readyz`` and ``/healthz``: whether a worker works, for the orchestrator that starts and stops it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import msgspec
from aiohttp import web

from aiokeyless.errors import BrokerError

from .logs import Seldom

if TYPE_CHECKING:
    from .service import ApprovalWorker

_MAX_LINE: Final = 4 << 10  # bytes of a line of the request's head
_MAX_HEADERS: Final = 64


async def serve_health(worker: ApprovalWorker, port: int, host: str = "127.0.0.1") -> web.AppRunner:
    """Serve what an orchestrator asks for, by GET.

    ``/livez`` answers 200 while the event loop of the process turns. ``/readyz`` answers 200 while the worker takes
    requests, and else 503 with a line for each of its problems. ``/healthz`` has the status of ``/readyz``, and the
    worker's statistics as JSON.

    Restart a worker by ``/livez`` alone: if the broker is away or full, another one would fare no better.

    Args:
        worker: The worker.
        port: Port to listen on; 0 takes a free one.
        host: Address to listen on. Default: this machine only.

    Returns:
        What serves; the caller ends it with ``await runner.cleanup()``. Its ``addresses`` say where it listens.

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
        body = {"status": "ok" if statistics.is_ready else "unavailable", **msgspec.to_builtins(statistics)}
        status = 200 if statistics.is_ready else 503
        return _once(web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json"))

    app = web.Application()
    app.router.add_get("/livez", livez)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/healthz", healthz)
    runner = web.AppRunner(
        app,
        access_log=None,
        logger=_bad_requests(),
        max_line_size=_MAX_LINE,
        max_field_size=_MAX_LINE,
        max_headers=_MAX_HEADERS,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        raise BrokerError(f"cannot serve the probes on {host} port {port}: {error.strerror}") from None
    return runner


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
