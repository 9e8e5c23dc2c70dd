"""``/livez``, ``/readyz`` and ``/healthz``: whether a worker works, for the orchestrator that starts and stops it."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import msgspec
from aiohttp import web

from aiokeyless.errors import BrokerError

from .approval_worker import ApprovalWorker

#: Seconds after which a connection is closed. aiohttp keeps one that sends no request forever, and each takes one of
#: the descriptors that the worker's polls need.
_LASTS: Final = 10.0
#: Connections that may wait to be accepted. asyncio logs this many tracebacks at once if there is no descriptor left.
_BACKLOG: Final = 4
#: aiohttp logs a traceback for each malformed request, and any client can send one.
_SILENT: Final = logging.Logger(__name__, logging.CRITICAL)  # noqa: LOG001  # of this server alone


async def serve_health(worker: ApprovalWorker, port: int, host: str = "127.0.0.1") -> web.BaseRunner:
    """Serve an orchestrator's probes, by GET.

    ``/livez`` answers 200 while the event loop of the process runs. ``/readyz`` answers 200 while the worker takes
    requests, and else 503 with a line for each of its problems. ``/healthz`` has the status of ``/readyz``, and the
    worker's statistics as JSON.

    Restart a worker only if ``/livez`` fails. If the broker is away or full, a restart does not help.

    Args:
        worker: The worker.
        port: Port to listen on; 0 takes a free one.
        host: Address to listen on. Default: this machine only.

    Returns:
        The server's runner. The caller ends it with ``await runner.cleanup()``; its ``addresses`` say where it listens.

    Raises:
        BrokerError: The port cannot be bound.
    """

    async def answer(request: web.BaseRequest) -> web.Response:
        response = _answer(worker, request)
        response.force_close()  # ends the connection after it
        return response

    runner = web.ServerRunner(_Server(answer, access_log=None, logger=_SILENT))
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, backlog=_BACKLOG).start()
    except OSError as error:
        await runner.cleanup()
        raise BrokerError(f"cannot serve the probes on {host} port {port}: {error.strerror}") from None
    return runner


class _Server(web.Server):
    """A server whose connections end after `_LASTS`."""

    def __call__(self) -> web.RequestHandler:
        connection = super().__call__()
        asyncio.get_running_loop().call_later(_LASTS, connection.force_close)
        return connection


def _answer(worker: ApprovalWorker, request: web.BaseRequest) -> web.Response:
    if request.path not in {"/livez", "/readyz", "/healthz"}:
        return web.Response(text="not found\n", status=404)
    if request.method not in {"GET", "HEAD"}:
        return web.Response(text="use GET\n", status=405, headers={"Allow": "GET, HEAD"})
    if request.path == "/livez":
        return web.Response(text="ok\n")
    statistics = worker.statistics
    status, text = (200, "ok") if statistics.is_ready else (503, "unavailable")
    if request.path == "/readyz":
        return web.Response(text="".join(f"{line}\n" for line in statistics.problems or ("ok",)), status=status)
    body = msgspec.json.encode({"status": text, **msgspec.to_builtins(statistics)})
    return web.Response(body=body, status=status, content_type="application/json")
