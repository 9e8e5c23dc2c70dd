"""Connections that are lost: a balancer fails over and resets each old one at its next use, while new ones work."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import statistics
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from raw_server import RawServer, answer, hang, kept_open, now, operation, reset
from tenacity import wait_fixed

from aiokeyless import KeylessClient, Operation, RequestTimeoutError, Secret, ServerError, TransportError
from aiokeyless._http import protocol
from aiokeyless._http.keys import ApiKeys
from aiokeyless._http.transport import Transport
from aiokeyless.events import PollEnded, RequestEnded
from aiokeyless.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from raw_server import Handler

    from aiokeyless.events import Event

    Call = Callable[[KeylessClient], Awaitable[object]]

pytestmark = [pytest.mark.platform, pytest.mark.looptime]

USER = "C0FFEE"
DEAD = 12  # connections in the pool


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
async def client(sandbox: Sandbox, events: list[Event]) -> AsyncGenerator[KeylessClient]:
    async with sandbox.client(listeners=[events.append]) as client:
        yield client


async def fail_over(sandbox: Sandbox, client: KeylessClient) -> None:
    """Let all connections in the client's pool die at their next use."""
    sandbox.approve("warm", user_id=USER)
    sandbox.latency = 0.1  # so that each request has a connection of its own
    await asyncio.gather(*(client.get_operation("warm") for _ in range(DEAD)))
    sandbox.latency = 0
    sandbox.reset_connections()
    sandbox.requests.clear()


async def test_get_is_asked_once_more_on_a_new_connection(
    sandbox: Sandbox, client: KeylessClient, events: list[Event]
) -> None:
    await fail_over(sandbox, client)
    events.clear()
    started = now()
    for _ in range(DEAD + 3):
        assert (await client.get_operation("warm")).is_approved
    assert now() == started
    assert len(sandbox.requests) == DEAD + 3
    ended = [event for event in events if isinstance(event, RequestEnded)]
    facts = [(event.status, event.error, event.attempt, event.seconds) for event in ended]
    assert facts == [(200, None, 1, 0.0)] * (DEAD + 3)


async def test_create_with_nothing_but_dead_connections_creates_one_operation(
    sandbox: Sandbox, client: KeylessClient
) -> None:
    await fail_over(sandbox, client)
    ticket = await client.create_operation(USER, operation_id="a")
    assert not ticket.reconciled
    assert [record.method for record in sandbox.requests] == ["GET", "POST"]
    assert set(sandbox.operations) == {"warm", "a"}


REPEATED: dict[str, Call] = {
    "PATCH": lambda client: client.update_external_user(USER, "ann"),
    "DELETE": lambda client: client.delete_external_user("ann"),
}


@pytest.mark.parametrize("method", REPEATED)
async def test_repetition_goes_on_a_new_connection(sandbox: Sandbox, client: KeylessClient, method: str) -> None:
    sandbox.enroll(USER, external_user_id="ann")
    await fail_over(sandbox, client)
    await REPEATED[method](client)
    assert [record.method for record in sandbox.requests] == [method]


# What is asked twice


HALF = b"HTTP/1.1 200 OK\r\nContent-Le"


@pytest.mark.parametrize(
    ("answered", "times"), [(reset, 2), (b"", 2), (b"H", 1), (HALF, 1), (HALF + b"ngth: 9\r\n\r\n{", 1)]
)
async def test_get_is_two_requests_at_most_and_one_if_an_answer_began(answered: bytes | Handler, times: int) -> None:
    async with RawServer(answered) as server, KeylessClient("key", base_url=server.url, max_attempts=1) as client:
        with pytest.raises(TransportError):
            await client.get_operation("a")
        assert len(server.heads) == times


async def test_repetition_that_loses_a_new_connection_is_not_asked_again() -> None:
    async with RawServer(reset) as server, KeylessClient("key", base_url=server.url, max_attempts=3) as client:
        with pytest.raises(TransportError, match="ClientOSError: Connection reset by peer"):
            await client.get_operation("a")
        assert len(server.heads) == 2 + 1 + 1


@pytest.mark.parametrize("name", ["delete_external_user", "update_external_user", "create_operation"])
async def test_no_other_method_is_asked_twice_in_one_attempt(name: str) -> None:
    calls: dict[str, Call] = {
        "delete_external_user": REPEATED["DELETE"],
        "update_external_user": REPEATED["PATCH"],
        "create_operation": lambda client: client.create_operation(USER),
    }
    async with (
        RawServer(reset, answer(b"", status=b"404 No")) as server,
        KeylessClient("key", base_url=server.url, max_attempts=1) as client,
    ):
        with pytest.raises(TransportError) as caught:
            await calls[name](client)
        assert caught.value.sent
        assert [method for method in server.methods if method != "GET"] == server.methods[:1]


