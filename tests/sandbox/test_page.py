"""The phone's page as it is sent: it runs its own script and nothing else, and is told apart from the API."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import TYPE_CHECKING

from .phone_page import BROWSER, approve, get, picture

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import aiohttp

    from aiokeyless.sandbox import Sandbox

    Raw = Callable[..., Awaitable[tuple[int, bytes]]]


async def test_browser_gets_the_page_that_runs_its_own_script_and_nothing_else(
    page: aiohttp.ClientSession,
) -> None:
    async with page.get("/", headers=BROWSER) as response:
        assert (response.status, response.content_type, response.charset) == (200, "text/html", "utf-8")
        html, headers = await response.text(), response.headers
    policy = dict(directive.split(" ", 1) for directive in headers["Content-Security-Policy"].split("; "))
    for tag in ("script", "style"):
        [content] = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Referrer-Policy"] == "same-origin"
    assert headers["Cache-Control"] == "no-store"


async def test_page_needs_nothing_from_outside_and_sets_no_html(page: aiohttp.ClientSession) -> None:
    async with page.get("/", headers=BROWSER) as response:
        html = await response.text()
    assert not re.search(r"""(?:src|href)=(?!"data:|"/)|url\(|@import|https?://(?!www\.w3\.org/2000/svg)""", html)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\bon\w+=|style=", html)


async def test_client_that_asks_the_root_is_answered_by_the_api(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    for headers in ({}, {"Accept": "application/json"}):
        async with http.get("/", headers=headers) as response:
            assert (response.status, response.content_type) == (404, "application/json")
    async with http.post("/", headers=BROWSER) as response:
        assert response.status == 404
    assert [record.status for record in sandbox.requests] == [404] * 3


async def test_the_page_is_refused_under_another_host_name(raw: Raw) -> None:
    status, body = await raw(b"/", headers=b"Accept: text/html\r\n", host=b"evil.example")
    assert status == 421
    assert list(json.loads(body)) == ["error"]


async def test_page_and_its_requests_stay_out_of_the_journal_and_take_no_faults(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    sandbox.latency = 3600
    sandbox.fail_next(500, times=2)
    sandbox.drop_next()
    async with page.get("/", headers=BROWSER) as response:
        assert response.status == 200
    assert (await picture(page))["phones"] == []
    assert await approve(page, "none") == 404
    assert (sandbox.requests, sandbox.request_count) == ([], 0)
    sandbox.latency = 0
    assert [await get(http), await get(http)] == [500, 500]
