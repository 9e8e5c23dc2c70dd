"""Keycloak's HTTP authentication channel (CIBA): Keycloak asks here, and gets what the user decided."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator
from typing import Any

import aiohttp
import jwt
import jwt.types
from aiohttp import web

from aiokeyless import ApprovalTicket, KeylessClient

REALM = "{realm}/protocol/openid-connect"
CALLBACK, KEYS = f"{REALM}/ext/ciba/auth/callback", f"{REALM}/certs"
log = logging.getLogger("keycloak")
USERS = {"alice": "C0FFEE"}  # your own record: the Keyless user of each user name at Keycloak


def notify_phone(ticket: ApprovalTicket) -> None:
    """Send a push notification: your own function. Catch here what the push service raises."""
    print(f"push to {ticket.user_id}: {ticket.operation_id}")


def question(wanted: dict[str, Any], client: str) -> str:
    """Return what the user is asked: which client wants the login, and to which scopes Keycloak stores a consent."""
    parts = [f"Log in to {client}"]
    if message := wanted.get("binding_message"):
        parts.append(message)
    if wanted["is_consent_required"]:  # or a text that the client added under this name: none makes it false
        parts.append(f"and allow {' '.join(dict.fromkeys(wanted['scope'].split()))}")
    return ", ".join(parts)


class Channel:
    """Answers Keycloak's requests. Each login is a task."""

    async def connect(self, _app: web.Application) -> AsyncGenerator[None]:
        """Keep the connections. At the end the client closes first, so the logins that wait are refused."""
        self.realm = os.environ["KEYCLOAK_REALM"]
        self.keys: dict[str, jwt.PyJWK] = {}
        self.fetch_after = 0.0
        async with aiohttp.ClientSession() as self.http, asyncio.TaskGroup() as self.logins, KeylessClient() as keyless:
            self.keyless = keyless
            yield

    async def delegate(self, request: web.Request) -> web.Response:
        """Receive an authentication delegation request: answer it at once, and ask the user meanwhile."""
        bearer = request.headers.get("Authorization", "")
        client = await self.verify(bearer.removeprefix("Bearer "))
        wanted = await request.json()
        user_id = USERS.get(wanted["login_hint"])
        if user_id is None:
            raise web.HTTPNotFound
        self.logins.create_task(self.log_in(user_id, wanted, client, bearer))
        return web.Response(status=201)

    async def verify(self, token: str) -> str:
        """Return which client wants the login. Only Keycloak signs a token for itself: users have others of its."""
        try:
            key = await self.find_key(jwt.get_unverified_header(token)["kid"])
            required: jwt.types.Options = {"require": ["exp", "jti"]}
            claims = jwt.decode(token, key, [key.algorithm_name], required, audience=self.realm, issuer=self.realm)
            return str(claims["azp"])
        except (jwt.PyJWTError, KeyError) as error:
            raise web.HTTPUnauthorized from error

    async def find_key(self, kid: str) -> jwt.PyJWK:
        """Return a key of the realm. For an unknown one, fetch the keys, at most once in 10 seconds."""
        if kid not in self.keys and time.monotonic() > self.fetch_after:
            self.fetch_after = time.monotonic() + 10
            async with self.http.get(KEYS.format(realm=self.realm)) as answer:
                keys = (await answer.json())["keys"]
                self.keys = {each["kid"]: jwt.PyJWK(each) for each in keys if each["use"] == "sig"}
        return self.keys[kid]

    async def log_in(self, user_id: str, wanted: dict[str, Any], client: str, bearer: str) -> None:
        """Ask the user, and post the result to Keycloak, once."""
        status = "SUCCEED"
        try:
            await self.keyless.request_approval(
                user_id,
                operation_payload=question(wanted, client),
                expires_in=110,
                require_auth_type="biom",
                on_created=notify_phone,
            )
        except Exception as error:  # noqa: BLE001  # also of the push service: one login ends no other
            log.warning("not logged in: %r", error)
            status = "UNAUTHORIZED"
        callback, headers = CALLBACK.format(realm=self.realm), {"Authorization": bearer}
        try:
            async with self.http.post(callback, json={"status": status}, headers=headers) as answer:
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
