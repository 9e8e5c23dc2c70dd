"""What a client tells its listeners of each exchange, and what it never tells."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import aiohttp
import msgspec
import pytest
from raw_server import RawServer

from aiokeyless import (
    ConflictError,
    KeylessClient,
    KeylessError,
    NotFoundError,
    NotJsonError,
    ServerError,
    TransportError,
)
from aiokeyless.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokeyless.events import Event, RequestEnded

USER = "C0FFEE"
OPERATION = "/v2/operations/{operationId}"
PENDING = "/v2/users/{userId}/operations/pending"
OPERATIONS = "/v2/users/{userId}/operations"


class Told:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    @property
    def requests(self) -> list[RequestEnded]:
        return list(self.events)


class TestRequestEnded:
    async def test_each_exchange_is_told_by_its_route(self, sandbox: Sandbox) -> None:
        told = Told()
        async with sandbox.client(listeners=[told]) as client:
            ticket = await client.create_operation(USER, operation_payload="Pay 40 to Alice")
            await client.get_pending_operations(USER)
            await client.get_operation(ticket.operation_id)
            await client.get_authentications(user_id=USER)
            sandbox.approve(ticket.operation_id)
            await client.wait_for_approval(ticket.operation_id)
        assert [(event.method, event.route, event.status, event.error, event.attempt) for event in told.requests] == [
            ("POST", OPERATIONS, 200, None, 1),
            ("GET", PENDING, 200, None, 1),
            ("GET", OPERATION, 200, None, 1),
            ("GET", "/v2/users/{userId}/authentications", 200, None, 1),
            ("GET", OPERATION, 200, None, 1),
        ]
        assert {f"http://{event.server}:{event.port}" for event in told.requests} == {sandbox.url}

    @pytest.mark.parametrize(
        ("fault", "status", "raised"),
        [
            (lambda sandbox: sandbox.fail_next(500), 500, ServerError),
            (lambda sandbox: sandbox.fail_next(404), 404, NotFoundError),
            (lambda sandbox: sandbox.fail_next(200, body=b"<html>"), 200, NotJsonError),
            (lambda sandbox: sandbox.drop_next(times=None), None, TransportError),
        ],
    )
    async def test_a_failure_is_told_by_its_type(
        self, fault: Callable[[Sandbox], None], status: int | None, raised: type[KeylessError]
    ) -> None:
        told = Told()
        async with Sandbox() as sandbox, sandbox.client(listeners=[told], max_attempts=1) as client:
            fault(sandbox)
            with pytest.raises(raised):
                await client.get_operation("op")
        [event] = told.requests
        assert (event.status, event.error) == (status, raised.__name__)

    @pytest.mark.looptime
    async def test_attempts_are_counted(self, sandbox: Sandbox) -> None:
        told = Told()
        async with sandbox.client(listeners=[told], max_attempts=3) as client:
            sandbox.fail_next(503, times=2)
            await client.get_pending_operations(USER)
            sandbox.fail_next(503, times=1, method="POST")
            await client.create_operation(USER, operation_id="op")
            with pytest.raises(ConflictError):
                await client.create_operation(USER, operation_id="op")
        assert [(event.method, event.status, event.attempt) for event in told.requests] == [
            ("GET", 503, 1),
            ("GET", 503, 2),
            ("GET", 200, 3),
            ("POST", 503, 1),
            ("GET", 404, 1),
            ("POST", 200, 2),
            ("POST", 409, 1),
        ]

    async def test_the_request_id_of_a_success_and_of_a_failure_is_told(self) -> None:
        told = Told()
        async with Sandbox() as sandbox, sandbox.client(listeners=[told], max_attempts=1) as client:
            sandbox.fail_next(200, body=b"[]", headers={"X-Request-Id": "good-1"})
            await client.get_pending_operations(USER)
            sandbox.fail_next(500, headers={"X-Request-Id": "bad-1"})
            with pytest.raises(ServerError):
                await client.get_pending_operations(USER)
            await client.get_pending_operations(USER)
        assert [event.request_id for event in told.requests] == ["good-1", "bad-1", None]

    @pytest.mark.looptime
    async def test_a_poll_that_hangs_is_told_as_a_timeout(self, sandbox: Sandbox) -> None:
        told = Told()
        async with sandbox.client(listeners=[told], request_timeout=3) as client:
            ticket = await client.create_operation(USER)
            sandbox.latency = 100
            with pytest.raises(KeylessError):
                await client.wait_for_approval(ticket.operation_id, timeout=4)
        first = told.requests[1]
        assert (first.status, first.error) == (None, "RequestTimeoutError")
        assert first.seconds == pytest.approx(3)

    @pytest.mark.looptime
    async def test_a_poll_that_is_cut_off_is_told_as_cancelled(self, sandbox: Sandbox) -> None:
        told = Told()
        async with sandbox.client(listeners=[told]) as client:
            ticket = await client.create_operation(USER)
            sandbox.latency = 5
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1):
                    await client.wait_for_approval(ticket.operation_id)
            await asyncio.sleep(1)
        assert [(event.status, event.error) for event in told.requests[1:]] == [(None, "CancelledError")]

    async def test_neither_key_nor_payload_nor_user_is_told(self, sandbox: Sandbox) -> None:
        told = Told()
        async with sandbox.client(listeners=[told]) as client:
            ticket = await client.create_operation(USER, operation_id="txn-1", operation_payload="Pay 40 to Alice")
            sandbox.approve(ticket.operation_id)
            await client.wait_for_approval(ticket)
        text = repr([msgspec.structs.asdict(event) for event in told.requests])
        for secret in (sandbox.api_key, "Alice", USER, "txn-1"):
            assert secret not in text

    async def test_an_id_that_echoes_the_key_does_not_show_it(self) -> None:
        told = Told()
        async with Sandbox() as sandbox, sandbox.client(listeners=[told]) as client:
            sandbox.fail_next(200, body=b"[]", headers={"X-Request-Id": f"id-{sandbox.api_key}"})
            await client.get_pending_operations(USER)
        assert told.requests[0].request_id is not None
        assert sandbox.api_key not in told.requests[0].request_id


async def test_a_view_of_a_client_tells_the_same_listeners(sandbox: Sandbox) -> None:
    told = Told()
    async with sandbox.client(listeners=[told]) as client:
        await client.with_max_attempts(1).get_pending_operations(USER)
    assert len(told.requests) == 1


async def test_headers_of_a_borrowed_session_are_sent_along_but_never_in_place_of_ours() -> None:
    headers = {"X-Correlation-Id": "batch-7", "X-Api-Key": "another"}
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]"
    async with (
        RawServer(answer) as server,
        aiohttp.ClientSession(headers=headers) as session,
        KeylessClient("ours", base_url=server.url, session=session) as client,
    ):
        await client.get_pending_operations(USER)
    assert b"X-Correlation-Id: batch-7\r\n" in server.heads[0]
    assert b"X-Api-Key: ours\r\n" in server.heads[0]
    assert b"another" not in server.heads[0]
