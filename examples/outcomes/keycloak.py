"""Keycloak's HTTP authentication channel (CIBA): Keycloak asks here, and gets what the user decided."""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator

import aiohttp
from aiohttp import web

from aiokeyless import ApprovalTicket, KeylessClient

CALLBACK = "{realm}/protocol/openid-connect/ext/ciba/auth/callback"
log = logging.getLogger("keycloak")
USERS = {"alice": "C0FFEE"}  # your own record: the Keyless user of each user name at Keycloak


def notify_phone(ticket: ApprovalTicket) -> None:
    """Send a push notification: your own function. Catch here what the push service raises."""
    print(f"push to {ticket.user_id}: {ticket.operation_id}")


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
        wanted = await request.json()
        user_id, message = USERS.get(wanted["login_hint"]), wanted.get("binding_message")
        if user_id is None:
            raise web.HTTPNotFound
        payload = f"Log in, {message}" if message else "Log in"
        self.logins.create_task(self.log_in(user_id, payload, request.headers["Authorization"]))
        return web.Response(status=201)

    async def log_in(self, user_id: str, payload: str, bearer: str) -> None:
        """Ask the user, and post the result to Keycloak, once."""
        status = "SUCCEED"
        try:
            await self.keyless.request_approval(
                user_id, operation_payload=payload, expires_in=110, require_auth_type="biom", on_created=notify_phone
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
