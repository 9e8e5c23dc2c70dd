"""Services that are a sandbox but for one point: what each makes of a right answer, and which checks then differ."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

import msgspec

from aiokeyless.sandbox.api import Answer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import pytest
    from aiohttp import web

    from aiokeyless.sandbox import Sandbox


class Exchange(NamedTuple):
    """A request, what the sandbox answers to it, and what it had of the operation that the path or the body names."""

    service: Sandbox
    method: str
    path: str
    key: str | None
    body: dict[str, Any]
    before: dict[str, Any] | None
    answer: Answer

    @property
    def json(self) -> Any:
        return json.loads(self.answer.body)

    @property
    def reads(self) -> bool:
        """Whether it reads an operation that there is."""
        return self.method == "GET" and "/operations/" in self.path and "/users/" not in self.path and self.is_good

    @property
    def is_good(self) -> bool:
        return self.answer.status == 200

    def with_status(self, status: int) -> Answer:
        return self.answer._replace(status=status)

    def with_json(self, value: Any) -> Answer:
        return self.answer._replace(body=json.dumps(value).encode())

    def with_fields(self, **fields: Any) -> Answer:
        return self.with_json(self.json | fields)

    def with_headers(self, **headers: str) -> Answer:
        return self.answer._replace(headers={**self.answer.headers, **headers})


def deviate(monkeypatch: pytest.MonkeyPatch, service: Sandbox, deviation: Callable[[Exchange], Any]) -> None:
    """Let a service answer what the deviation makes of each answer; None: as it is. It may be a coroutine function."""
    take_effect: Callable[[web.Request], Awaitable[Answer]] = service._take_effect

    async def deviating(request: web.Request) -> Answer:
        body = json.loads(await request.read() or b"{}")
        operation_id = body.get("operationId") or unquote(request.raw_path.rpartition("/")[2])
        before = service.operations.get(operation_id)
        answer = await take_effect(request)
        exchange = Exchange(
            service,
            request.method,
            request.raw_path,
            request.headers.get("X-Api-Key"),
            body,
            None if before is None else before.to_dict(),
            answer,
        )
        made = deviation(exchange)
        return (await made if asyncio.iscoroutine(made) else made) or answer

    monkeypatch.setattr(service, "_take_effect", deviating)


def _is_unknown(it: Exchange) -> bool:
    return it.method == "GET" and it.path.startswith("/v2/operations/") and it.answer.status == 404


def _is_list(it: Exchange) -> bool:
    return it.path.endswith("/pending") and it.is_good


def _is_second(it: Exchange, *, is_same: bool, state: str = "pending") -> bool:
    """Whether it creates an operation under a taken id, with the same content or with other content."""
    if it.method != "POST" or it.before is None or it.before["state"] != state:
        return False
    return (it.body["operationPayload"] == it.before["operation_payload"]) is is_same


class Late:
    """A replica that does not have a new operation for two seconds."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def __call__(self, it: Exchange) -> Answer | None:
        now = asyncio.get_running_loop().time()
        if it.method == "POST":
            self._since.setdefault(it.body["operationId"], now)
        if it.reads and now - self._since[it.json["operationId"]] < 2:
            return Answer(404, b"{}")
        return None


class Forgetful:
    """A service that says once that an operation is approved."""

    def __init__(self) -> None:
        self._reads = 0

    def __call__(self, it: Exchange) -> Answer | None:
        if not it.reads or it.json["state"] != "approved":
            return None
        self._reads += 1
        return None if self._reads == 1 else it.with_fields(state="pending", result=False)


def overwrites(it: Exchange) -> None:
    if _is_second(it, is_same=False):
        it.service.tamper(it.body["operationId"], operation_payload=it.body["operationPayload"])


def ignores_case(it: Exchange) -> Answer | None:
    if _is_unknown(it) and it.path.isupper() is False and "DOCTOR" in it.path:
        found = it.service.operations[unquote(it.path.rpartition("/")[2]).swapcase()]
        return Answer(200, msgspec.json.encode(msgspec.structs.replace(found, api_key=None)))
    return None


def lists_approved(it: Exchange) -> Answer | None:
    if _is_list(it):
        approved = [o for o in it.service.operations.values() if o.state == "approved"]
        return it.with_json(it.json + [{"operationId": operation.operation_id} for operation in approved])
    return None