async def test_borrowed_session_is_asked_once_more_in_each_attempt_as_it_is() -> None:
    async with (
        RawServer(reset) as server,
        aiohttp.ClientSession() as session,
        KeylessClient("key", base_url=server.url, session=session, max_attempts=2) as client,
    ):
        with pytest.raises(TransportError):
            await client.get_operation("a")
        assert len(server.heads) == 2 * 2
        assert len(set(server.heads)) == 1


async def test_both_requests_have_one_request_timeout() -> None:
    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(1.5)
        await reset(reader, writer)

    async with (
        RawServer(late, hang) as server,
        KeylessClient("key", base_url=server.url, max_attempts=1, request_timeout=2.5) as client,
    ):
        started = now()
        with pytest.raises(RequestTimeoutError):
            await client.get_operation("a")
        assert now() - started == pytest.approx(2.5, abs=1e-3)
        assert len(server.heads) == 2


async def test_new_connection_is_not_kept() -> None:
    async def answer_and_stay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(operation()).replace(b"Connection: close", b"Connection: keep-alive"))
        await reader.read()

    async with RawServer(reset, answer_and_stay) as server, KeylessClient("key", base_url=server.url) as client:
        await client.get_operation("a")
        await asyncio.sleep(1)
        assert server.connections == 0


# Waits


async def after_failover(sandbox: Sandbox, client: KeylessClient, waits: int, **options: Any) -> list[float]:
    """Return how late waits notice approvals within the five seconds that follow a failover."""
    loop = asyncio.get_running_loop()
    late: list[float] = []

    async def notice(name: str, at: float) -> None:
        await client.wait_for_approval(name, **options)
        late.append(loop.time() - at)

    names = [str(number) for number in range(waits)]
    await asyncio.gather(*(client.create_operation(USER, operation_id=name) for name in names))
    fails_over_at = loop.time() + 5
    async with asyncio.TaskGroup() as group:
        for number, name in enumerate(names):
            at = fails_over_at + 5 * number / waits
            loop.call_at(at, sandbox.approve, name)
            group.create_task(notice(name, at))
        loop.call_at(fails_over_at, sandbox.reset_connections)
    return late


async def test_waits_after_a_failover_are_no_later_than_before(
    sandbox: Sandbox, client: KeylessClient, events: list[Event]
) -> None:
    sandbox.latency = 0.05
    late = await after_failover(sandbox, client, 60)
    assert len(late) == 60
    assert statistics.mean(late) < 1.0
    assert {event.result for event in events if isinstance(event, PollEnded)} == {"pending", "approved"}
    assert client.statistics.transient_failures == 0


async def test_waits_whose_connections_serve_one_request_are_in_time(events: list[Event]) -> None:
    async with (
        Sandbox(on_request=lambda _: sandbox.reset_connections()) as sandbox,
        sandbox.client(listeners=[events.append]) as client,
    ):
        sandbox.latency = 0.05
        late = await after_failover(sandbox, client, 20, schedule=wait_fixed(1))
        assert statistics.mean(late) < 0.7
        assert client.statistics.transient_failures == 0


# -- answers that nobody asked for


async def answer_twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the first request, and once more a moment later; then the others about the operation that they name."""
    writer.write(kept_open("a"))
    await asyncio.sleep(1)
    writer.write(kept_open("a"))
    while head := await reader.readuntil(b"\r\n\r\n"):
        writer.write(kept_open(head.split()[1].rpartition(b"/")[2].decode()))


async def test_an_answer_that_came_before_a_request_is_no_answer_to_it() -> None:
    async with (
        RawServer(answer_twice, answer(operation(operationId="b"))) as server,
        KeylessClient("key", base_url=server.url, max_attempts=1) as client,
    ):
        await client.get_operation("a")
        await asyncio.sleep(2)
        assert (await client.get_operation("b")).operation_id == "b"


async def test_a_request_that_is_not_repeated_fails_if_an_answer_came_before_it() -> None:
    async with (
        RawServer(answer_twice) as server,
        KeylessClient("key", base_url=server.url, max_attempts=1) as client,
    ):
        await client.get_operation("a")
        await asyncio.sleep(2)
        with pytest.raises(TransportError) as caught:
            await client.delete_user(USER)
        assert caught.value.sent


class Host:
    """A service that answers polls with some status, and knows on which connection each came."""

    def __init__(self) -> None:
        self.status = 200
        self.body = operation()
        self.seconds = 0.0
        """From the first byte of an answer's body to the others."""
        self.connections: list[object] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.connections.append(request.transport)
        if not self.seconds:
            return web.Response(status=self.status, body=self.body, content_type="application/json")
        response = web.StreamResponse(status=self.status)
        await response.prepare(request)
        await response.write(self.body[:1])
        await asyncio.sleep(self.seconds)
        await response.write(self.body[1:])
        return response

    def used(self) -> int:
        """Return how many connections were used since the last call."""
        count = len(set(map(id, self.connections)))
        self.connections.clear()
        return count


