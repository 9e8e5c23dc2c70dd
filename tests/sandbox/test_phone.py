"""The phone's page and its endpoints over real sockets: what they show, what they do, and whom they refuse."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import socket
import time
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web

from aiokeyless.sandbox import Sandbox
from aiokeyless.sandbox.journal import Journal
from aiokeyless.sandbox.phone import Phones
from aiokeyless.sandbox.snapshot import PhoneBook

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    Raw = Callable[..., Awaitable[tuple[int, bytes]]]

USER = "C0FFEE"
OTHER = "BADA55"
BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


@pytest.fixture
async def page(sandbox: Sandbox) -> AsyncGenerator[aiohttp.ClientSession]:
    """The sandbox's own page, as far as its requests show."""
    async with aiohttp.ClientSession(sandbox.url, headers={"Origin": sandbox.url}) as session:
        yield session


async def create(http: aiohttp.ClientSession, operation_id: str = "a", user: str = USER, **fields: str) -> None:
    async with http.post(f"/v2/users/{user}/operations", json={"operationId": operation_id, **fields}) as response:
        assert response.status == 200


async def get(http: aiohttp.ClientSession, operation_id: str = "a") -> int:
    async with http.get(f"/v2/operations/{operation_id}") as response:
        return response.status


class Events:
    """The pictures that a page is sent."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response

    async def next(self) -> Any:
        async for line in self.response.content:
            if line.startswith(b"data: "):
                return json.loads(line.removeprefix(b"data: "))
        raise EOFError

    async def until(self, condition: Callable[[Any], bool]) -> Any:
        async with asyncio.timeout(60):
            while not condition(picture := await self.next()):
                pass
        return picture


@asynccontextmanager
async def events(page: aiohttp.ClientSession, **query: str) -> AsyncGenerator[Events]:
    async with page.get("/sandbox/events", params=query) as response:
        assert (response.status, response.content_type) == (200, "text/event-stream")
        yield Events(response)


async def picture(page: aiohttp.ClientSession, **query: str) -> Any:
    async with events(page, **query) as stream:
        return await stream.next()


async def key_of(page: aiohttp.ClientSession, user: str = USER) -> str:
    return str((await picture(page, user=user))["phones"][0]["pending"][0]["key"])


async def post(page: aiohttp.ClientSession, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    async with page.post(f"/sandbox/{path}", json=body, headers=headers) as response:
        return response.status, await response.json()


async def approve(page: aiohttp.ClientSession, key: str, user: str = USER, how: str = "biom") -> int:
    status, _ = await post(page, "approve", {"user": user, "key": key, "authType": how})
    return status


async def fail(page: aiohttp.ClientSession, key: str, error_code: int) -> int:
    status, _ = await post(page, "fail", {"user": USER, "key": key, "errorCode": error_code})
    return status


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until what other tasks do has come about."""
    # Not a number of turns: uvloop makes a thousand of them before a socket has answered.
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        await asyncio.sleep(0)


# The page


