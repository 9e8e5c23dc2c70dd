"""A second service, written from the vendor's documentation alone: it refuses what the documentation does not allow.

It shares no code with the library or with its sandbox, so a mistake that those two share shows here. It plays users,
devices, external users and the key set; `complaints` lists what it refused for its form.
"""

from __future__ import annotations

import base64
import json
import re
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import unquote_to_bytes

from aiohttp import web
from aiohttp.test_utils import TestServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

KEY = "the-server-key"
TENANT = "acme"
TIME = "2025-08-06T15:04:05.242194378"

USER_ID = r"(?P<user>[0-9A-F]+)"
SEGMENT = r"(?P<id>(?:[A-Za-z0-9._~-]|%[0-9A-F]{2})+)"  # RFC 3986: unreserved characters and upper-case escapes only


class StrictService:
    """Serves on loopback; a lost answer is simulated by `lose`: the next request takes effect and is not answered."""

    def __init__(self) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.external_ids: dict[str, str] = {}  # by user
        self.devices: dict[str, list[dict[str, Any]]] = {}  # by user
        self.key_set: dict[str, Any] = {"keys": []}
        self.lose: list[bool] = []  # for each request to come: whether its answer is lost
        application = web.Application(handler_args={"auto_decompress": False})
        application.router.add_route("*", "/{path:.*}", self._handle)
        self._server = TestServer(application)
        self._routes: list[tuple[str, str, Callable[[re.Match[str], web.Request], Awaitable[web.Response]]]] = [
            ("POST", rf"/v2/users/{USER_ID}/external-user", self._create),
            ("PATCH", rf"/v2/users/{USER_ID}/external-user", self._update),
            ("DELETE", rf"/v2/external-users/{SEGMENT}", self._delete_external_user),
            ("GET", rf"/v2/external-users/{SEGMENT}/users", self._find),
            ("DELETE", rf"/v2/users/{USER_ID}", self._delete_user),
            ("GET", rf"/v2/users/{USER_ID}/devices", self._get_devices),
            ("DELETE", rf"/v2/users/{USER_ID}/devices/{SEGMENT}", self._delete_device),
            ("GET", rf"/customers/{TENANT}/\.well-known/jwks\.json", self._get_keys),
        ]

    async def __aenter__(self) -> Self:
        await self._server.start_server()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.close()

    @property
    def url(self) -> str:
        return str(self._server.make_url("")).rstrip("/")

    def enroll(self, user_id: str, key: bytes = b"\xfb\xff\xfe device") -> str:
        """Add a user with one device, and return the public signing key of that."""
        signing_key = base64.b64encode(key).decode()
        self.devices.setdefault(user_id, []).append(
            {
                "userId": user_id,
                "sdkCustomerId": 1,
                "publicSigningKey": signing_key,
                "publicEncryptionKey": base64.b64encode(b"another key").decode(),
                "state": "ACTIVE",
                "createdAt": TIME,
                "osVersion": "15",
                "info": "deprecated",
            }
        )
        return signing_key

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.raw_path}")
        answer = await self._answer(request)
        if self.lose and self.lose.pop(0):
            assert request.transport is not None
            request.transport.abort()
        return answer

    async def _answer(self, request: web.Request) -> web.Response:
        for method, pattern, handler in self._routes:
            match = re.fullmatch(pattern, request.raw_path)
            if match is not None and method == request.method:
                if handler != self._get_keys:
                    self._check_headers(request)
                elif "X-Api-Key" in request.headers:
                    self.complaints.append("the API key was sent for the public keys")
                return await handler(match, request)
        self.complaints.append(f"{request.method} {request.raw_path} is not documented")
        return web.json_response({"error": "no such endpoint"}, status=404)

    def _check_headers(self, request: web.Request) -> None:
        if request.headers.getall("X-Api-Key", []) != [KEY]:
            self.complaints.append("X-Api-Key must be there once, and right")
        if request.headers.get("Accept") != "application/json":
            self.complaints.append("Accept must admit application/json")
        if (request.method in {"POST", "PATCH"}) != (request.headers.get("Content-Type") == "application/json"):
            self.complaints.append("Content-Type must be application/json if and only if there is a body")

    async def _external_id(self, request: web.Request) -> str:
        body = json.loads(await request.read())
        if set(body) != {"externalUserId"} or not isinstance(body["externalUserId"], str):
            self.complaints.append(f"the body must hold an externalUserId and nothing else: {body}")
        external_id: str = body["externalUserId"]
        return external_id

    async def _create(self, match: re.Match[str], request: web.Request) -> web.Response:
        external_id = await self._external_id(request)
        if match["user"] not in self.devices:
            return _error(404)
        if match["user"] in self.external_ids:
            return _error(409)
        return self._set(match["user"], external_id, status=201)

    async def _update(self, match: re.Match[str], request: web.Request) -> web.Response:
        external_id = await self._external_id(request)
        return self._set(match["user"], external_id, status=200) if match["user"] in self.devices else _error(404)

    def _set(self, user: str, external_id: str, *, status: int) -> web.Response:
        self.external_ids[user] = external_id
        answer = {"sdkCustomerId": 1, "userId": user, "externalUserId": external_id}
        return web.json_response({**answer, "createdAt": TIME, "updatedAt": TIME}, status=status)

    async def _delete_external_user(self, match: re.Match[str], _request: web.Request) -> web.Response:
        gone = _text(match["id"])
        self.external_ids = {user: external for user, external in self.external_ids.items() if external != gone}
        return web.Response(status=204)

    async def _find(self, match: re.Match[str], _request: web.Request) -> web.Response:
        wanted = _text(match["id"]).lower()
        users = [user for user, external in self.external_ids.items() if external.lower() == wanted]
        return web.json_response(
            [
                {"userId": user, "biometricPublicSigningKey": "a2V5", "createdAt": TIME, "updatedAt": TIME}
                for user in users
            ]
        )

    async def _delete_user(self, match: re.Match[str], _request: web.Request) -> web.Response:
        self.external_ids.pop(match["user"], None)
        return _error(404) if self.devices.pop(match["user"], None) is None else web.json_response({"success": True})

    async def _get_devices(self, match: re.Match[str], _request: web.Request) -> web.Response:
        return web.json_response(self.devices[match["user"]]) if match["user"] in self.devices else _error(404)

    async def _delete_device(self, match: re.Match[str], _request: web.Request) -> web.Response:
        devices = self.devices.get(match["user"], [])
        kept = [device for device in devices if device["publicSigningKey"] != _text(match["id"])]
        if len(kept) == len(devices):
            return _error(404)
        self.devices[match["user"]] = kept
        return web.json_response({"success": True})

    async def _get_keys(self, _match: re.Match[str], _request: web.Request) -> web.Response:
        return web.json_response(self.key_set)


def _text(segment: str) -> str:
    return unquote_to_bytes(segment).decode("utf-8")


def _error(status: int) -> web.Response:
    return web.json_response({"error": "the shape of this is not documented"}, status=status)
