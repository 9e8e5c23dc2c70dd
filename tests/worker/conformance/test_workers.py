from __future__ import annotations

import asyncio
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from tenacity import wait_fixed
from waiting import until

from aiokeyless.errors import ConflictError
from aiokeyless.worker import ApprovalRequest, ApprovalWorker, FailureReason, Outcome, submit_approval

from ..reading import read  # noqa: TID252

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox
    from aiokeyless.worker import Broker

    from .brokers import Storage

CONTENT: dict[str, Any] = {"operation_payload": "Pay 40", "external_user_id": "ann"}


def worker_at(broker: Broker, client: KeylessClient, **options: Any) -> ApprovalWorker:
    return ApprovalWorker(client, broker, schedule=wait_fixed(0.2), **options)


async def submit(broker: Broker, **changed: Any) -> None:
    await submit_approval(broker, "C0FFEE", **{"operation_id": "txn-1", "started_by": "phone", **CONTENT, **changed})


def authenticate(sandbox: Sandbox) -> None:
    sandbox.approve("txn-1", user_id="C0FFEE", **CONTENT)


async def test_a_tap_before_the_first_delivery_counts_and_nothing_is_created(
    storage: Storage, client: KeylessClient, sandbox: Sandbox
) -> None:
    authenticate(sandbox)
    async with storage.broker() as broker, worker_at(broker, client):
        await submit(broker)
        [event] = await read(broker)
    assert (event.outcome, event.deliveries) == (Outcome.APPROVED, 1)
    assert {record.method for record in sandbox.requests} == {"GET"}


async def test_one_tap_pays_for_one_of_two_orders_under_one_id(
    storage: Storage, client: KeylessClient, sandbox: Sandbox
) -> None:
    async with storage.broker() as broker, worker_at(broker, client) as worker:
        await submit(broker, context={"order": 1})
        await until(lambda: worker.statistics.polls >= 1)
        with pytest.raises(ConflictError) if storage.has_rows else nullcontext():
            await submit(broker, context={"order": 2})
        authenticate(sandbox)
        events = await read(broker, 1 if storage.has_rows else 2)
    others = [] if storage.has_rows else [(Outcome.FAILED, FailureReason.CONFLICT)]
    assert sorted((event.outcome, event.reason) for event in events) == [(Outcome.APPROVED, None), *others]


@pytest.mark.parametrize(
    "write",
    [
        lambda at: f"{at:%Y-%m-%dT%H:%M:%S.%f}Z",
        lambda at: at.astimezone(timezone(timedelta(hours=-9))).isoformat(),
        lambda at: round(at.timestamp() * 1000),
    ],
    ids=["Z", "an offset", "milliseconds"],
)
async def test_a_tap_counts_in_whatever_form_its_time_is(
    storage: Storage, client: KeylessClient, sandbox: Sandbox, write: Callable[[datetime], object]
) -> None:
    authenticate(sandbox)
    sandbox.tamper("txn-1", timestamp=write(datetime.now(UTC)), id="1", node_id=None)
    async with storage.broker() as broker, worker_at(broker, client):
        await submit(broker)
        [event] = await read(broker)
    assert event.outcome is Outcome.APPROVED


@pytest.mark.parametrize("timestamp", ["2020-01-02T03:04:05.68", "yesterday", None])
async def test_an_operation_that_is_older_than_the_claims_that_a_broker_keeps_is_an_earlier_requests(
    storage: Storage, client: KeylessClient, sandbox: Sandbox, timestamp: str | None
) -> None:
    authenticate(sandbox)
    sandbox.tamper("txn-1", timestamp=timestamp)
    async with storage.broker() as broker, worker_at(broker, client):
        await submit(broker)
        [event] = await read(broker)
    assert event.reason == (FailureReason.ALREADY_APPROVED if broker.forgets_claims else None)
    assert event.outcome is (Outcome.FAILED if broker.forgets_claims else Outcome.APPROVED)


async def test_the_phone_is_told_once_by_the_delivery_that_first_knows_that_the_operation_is_there(
    storage: Storage, client: KeylessClient, sandbox: Sandbox
) -> None:
    told: list[ApprovalRequest] = []
    async with storage.broker() as broker, worker_at(broker, client, on_created=told.append) as worker:
        sandbox.drop_next(stored=True, method="POST")
        sandbox.fail_next(404, method="GET")  # the poll before the create
        sandbox.fail_next(method="GET")  # the check whether the create took effect
        await submit_approval(broker, "C0FFEE", operation_id="txn-1", operation_payload="Pay 40")
        await until(lambda: bool(told))
        assert "txn-1" in sandbox.operations
        polls = worker.statistics.polls
        await until(lambda: worker.statistics.polls >= polls + 3)
        sandbox.approve("txn-1")
        await read(broker)
        await asyncio.sleep(0)
    assert [(request.operation_id, request.operation_payload) for request in told] == [("txn-1", "Pay 40")]


async def test_an_outcome_that_is_unknown_says_what_failed_and_is_a_warning(
    storage: Storage, client: KeylessClient, sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    async with storage.broker() as broker, worker_at(broker, client, grace=0.5):
        sandbox.fail_next(503, times=1000)
        await submit(broker, expires_in=1.0)
        [event] = await read(broker)
    assert (event.outcome, event.answered) == (Outcome.EXPIRED, False)
    assert "GET /v2/operations/txn-1 answered 503: the service failed" in (event.detail or "")
    [record] = [record for record in caplog.records if record.message.startswith("approval.")]
    assert (record.levelname, record.message.count(event.detail or "")) == ("WARNING", 1)
