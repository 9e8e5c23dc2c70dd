"""The JSON API that drives a sandbox, over real sockets: what it answers, and whom it refuses.

tests/cli/test_drive.py asks each endpoint for its effect.
"""

from __future__ import annotations

import io
import itertools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
import pytest

from aiokeyless._version import __version__
from aiokeyless.sandbox.control import ENDPOINTS, IDENTITY

from .phone_page import BROWSER, OTHER, USER, create, get

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiokeyless.sandbox import Sandbox

    Raw = Callable[..., Awaitable[tuple[int, bytes]]]

JSON = {"Content-Type": "application/json"}
#: A body for each endpoint that has an effect.
BODIES: dict[str, dict[str, object]] = {
    "approve": {"operationId": "a"},
    "decline": {"operationId": "a"},
    "fail": {"status": 500},
    "drop": {},
    "recover": {},
    "unlock": {"userId": USER},
    "enroll": {"userId": USER},
    "sign": {"operationId": "approved"},
    "rotate": {},
}


async def drive(http: aiohttp.ClientSession, name: str, **body: object) -> tuple[int, Any]:
    async with http.post(f"/sandbox/{name}", json=body) as response:
        assert response.headers[IDENTITY] == __version__
        return response.status, await response.json()


async def done(http: aiohttp.ClientSession, name: str, **body: object) -> Any:
    status, answer = await drive(http, name, **body)
    assert status == 200, answer
    return answer


async def error(http: aiohttp.ClientSession, name: str, **body: object) -> tuple[int, str]:
    status, answer = await drive(http, name, **body)
    return status, answer["error"]


async def listed(http: aiohttp.ClientSession, **query: str) -> list[str]:
    async with http.get("/sandbox/list", params=query) as response:
        assert response.status == 200
        return [each["operationId"] for each in (await response.json())["operations"]]


# What is driven