async def test_browser_is_given_the_page_that_runs_its_own_script_and_nothing_else(
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


async def test_page_of_one_user_is_the_same_page(page: aiohttp.ClientSession) -> None:
    async with page.get("/", headers=BROWSER) as all_phones, page.get(f"/?user={USER}", headers=BROWSER) as one:
        assert await all_phones.read() == await one.read()


async def test_client_that_goes_astray_to_the_root_is_answered_by_the_api(
    sandbox: Sandbox, http: aiohttp.ClientSession
) -> None:
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
    assert await approve(page, "none") == 409
    async with page.get("/sandbox/elsewhere") as response:
        assert response.status == 404
    assert (sandbox.requests, sandbox.request_count) == ([], 0)
    sandbox.latency = 0
    assert [await get(http), await get(http)] == [500, 500]


# What it is shown


async def test_operation_is_shown_on_its_users_phone(http: aiohttp.ClientSession, page: aiohttp.ClientSession) -> None:
    await create(http, operationPayload="Pay 5", externalUserId="ann@example.com")
    await create(http, "b", OTHER)
    shown = await picture(page)
    assert [phone["user"] for phone in shown["phones"]] == [USER, OTHER]
    [first], [second] = (phone["pending"] for phone in shown["phones"])
    assert 0 <= first.pop("age") < 60
    key = first.pop("key")
    assert key != second["key"]
    assert first == {
        "number": 1,
        "operationId": "a",
        "operationPayload": "Pay 5",
        "characters": 5,
        "readable": True,
        "externalUserId": "ann@example.com",
    }
    assert (second["operationPayload"], second["externalUserId"]) == (None, None)


@pytest.mark.looptime
async def test_what_happens_is_shown_as_it_happens(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    async with events(page) as stream:
        assert (await stream.next())["phones"] == []
        await create(http)
        shown = await stream.until(lambda shown: shown["phones"])
        key = shown["phones"][0]["pending"][0]["key"]
        await create(http, "b")
        shown = await stream.until(lambda shown: len(shown["phones"][0]["pending"]) == 2)
        assert [card["operationId"] for card in shown["phones"][0]["pending"]] == ["b", "a"]
        sandbox.forget("b")
        shown = await stream.until(lambda shown: len(shown["phones"][0]["pending"]) == 1)
        assert shown["history"] == []
        sandbox.fail_authentication("a")
        sandbox.approve("a", auth_type="pin")
        sandbox.approve("a")
        shown = await stream.until(lambda shown: not shown["phones"][0]["pending"])
        for number, entry in ((2, shown["history"][0]), (1, shown["history"][1])):
            assert 0 <= entry.pop("age") < 60
            assert entry.pop("number") == number
        common = {"key": key, "user": USER, "text": None}
        assert shown["history"] == [
            {**common, "authType": "pin", "errorCode": 0, "reason": None},
            {**common, "authType": "biom", "errorCode": 30004, "reason": "the face did not match"},
        ]


async def test_attempt_for_what_the_phone_would_create_is_in_the_history(
    sandbox: Sandbox, page: aiohttp.ClientSession
) -> None:
    sandbox.fail_authentication("of the phone", user_id=USER)
    [entry] = (await picture(page))["history"]
    assert (entry["key"], entry["text"], entry["user"]) == (None, None, USER)


async def test_history_has_the_start_of_a_text_and_the_latest_attempts(
    sandbox: Sandbox, page: aiohttp.ClientSession
) -> None:
    for number in range(60):
        sandbox.approve(str(number), user_id=USER, operation_payload=f"{number} " + "p" * 120)
    shown = (await picture(page))["history"]
    assert [entry["text"] for entry in shown] == [f"{number} {'p' * 117}…" for number in range(59, 9, -1)]


async def test_simulated_user_is_shown_too() -> None:
    async with (
        Sandbox(auto_approve=0) as sandbox,
        aiohttp.ClientSession(sandbox.url, headers={"X-Api-Key": sandbox.api_key}) as http,
    ):
        await create(http)
        shown = await picture(http)
    assert [each["authType"] for each in shown["history"]] == ["biom"]
    assert shown["phones"] == [{"user": USER, "lockedFor": 0, "pending": [], "more": 0}]


async def test_phone_alone_shows_nothing_of_others(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    await create(http)
    await create(http, "secret-of-the-other", OTHER)
    await create(http, "secret-too", OTHER)
    sandbox.approve("secret-too")
    shown = await picture(page, user=USER.lower())
    assert [phone["user"] for phone in shown["phones"]] == [USER]
    assert (shown["history"], shown["requests"]) == ([], [])
    assert "secret" not in json.dumps(shown)
    assert OTHER not in json.dumps(shown)


async def test_the_phone_of_an_unknown_user_is_empty(page: aiohttp.ClientSession) -> None:
    assert (await picture(page, user="ABC"))["phones"] == [{"user": "ABC", "lockedFor": 0, "pending": [], "more": 0}]


async def test_user_that_is_not_hex_is_a_bad_request(page: aiohttp.ClientSession) -> None:
    async with page.get("/sandbox/events?user=%3Cb%3E") as response:
        assert response.status == 400


@pytest.mark.looptime
async def test_journal_is_shown_latest_first_with_status_and_duration(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    sandbox.latency = 0.25
    await create(http)
    sandbox.drop_next(method="POST")
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await create(http, "b")
    asking = asyncio.create_task(get(http))
    await until(lambda: len(sandbox.requests) == 3)
    shown = await picture(page)
    assert [(each["method"], each["status"]) for each in shown["requests"]] == [
        ("GET", None),
        ("POST", None),
        ("POST", 200),
    ]
    assert [each["duration"] for each in shown["requests"]] == [0, pytest.approx(0.25), pytest.approx(0.25)]
    assert [each["age"] for each in shown["requests"]] == [0, pytest.approx(0.25), pytest.approx(0.5)]
    await asking
    sandbox.latency = 0
    for number in range(15):
        await get(http, str(number))
    shown = await picture(page)
    assert [each["path"] for each in shown["requests"]] == [f"/v2/operations/{n}" for n in range(14, 2, -1)]


async def test_picture_has_no_key_in_it(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    await create(http)
    await get(http)
    shown = json.dumps(await picture(page))
    assert sandbox.api_key not in shown
    assert "sandbox-sdk-key" not in shown


async def test_only_the_newest_operations_are_shown_and_the_others_counted(
    http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    for number in range(23):
        await create(http, str(number))
    [phone] = (await picture(page))["phones"]
    assert [card["operationId"] for card in phone["pending"]] == [str(number) for number in range(22, 2, -1)]
    assert phone["more"] == 3


async def test_only_the_users_who_were_active_last_are_shown_and_none_changes_places(
    http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    users = [f"AB{number:02}" for number in range(24)]
    for user in users:
        await create(http, user, user)
    assert not (await picture(page))["crowded"]
    await create(http, "again", users[0])
    await create(http, "one more", "FF")
    shown = await picture(page)
    assert [phone["user"] for phone in shown["phones"]] == [users[0], *users[2:], "FF"]
    assert shown["crowded"]
    assert not (await picture(page, user=users[0]))["crowded"]


async def test_text_without_end_is_cut(http: aiohttp.ClientSession, page: aiohttp.ClientSession) -> None:
    await create(http, "i" * 601, operationPayload="p" * 500_000, externalUserId="e" * 600)
    [card] = (await picture(page))["phones"][0]["pending"]
    assert (card["operationPayload"], card["characters"], card["readable"]) == ("p" * 2000, 500_000, False)
    assert card["operationId"] == "i" * 600 + "… (1 more characters)"
    assert card["externalUserId"] == "e" * 600
    await get(http, "f" * 2000)
    assert len((await picture(page))["requests"][0]["path"]) < 450


async def test_phone_shows_no_more_text_than_a_person_reads(
    http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    for number in range(20):
        await create(http, str(number), operationPayload="p" * 100)
    [phone] = (await picture(page))["phones"]
    assert (len(phone["pending"]), phone["more"]) == (20, 0)
    for number in range(20, 40):
        await create(http, f"{number}{'i' * 2000}", operationPayload="p" * 3000, externalUserId="e" * 3000)
    [phone] = (await picture(page))["phones"]
    assert [card["number"] for card in phone["pending"]] == [40]
    assert phone["more"] == 39


# Long texts


async def whole_text(page: aiohttp.ClientSession, **query: str) -> tuple[int, Any]:
    async with page.get("/sandbox/payload", params=query) as response:
        return response.status, await response.json()


async def test_long_text_is_there_to_be_read(http: aiohttp.ClientSession, page: aiohttp.ClientSession) -> None:
    text = "€" * 19_999 + "!"
    await create(http, operationPayload=text)
    [card] = (await picture(page))["phones"][0]["pending"]
    assert (card["operationPayload"], card["characters"], card["readable"]) == (text[:2000], 20_000, True)
    assert await whole_text(page, user=USER, key=card["key"]) == (200, {"operationPayload": text})
    assert await approve(page, card["key"]) == 200
    assert (await whole_text(page, user=USER, key=card["key"]))[0] == 409
    assert (await whole_text(page))[0] == 409


async def test_text_that_cannot_be_read_cannot_be_approved(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    await create(http, operationPayload="p" * 20_001)
    key = await key_of(page)
    status, answer = await whole_text(page, user=USER, key=key)
    assert (status, "cannot be read" in answer["error"]) == (409, True)
    assert await approve(page, key) == 409
    assert not sandbox.operations["a"].is_approved
    assert await fail(page, key, 30003) == 200


async def test_operation_without_a_text_has_an_empty_one(
    http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    await create(http)
    assert await whole_text(page, user=USER, key=await key_of(page)) == (200, {"operationPayload": ""})


# How it is sent


async def test_no_more_than_so_many_pages_are_served_at_once(sandbox: Sandbox, page: aiohttp.ClientSession) -> None:
    async with AsyncExitStack() as streams:
        opened = [await streams.enter_async_context(events(page)) for _ in range(32)]
        for _ in range(2):
            async with page.get("/sandbox/events") as response:
                assert response.status == 503
                assert await response.json() == {"error": "32 pages are open, which is the limit; close one"}
        opened[7].response.close()
        await until(lambda: len(sandbox._phones._readers) < 32)  # nothing public tells who reads
        assert (await picture(page))["phones"] == []


def buffered(sandbox: Sandbox) -> int:
    """Bytes that the server holds for its clients; nothing public tells."""
    assert sandbox._runner is not None
    assert sandbox._runner.server is not None
    transports = [connection.transport for connection in sandbox._runner.server.connections]
    return sum(transport.get_write_buffer_size() for transport in transports if transport is not None)


@pytest.mark.looptime
async def test_little_is_buffered_for_readers_that_do_not_read_and_then_they_are_dropped(
    sandbox: Sandbox, http: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(24 * 3):  # as much as is shown at all, and each character takes six bytes
        await create(http, str(number), f"AB{number % 24:02}", operationPayload="\x01" * 2000)
    assert sandbox._runner is not None
    [site] = sandbox._runner.sites
    assert isinstance(site, web.TCPSite)
    assert isinstance(site._server, asyncio.Server)
    [listening] = site._server.sockets
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)  # what the kernel takes does not count
    address = urlsplit(sandbox.url)
    most = 0
    with ExitStack() as lazy:
        for _ in range(40):
            connection = lazy.enter_context(socket.create_connection((address.hostname, address.port)))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
            connection.sendall(b"GET /sandbox/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for _ in range(20):
            sandbox.approve("x", user_id=USER)
            sandbox.forget("x")
            await asyncio.sleep(0.2)
            most = max(most, buffered(sandbox))
        assert len(sandbox._phones._readers) == 32
        assert 0 < most < 32 * (3 << 15)
        await asyncio.sleep(20)
        assert not sandbox._phones._readers
        assert buffered(sandbox) == 0
        assert caplog.records == []
        assert (await picture(http, user="AB00"))["phones"][0]["more"] == 1


@pytest.mark.looptime
async def test_many_changes_are_one_picture(sandbox: Sandbox, page: aiohttp.ClientSession) -> None:
    async with events(page) as stream:
        await stream.next()
        for number in range(1000):
            sandbox.approve(str(number), user_id=USER)
        sandbox.requests.clear()
        assert len((await stream.next())["history"]) == 50
        started = asyncio.get_running_loop().time()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10):
                await stream.next()
        assert asyncio.get_running_loop().time() == pytest.approx(started + 10)


@pytest.mark.looptime
async def test_a_reader_that_does_not_read_piles_nothing_up_and_delays_no_other(
    sandbox: Sandbox, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = 0
    draw = Phones._event  # nothing public tells how often

    def count_and_draw(phones: Phones, user: str) -> Any:
        nonlocal drawn
        drawn += 1
        return draw(phones, user)

    monkeypatch.setattr(Phones, "_event", count_and_draw)
    for number in range(20):
        await create(http, str(number), operationPayload="€" * 2000)
    address = urlsplit(sandbox.url)
    with socket.create_connection((address.hostname, address.port)) as lazy:
        lazy.sendall(b"GET /sandbox/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        before = -1
        while before < drawn:  # until neither the kernel nor the server takes any more
            before = drawn
            for _ in range(20):
                sandbox.approve("x", user_id=USER)
                sandbox.forget("x")
                await asyncio.sleep(0.2)
        assert drawn < 1000
        assert await get(http, "0") == 200
        await sandbox.aclose()  # does not wait for it either


async def test_closing_ends_the_streams_and_leaves_nothing() -> None:
    before = asyncio.all_tasks()
    async with Sandbox() as sandbox, aiohttp.ClientSession(sandbox.url) as http, events(http) as stream:
        await stream.next()
        closing = asyncio.create_task(sandbox.aclose())
        assert (await stream.until(lambda shown: shown["ended"]))["history"] == []
        with pytest.raises(EOFError):
            await stream.next()
        await closing
    assert asyncio.all_tasks() == before


@pytest.mark.looptime
async def test_readers_of_the_same_phones_share_what_they_are_sent(
    sandbox: Sandbox, page: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    draw = PhoneBook.snapshot

    def count_and_draw(book: PhoneBook, user: str, now: float) -> Any:
        drawn.append(user)
        return draw(book, user, now)

    monkeypatch.setattr(PhoneBook, "snapshot", count_and_draw)
    async with AsyncExitStack() as streams:
        opened = [await streams.enter_async_context(events(page)) for _ in range(5)]
        alone = await streams.enter_async_context(events(page, user=USER))
        for stream in (*opened, alone):
            await stream.next()
        await asyncio.sleep(1)
        drawn.clear()
        sandbox.approve("a", user_id=USER)
        for stream in (*opened, alone):
            assert len((await stream.next())["history"]) == 1
    assert sorted(drawn) == ["", USER]


async def test_page_that_is_closed_leaves_nothing(sandbox: Sandbox, page: aiohttp.ClientSession) -> None:
    async with events(page) as stream:
        await stream.next()
        assert len(sandbox._phones._readers) == 1  # nothing public tells who reads
        stream.response.close()
    await until(lambda: not sandbox._phones._readers)
    sandbox.approve("a", user_id=USER)


async def test_stream_that_cannot_be_written_to_ends(
    page: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def write(*_: object) -> None:
        raise ConnectionResetError  # as aiohttp does when the page was closed a moment ago

    monkeypatch.setattr(web.StreamResponse, "write", write)
    async with events(page) as stream:
        with pytest.raises(EOFError):
            await stream.next()
    assert caplog.records == []


async def test_page_follows_a_sandbox_that_comes_back() -> None:
    sandbox = Sandbox()
    async with sandbox, aiohttp.ClientSession(sandbox.url, headers={"X-Api-Key": sandbox.api_key}) as http:
        await create(http)
        before = await picture(http)
    async with sandbox, aiohttp.ClientSession(sandbox.url) as http:
        after = await picture(http)
    assert [phone["pending"][0]["key"] for phone in before["phones"]] == [after["phones"][0]["pending"][0]["key"]]
    assert before["boot"] == after["boot"]


# Approving


@pytest.mark.parametrize("how", ["biom", "pin"])
async def test_button_approves_as_it_says(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession, how: str
) -> None:
    await create(http, "first")
    await create(http)
    assert await approve(page, await key_of(page), how=how) == 200
    assert sandbox.operations["a"].is_approved
    assert sandbox.operations["a"].auth_type == how
    assert not sandbox.operations["first"].is_approved


async def test_only_what_is_pending_is_approved(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    await create(http)
    key = await key_of(page)
    assert await approve(page, key, user=OTHER) == 409
    assert await approve(page, "00000000-1") == 409  # of another run of the sandbox
    assert not sandbox.operations["a"].is_approved
    assert await approve(page, key) == 200
    assert await approve(page, key, how="pin") == 409
    assert sandbox.operations["a"].auth_type == "biom"


async def test_user_who_is_locked_out_approves_nothing(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    await create(http)
    for _ in range(5):
        sandbox.fail_authentication("a")
    status, answer = await post(page, "approve", {"user": USER, "key": await key_of(page), "authType": "biom"})
    assert (status, answer) == (409, {"error": "You are locked out, after too many failed attempts."})
    assert not sandbox.operations["a"].is_approved


async def test_attempt_sends_the_page_a_new_snapshot(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    await create(http)
    async with events(page) as stream:
        await stream.next()
        sandbox.fail_authentication("a")
        async with asyncio.timeout(60):
            await stream.next()


async def test_operation_that_took_the_id_of_the_one_shown_is_not_approved(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    await create(http, operationPayload="Pay 5")
    key = await key_of(page)
    sandbox.forget("a")
    await create(http, operationPayload="Pay 9000 to mallory")
    assert await approve(page, key) == 409
    assert not sandbox.operations["a"].is_approved


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"user": "C0FFEE", "key": "k"}',
        b'{"user": "C0FFEE", "key": "k", "authType": "voice"}',
        b'{"user": null, "key": "k", "authType": "pin"}',
    ],
)
async def test_body_that_the_page_does_not_send_is_a_bad_request(page: aiohttp.ClientSession, body: bytes) -> None:
    for path in ("approve", "fail", "create", "fault"):
        headers = {"Content-Type": "application/json"}
        async with page.post(f"/sandbox/{path}", data=body, headers=headers) as response:
            assert (response.status, list(await response.json())) == (400, ["error"])


async def test_body_that_cannot_be_unpacked_is_a_bad_request(page: aiohttp.ClientSession) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    async with page.post("/sandbox/approve", data=b"nope", headers=headers) as response:
        assert response.status == 400


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Host": "evil.example", "Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"}, 421),
    ],
)
async def test_other_page_approves_nothing(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession, headers: dict[str, str], status: int
) -> None:
    await create(http)
    body = json.dumps({"user": USER, "key": await key_of(page), "authType": "biom"})
    headers = {"Content-Type": "application/json", **headers}
    async with page.post("/sandbox/approve", data=body, headers=headers) as response:
        assert (response.status, list(await response.json())) == (status, ["error"])
        assert not [name for name in response.headers if name.startswith("Access-Control")]
    assert not sandbox.operations["a"].is_approved


async def test_other_page_cannot_follow_nor_ask_whether_it_may(raw: Raw, sandbox: Sandbox) -> None:
    async with aiohttp.ClientSession(sandbox.url, headers={"Origin": "http://evil.example"}) as evil:
        async with evil.get("/sandbox/events") as response:
            assert response.status == 403
        preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        async with evil.options("/sandbox/approve", headers=preflight) as response:
            assert response.status == 403
            assert not [name for name in response.headers if name.startswith("Access-Control")]
    rebound = b"evil.example:%d" % (urlsplit(sandbox.url).port or 0)
    status, _ = await raw(b"/sandbox/events", headers=b"Origin: http://%b\r\n" % rebound, host=rebound)
    assert status == 421
    assert sandbox.requests == []


@pytest.mark.parametrize("host", ["0.0.0.0", "localhost"])  # noqa: S104  # to see what it makes of it
async def test_the_page_works_for_every_host_the_sandbox_listens_on(host: str) -> None:
    async with Sandbox(host=host) as sandbox:
        for name in ("localhost", "127.0.0.1"):
            url = f"http://{name}:{urlsplit(sandbox.url).port}"
            async with (
                aiohttp.ClientSession(sandbox.url, headers={"Host": urlsplit(url).netloc, "Origin": url}) as page,
                page.get("/", headers=BROWSER) as response,
            ):
                assert response.status == 200
                assert await approve(page, "none") == 409


# Refusing


@pytest.mark.parametrize(("code", "reason"), [(30003, "the user cancelled"), (30004, "the face did not match")])
async def test_attempt_fails_as_the_button_says_and_the_operation_stays_pending(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession, code: int, reason: str
) -> None:
    await create(http)
    key = await key_of(page)
    assert await fail(page, key, code) == 200
    [entry] = (await picture(page))["history"]
    assert (entry["key"], entry["errorCode"], entry["reason"]) == (key, code, reason)
    assert [each.error_code for each in sandbox.authentications] == [code]
    assert await approve(page, key) == 200
    assert await fail(page, key, code) == 409


async def test_page_lets_attempts_fail_with_its_own_codes_only(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    await create(http)
    key = await key_of(page)
    assert [await fail(page, key, code) for code in (0, 1, 30007)] == [400] * 3
    assert sandbox.authentications == []


@pytest.mark.looptime
async def test_phone_that_is_locked_says_for_how_long(http: aiohttp.ClientSession, page: aiohttp.ClientSession) -> None:
    await create(http)
    key = await key_of(page)
    for _ in range(5):
        assert await fail(page, key, 30004) == 200
    assert 0 < (await picture(page))["phones"][0]["lockedFor"] <= 600
    assert await approve(page, key) == 409
    await asyncio.sleep(600)
    assert (await picture(page))["phones"][0]["lockedFor"] == 0
    assert await approve(page, key) == 200


# Creating


async def test_page_creates_an_operation_as_a_program_does(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    for user, text in ((f" {USER.lower()} ", "Pay 5"), (OTHER, "")):
        assert await post(page, "create", {"user": user, "operationPayload": text}) == (200, {})
    first, second = sandbox.operations.values()
    assert (first.user_id, first.operation_payload, second.user_id, second.operation_payload) == (
        USER,
        "Pay 5",
        OTHER,
        None,
    )
    assert await get(http, first.operation_id) == 200
    assert [phone["user"] for phone in (await picture(page))["phones"]] == [USER, OTHER]


async def test_simulated_user_approves_what_the_page_creates() -> None:
    async with (
        Sandbox(auto_approve=0) as sandbox,
        aiohttp.ClientSession(sandbox.url, headers={"Origin": sandbox.url}) as page,
    ):
        assert (await post(page, "create", {"user": USER, "operationPayload": "Pay 5"}))[0] == 200
        assert [each.is_approved for each in sandbox.operations.values()] == [True]


@pytest.mark.parametrize(("user", "text"), [("", "Pay"), ("Alice", "Pay"), (USER, "p" * 20_001)])
async def test_page_creates_nothing_that_it_could_not_show(
    sandbox: Sandbox, page: aiohttp.ClientSession, user: str, text: str
) -> None:
    status, answer = await post(page, "create", {"user": user, "operationPayload": text})
    assert (status, list(answer)) == (400, ["error"])
    assert not sandbox.operations


# The faults


async def test_api_answers_503_to_everyone_until_it_is_to_work_again(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    await create(http)
    assert await post(page, "fault", {"fault": "unavailable"}) == (200, {})
    assert (await picture(page))["fault"] == "unavailable"
    assert [await get(http) for _ in range(3)] == [503] * 3
    async with aiohttp.ClientSession(sandbox.url) as nobody, nobody.get("/v2/operations/a") as response:
        assert (response.status, list(await response.json())) == (503, ["error"])
    assert await approve(page, await key_of(page)) == 200
    assert await post(page, "fault", {"fault": "none"}) == (200, {})
    assert (await picture(page))["fault"] == "none"
    assert await get(http) == 200
    assert [record.status for record in sandbox.requests] == [200, 503, 503, 503, 503, 200]


async def test_api_drops_connections_until_it_is_to_work_again(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    await post(page, "fault", {"fault": "dropped"})
    for attempt in (create(http), get(http)):
        with pytest.raises((aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)):
            await attempt
    assert not sandbox.operations
    await post(page, "fault", {"fault": "none"})
    await create(http)
    assert {record.status for record in sandbox.requests} == {None, 200}


@pytest.mark.parametrize("fault", ["unavailable", "dropped"])
async def test_faults_of_the_page_leave_those_of_a_test_alone_and_let_nothing_take_effect(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession, fault: str
) -> None:
    sandbox.fail_next(500)
    await post(page, "fault", {"fault": fault})
    with suppress(aiohttp.ClientError):
        async with http.post(f"/v2/users/{USER}/operations", json={"operationId": "a"}) as response:
            assert response.status == 503
    await post(page, "fault", {"fault": "none"})
    assert not sandbox.operations
    assert [await get(http), await get(http)] == [500, 404]


# The journal


@pytest.mark.looptime
async def test_the_journal_records_how_long_an_answer_took(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    sandbox.latency = 0.2
    asking = asyncio.create_task(get(http))
    await until(lambda: sandbox.requests)
    assert sandbox.requests[0].duration == 0
    await asking
    assert sandbox.requests[0].duration == pytest.approx(0.2)


@pytest.mark.looptime
async def test_the_journal_records_how_long_a_client_waited_that_left(
    sandbox: Sandbox, http: aiohttp.ClientSession
) -> None:
    sandbox.latency = 3600
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await get(http)
    await until(lambda: sandbox.requests[0].duration)
    assert sandbox.requests[0].status is None
    assert sandbox.requests[0].duration == pytest.approx(1)


def test_journal_keeps_a_bounded_amount_of_text() -> None:
    journal = Journal(most_text=10_000)
    for number in range(100):
        journal.add("GET", f"/{number}" + "p" * 1000, number, most_records=1000)
        assert sum(len(record.path) for record in journal.requests) <= 10_000
    assert journal.requests[-1].path.startswith("/99")


def test_journal_that_was_cleared_has_room_again() -> None:
    journal = Journal(most_text=1000)
    journal.add("GET", "p" * 900, 0, most_records=10)
    journal.requests.clear()
    for number in range(3):
        journal.add("GET", "p" * 200, number, most_records=10)
    assert [record.at for record in journal.requests] == [0, 1, 2]


def test_journal_keeps_the_latest_request_whatever_its_length() -> None:
    journal = Journal(most_text=10)
    journal.add("GET", "/first", 0, most_records=10)
    record = journal.add("M" * 100, "/" + "p" * 1000, 1, most_records=10)
    assert journal.requests == [record]
    assert record.method == "M" * 40 + "… (60 more characters)"
