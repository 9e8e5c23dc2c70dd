"""``/healthz``: whether a worker works, for whoever starts and stops it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from .messages import BrokerError

if TYPE_CHECKING:
    from .service import ApprovalWorker


async def serve_health(worker: ApprovalWorker, port: int, host: str = "127.0.0.1") -> web.AppRunner:
    """Serve ``GET /healthz``: 200 while the worker takes requests, 503 while the broker is away or the worker ends.

    That Keyless is down makes no worker unhealthy: another one would fare no better. The body, JSON, tells it.

    Args:
        worker: The worker.
        port: Port to listen on; 0 takes a free one.
        host: Address to listen on. Default: this machine only.

    Returns:
        What serves; the caller ends it with ``await runner.cleanup()``.

    Raises:
        BrokerError: The port cannot be had.
    """

    async def healthz(_request: web.Request) -> web.Response:
        statistics = worker.statistics
        body = {"status": "ok" if statistics.is_ready else "unavailable", **msgspec.structs.asdict(statistics)}
        status = 200 if statistics.is_ready else 503
        return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        raise BrokerError(f"cannot serve /healthz on {host} port {port}: {error.strerror}") from None
    return runner
