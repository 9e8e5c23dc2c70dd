"""``/livez``, ``/readyz`` and ``/healthz``: whether a worker works, for the orchestrator that starts and stops it."""

from __future__ import annotations

import logging
from typing import Final

import msgspec
from aiohttp import web

from aiokeyless.errors import BrokerError

from .approval_worker import ApprovalWorker

#: aiohttp logs a traceback for each malformed request, and any client can send one.
_SILENT: Final = logging.Logger(__name__, logging.CRITICAL)  # noqa: LOG001  # of this server alone


async def serve_health(worker: ApprovalWorker, port: int, host: str = "127.0.0.1") -> web.AppRunner:
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

    async def livez(_request: web.Request) -> web.Response:
        return _close_after(web.Response(text="ok\n"))

    async def readyz(_request: web.Request) -> web.Response:
        problems = worker.statistics.problems
        lines = problems or ("ok",)
        return _close_after(web.Response(text="".join(f"{line}\n" for line in lines), status=503 if problems else 200))

    async def healthz(_request: web.Request) -> web.Response:
        statistics = worker.statistics
        status, text = (200, "ok") if statistics.is_ready else (503, "unavailable")
        body = msgspec.json.encode({"status": text, **msgspec.to_builtins(statistics)})
        return _close_after(web.Response(body=body, status=status, content_type="application/json"))

    app = web.Application()
    app.router.add_get("/livez", livez)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/healthz", healthz)
    runner = web.AppRunner(app, access_log=None, logger=_SILENT)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        raise BrokerError(f"cannot serve the probes on {host} port {port}: {error.strerror}") from None
    return runner


def _close_after(response: web.Response) -> web.Response:
    """Let a response close its connection."""
    response.force_close()
    return response