def hides_emoji(it: Exchange) -> Answer | None:
    payload = it.json.get("operationPayload", "") if it.reads else ""
    return it.with_fields(operationPayload=payload.replace("🦊", "?")) if "🦊" in payload else None


#: Which checks differ, and the deviation: one for each check that the service's answers decide.
DEVIATIONS: dict[str, tuple[set[str], Callable[[], Callable[[Exchange], Any]]]] = {
    "connections are not kept": ({"round_trip"}, lambda: lambda it: it.with_headers(Connection="close")),
    "another clock": ({"clock"}, lambda: lambda it: it.with_headers(Date="Mon, 01 Dec 2025 00:00:00 GMT")),
    "403 without a key": ({"no_key"}, lambda: lambda it: it.with_status(403) if it.key is None else None),
    "403 with a wrong key": (
        {"wrong_key"},
        lambda: lambda it: it.with_status(403) if it.key and it.answer.status == 401 and it.key != "app" else None,
    ),
    "the key is refused": ({"key"}, lambda: lambda it: it.with_status(401) if it.path.endswith("/pending") else None),
    "the app's key is accepted": ({"sdk_key"}, lambda: lambda it: it.with_status(404) if it.key == "app" else None),
    "403 for an unknown id": (
        {"unknown_operation", "id_exact"},
        lambda: lambda it: it.with_status(403) if _is_unknown(it) else None,
    ),
    "a create without success": (
        {"created"},
        lambda: lambda it: it.with_json({"success": False}) if it.method == "POST" and it.is_good else None,
    ),
    "a lagging replica": (set(), Late),
    "a result before the approval": (
        {"read_at_once"},
        lambda: lambda it: it.with_fields(result=True) if it.reads and it.json["state"] == "pending" else None,
    ),
    "a factor while pending": (
        {"pending_factor"},
        lambda: lambda it: it.with_fields(authType="pin") if it.reads and it.json["state"] == "pending" else None,
    ),
    "content without emoji": ({"content_kept"}, lambda: hides_emoji),
    "slashes end an id": (
        {"id_kept"},
        lambda: lambda it: it.with_status(404) if it.method == "GET" and "%2F" in it.path else None,
    ),
    "ids without case": ({"id_exact"}, lambda: ignores_case),
    "the same again": ({"id_taken"}, lambda: lambda it: it.with_status(200) if _is_second(it, is_same=True) else None),
    "other content again": (
        {"id_taken_by_other"},
        lambda: lambda it: it.with_status(200) if _is_second(it, is_same=False) else None,
    ),
    "content is overwritten": ({"id_taken_by_other"}, lambda: overwrites),
    "anything again": (
        {"id_taken", "id_taken_by_other"},
        lambda: lambda it: it.with_status(200) if it.method == "POST" else None,
    ),
    "users in lower case": (
        {"user_case"},
        lambda: lambda it: it.with_fields(userId=it.json["userId"].lower()) if it.reads else None,
    ),
    "local time": (
        {"timestamp"},
        lambda: lambda it: it.with_fields(timestamp="2026-06-01T12:00:00.5") if it.reads else None,
    ),
    "a timestamp with a zone": (
        {"timestamp"},
        lambda: lambda it: it.with_fields(timestamp="2026-06-01T12:00:00Z") if it.reads else None,
    ),
    "an empty list": ({"listed"}, lambda: lambda it: it.with_json([]) if _is_list(it) else None),
    "an approval without result": (
        {"approved"},
        lambda: lambda it: it.with_fields(result=False) if it.reads and it.json["state"] == "approved" else None,
    ),
    "an approval that is forgotten": ({"stays_approved"}, Forgetful),
    "approved ones are listed": ({"unlisted"}, lambda: lists_approved),
    "an id that is free after the approval": (
        {"id_taken_after"},
        lambda: lambda it: it.with_status(200) if _is_second(it, is_same=True, state="approved") else None,
    ),
    "attempts without an operation": (
        {"attempt_told"},
        lambda: lambda it: it.with_json({"content": []}) if "/authentications" in it.path else None,
    ),
}
