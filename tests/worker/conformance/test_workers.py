from __future__ import annotations

import asyncio
import time
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from tenacity import wait_fixed
from waiting import until

from aiokeyless.errors import ConflictError
from aiokeyless.worker import ApprovalRequest, ApprovalWorker, FailureReason, Outcome, submit_approval

from ..reading import read  # noqa: TID252
from .brokers import LEASE, those

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox
    from aiokeyless.worker import Broker
    from aiokeyless.worker.broker import Claim
    from aiokeyless.worker.messages import Message

    from .brokers import Storage

WHERE_SUSPENSION_COUNTS = pytest.mark.skipif(
    not hasattr(time, "CLOCK_BOOTTIME"), reason="this system has no such clock"
)
#: Seconds of the requests that a machine sleeps over, which is longer.
LIFETIME = 0.5
CONTENT: dict[str, Any] = {"operation_payload": "Pay 40", "external_user_id": "ann"}


@pytest.fixture(autouse=True)
def _backoff_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiokeyless._rules.backoff._ERROR_BACKOFF", wait_fixed(0.1))


def worker_at(broker: Broker, client: KeylessClient, **options: Any) -> ApprovalWorker:
    return ApprovalWorker(client, broker, schedule=wait_fixed(0.05), **options)


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


async def ask_ten_and_sleep(
    storage: Storage, client: KeylessClient, monkeypatch: pytest.MonkeyPatch, *clocks: str, is_claimed: bool
) -> set[tuple[str, bool | None]]:
    """Let the machine sleep over the deadlines before or after the first claim. Return what became of ten requests.

    Some of its clocks do not count that.
    """
    slept = 0.0

    def sleep() -> None:
        nonlocal slept
        if not slept:
            slept = LIFETIME + 0.1
            time.sleep(slept)

    def read_clock(clock: Callable[..., float], *which: int) -> float:
        return clock(*which) - slept

    for clock in clocks:
        monkeypatch.setattr(time, clock, partial(read_clock, getattr(time, clock)))
    async with storage.broker() as first:
        await first.prepare(lease=LEASE, service="")
    async with storage.broker() as broker:
        claim, are_submitted = broker.claim, asyncio.Event()

        async def claim_and_sleep(message: Message) -> Claim:
            await are_submitted.wait()
            if not is_claimed:
                sleep()
            claimed = await claim(message)
            sleep()
            return claimed

        monkeypatch.setattr(broker, "claim", claim_and_sleep)
        async with worker_at(broker, client):
            for number in range(10):
                await submit(broker, operation_id=f"txn-{number}", started_by="backend", expires_in=LIFETIME)
            are_submitted.set()
            return {(event.outcome, event.asked) for event in await read(broker, 10)}


@WHERE_SUSPENSION_COUNTS
@those(which=lambda storage: storage.lasts)
async def test_nobody_is_asked_after_the_deadline_by_a_machine_that_was_suspended(
    storage: Storage, client: KeylessClient, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = await ask_ten_and_sleep(storage, client, monkeypatch, "monotonic", is_claimed=True)
    assert (seen, sandbox.operations) == ({(Outcome.EXPIRED, False)}, {})


@WHERE_SUSPENSION_COUNTS
@those(which=lambda storage: storage.claims_tell_time)
async def test_nobody_is_asked_after_the_deadline_although_no_clock_of_the_machine_tells_that_it_was_paused(
    storage: Storage, client: KeylessClient, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = await ask_ten_and_sleep(storage, client, monkeypatch, "monotonic", "clock_gettime", is_claimed=False)
    assert (seen, sandbox.operations) == ({(Outcome.EXPIRED, False)}, {})


async def test_an_outcome_that_is_unknown_says_what_failed_and_is_a_warning(
    storage: Storage, client: KeylessClient, sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    async with storage.broker() as broker, worker_at(broker, client, grace=0.1):
        sandbox.fail_next(503, times=1000)
        await submit(broker, expires_in=0.3)
        [event] = await read(broker)
    assert (event.outcome, event.answered) == (Outcome.EXPIRED, False)
    assert "GET /v2/operations/txn-1 answered 503: the service failed" in (event.detail or "")
    [record] = [record for record in caplog.records if record.message.startswith("approval.")]
    assert (record.levelname, record.message.count(event.detail or "")) == ("WARNING", 1)