async def test_operation_is_approved_as_by_its_user(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    await create(http, operationPayload="Pay 5", externalUserId="ann")
    answer = await done(http, "approve", operationId="a")
    assert (answer["state"], answer["result"], answer["authType"]) == ("approved", True, "biom")
    assert (answer["operationPayload"], answer["externalUserId"]) == ("Pay 5", "ann")
    assert "apiKey" not in answer
    assert sandbox.operations["a"].is_approved
    assert await done(http, "approve", operationId="a", authType="pin") == answer  # approving again has no effect


async def test_operations_are_listed_and_selected(http: aiohttp.ClientSession) -> None:
    for operation_id, user in (("a", USER), ("b", OTHER), ("c", USER)):
        await create(http, operation_id, user)
    await done(http, "approve", operationId="a")
    assert await listed(http) == ["a", "b", "c"]
    assert await listed(http, userId=USER.lower()) == ["a", "c"]
    assert await listed(http, state="pending") == ["b", "c"]
    assert await listed(http, userId=USER, state="approved") == ["a"]
    assert await listed(http, userId="ABCDEF") == []
    async with http.get("/sandbox/list") as response:
        first = (await response.json())["operations"][0]
    assert first.keys() == {"id", "timestamp", "nodeId", "userId", "operationId", "result", "authType", "state"}


# What cannot be done


async def test_operation_that_does_not_exist_is_not_found(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    for name in ("approve", "decline", "sign"):
        status, message = await error(http, name, operationId="nope")
        assert (status, "there is no operation 'nope'" in message) == (404, True)
    assert not sandbox.operations


async def test_what_the_state_of_the_sandbox_does_not_permit_is_a_conflict(http: aiohttp.ClientSession) -> None:
    await create(http)
    await done(http, "enroll", userId=OTHER, externalUserId="ann")
    assert (await error(http, "sign", operationId="a"))[0] == 409
    assert (await error(http, "enroll", userId=USER, externalUserId="ann"))[0] == 409
    assert (await error(http, "approve", operationId="a", userId=OTHER))[0] == 409
    await done(http, "approve", operationId="a")
    assert (await error(http, "decline", operationId="a"))[0] == 409


@pytest.mark.parametrize(
    ("name", "body"),
    [
        *(("approve", body) for body in (b"{}", b'{"operationId": ""}', b'{"operationId": null}')),
        *(("approve", b'{"operationId": "a", %b}' % more) for more in (b'"authType": "voice"', b'"userId": "Alice"')),
        ("approve", b'{"operation_id": "a"}'),
        *(("decline", b'{"operationId": "a", "errorCode": %b}' % code) for code in (b"0", b'"30003"')),
        ("decline", b'{"errorCode": 30003}'),
        *(("fail", b'{"status": %b}' % status) for status in (b"199", b"600")),
        *(("fail", b'{"times": %b}' % times) for times in (b"0", b"1.5")),
        *(("fail", b'{"retryAfter": %b}' % seconds) for seconds in (b"-1", b"1e999")),
        *(("fail", b'{"method": "get"}'), ("drop", b'{"status": 500}'), ("recover", b'{"times": 1}')),
        *(("unlock", b'{"userId": "%b"}' % user_id) for user_id in (b"", b"C0FFEE\\n")),
        *(("enroll", b'{"userId": "C0FFEE", "externalUserId": ""}'), ("list", b'{"state": "denied"}')),
        *(("sign", b'{"operationId": "a", "claims": {}}'), ("rotate", b'{"retire": 1}')),
    ],
)
def test_field_that_is_wrong_is_refused(name: str, body: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(body, type=ENDPOINTS[name].body)


async def test_body_that_is_wrong_is_a_bad_request_and_does_nothing(http: aiohttp.ClientSession) -> None:
    await create(http)
    for name in BODIES:
        for body in (b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"status": 700}'):
            async with http.post(f"/sandbox/{name}", data=body, headers=JSON) as response:
                assert (response.status, list(await response.json())) == (400, ["error"])
    assert await listed(http, state="pending") == ["a"]
    assert await get(http) == 200


async def test_query_that_is_wrong_is_a_bad_request(http: aiohttp.ClientSession) -> None:
    for query in ("userId=Alice", "state=denied", "nope=1"):
        async with http.get(f"/sandbox/list?{query}") as response:
            assert (response.status, list(await response.json())) == (400, ["error"])


async def test_body_that_is_too_large_is_refused(http: aiohttp.ClientSession) -> None:
    async with http.post("/sandbox/approve", data=io.BytesIO(b" " * (1 << 21)), headers=JSON) as response:
        assert response.status == 413


async def test_only_the_method_of_the_table_is_allowed(http: aiohttp.ClientSession) -> None:
    for name, endpoint in ENDPOINTS.items():
        for method in {"GET", "POST", "PUT", "DELETE"} - {endpoint.method}:
            async with http.request(method, f"/sandbox/{name}", json={}) as response:
                assert (response.status, response.headers["Allow"]) == (405, endpoint.method)


async def test_path_that_is_not_there_names_those_that_are(http: aiohttp.ClientSession) -> None:
    for path in ("", "aprove", "approve/", "a%2Fb", "page"):
        status, message = await error(http, path)
        assert (status, all(name in message for name in ENDPOINTS)) == (404, True)


# The page of the reference

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "sandbox-api.md").read_text()


def test_the_page_names_each_endpoint_with_its_fields_and_a_line_for_curl() -> None:
    rows = re.findall(r"^\| `(GET|POST) /sandbox/(\w+)` \| (.*?) \| .* \|$", PAGE, re.MULTILINE)
    named = {name: (method, set(re.findall(r"`([a-z]\w+)`", fields))) for method, name, fields in rows}
    made = {
        name: (endpoint.method, set(endpoint.body.__struct_encode_fields__)) for name, endpoint in ENDPOINTS.items()
    }
    assert named == made
    assert set(re.findall(r"^(?:curl|drive) .*?\bsandbox/(\w+)", PAGE, re.MULTILINE)) == ENDPOINTS.keys()


# Attacks


def attack_headers(sandbox: Sandbox) -> dict[str, tuple[dict[str, str], int]]:
    port = urlsplit(sandbox.url).port
    key = {"X-Api-Key": sandbox.api_key, **JSON}
    return {
        "no key": (JSON, 401),
        "another key": ({**JSON, "X-Api-Key": "sandbox-key2"}, 401),
        "the own page, which has no key": ({**JSON, "Origin": sandbox.url, "Sec-Fetch-Site": "same-origin"}, 401),
        "a form of another page": ({"Content-Type": "application/x-www-form-urlencoded", "Origin": "null"}, 403),
        "a form of a page that a file is": ({"Content-Type": "text/plain"}, 401),
        "a form with the key": ({**key, "Content-Type": "text/plain"}, 415),
        "another page that knows the key": ({**key, "Origin": "http://evil.example"}, 403),
        "another port": ({**key, "Origin": f"http://127.0.0.1:{1 if port != 1 else 2}"}, 403),
        "another page of an old browser": ({**key, "Sec-Fetch-Site": "cross-site"}, 403),
        "a name that was rebound": (
            {**key, "Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"},
            421,
        ),
    }


async def test_nobody_but_a_program_with_the_key_drives_anything(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    await create(http)
    sandbox.approve("approved", user_id=OTHER)
    before = (sandbox.authentications, [*sandbox.operations.values()])
    attacks = attack_headers(sandbox)
    async with aiohttp.ClientSession(sandbox.url) as anybody:
        for (name, endpoint), who in itertools.product(ENDPOINTS.items(), attacks):
            headers, status = attacks[who]
            if endpoint.method == "GET" and status == 415:  # a request without a body
                continue
            body = json.dumps(BODIES.get(name))
            async with anybody.request(endpoint.method, f"/sandbox/{name}", data=body, headers=headers) as response:
                assert (response.status, list(await response.json())) == (status, ["error"]), (name, who)
                assert not [each for each in response.headers if each.startswith("Access-Control")]
    assert (sandbox.authentications, [*sandbox.operations.values()]) == before
    assert await get(http) == 200


async def test_a_browser_that_asks_whether_it_may_is_not_told_so(sandbox: Sandbox) -> None:
    preflight = {
        "Origin": "http://evil.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "x-api-key, content-type",
    }
    async with (
        aiohttp.ClientSession(sandbox.url) as evil,
        evil.options("/sandbox/approve", headers=preflight) as response,
    ):
        assert response.status == 403
        assert not [each for each in response.headers if each.startswith("Access-Control")]


async def test_answers_cannot_be_embedded_nor_kept(http: aiohttp.ClientSession) -> None:
    async with http.get("/sandbox/list", headers=BROWSER) as response:
        assert response.content_type == "application/json"
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin"
