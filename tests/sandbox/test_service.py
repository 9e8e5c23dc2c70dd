"""The sandbox over real sockets: what is answered, when, whether at all, and what is left when it closes."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import logging
import math
import socket
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web
from aiohttp_version import takes_the_limit
from ports import own_port
from waiting import spin_until

from aiokeyless.errors import ConfigurationError
from aiokeyless.sandbox import RequestRecord, Sandbox

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiokeyless.models import Operation

    Raw = Callable[..., Awaitable[tuple[int, bytes]]]


USER = "C0FFEE"
CREATE = f"/v2/users/{USER}/operations"
PENDING = f"/v2/users/{USER}/operations/pending"


def session_for(sandbox: Sandbox) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(sandbox.url, headers={"X-Api-Key": sandbox.api_key})


async def create(http: aiohttp.ClientSession, operation_id: str = "a", **fields: str) -> int:
    async with http.post(CREATE, json={"operationId": operation_id, **fields}) as response:
        return response.status


async def get(http: aiohttp.ClientSession, path: str = "/v2/operations/a") -> tuple[int, Any]:
    async with http.get(path) as response:
        return response.status, await response.json()


async def state(http: aiohttp.ClientSession, operation_id: str = "a") -> str:
    _, operation = await get(http, f"/v2/operations/{operation_id}")
    return str(operation["state"])


def now() -> float:
    return asyncio.get_running_loop().time()


# An operation's life


@pytest.mark.platform
@pytest.mark.real_clock
async def test_operation_is_created_shown_pending_and_approved(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    async with http.post(CREATE, json={"operationId": "a", "operationPayload": "Pay 5"}) as response:
        assert (response.status, response.content_type) == (200, "application/json")
        assert await response.json() == {"success": True}
    assert await get(http, PENDING) == (200, [{"operationId": "a", "operationPayload": "Pay 5"}])
    assert await state(http) == "pending"
    approved = sandbox.approve("a", auth_type="pin")
    assert sandbox.operations == {"a": approved}
    assert await get(http, PENDING) == (200, [])
    status, operation = await get(http)
    assert status == 200
    assert (operation["state"], operation["result"], operation["authType"]) == ("approved", True, "pin")


@pytest.mark.platform
@pytest.mark.looptime
async def test_each_request_of_the_api_is_reported_when_it_ends() -> None:
    reported: list[object] = []

    def report(record: RequestRecord) -> None:
        reported.append((record.method, record.path, record.status, record.duration))

    async with Sandbox(on_request=report) as sandbox, session_for(sandbox) as http:
        await create(http)
        async with http.get("/", headers={"Accept": "text/html"}):
            pass  # the phone is not the API
        sandbox.latency = 0.5
        await get(http)
    assert reported == [
        ("POST", CREATE, 200, pytest.approx(0, abs=0.1)),
        ("GET", "/v2/operations/a", 200, pytest.approx(0.5, abs=0.1)),
    ]


async def test_a_report_that_raises_is_logged_and_the_request_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    def report(_: RequestRecord) -> None:
        raise LookupError("no such report")

    async with Sandbox(on_request=report) as sandbox, session_for(sandbox) as http:
        assert await create(http) == 200
    assert "on_request of the sandbox failed for POST" in caplog.text
    assert "no such report" in caplog.text


# The wire


@pytest.mark.parametrize(
    "target",
    [
        *(b"/", b"/favicon.ico", b"/v2%2Foperations%2Fa", b"/v2/operations/../operations/a", b"//v2/operations/a"),
        *(b"http://127.0.0.1/v2/operations/a", b"http://evil.example/v2/operations/a"),
    ],
)
async def test_other_paths_are_not_found_in_json(http: aiohttp.ClientSession, raw: Raw, target: bytes) -> None:
    await create(http)
    status, body = await raw(target)
    assert (status, list(json.loads(body))) == (404, ["error"])


@pytest.mark.parametrize(
    ("accept", "status"),
    [
        (b"", 200),
        (b"Accept: text/html\r\n", 406),
        (b"Accept: text/html\r\nAccept: application/json\r\n", 200),
    ],
)
async def test_all_accept_headers_count_together(raw: Raw, accept: bytes, status: int) -> None:
    assert (await raw(PENDING.encode(), headers=b"X-Api-Key: sandbox-key\r\n" + accept))[0] == status


@pytest.mark.platform
@pytest.mark.parametrize(
    ("size", "status"),
    [
        pytest.param(1024 * 1024, 200, marks=takes_the_limit),
        (1024 * 1024 + 1, 413),
        (3 * 1024 * 1024, 413),
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
async def test_body_over_the_limit_is_too_large(
    sandbox: Sandbox, http: aiohttp.ClientSession, size: int, status: int, chunked: bool
) -> None:
    body = io.BytesIO(b'{"operationId": "a", "operationPayload": "%s"}' % (b"x" * (size - 44)))
    headers = {"Content-Type": "application/json"}
    async with http.post(CREATE, data=body, headers=headers, chunked=chunked or None) as response:
        assert (response.status, list(await response.json())) == (status, ["success" if status == 200 else "error"])
    assert [record.status for record in sandbox.requests] == [status]


async def test_body_that_cannot_be_unpacked_is_a_bad_request(sandbox: Sandbox, raw: Raw) -> None:
    headers = b"X-Api-Key: sandbox-key\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n"
    status, _ = await raw(CREATE.encode(), b"POST", headers + b"Content-Length: 4\r\n", b"nope")
    assert status == 400
    assert sandbox.requests[0].status == 400


@pytest.mark.platform
async def test_client_that_leaves_in_its_body_is_no_error(sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    address = urlsplit(sandbox.url)
    _, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{" % CREATE.encode())
    await spin_until(lambda: sandbox.requests)
    writer.transport.abort()
    await spin_until(lambda: not sandbox._handlers)  # nothing public tells that a handler is gone
    await asyncio.sleep(0)
    assert [record.status for record in sandbox.requests] == [None]
    assert [record for record in caplog.records if record.name.startswith("aiohttp")] == []


async def test_requests_are_not_logged(http: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    await get(http)
    assert [record for record in caplog.records if record.name.startswith("aiohttp")] == []


# Whom it answers


@pytest.mark.parametrize("host", [b"evil.example", b"localhost.evil.example:80", b"sandbox", b""])
async def test_page_whose_name_resolves_to_this_machine_reaches_no_api(sandbox: Sandbox, raw: Raw, host: bytes) -> None:
    json_body = b"X-Api-Key: sandbox-key\r\nContent-Type: application/json\r\nContent-Length: 20\r\n"
    sandbox.approve("a", user_id=USER)
    for target, method, headers, body in (
        (b"/v2/operations/a", b"GET", b"X-Api-Key: sandbox-key\r\n", b""),
        (CREATE.encode(), b"POST", json_body, b'{"operationId": "b"}'),
        (b"/v2/operations/a", b"GET", b"", b""),
    ):
        status, answer = await raw(target, method, headers, body, host)
        assert (status, list(json.loads(answer))) == (421, ["error"])
        assert b"use localhost or an IP address" in answer
        assert b"--host" in answer
    assert list(sandbox.operations) == ["a"]
    assert [record.status for record in sandbox.requests] == [421] * 3


async def test_page_that_is_kept_out_uses_up_no_fault(sandbox: Sandbox, http: aiohttp.ClientSession, raw: Raw) -> None:
    sandbox.fail_next(500)
    assert (await raw(b"/v2/operations/a", host=b"evil.example"))[0] == 421
    assert (await get(http))[0] == 500


async def test_api_answers_to_the_name_that_it_listens_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Sandbox(host="localhost") as sandbox:
        monkeypatch.setattr(sandbox, "_host", "sandbox.test")  # as if this machine had the name
        headers = {"X-Api-Key": sandbox.api_key, "Host": "Sandbox.test:3223"}
        async with aiohttp.ClientSession(sandbox.url, headers=headers) as http:
            assert (await get(http, PENDING))[0] == 200


# Faults


async def test_next_requests_fail_and_then_it_is_over(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    sandbox.approve("a", user_id=USER)
    sandbox.fail_next(status=502, times=2)
    statuses = [(await get(http))[0] for _ in range(3)]
    assert statuses == [502, 502, 200]
    assert [record.status for record in sandbox.requests] == statuses


async def test_fault_is_503_once_in_json_by_default(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    sandbox.fail_next()
    assert await get(http) == (503, {"error": "the sandbox simulates a 503"})
    assert (await get(http))[0] == 404


async def test_faults_come_in_the_order_in_which_they_were_made(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    sandbox.fail_next(status=500)
    sandbox.drop_next()
    sandbox.fail_next(status=429)
    assert (await get(http))[0] == 500
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await create(http)
    assert (await get(http))[0] == 429


async def test_fault_reaches_requests_that_would_be_refused(sandbox: Sandbox, raw: Raw) -> None:
    sandbox.fail_next(status=500, times=2)
    assert (await raw(b"/elsewhere"))[0] == 500
    assert (await raw(PENDING.encode(), headers=b""))[0] == 500


@pytest.mark.parametrize("is_stored", [False, True])
@pytest.mark.parametrize("status", [504, None], ids=["failed", "dropped"])
async def test_creation_that_fails_is_stored_if_it_is_told_to_be(
    sandbox: Sandbox, http: aiohttp.ClientSession, status: int | None, is_stored: bool
) -> None:
    if status is None:
        sandbox.drop_next(stored=is_stored)
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await create(http)
    else:
        sandbox.fail_next(status=status, stored=is_stored)
        assert await create(http) == status
    assert list(sandbox.operations) == ["a"] * is_stored
    assert await create(http) == (409 if is_stored else 200)


@pytest.mark.parametrize("method", ["POST", "post"])
async def test_fault_of_one_method_waits_for_it(sandbox: Sandbox, http: aiohttp.ClientSession, method: str) -> None:
    sandbox.fail_next(status=500, method=method)
    sandbox.fail_next(status=502)
    assert (await get(http))[0] == 502
    assert (await get(http))[0] == 404
    assert await create(http) == 500
    assert await create(http) == 200


@pytest.mark.parametrize(
    ("retry_after", "header"),
    [
        (1, "1"),
        (0, "0"),
        (2.0, "2"),
        (0.5, "0.5"),
        *((text, text) for text in ("Wed, 21 Oct 2026 07:28:00 GMT", "soon")),
    ],
)
async def test_fault_has_retry_after(
    sandbox: Sandbox, http: aiohttp.ClientSession, retry_after: float | str, header: str
) -> None:
    sandbox.fail_next(status=429, retry_after=retry_after)
    async with http.get(PENDING) as response:
        assert (response.status, response.headers["Retry-After"]) == (429, header)


async def test_captive_portal_answers_its_page(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    sandbox.fail_next(status=200, body=b"<html>Log in", content_type="text/html")
    async with http.get(PENDING) as response:
        assert (response.status, response.content_type, await response.read()) == (200, "text/html", b"<html>Log in")
        assert "Retry-After" not in response.headers


async def test_fault_has_the_headers_that_it_is_given(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    sandbox.fail_next(302, headers={"location": "/elsewhere", "content-type": "text/plain"}, body=b"")
    async with http.get(PENDING, allow_redirects=False) as response:
        assert (response.status, response.headers["Location"]) == (302, "/elsewhere")
        assert response.headers.getall("Content-Type") == ["text/plain"]


@pytest.mark.platform
async def test_dropped_connection_sends_not_one_byte(sandbox: Sandbox) -> None:
    sandbox.drop_next(method="GET")
    address = urlsplit(sandbox.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


async def test_outage_lasts_until_it_recovers(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    sandbox.fail_next(times=None)
    sandbox.fail_next(status=500)
    assert {(await get(http, PENDING))[0] for _ in range(20)} == {503}
    sandbox.recover()
    assert (await get(http, PENDING))[0] == 200


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("status", value) for value in (99, 101, 600, True, "503")),
        *(("times", value) for value in (0, -1, 1.5, True)),
        *(("method", value) for value in ("", 7)),
        *(("retry_after", value) for value in (-1, math.nan, math.inf, "1\r\nSet-Cookie: a=b", "", " ")),
        *(("content_type", value) for value in ("", "text/html\n")),
        *(
            ("headers", value)
            for value in ({"A": "b\r\nC: d"}, {"A\r\nC": "b"}, {"": "b"}, {"A": 7}, {7: "A"}, {"A": ""})
        ),
    ],
)
async def test_wrong_fault_is_refused_by_its_argument(sandbox: Sandbox, argument: str, value: Any) -> None:
    wrong = {argument: value}
    with pytest.raises(ConfigurationError) as refused:
        sandbox.fail_next(**wrong)
    assert refused.value.argument == argument
    async with session_for(sandbox) as http:
        assert (await get(http, PENDING))[0] == 200


async def read_pending(sandbox: Sandbox, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """Send a request on a connection that stays open, and return the first line of the answer."""
    head = f"GET {PENDING} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\nX-Api-Key: {sandbox.api_key}"
    writer.write(f"{head}\r\n\r\n".encode())
    answer = await reader.readuntil(b"[]")
    return answer.partition(b"\r\n")[0]


async def test_each_open_connection_is_reset_at_its_next_request_and_new_ones_work(sandbox: Sandbox) -> None:
    port = urlsplit(sandbox.url).port
    used, unused = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
    assert await read_pending(sandbox, *used) == b"HTTP/1.1 200 OK"
    sandbox.reset_connections()
    new = await asyncio.open_connection("127.0.0.1", port)
    assert await read_pending(sandbox, *new) == b"HTTP/1.1 200 OK"
    for connection in (used, unused):
        with pytest.raises(ConnectionResetError):
            await read_pending(sandbox, *connection)
    assert await read_pending(sandbox, *new) == b"HTTP/1.1 200 OK"
    assert [record.status for record in sandbox.requests] == [200] * 3
    for _, writer in (used, unused, new):
        writer.close()


async def test_closed_sandbox_has_no_connections_to_reset() -> None:
    sandbox = Sandbox()
    sandbox.reset_connections()
    async with sandbox, session_for(sandbox) as http:
        assert await create(http) == 200


# Latency


@pytest.mark.platform
@pytest.mark.looptime
async def test_timestamps_follow_a_clock_that_a_test_moves(sandbox: Sandbox) -> None:
    sandbox.approve("a", user_id=USER)
    await asyncio.sleep(24 * 3600)
    sandbox.approve("b", user_id=USER)
    first, second = (operation.created_at for operation in sandbox.operations.values())
    assert first is not None
    assert second is not None
    assert second - first >= timedelta(hours=24)


@pytest.mark.platform
@pytest.mark.looptime
async def test_refusals_and_faults_come_late_too(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    sandbox.latency = 1
    sandbox.fail_next()
    assert (await get(http))[0] == 503
    assert now() == pytest.approx(1)
    assert (await get(http, "/elsewhere"))[0] == 404
    assert now() == pytest.approx(2)
    sandbox.drop_next(method="POST")
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await create(http)
    assert now() == pytest.approx(3)


@pytest.mark.platform
@pytest.mark.looptime
async def test_poll_shows_what_was_true_when_it_arrived(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    await create(http)
    sandbox.latency = 1
    asyncio.get_running_loop().call_later(0.5, sandbox.approve, "a")
    assert await state(http) == "pending"
    assert await state(http) == "approved"


@pytest.mark.platform
@pytest.mark.looptime
async def test_client_that_leaves_ends_its_handler(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    sandbox.latency = 3600
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await get(http)
    await spin_until(lambda: not sandbox._handlers)  # nothing public tells that a handler is gone
    [record] = sandbox.requests
    assert record.status is None
    assert record.duration == pytest.approx(1)


@pytest.mark.parametrize("latency", [-0.1, math.nan, math.inf, "1", None, True])
async def test_latency_is_a_finite_number_of_seconds(sandbox: Sandbox, latency: float) -> None:
    with pytest.raises(ConfigurationError, match="latency") as refused:
        sandbox.latency = latency
    assert refused.value.argument == "latency"
    assert sandbox.latency == 0


# The simulated user


@pytest.mark.platform
@pytest.mark.looptime
async def test_operation_is_approved_after_the_time_that_was_asked_for() -> None:
    async with Sandbox(auto_approve=8) as sandbox, session_for(sandbox) as http:
        await create(http)
        await asyncio.sleep(7.999)
        assert await state(http) == "pending"
        await asyncio.sleep(0.002)
        assert await state(http) == "approved"


async def test_another_time_counts_for_operations_after_it(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    sandbox.auto_approve = 0
    await create(http, "a")
    with pytest.raises(ConfigurationError, match="auto_approve"):
        sandbox.auto_approve = -1
    assert sandbox.auto_approve == 0
    sandbox.auto_approve = None
    await create(http, "b")
    assert [operation.is_approved for operation in sandbox.operations.values()] == [True, False]


@pytest.mark.platform
@pytest.mark.looptime
async def test_callable_decides_for_each_operation_when_it_is_approved() -> None:
    def patience(operation: Operation) -> float | None:
        return {"a": 3, "b": None, "c": 0}[operation.operation_id]

    async with Sandbox(auto_approve=patience) as sandbox, session_for(sandbox) as http:
        for operation_id in "abc":
            await create(http, operation_id)
        assert [operation.is_approved for operation in sandbox.operations.values()] == [False, False, True]
        await asyncio.sleep(1000)
        assert [operation.is_approved for operation in sandbox.operations.values()] == [True, False, True]


@pytest.mark.platform
@pytest.mark.parametrize("answer", [-1, math.nan, "soon", ZeroDivisionError])
async def test_callable_that_fails_is_logged_and_answers_500(answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    def patience(_operation: Operation) -> float | None:
        if isinstance(answer, type):
            raise answer
        result: float = answer
        return result

    async with Sandbox(auto_approve=patience) as sandbox, session_for(sandbox) as http:
        assert await create(http) == 500
        assert [record.status for record in sandbox.requests] == [500]
        assert (await get(http))[0] == 200
    assert any(record.exc_info for record in caplog.records)


@pytest.mark.platform
@pytest.mark.looptime
async def test_simulated_user_does_not_approve_what_was_forgotten() -> None:
    async with Sandbox(auto_approve=5) as sandbox, session_for(sandbox) as http:
        await create(http)
        await asyncio.sleep(4)
        sandbox.forget("a")
        await create(http)
        await asyncio.sleep(4)
        assert await state(http) == "pending"
        await asyncio.sleep(2)
        assert await state(http) == "approved"


# Attempts that fail


@pytest.mark.platform
@pytest.mark.parametrize("delay", [0, 5])
@pytest.mark.looptime
async def test_simulated_user_who_is_locked_out_does_not_approve(delay: int) -> None:
    async with Sandbox(auto_approve=delay) as sandbox, session_for(sandbox) as http:
        for _ in range(5):
            sandbox.fail_authentication("a", user_id=USER)
        assert await create(http) == 200
        await asyncio.sleep(6)
        assert await state(http) == "pending"
        assert sandbox.authentications[-1].error_code == 30007


# The journal


async def test_journal_may_be_cleared_and_the_count_goes_on(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    await get(http)
    sandbox.requests.clear()
    await get(http, PENDING)
    assert [record.path for record in sandbox.requests] == [PENDING]
    assert sandbox.request_count == 2


async def test_journal_does_not_grow_without_end(
    sandbox: Sandbox, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sandbox, "JOURNAL_LIMIT", 20)
    for number in range(22):
        await get(http, f"/v2/operations/{number}")
    assert [record.path for record in sandbox.requests] == [f"/v2/operations/{number}" for number in range(2, 22)]
    assert sandbox.request_count == 22


# Opening and closing


async def test_url_is_there_only_while_it_runs() -> None:
    sandbox = Sandbox()
    with pytest.raises(ConfigurationError, match="async with"):
        _ = sandbox.url
    async with sandbox:
        assert sandbox.url.startswith("http://127.0.0.1:")
    with pytest.raises(ConfigurationError, match="async with"):
        _ = sandbox.url


@pytest.mark.platform
@pytest.mark.real_clock
async def test_it_serves_again_on_the_same_port_with_the_same_operations() -> None:
    sandbox = Sandbox(port=own_port())
    async with sandbox:
        url = sandbox.url
        sandbox.approve("a", user_id=USER)
    async with sandbox, aiohttp.ClientSession(url, headers={"X-Api-Key": sandbox.api_key}) as http:
        assert sandbox.url == url
        assert (await get(http))[0] == 200


@pytest.mark.platform
async def test_it_serves_again_in_another_loop() -> None:
    sandbox = Sandbox()

    async def use() -> int:
        async with sandbox, aiohttp.ClientSession(sandbox.url, headers={"X-Api-Key": sandbox.api_key}) as http:
            return (await get(http, PENDING))[0]

    assert await use() == 200
    assert await asyncio.to_thread(asyncio.run, use()) == 200


@pytest.mark.platform
async def test_running_sandbox_is_not_entered_twice(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    with pytest.raises(ConfigurationError, match="running already"):
        await sandbox.start()
    assert (await get(http, PENDING))[0] == 200


@pytest.mark.platform
async def test_closing_twice_or_before_the_start_does_nothing() -> None:
    sandbox = Sandbox()
    await sandbox.aclose()
    await sandbox.start()
    await sandbox.aclose()
    await sandbox.aclose()


@pytest.mark.platform
async def test_taken_port_is_an_os_error_and_can_be_tried_again() -> None:
    port = own_port()
    second = Sandbox(port=port)
    async with Sandbox(port=port):
        with pytest.raises(OSError, match="address already in use"):
            await second.start()
        with pytest.raises(ConfigurationError):
            _ = second.url
    async with second:
        assert second.url


@pytest.mark.platform
@pytest.mark.parametrize("turns", range(8))
async def test_start_that_is_cancelled_at_any_point_leaves_the_port_free(turns: int) -> None:
    port = own_port()
    second = Sandbox(port=port)
    starting = asyncio.create_task(second.start())
    for _ in range(turns):
        await asyncio.sleep(0)
    starting.cancel()
    await asyncio.wait([starting])
    if not starting.cancelled():
        await second.aclose()
    async with second:
        assert second.url == f"http://127.0.0.1:{port}"


@pytest.mark.platform
async def test_start_that_fails_while_it_is_cancelled_is_no_more_than_cancelled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begun, failing = asyncio.Event(), asyncio.Event()

    async def start(_site: web.TCPSite) -> None:
        begun.set()
        await failing.wait()
        raise OSError("address already in use")

    monkeypatch.setattr(web.TCPSite, "start", start)
    starting = asyncio.create_task(Sandbox().start())
    await begun.wait()
    starting.cancel()
    asyncio.get_running_loop().call_soon(failing.set)
    with pytest.raises(asyncio.CancelledError):
        await starting
    del starting
    gc.collect()
    assert not caplog.records


@pytest.mark.platform
@pytest.mark.looptime
async def test_nothing_is_left_when_it_is_closed() -> None:
    loop = asyncio.get_running_loop()
    before = asyncio.all_tasks()
    async with Sandbox(auto_approve=60) as sandbox:
        address = urlsplit(sandbox.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        async with aiohttp.ClientSession(sandbox.url, headers={"X-Api-Key": sandbox.api_key}) as http:
            await create(http)
        sandbox.latency = 3600
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await spin_until(lambda: len(sandbox.requests) == 2)
    assert asyncio.all_tasks() == before
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    timers: list[asyncio.TimerHandle] = loop._scheduled  # type: ignore[attr-defined]  # no public list
    assert [timer for timer in timers if not timer.cancelled()] == []
    assert loop.time() == 0


@pytest.mark.platform
async def test_closing_does_not_wait_for_bodies_that_do_not_end() -> None:
    before = asyncio.all_tasks()
    async with Sandbox() as sandbox:
        sandbox.fail_next()
        address = urlsplit(sandbox.url)
        connections = []
        for _ in range(2):
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            writer.write(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{")
            connections.append((reader, writer))
        await spin_until(lambda: len(sandbox.requests) == 2)
        assert await connections[0][0].readline() == b"HTTP/1.1 503 Service Unavailable\r\n"
        started = now()
    assert now() - started < 1
    for reader, writer in connections:
        await reader.read()
        writer.close()
        await writer.wait_closed()
    assert asyncio.all_tasks() == before


@pytest.mark.platform
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])  # noqa: S104  # to see what it makes of it
async def test_the_url_can_be_reached_for_every_host_it_listens_on(host: str) -> None:
    async with Sandbox(host=host) as sandbox, aiohttp.ClientSession(sandbox.url) as http, http.get("/") as response:
        assert response.status == 404
    assert urlsplit(str(response.url)).hostname in {"127.0.0.1", "::1"}


@pytest.mark.platform
@pytest.mark.parametrize("host", ["::1", "::"])
async def test_url_of_an_ipv6_address_has_brackets(host: str) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    async with Sandbox(host=host) as sandbox, aiohttp.ClientSession(sandbox.url) as http, http.get("/") as response:
        assert response.status == 404
        assert sandbox.url.startswith("http://[::1]:")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("port", value) for value in (-1, 65536, "80", True, None)),
        *(("host", value) for value in ("", None, "a\nb")),
        *(("api_key", value) for value in ("", None, " key", "kéy", "k\ney")),
        *(("auto_approve", value) for value in (-1, math.nan, math.inf, "2", True)),
    ],
)
def test_wrong_argument_is_refused_at_once(argument: str, value: Any) -> None:
    wrong = {argument: value}
    with pytest.raises(ConfigurationError, match=argument) as refused:
        Sandbox(**wrong)
    assert refused.value.argument == argument


# Its client
