"""What a client tells its listeners of each exchange, and what it never tells."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import aiohttp
import msgspec
import pytest
from mocked_service import URL, MockedService
from tenacity.wait import wait_fixed

from aiokeyless import (
    ApprovalTicket,
    ClientClosedError,
    ConflictError,
    KeylessClient,
    KeylessError,
    NotFoundError,
    NotJsonError,
    ServerError,
    TransportError,
)
from aiokeyless.events import OperationCreated, PollEnded, RequestEnded, ServiceChanged, WaitEnded, WaitStarted
from aiokeyless.sandbox import Sandbox

if TYPE_CHECKING:
    from aiokeyless.events import Event

USER = "C0FFEE"
OPERATION = "/v2/operations/{operationId}"
PENDING = "/v2/users/{userId}/operations/pending"
OPERATIONS = "/v2/users/{userId}/operations"
T = TypeVar("T")


class Told:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    @property
    def requests(self) -> list[RequestEnded]:
        return self.of(RequestEnded)

    def of(self, kind: type[T]) -> list[T]:
        return [event for event in self.events if isinstance(event, kind)]


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

    async def test_each_create_that_succeeded_is_told_once_and_no_other(self, sandbox: Sandbox) -> None:
        told = Told()
        async with sandbox.client(listeners=[told]) as client:
            await client.create_operation(USER.lower(), operation_id="op-1", operation_payload="Pay 40 to Alice")
            sandbox.drop_next(stored=True)
            await client.create_operation(USER, operation_id="op-2")
            await client.create_operation(USER, operation_id="op-2", if_exists="resume")
            with pytest.raises(ConflictError):
                await client.create_operation(USER, operation_id="op-2")
            sandbox.drop_next(times=None)
            with pytest.raises(TransportError):
                await client.create_operation(USER, operation_id="op-3")
        created = told.of(OperationCreated)
        assert [event.operation_id for event in created] == ["op-1", "op-2", "op-2"]
        assert created[0] == OperationCreated(operation_id="op-1", user_id=USER)

    @pytest.mark.parametrize(
        ("answer", "status", "raised"),
        [
            ({"status": 500}, 500, ServerError),
            ({"status": 404}, 404, NotFoundError),
            ({"body": "<html>"}, 200, NotJsonError),
            ({"exception": aiohttp.ServerDisconnectedError()}, None, TransportError),
        ],
    )
    async def test_a_failure_is_told_by_its_type(
        self, mocked: MockedService, answer: dict[str, Any], status: int | None, raised: type[KeylessError]
    ) -> None:
        told = Told()
        mocked.get("/v2/operations/op", **answer)
        async with KeylessClient("key", base_url=URL, listeners=[told], max_attempts=1) as client:
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

    @pytest.mark.looptime
    async def test_neither_key_nor_payload_nor_user_is_told(self, sandbox: Sandbox) -> None:
        told = Told()
        async with sandbox.client(listeners=[told]) as client:
            ticket = await client.create_operation(USER, operation_id="txn-1", operation_payload="Pay 40 to Alice")
            sandbox.approve(ticket.operation_id)
            await client.wait_for_approval(ticket)
        text = repr([msgspec.structs.asdict(event) for event in told.requests])
        for secret in (sandbox.api_key, "Alice", USER, "txn-1"):
            assert secret not in text

    async def test_an_id_that_echoes_the_key_does_not_show_it(self, mocked: MockedService) -> None:
        told = Told()
        mocked.get("/v2/operations/op", headers={"X-Request-Id": "id-the-secret-key"})
        async with KeylessClient("the-secret-key", base_url=URL, listeners=[told], max_attempts=1) as client:
            with pytest.raises(NotJsonError):
                await client.get_operation("op")
        assert told.requests[0].request_id == "id-***"


# -- waits: what is done with one, and how it then ends


async def approve(sandbox: Sandbox, client: KeylessClient, ticket: ApprovalTicket) -> None:
    sandbox.approve(ticket.operation_id)
    await client.wait_for_approval(ticket)


async def time_out(_sandbox: Sandbox, client: KeylessClient, ticket: ApprovalTicket) -> None:
    await client.wait_for_approval(ticket, timeout=5)


async def be_unknown(sandbox: Sandbox, client: KeylessClient, ticket: ApprovalTicket) -> None:
    sandbox.latency = 60
    await client.wait_for_approval(ticket, timeout=5)


async def be_rejected(sandbox: Sandbox, client: KeylessClient, ticket: ApprovalTicket) -> None:
    sandbox.tamper(ticket.operation_id, user_id="BAD0")
    await client.wait_for_approval(ticket)


async def fail(sandbox: Sandbox, client: KeylessClient, ticket: ApprovalTicket) -> None:
    sandbox.fail_next(403)
    await client.wait_for_approval(ticket)


async def be_cancelled(_sandbox: Sandbox, client: KeylessClient, ticket: ApprovalTicket) -> None:
    async with asyncio.timeout(5):
        await client.wait_for_approval(ticket)


async def be_closed(_sandbox: Sandbox, client: KeylessClient, ticket: ApprovalTicket) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(client.wait_for_approval(ticket))
        await asyncio.sleep(5)
        await client.aclose()


async def hold(_sandbox: Sandbox, client: KeylessClient, ticket: ApprovalTicket) -> None:
    await client.hold_for_approval(ticket, seconds=1)
    await asyncio.sleep(10.5)  # nobody holds it again


async def leave_an_iterator(_sandbox: Sandbox, client: KeylessClient, ticket: ApprovalTicket) -> None:
    updates = client.watch_approval(ticket)
    await anext(updates)
    await updates.aclose()


Act = Callable[[Sandbox, KeylessClient, ApprovalTicket], Coroutine[Any, Any, None]]

#: The outcome, the error, the seconds and the polls, one each two seconds.
ENDS: dict[Act, tuple[str, str | None, float, int]] = {
    approve: ("approved", None, 2, 1),
    time_out: ("timed_out", "ApprovalTimeoutError", 5, 3),
    be_unknown: ("unknown", "ApprovalUnknownError", 7, 2),
    be_rejected: ("rejected", "OperationMismatchError", 2, 1),
    fail: ("failed", "PermissionDeniedError", 2, 1),
    be_cancelled: ("cancelled", None, 5, 2),
    be_closed: ("closed", "ClientClosedError", 5, 2),
    hold: ("held", None, 11, 5),
    leave_an_iterator: ("cancelled", None, 2, 1),
}


@pytest.mark.looptime
class TestWaits:
    @pytest.mark.parametrize("act", ENDS, ids=lambda act: act.__name__)
    async def test_a_wait_is_told_once_when_it_starts_and_once_how_it_ended(self, act: Act) -> None:
        told = Told()
        async with Sandbox() as sandbox, sandbox.client(listeners=[told], schedule=wait_fixed(2)) as client:
            ticket = await client.create_operation(USER)
            await asyncio.sleep(0.5)
            with contextlib.suppress(Exception):
                await act(sandbox, client, ticket)
            [started] = told.of(WaitStarted)
            [ended] = told.of(WaitEnded)
        outcome, error, seconds, polls = ENDS[act]
        assert (ended.outcome, ended.error, ended.polls) == (outcome, error, polls)
        assert (ended.seconds, ended.age) == pytest.approx((seconds, seconds + 0.5))
        assert ended.wait == started.wait
        assert ended.operation_id == started.operation_id == ticket.operation_id

    async def test_waits_for_one_operation_have_numbers_of_their_own_and_share_polls(self, sandbox: Sandbox) -> None:
        told = Told()
        async with sandbox.client(listeners=[told]) as client:
            await client.create_operation(USER, operation_id="op")
            async with asyncio.TaskGroup() as tasks:
                for _ in range(2):
                    tasks.create_task(client.wait_for_approval("op", timeout=None))
                await asyncio.sleep(5)
                sandbox.approve("op")
        numbers = {event.wait for event in told.of(WaitStarted)}
        assert len(numbers) == 2
        assert {event.timeout for event in told.of(WaitStarted)} == {None}
        assert [event.wait for event in told.of(WaitEnded)] == sorted(numbers)
        assert set(told.of(PollEnded)[-1].waits) == numbers

    async def test_a_listener_may_call_the_client(self, sandbox: Sandbox) -> None:
        """It cannot await; what it starts goes on by itself."""
        tasks: list[asyncio.Task[Any]] = []

        def listen(event: Event) -> None:
            client.statistics  # noqa: B018  # it may be read
            if isinstance(event, WaitEnded) and len(tasks) < 3:
                tasks.append(asyncio.create_task(client.wait_for_approval(event.operation_id)))

        async with sandbox.client(listeners=[listen]) as client:
            await client.create_operation(USER, operation_id="op")
            sandbox.approve("op")
            await client.wait_for_approval("op")
            operations = [await tasks[number] for number in range(3)]
        assert all(operation.is_approved for operation in operations)

    async def test_a_listener_that_closes_the_client_ends_the_other_waits(self, sandbox: Sandbox) -> None:
        closing: list[asyncio.Task[None]] = []

        def listen(event: Event) -> None:
            if isinstance(event, WaitEnded) and not closing:
                closing.append(asyncio.create_task(client.aclose()))

        async with sandbox.client(listeners=[listen]) as client:
            for name in ("a", "b"):
                await client.create_operation(USER, operation_id=name)
            waits = [asyncio.create_task(client.wait_for_approval(name)) for name in ("a", "b")]
            await asyncio.sleep(1)
            sandbox.approve("a")
            a, b = await asyncio.gather(*waits, return_exceptions=True)
            await closing[0]
        assert not isinstance(a, BaseException)
        assert isinstance(b, ClientClosedError)

    async def test_a_ticket_that_has_expired_has_no_time(self, sandbox: Sandbox) -> None:
        told = Told()
        async with sandbox.client(listeners=[told]) as client:
            ticket = await client.create_operation(USER, expires_in=1)
            sandbox.approve(ticket.operation_id)
            await asyncio.sleep(10)
            await client.wait_for_approval(ticket)
        assert told.of(WaitStarted)[0].timeout == 0


@pytest.mark.looptime
async def test_a_service_that_fails_when_its_client_is_closed_is_told_to_be_gone(sandbox: Sandbox) -> None:
    told = Told()
    async with sandbox.client(listeners=[told], schedule=wait_fixed(1)) as client:
        sandbox.fail_next(503, times=None)
        for number in range(20):
            with contextlib.suppress(KeylessError):
                await client.wait_for_approval(f"op-{number}", timeout=0.5)
    first, last = told.of(ServiceChanged)
    assert (first.is_failing, first.error) == (True, "ServerError")
    assert (last.is_failing, last.error, last.waiting) == (False, "ClientClosedError", 0)
