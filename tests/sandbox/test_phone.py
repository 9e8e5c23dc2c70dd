"""The endpoints of the phone's page over real sockets: what they send, what they do, and whom they refuse."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import AsyncExitStack, ExitStack, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web
from waiting import PATIENCE, spin_until

from aiokeyless.sandbox import Sandbox
from aiokeyless.sandbox.phone import Phones
from aiokeyless.sandbox.snapshot import PhoneBook
from aiokeyless.signatures import TransactionVerifier

from .phone_page import BROWSER, OTHER, USER, approve, create, events, fail, get, key_of, picture, post

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Raw = Callable[..., Awaitable[tuple[int, bytes]]]


# Long texts


async def whole_text(page: aiohttp.ClientSession, **query: str) -> tuple[int, Any]:
    async with page.get("/sandbox/page/payload", params=query) as response:
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


async def test_a_phone_that_was_removed_approves_and_cancels_nothing(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    await create(http)
    key = await key_of(page)
    async with http.delete(f"/v2/users/{USER}") as response:
        assert response.status == 200
    body = {"user": USER, "key": key}
    for path, more in (("approve", {"authType": "biom"}), ("fail", {"errorCode": 30003})):
        assert await post(page, path, {**body, **more}) == (
            409,
            {"error": "This phone was removed, so it can approve nothing."},
        )
    assert not sandbox.operations["a"].is_approved
    assert sandbox.authentications == []


async def test_a_user_is_enrolled_and_their_device_removed_on_the_page(
    sandbox: Sandbox, page: aiohttp.ClientSession
) -> None:
    enrolment = {"user": f" {USER.lower()} ", "externalUserId": "ann"}
    assert (await post(page, "enroll", enrolment))[0] == 200
    [phone] = (await picture(page))["phones"]
    assert (phone["user"], phone["externalUserId"]) == (USER, "ann")
    [device] = phone["devices"]
    assert (await post(page, "enroll", {"user": USER, "externalUserId": ""}))[0] == 200
    assert (await post(page, "remove", {"user": USER, "key": device["key"]}))[0] == 200
    [phone] = (await picture(page))["phones"]
    assert (phone["externalUserId"], len(phone["devices"])) == ("ann", 1)
    assert phone["devices"] != [device]
    assert await post(page, "enroll", {"user": OTHER, "externalUserId": "ann"}) == (
        409,
        {"error": "This external id belongs to another user."},
    )
    assert (await post(page, "enroll", {"user": "xyz", "externalUserId": ""}))[0] == 400
    assert (await post(page, "enroll", {"user": OTHER, "externalUserId": "a" * 513}))[0] == 400
    assert [each.user_id for each in sandbox._store.users.devices(USER)] == [USER]


async def test_what_was_signed_is_there_to_be_copied(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    await create(http, operationPayload="Pay 5")
    sandbox.fail_authentication("a")
    sandbox.approve("a")
    shown = await picture(page)
    assert shown["signs"]
    approved, failed = (entry["number"] for entry in shown["history"])

    async def token(number: object) -> tuple[int, Any]:
        async with page.get("/sandbox/page/token", params={"number": str(number)}) as response:
            return response.status, await response.json()

    status, answer = await token(approved)
    assert status == 200
    async with sandbox.client() as client:
        verifier = TransactionVerifier(client, tenant=sandbox.tenant)
        await verifier.verify(answer["token"], user_id=USER, transaction_data="Pay 5")
    sandbox.forget("a")
    for number in (approved, failed, 99, "", "x", "\u0661"):
        assert await token(number) == (404, {"error": "This operation is no longer there."})


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
            async with page.get("/sandbox/page/events") as response:
                assert response.status == 503
                assert await response.json() == {"error": "32 pages are open, which is the limit; close one"}
        opened[7].response.close()
        await spin_until(lambda: len(sandbox._phones._readers) < 32)  # nothing public tells who reads
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
            connection.sendall(b"GET /sandbox/page/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
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
    draw = Phones._encode_event  # nothing public tells how often

    def count_and_draw(phones: Phones, user: str) -> Any:
        nonlocal drawn
        drawn += 1
        return draw(phones, user)

    monkeypatch.setattr(Phones, "_encode_event", count_and_draw)
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
    await spin_until(lambda: not sandbox._phones._readers)
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
        async with asyncio.timeout(PATIENCE):
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
        async with page.post(f"/sandbox/page/{path}", data=body, headers=headers) as response:
            assert (response.status, list(await response.json())) == (400, ["error"])


async def test_body_that_cannot_be_unpacked_is_a_bad_request(page: aiohttp.ClientSession) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    async with page.post("/sandbox/page/approve", data=b"nope", headers=headers) as response:
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
    async with page.post("/sandbox/page/approve", data=body, headers=headers) as response:
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


@pytest.mark.parametrize(("code", "reason"), [(30003, "the user left the scan"), (30004, "the face did not match")])
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


async def test_phone_that_is_locked_is_unlocked(http: aiohttp.ClientSession, page: aiohttp.ClientSession) -> None:
    await create(http)
    key = await key_of(page)
    for _ in range(5):
        await fail(page, key, 30004)
    assert (await post(page, "unlock", {"user": "Alice"}))[0] == 400
    assert await approve(page, key) == 409
    assert await post(page, "unlock", {"user": USER}) == (200, {})
    assert await approve(page, key) == 200


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


async def test_page_is_told_that_a_program_lets_the_api_fail(
    sandbox: Sandbox, http: aiohttp.ClientSession, page: aiohttp.ClientSession
) -> None:
    async with events(page) as stream:
        assert not (await stream.next())["fails"]
        sandbox.fail_next(times=1)
        await stream.until(lambda shown: shown["fails"])
        assert await get(http) == 503
        await stream.until(lambda shown: not shown["fails"])


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
