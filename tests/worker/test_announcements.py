"""A worker's `on_created`: whom it tells and when, what goes wrong in it, and its end; on a clock that moves."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import pytest
from leaks import tasks_since
from waiting import until

from aiokeyless.events import Event, OperationCreated
from aiokeyless.worker import ApprovalRequest, ApprovalWorker, Outcome, submit_approval
from aiokeyless.worker.announcements import CALL_WITHIN
from aiokeyless.worker.broker import UnavailableError
from aiokeyless.worker.sqlite import SqliteBroker

from .reading import created, now, read, working

if TYPE_CHECKING:
    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox

pytestmark = pytest.mark.looptime


async def submit(broker: SqliteBroker, *operation_ids: str, **options: Any) -> None:
    for operation_id in operation_ids:
        await submit_approval(broker, "c0ffee", operation_id=operation_id, **options)


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "plain"])
async def test_the_phone_is_told_once_within_a_tenth_of_a_second_after_the_operation_is_there(
    sandbox: Sandbox, *, is_async: bool
) -> None:
    told: list[tuple[float, ApprovalRequest]] = []

    def tell(request: ApprovalRequest) -> None:
        assert request.operation_id in sandbox.operations
        told.append((now(), request))

    async def tell_later(request: ApprovalRequest) -> None:
        await asyncio.sleep(0)
        tell(request)

    async with working(sandbox, on_created=tell_later if is_async else tell) as (_, broker):
        await submit(broker, "txn-1", operation_payload="Pay 40", context={"order": 7})
        await asyncio.sleep(5)
        sandbox.approve("txn-1")
        await read(broker)
    [(at, request)] = told
    [post] = [record for record in sandbox.requests if record.method == "POST"]
    assert post.at <= at <= post.at + 0.1
    assert (request.operation_id, request.operation_payload) == ("txn-1", "Pay 40")
    assert bytes(request.context) == b'{"order":7}'


async def test_a_phone_that_is_told_slowly_delays_neither_polls_nor_other_requests(sandbox: Sandbox) -> None:
    async with working(sandbox, on_created=lambda _: asyncio.sleep(9)) as (_, broker):
        await submit(broker, "txn-1", "txn-2")
        started_at = now()
        await created(sandbox, 2)
        sandbox.approve("txn-1")
        sandbox.approve("txn-2")
        events = await read(broker, 2)
        assert now() - started_at < 2
    assert {event.outcome for event in events} == {Outcome.APPROVED}


async def test_what_it_raises_is_logged_without_payload_and_key_and_the_request_goes_on(
    sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_request: ApprovalRequest) -> None:
        raise ZeroDivisionError

    async with working(sandbox, on_created=fail) as (_, broker):
        await submit(broker, "txn-1", operation_payload="Pay 40 to Alice", context="secret")
        await created(sandbox, 1)
        sandbox.approve("txn-1")
        [event] = await read(broker)
    assert event.outcome is Outcome.APPROVED
    [record] = [record for record in caplog.records if "on_created" in record.getMessage()]
    assert (record.levelno, record.getMessage()) == (logging.ERROR, 'on_created.failed operation_id="txn-1"')
    assert "ZeroDivisionError" in caplog.text
    assert not any(secret in caplog.text for secret in ("Pay 40", "secret", sandbox.api_key))


async def test_a_cancellation_of_its_own_is_logged_as_well(sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """A call that gave up may have cancelled what others wait for, such as a token that all of them need."""
    token = asyncio.get_running_loop().create_future()
    token.cancel()
    async with working(sandbox, on_created=lambda _: token) as (_, broker):
        await submit(broker, "txn-1")
        await until(lambda: 'on_created.failed operation_id="txn-1"' in caplog.text)


async def test_so_many_are_told_at_once_each_within_10_s(sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    began: list[tuple[str, float]] = []

    async def tell(request: ApprovalRequest) -> None:
        began.append((request.operation_id, now()))
        await asyncio.sleep(4 if len(began) <= 2 else 1000)

    async with working(sandbox, max_in_flight=2, on_created=tell) as (_, broker):
        start = now()
        await submit(broker, *(f"txn-{number}" for number in range(6)))
        await created(sandbox, 6)
        await asyncio.sleep(CALL_WITHIN)
        assert [round(at - start) for _, at in began] == [0, 0, 4, 4]
        await submit(broker, "txn-6")
        await until(lambda: began[-1][0] == "txn-6")  # those that hung made room
    failed = [record for record in caplog.records if record.getMessage().startswith("on_created.failed")]
    assert len(failed) == 5
    assert "TimeoutError" in caplog.text


@pytest.mark.parametrize("seconds", [9.0, 1000.0])
async def test_a_worker_that_is_closed_waits_10_s_for_it_and_then_cancels_it(sandbox: Sandbox, seconds: float) -> None:
    ends: list[str] = []

    async def tell(_request: ApprovalRequest) -> None:
        try:
            await asyncio.sleep(seconds)
            ends.append("told")
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise

    before = asyncio.all_tasks()
    async with working(sandbox, on_created=tell) as (_, broker):
        await submit(broker, "txn-1")
        await created(sandbox, 1)
        await asyncio.sleep(0.1)
        closed_at = now()
    assert now() - closed_at == pytest.approx(min(seconds, CALL_WITHIN) - 0.1, abs=0.1)
    assert ends == ["told" if seconds < CALL_WITHIN else "cancelled"]
    await broker.aclose()
    assert tasks_since(before) == set()


async def test_a_worker_that_is_cancelled_cancels_it_at_once(
    client: KeylessClient, memory: SqliteBroker, caplog: pytest.LogCaptureFixture
) -> None:
    telling = asyncio.Event()

    async def tell(_request: ApprovalRequest) -> None:
        telling.set()
        with suppress(asyncio.CancelledError):  # as `asyncio.wait_for` may lose one on Python 3.11
            await asyncio.sleep(1000)
        await asyncio.sleep(1000)

    before = asyncio.all_tasks()
    run = asyncio.create_task(ApprovalWorker(client, memory, on_created=tell).run())
    await submit(memory, "txn-1")
    await telling.wait()
    run.cancel()
    async with asyncio.timeout(1):
        await asyncio.wait({run})
    assert run.cancelled()
    assert "on_created.failed" not in caplog.text
    await memory.aclose()
    assert tasks_since(before) == set()


@pytest.mark.parametrize("fault", ["lost", "lost, and a replica is late", "misshapen"])
async def test_without_an_answer_the_first_delivery_that_finds_it_tells_it_once(sandbox: Sandbox, fault: str) -> None:
    """It finds it by its poll, or, if a replica is late, by a create that is a conflict."""
    told: list[ApprovalRequest] = []
    events: list[Event] = []
    async with working(sandbox, listeners=[events.append], on_created=told.append) as (_, broker):
        if fault == "misshapen":
            sandbox.fail_next(200, body=b'{"is": "misshapen"}', stored=True, method="POST")
        else:
            sandbox.drop_next(stored=True, method="POST")
        sandbox.fail_next(404, method="GET")  # the poll before the create
        sandbox.fail_next(method="GET")  # the check whether the create took effect
        if fault == "lost, and a replica is late":
            sandbox.fail_next(404, method="GET")
        await submit(broker, "txn-1")
        await created(sandbox, 1)
        assert told == []
        await asyncio.sleep(3)
        sandbox.fail_next(method="GET")  # a poll that fails later is no reason to tell it again
        await asyncio.sleep(3)
        sandbox.approve("txn-1")
        async with asyncio.timeout(5):
            [event] = await read(broker)
    assert event.outcome is Outcome.APPROVED
    creates = sum(record.method == "POST" for record in sandbox.requests)
    assert creates == (2 if fault == "lost, and a replica is late" else 1)
    assert [request.operation_id for request in told] == ["txn-1"]
    assert [event for event in events if isinstance(event, OperationCreated)] == [
        OperationCreated(operation_id="txn-1", user_id="C0FFEE")
    ]


async def test_an_operation_of_somebody_else_is_never_told(client: KeylessClient, sandbox: Sandbox) -> None:
    told: list[str] = []
    await client.create_operation("C0FFEE", operation_id="txn-1")
    async with working(sandbox, on_created=lambda request: told.append(request.operation_id)) as (_, broker):
        sandbox.fail_next(method="GET")
        await submit(broker, "txn-1")
        [event] = await read(broker)
    assert (event.reason, told) == ("conflict", [])


async def test_the_phone_is_told_although_the_broker_did_not_confirm_that_it_is_put_off(sandbox: Sandbox) -> None:
    class Broker(SqliteBroker):
        async def put_off(self, *_: Any) -> None:
            raise UnavailableError("it is away")

    told: list[ApprovalRequest] = []
    async with Broker(":memory:") as broker, working(sandbox, broker, on_created=told.append):
        await submit(broker, "txn-1")
        await until(lambda: len(told) == 1)
        assert "txn-1" in sandbox.operations


async def test_calls_see_what_the_application_set_in_its_context_and_not_what_the_others_did(sandbox: Sandbox) -> None:
    """Otherwise a push would go to the phone of another user."""
    whose: ContextVar[str] = ContextVar("whose")
    whose.set("the shop's")
    told: list[tuple[str, str, str]] = []

    async def tell(request: ApprovalRequest) -> None:
        before = whose.get()
        whose.set(request.operation_id)
        await asyncio.sleep(1)
        told.append((request.operation_id, before, whose.get()))

    async with working(sandbox, on_created=tell) as (_, broker):
        await submit(broker, "txn-1", "txn-2")
        await until(lambda: len(told) == 2)
    assert sorted(told) == [("txn-1", "the shop's", "txn-1"), ("txn-2", "the shop's", "txn-2")]
