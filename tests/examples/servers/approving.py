"""What web servers run in `test_servers.py`: one client that was made at import, and an approval in each request."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from tenacity.wait import wait_fixed

from aiokeyless import ConfigurationError
from aiokeyless.sync import KeylessClient

if TYPE_CHECKING:
    from collections.abc import Callable

keyless = KeylessClient(schedule=wait_fixed(0.1))
if os.environ.get("CALL_AT_IMPORT"):  # with --preload that is before the fork
    keyless.get_pending_operations("C0FFEE")


def wsgi(_environment: dict[str, Any], start_response: Callable[..., object]) -> list[bytes]:
    """Answer with the state of an approval and the number of the process."""
    operation = keyless.request_approval("C0FFEE")
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{operation.state} {os.getpid()}".encode()]


async def asgi(scope: dict[str, Any], _receive: object, send: Callable[[dict[str, Any]], Any]) -> None:
    """Answer with what a call in the thread of the event loop raises, and with what one in another thread returns."""
    if scope["type"] != "http":
        return
    try:
        refused = repr(keyless.get_pending_operations("C0FFEE"))
    except ConfigurationError as error:
        refused = str(error)
    operation = await asyncio.to_thread(keyless.request_approval, "C0FFEE")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": f"{refused} / {operation.state}".encode()})
