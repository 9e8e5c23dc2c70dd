"""Keycloak's HTTP authentication channel (CIBA): Keycloak asks here, and gets what the user decided."""

import asyncio
import base64
import json
import logging
import os
from collections.abc import AsyncGenerator
from typing import Any

import aiohttp
from aiohttp import web

from aiokeyless import ApprovalTicket, KeylessClient

CALLBACK = "{realm}/protocol/openid-connect/ext/ciba/auth/callback"
log = logging.getLogger("keycloak")
USERS = {"alice": "C0FFEE"}  # your own record: the Keyless user of each user name at Keycloak


def notify_phone(ticket: ApprovalTicket) -> None:
    """Send a push notification: your own function. Catch here what the push service raises."""
    print(f"push to {ticket.user_id}: {ticket.operation_id}")


def question(wanted: dict[str, Any], bearer: str) -> str:
    """Return what the user is asked: which client wants the login, and to which scopes Keycloak stores a consent."""
    claims = bearer.split(".")[1]  # of a signed token, which Keycloak verifies when it gets the result
    parts = [f"Log in to {json.loads(base64.urlsafe_b64decode(claims + '=='))['azp']}"]
    if message := wanted.get("binding_message"):
        parts.append(message)
    if wanted["is_consent_required"]:  # or a text that the client added under this name: none makes it false
        parts.append(f"and allow {' '.join(dict.fromkeys(wanted['scope'].split()))}")
    return ", ".join(parts)


class Channel:
    """Answers Keycloak's requests. Each login is a task."""

    async def connect(self, _app: web.Application) -> AsyncGenerator[None]:
        """Keep the connections. At the end the client closes first, so the logins that wait are refused."""
        self.callback = CALLBACK.format(realm=os.environ["KEYCLOAK_REALM"])
        async with aiohttp.ClientSession() as self.http, asyncio.TaskGroup() as self.logins, KeylessClient() as keyless:
            self.keyless = keyless
            yield

    async def delegate(self, request: web.Request) -> web.Response:
        """Receive an authentication delegation request: answer it at once, and ask the user meanwhile."""
        wanted, bearer = await request.json(), request.headers["Authorization"]
        user_id = USERS.get(wanted["login_hint"])
        if user_id is None:
            raise web.HTTPNotFound
        self.logins.create_task(self.log_in(user_id, wanted, bearer))
        return web.Response(status=201)

    async def log_in(self, user_id: str, wanted: dict[str, Any], bearer: str) -> None:
        """Ask the user, and post the result to Keycloak, once."""
        status = "SUCCEED"
        try:
            await self.keyless.request_approval(
                user_id,
                operation_payload=question(wanted, bearer),
                expires_in=110,
                require_auth_type="biom",
                on_created=notify_phone,
            )
        except Exception as error:  # noqa: BLE001  # also of the push service: one login ends no other
            log.warning("not logged in: %r", error)
            status = "UNAUTHORIZED"
        headers = {"Authorization": bearer}
        try:
            async with self.http.post(self.callback, json={"status": status}, headers=headers) as answer:
                answer.raise_for_status()
        except (aiohttp.ClientError, TimeoutError) as error:  # its repr would show the token
            log.warning("Keycloak did not take the result: %s %s", type(error).__name__, error)


def make_app() -> web.Application:
    """Return the server."""
    app, channel = web.Application(), Channel()
    app.cleanup_ctx.append(channel.connect)
    app.add_routes([web.post("/delegate", channel.delegate)])
    return app


if __name__ == "__main__":
    web.run_app(make_app(), host="127.0.0.1", port=int(os.environ.get("PORT", "8000")))
