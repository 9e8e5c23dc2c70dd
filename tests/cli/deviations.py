"""Services that are a sandbox but for one point: what each makes of a right answer, and which checks then differ."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta, timezone
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


class Cache:
    """One that keeps the good answers to GETs for two minutes."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[float, Answer]] = {}

    def __call__(self, it: Exchange) -> Answer | None:
        if it.method != "GET" or not it.is_good:
            return None
        now = asyncio.get_running_loop().time()
        at, answer = self._kept.get(it.path, (now, it.answer))
        if now - at > 120:
            at, answer = now, it.answer
        self._kept[it.path] = at, answer
        return answer._replace(headers={**answer.headers, "Age": str(round(now - at))})


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


def reads(when: str = "", /, **fields: Any) -> Callable[[], Callable[[Exchange], Any]]:
    """Each operation that is read, or each one in this state, has these fields in place of its own."""
    return lambda: lambda it: it.with_fields(**fields) if it.reads and when in ("", it.json["state"]) else None


def reads_now(form: Callable[[datetime], str | int], /, **fields: Any) -> Callable[[], Callable[[Exchange], Any]]:
    """Each operation that is read has the time at which the service started, in some form."""

    def begin() -> Callable[[Exchange], Any]:
        return reads(timestamp=form(datetime.now(UTC)), **fields)()

    return begin


def payloads(change: Callable[[str], str]) -> Callable[[], Callable[[Exchange], Any]]:
    return lambda: (
        lambda it: it.with_fields(operationPayload=change(it.json.get("operationPayload", ""))) if it.reads else None
    )


def creates(status: int, when: Callable[[dict[str, Any]], bool] = lambda _: True) -> Any:
    """A create with such a body is refused."""

    def refuse(it: Exchange) -> Answer | None:
        if it.method != "POST" or not when(it.body) or not it.is_good:
            return None
        it.service.forget(it.body["operationId"])
        return it.with_status(status)

    return lambda: refuse


def answers(path: str, status: int = 200, value: Any = None) -> Callable[[], Callable[[Exchange], Any]]:
    """What has this in its path is answered so."""
    return lambda: lambda it: it.with_json(value)._replace(status=status) if path in it.path else None


def at(now: datetime) -> str:
    return now.isoformat(timespec="milliseconds")