@pytest.fixture
async def host() -> AsyncGenerator[tuple[Host, str]]:
    service = Host()
    application = web.Application()
    application.router.add_get("/v2/operations/{name}", service.answer)
    async with TestServer(application) as server:
        yield service, str(server.make_url("")).rstrip("/")


@pytest.fixture(params=["own session", "borrowed session"])
async def sender(request: pytest.FixtureRequest, host: tuple[Host, str]) -> AsyncGenerator[Transport]:
    async with aiohttp.ClientSession() as session:
        borrowed = session if request.param == "borrowed session" else None
        keys = ApiKeys(Secret("key"))
        transport = Transport(host[1], keys, session=borrowed, request_timeout=5.0, max_attempts=1)
        yield transport
        await transport.aclose()


@pytest.mark.parametrize(
    "renew",
    [
        lambda sender: sender.poll("a", True),  # noqa: FBT003  # as the poller calls it
        lambda sender: sender.fetch(protocol.get_operation("a"), is_renewal=True),
    ],
    ids=["a poll", "a worker's"],
)
async def test_each_renewal_has_a_new_connection(
    host: tuple[Host, str], sender: Transport, renew: Callable[[Transport], Awaitable[Operation]]
) -> None:
    await sender.poll("a")
    host[0].used()
    for _ in range(3):
        await renew(sender)
    assert host[0].used() == 3


@pytest.mark.parametrize(("body", "seconds"), [(b"busy", 0.0), (b"", 0.0), (b"busy", 0.5)])
@pytest.mark.parametrize("renewal", [None, 503, 200])
async def test_connection_that_brought_a_503_is_kept_unless_a_new_one_brings_good_answers(
    host: tuple[Host, str], sender: Transport, renewal: int | None, body: bytes, seconds: float
) -> None:
    service = host[0]
    await sender.poll("a")
    await asyncio.sleep(1)
    if renewal is not None:
        service.status = renewal
        with contextlib.suppress(ServerError):
            await sender.poll("a", is_renewal=True)
    service.used()
    service.status, service.body, service.seconds = 503, body, seconds
    for _ in range(4):
        with pytest.raises(ServerError):
            await sender.poll("a")
    # The second one is newer than the renewal. A borrowed session closes none that is older.
    assert service.used() == (2 if renewal == 200 and sender._owned_sessions else 1)


async def test_no_connection_of_ours_is_used_for_over_a_minute(host: tuple[Host, str]) -> None:
    service, url = host
    async with KeylessClient("key", base_url=url) as client:
        for _ in range(13):
            await client.get_operation("a")
            await asyncio.sleep(10)
        assert service.used() == 2  # the second from 70 s on


@pytest.mark.parametrize("is_renewal", [False, True])
async def test_name_that_moves_is_followed_after_3_seconds(
    monkeypatch: pytest.MonkeyPatch, *, is_renewal: bool
) -> None:
    monkeypatch.setattr("aiohttp.connector.monotonic", now)
    answered = answer(operation())
    async with RawServer(answered) as old, RawServer(answered) as new:
        current = old

        async def resolve(*_: object, **__: object) -> list[tuple[object, ...]]:
            port = int(current.url.rpartition(":")[2])
            return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", port))]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
        keys = ApiKeys(Secret("key"))
        sender = Transport("http://localhost:1", keys, session=None, request_timeout=5.0, max_attempts=1)
        await sender.poll("a", is_renewal)
        current = new
        await asyncio.sleep(2.9)
        await sender.poll("a", is_renewal)
        assert len(new.heads) == 0
        await asyncio.sleep(0.2)
        await sender.poll("a", is_renewal)
        assert (len(old.heads), len(new.heads)) == (2, 1)
        await sender.aclose()
