"""The endpoints of the phone's page over real sockets: what they send, what they do, and whom they refuse."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web
from waiting import spin_until

from aiokeyless.sandbox import Sandbox
from aiokeyless.sandbox.snapshot import PhoneBook

from .phone_page import OTHER, USER, approve, create, events, fail, get, picture, post

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Raw = Callable[..., Awaitable[tuple[int, bytes]]]


# How it is sent


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
    draw = PhoneBook.snapshot  # nothing public tells how often

    def count_and_draw(book: PhoneBook, user: str) -> dict[str, object]:
        nonlocal drawn
        drawn += 1
        return draw(book, user)

    monkeypatch.setattr(PhoneBook, "snapshot", count_and_draw)
    for number in range(20):
        await create(http, str(number), operationPayload="€" * 2000)
    address = urlsplit(sandbox.url)
    with socket.create_connection((address.hostname, address.port)) as lazy:
        lazy.sendall(b"GET /sandbox/page/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
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


async def test_closing_sends_what_happened_last_ends_the_streams_and_leaves_nothing() -> None:
    before = asyncio.all_tasks()
    async with Sandbox() as sandbox, aiohttp.ClientSession(sandbox.url) as http, events(http) as stream:
        await stream.next()
        sandbox.approve("a", user_id=USER)
        closing = asyncio.create_task(sandbox.aclose())
        await stream.until(lambda shown: shown["history"])
        with pytest.raises(EOFError):
            await stream.until(lambda _: False)
        await closing
    assert asyncio.all_tasks() == before


async def test_page_that_is_closed_leaves_nothing(sandbox: Sandbox, page: aiohttp.ClientSession) -> None:
    async with events(page) as stream:
        await stream.next()
        assert len(sandbox._phones._streams) == 1  # nothing public tells who reads
        stream.response.close()
    await spin_until(lambda: not sandbox._phones._streams)
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


# What the buttons do


@pytest.mark.parametrize("how", ["biom", "pin"])
async def test_button_approves_as_it_says(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession, how: str
) -> None:
    await create(http, "first")
    await create(http)
    assert await approve(page, how=how) == 200
    assert sandbox.operations["a"].is_approved
    assert sandbox.operations["a"].auth_type == how
    assert not sandbox.operations["first"].is_approved


async def test_a_user_is_enrolled_on_the_page(page: aiohttp.ClientSession) -> None:
    assert (await post(page, "enroll", {"userId": USER.lower(), "externalUserId": "ann"}))[0] == 200
    [phone] = (await picture(page))["phones"]
    assert (phone["user"], phone["externalUserId"]) == (USER, "ann")


@pytest.mark.looptime
async def test_phone_that_is_locked_says_for_how_long_and_is_unlocked(
    http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    await create(http)
    for wait in (True, False):
        for _ in range(5):
            assert await fail(page, 30004) == 200
        assert 0 < (await picture(page))["phones"][0]["lockedFor"] <= 600
        assert await approve(page) == 409
        if wait:
            await asyncio.sleep(600)
        else:
            assert await post(page, "unlock", {"userId": USER}) == (200, {})
        assert (await picture(page))["phones"][0]["lockedFor"] == 0
    assert await approve(page) == 200


async def test_page_makes_operations(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    for body in ({"userId": USER.lower(), "operationPayload": "Pay 5"}, {"userId": OTHER}):
        assert await post(page, "create", body) == (200, {})
    first, second = sandbox.operations.values()
    assert (first.user_id, first.operation_payload) == (USER, "Pay 5")
    assert (second.user_id, second.operation_payload) == (OTHER, None)
    assert await get(http, first.operation_id) == 200
    assert [phone["user"] for phone in (await picture(page))["phones"]] == [USER, OTHER]


async def test_simulated_user_approves_what_the_page_creates() -> None:
    async with (
        Sandbox(auto_approve=0) as sandbox,
        aiohttp.ClientSession(sandbox.url, headers={"Origin": sandbox.url}) as page,
    ):
        assert (await post(page, "create", {"userId": USER, "operationPayload": "Pay 5"}))[0] == 200
        assert [each.is_approved for each in sandbox.operations.values()] == [True]


async def test_the_api_fails_as_the_page_or_a_program_says_until_it_is_to_work_again(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    await create(http)
    async with events(page) as stream:
        assert (await stream.next())["fault"] == "recover"
        assert await post(page, "fault", {"fault": "drop"}) == (200, {})
        await stream.until(lambda shown: shown["fault"] == "drop")
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await create(http, "b")
        assert await post(page, "fault", {"fault": "fail"}) == (200, {})
        await stream.until(lambda shown: shown["fault"] == "fail")
        assert [await get(http) for _ in range(3)] == [503] * 3
        await post(page, "fault", {"fault": "recover"})
        await stream.until(lambda shown: shown["fault"] == "recover")
        sandbox.drop_next(2)  # the client of these tests repeats a GET
        await stream.until(lambda shown: shown["fault"] == "drop")
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await get(http)
        await stream.until(lambda shown: shown["fault"] == "recover")
    assert await get(http) == 200


# Whom it refuses


@pytest.mark.parametrize("path", ["elsewhere", "sign", "rotate", "list", "fail"])
async def test_page_has_no_button_for_what_needs_the_key(page: aiohttp.ClientSession, path: str) -> None:
    assert (await post(page, path, {}))[0] == 404


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
    headers = {"Content-Type": "application/json", **headers}
    async with page.post("/sandbox/page/approve", data=json.dumps({"operationId": "a"}), headers=headers) as response:
        assert (response.status, list(await response.json())) == (status, ["error"])
        assert not [name for name in response.headers if name.startswith("Access-Control")]
    assert not sandbox.operations["a"].is_approved


async def test_other_page_cannot_follow_nor_ask_whether_it_may(raw: Raw, sandbox: Sandbox) -> None:
    async with aiohttp.ClientSession(sandbox.url, headers={"Origin": "http://evil.example"}) as evil:
        async with evil.get("/sandbox/page/events") as response:
            assert response.status == 403
        preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        async with evil.options("/sandbox/page/approve", headers=preflight) as response:
            assert response.status == 403
            assert not [name for name in response.headers if name.startswith("Access-Control")]
    rebound = b"evil.example:%d" % (urlsplit(sandbox.url).port or 0)
    status, _ = await raw(b"/sandbox/page/events", headers=b"Origin: http://%b\r\n" % rebound, host=rebound)
    assert status == 421
    assert sandbox.requests == []