TIMES = "createdAt", "updatedAt"
#: Which checks differ, and the deviation: one for each check that the service's answers decide.
DEVIATIONS: dict[str, tuple[set[str], Callable[[], Callable[[Exchange], Any]]]] = {
    "connections are not kept": ({"round_trip"}, lambda: lambda it: it.with_headers(Connection="close")),
    "another clock": ({"clock"}, lambda: lambda it: it.with_headers(Date="Mon, 01 Dec 2025 00:00:00 GMT")),
    "403 without a key": ({"no_key"}, lambda: lambda it: it.with_status(403) if it.key is None else None),
    "403 with a wrong key": (
        {"wrong_key"},
        lambda: lambda it: it.with_status(403) if it.key and it.answer.status == 401 and it.key != "app" else None,
    ),
    "the key is refused": ({"key"}, lambda: lambda it: it.with_status(401) if it.key == it.service.api_key else None),
    "no key is needed": ({"no_key"}, lambda: lambda it: it.with_status(404) if it.answer.status == 401 else None),
    "403 without a right key": (
        {"no_key"},
        lambda: lambda it: it.with_status(403) if it.answer.status == 401 else None,
    ),
    "any key is accepted": (
        {"wrong_key"},
        lambda: lambda it: it.with_status(404) if it.key and it.answer.status == 401 else None,
    ),
    "the app's key is refused with 403": (set(), lambda: lambda it: it.with_status(403) if it.key == "app" else None),
    "the app's key is accepted": ({"sdk_key"}, lambda: lambda it: it.with_status(404) if it.key == "app" else None),
    "403 for an unknown id": (
        {"unknown_operation"},
        lambda: lambda it: it.with_status(403) if _is_unknown(it) else None,
    ),
    "no search for users": ({"users"}, answers("/external-users/", 400)),
    "users in another form": ({"users"}, answers("/external-users/", value={"users": []})),
    "a search that finds everybody": (
        {"users"},
        answers("/external-users/", value=[dict.fromkeys(("userId", "biometricPublicSigningKey", *TIMES), "A")]),
    ),
    "404 for nobody": (set(), answers("/external-users/", 404)),
    "devices in another form": ({"devices"}, answers("/devices", value={"devices": []})),
    "404 for no devices": (set(), answers("/devices", 404)),
    "a create without success": (
        {"created"},
        lambda: lambda it: it.with_json({"success": False}) if it.method == "POST" and it.is_good else None,
    ),
    "a create with 202": (
        {"created"},
        lambda: lambda it: it.with_status(202) if it.method == "POST" and it.is_good else None,
    ),
    "a create that is refused": ({"created"}, creates(403)),
    "a create without effect": ({"created"}, creates(202)),
    "a lagging replica": (set(), Late),
    "a result before the approval": ({"read_at_once"}, reads("pending", result=True)),
    "a state in upper case": ({"read_at_once"}, reads("pending", state="PENDING")),
    "an approval by itself": ({"read_at_once"}, reads("pending", state="approved", result=True)),
    "no result": ({"read_at_once"}, reads("pending", result=None)),
    "operations that are never there": (
        {"read_at_once"},
        lambda: lambda it: it.with_status(404) if it.reads else None,
    ),
    "a cache": ({"cache"}, Cache),
    "a factor while pending": ({"pending_factor"}, reads("pending", authType="pin")),
    "content without emoji": ({"content_kept"}, payloads(lambda text: text.replace("🦊", "?"))),
    "content of 255 characters": ({"content_kept"}, payloads(lambda text: text[:255])),
    "content with a prefix": ({"content_kept"}, payloads(lambda text: f"Approve: {text}")),
    "long content is refused": ({"content_kept"}, creates(400, lambda body: len(body["operationPayload"]) > 255)),
    "an external user id that is lost": ({"external_user"}, reads(externalUserId=None)),
    "an external user id that is refused": ({"external_user"}, creates(409, lambda body: "externalUserId" in body)),
    "a question mark ends an id": (
        {"id_kept"},
        lambda: lambda it: it.with_status(404) if it.method == "GET" and "%3F" in it.path else None,
    ),
    "an odd id is refused": ({"id_kept"}, creates(400, lambda body: "?" in body["operationId"])),
    "ids of one's own": ({"id_kept"}, reads(operationId="4711")),
    "ids without case": ({"id_exact"}, lambda: ignores_case),
    "the same again": ({"id_taken"}, lambda: lambda it: it.with_status(200) if _is_second(it, is_same=True) else None),
    "other content again": (
        {"id_taken_by_other"},
        lambda: lambda it: it.with_status(200) if _is_second(it, is_same=False) else None,
    ),
    "content is overwritten": ({"id_taken_by_other"}, lambda: overwrites),
    "anything again": (
        {"id_taken_by_other"},
        lambda: lambda it: it.with_status(200) if it.method == "POST" else None,
    ),
    "users in lower case": (
        {"user_case"},
        lambda: lambda it: it.with_fields(userId=it.json["userId"].lower()) if it.reads else None,
    ),
    "another user": ({"user_case"}, reads(userId="BAD0")),
    "local time": ({"timestamp"}, reads_now(lambda now: at(now + timedelta(hours=2)).partition("+")[0])),
    "no timestamp": ({"timestamp"}, reads(timestamp=None)),
    "a timestamp in words": ({"timestamp"}, reads(timestamp="today")),
    "a timestamp with a zone": (set(), reads_now(lambda now: at(now.astimezone(timezone(timedelta(hours=2)))))),
    "a timestamp in milliseconds": (set(), reads_now(lambda now: round(now.timestamp() * 1000), id="1", nodeId=None)),
    "a list of another form": ({"listed"}, answers("/pending", value={"operations": []})),
    "a list that is forbidden": ({"listed"}, answers("/pending", 403)),
    "an empty list": ({"listed"}, lambda: lambda it: it.with_json([]) if _is_list(it) else None),
    "an approval without result": ({"approved"}, reads("approved", result=False)),
    "an approval in upper case": ({"approved"}, reads("approved", state="APPROVED")),
    "another word for the factor": ({"factor"}, reads("approved", authType="FACE")),
    "no factor": ({"factor"}, reads(authType=None)),
    "an approval that is forgotten": ({"stays_approved"}, Forgetful),
    "approved ones are listed": ({"unlisted"}, lambda: lists_approved),
    "an id that is free after the approval": (
        {"id_taken_after"},
        lambda: lambda it: it.with_status(200) if _is_second(it, is_same=True, state="approved") else None,
    ),
    "attempts without an operation": ({"attempt_told"}, answers("/authentications", value={"content": []})),
    "attempts that are forbidden": ({"attempt_told"}, answers("/authentications", 403)),
}
