"""A long poll on Django: `uvicorn django_app:application`. In a project the last function is in asgi.py."""

import os
from collections.abc import Awaitable, Callable
from functools import cache
from typing import Any

from approvals import USER, ask, state
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.handlers.asgi import ASGIRequest
from django.http import JsonResponse
from django.urls import path
from django.views.decorators.http import require_http_methods

from aiokeyless import KeylessClient
from aiokeyless.shutdown import close_on_signals

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


@cache
def keyless() -> KeylessClient:
    """Return the client of this process. In a project it has a module of its own; tests replace it."""
    return KeylessClient()


@require_http_methods(["GET", "POST"])
async def approval(request: ASGIRequest, order: str) -> JsonResponse:
    """Ask the user, or answer a long poll."""
    view = ask if request.method == "POST" else state  # a POST, so that your project's CSRF middleware guards it
    answer, status = await view(keyless(), USER, order)
    return JsonResponse(answer, status=status)


urlpatterns = [path("approvals/<order>", approval)]

settings.configure(
    ROOT_URLCONF=__name__, ALLOWED_HOSTS=["127.0.0.1"], SECRET_KEY=os.environ.get("DJANGO_SECRET_KEY", "only here")
)
django = get_asgi_application()


async def application(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Serve the ASGI lifespan, which Django does not: make the client, and close it when the signal arrives."""
    if scope["type"] != "lifespan":
        await django(scope, receive, send)
        return
    await receive()  # the server starts
    async with keyless() as client, close_on_signals(client):
        await send({"type": "lifespan.startup.complete"})
        await receive()  # it has waited for its requests
    await send({"type": "lifespan.shutdown.complete"})
