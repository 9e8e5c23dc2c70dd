"""What a worker makes of what Keyless answers, and when: in memory, on a clock that moves."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import uuid
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from tenacity import wait_fixed
from waiting import until

from aiokeyless import wait_adaptive
from aiokeyless._http.transport import Transport
from aiokeyless._rules.budget import LEAST, PER_SECOND, PER_WAIT
from aiokeyless.worker import (
    ApprovalEvent,
    ApprovalWorker,
    FailureReason,
    Outcome,
    processor,
    serving,
    submit_approval,
    tables,
)
from aiokeyless.worker.broker import NewRequest, RefusedError
from aiokeyless.worker.logs import JsonFormatter
from aiokeyless.worker.messages import ApprovalRequest, request_name
from aiokeyless.worker.sqlite import SqliteBroker

from . import reading
from .reading import now, polls_of, read

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokeyless import KeylessClient
    from aiokeyless._http.protocol import Request
    from aiokeyless.sandbox import RequestRecord, Sandbox
    from aiokeyless.worker.messages import Message

pytestmark = pytest.mark.looptime

AT_THE_DEADLINE = wait_fixed(60)  # the deadline cuts it, so the final poll is the only one
LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)


working = partial(reading.working, schedule=wait_fixed(0.05))


async def submit(broker: SqliteBroker, user_id: str, **options: Any) -> str:
    """Submit a request; return the operation's id."""
    options = {"operation_id": str(uuid.uuid4()), **options}
    return (await submit_approval(broker, user_id, **options)).operation_id


async def ask(sandbox: Sandbox, broker: SqliteBroker, **options: Any) -> str:
    """Submit a request, and wait until its user is asked; return the operation's id."""
    operation_id = await submit(broker, "C0FFEE", **options)
    await until(lambda: operation_id in sandbox.operations)
    return operation_id


async def publish(broker: SqliteBroker, fields: dict[str, Any], body: bytes | None = None) -> None:
    """Store a request whose fields nobody has checked, or what is none."""
    request = ApprovalRequest(version=1, **{"user_id": "C0", **fields})
    await broker.submit(NewRequest(request, body or msgspec.json.encode(request), request_name(request), None))


async def all_outcomes(broker: SqliteBroker) -> list[ApprovalEvent]:
    """Wait until no request is left, and return every event that there is."""

    async def no_request_is_left() -> bool:
        return (await broker.inspect()).waiting == 0

    await until(no_request_is_left)
    return await read(broker, broker._store._one("SELECT count(*) FROM outcome")[0], str(uuid.uuid4()))


def most_at_once(records: list[RequestRecord]) -> int:
    changes = [(record.at, 1) for record in records] + [(record.at + record.duration, -1) for record in records]
    in_flight = most = 0
    for _, change in sorted(changes):
        in_flight += change
        most = max(most, in_flight)
    return most


async def test_a_client_that_repeats_calls_sends_each_of_a_workers_once(sandbox: Sandbox, memory: SqliteBroker) -> None:
    async with sandbox.client(max_attempts=3) as client, ApprovalWorker(client, memory) as worker:
        sandbox.fail_next(times=2, method="POST")
        await ask(sandbox, memory)
        assert worker.statistics.transient_failures == 2
        assert sum(record.method == "POST" for record in sandbox.requests) == 3


async def test_keyless_that_is_down_at_the_start_is_waited_for(
    sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aiokeyless.worker")
    sandbox.fail_next()
    async with working(sandbox, name="acme") as (_, memory):
        await ask(sandbox, memory)
    whole = [line for line in caplog.messages if "operation_id=" not in line]
    assert whole[0].startswith('keyless.unreachable client="acme" error="')
    assert all(' client="acme" ' in line for line in whole)


@pytest.mark.parametrize(
    "fail",
    [
        lambda sandbox: sandbox.fail_next(times=2, method="POST"),
        lambda sandbox: sandbox.fail_next(status=429, times=2, retry_after=0.3, method="POST"),
        lambda sandbox: sandbox.fail_next(status=503, times=2, retry_after=0.3, method="POST"),
        lambda sandbox: sandbox.fail_next(status=200, times=2, body=b"<html>", method="POST"),
        lambda sandbox: sandbox.drop_next(times=4, method="POST"),  # aiohttp repeats some by itself
    ],
    ids=["503", "429 with Retry-After", "503 with Retry-After", "a page", "dropped"],
)
async def test_a_create_that_fails_briefly_costs_no_approval(sandbox: Sandbox, fail: Callable[[Sandbox], None]) -> None:
    async with working(sandbox) as (worker, memory):
        fail(sandbox)
        operation_id = await ask(sandbox, memory)
        sandbox.approve(operation_id)
        [event] = await all_outcomes(memory)
        assert event.outcome is Outcome.APPROVED
        assert worker.statistics.transient_failures >= 2
    assert list(sandbox.operations) == [operation_id]


async def test_a_service_that_is_down_gets_what_the_budget_holds_and_is_used_again_when_it_is_back(
    sandbox: Sandbox,
) -> None:
    random.seed(5)  # the backoff is random
    await asyncio.sleep(100_000)  # the loop's clock began long ago
    async with working(sandbox, max_in_flight=8, schedule=wait_fixed(0.5)) as (worker, memory):
        ids = [await submit(memory, "C0FFEE") for _ in range(100)]
        await until(lambda: len(sandbox.operations) == 100)
        await asyncio.sleep(6)  # the next inspection counts the requests that wait
        sandbox.fail_next(times=None)
        sandbox.requests.clear()
        await asyncio.sleep(60)
        sent = len(sandbox.requests)
        assert worker.statistics.is_failing
        sandbox.recover()
        for operation_id in ids:
            sandbox.approve(operation_id)
        async with asyncio.timeout(60):  # the requests have more time
            events = await all_outcomes(memory)
        assert not worker.statistics.is_failing
    assert PER_WAIT * 100 < sent <= PER_WAIT * 100 + PER_SECOND * 30 + 30 + 8  # one a second after half a minute
    assert sorted((event.operation_id or "", event.outcome) for event in events) == sorted(
        (operation_id, Outcome.APPROVED) for operation_id in ids
    )


async def test_deliveries_from_before_an_outage_take_no_room_while_the_service_recovers(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    random.seed(5)  # the backoff is random
    fetch = Transport.fetch
    hanging: set[str] = set()
    renewals: set[object] = set()
    released = asyncio.Event()

    async def hang(transport: Transport, request: Request[Any], **options: Any) -> object:
        renewals.add(options["is_renewal"])
        operation_id = request.path.rpartition("/")[2]
        if operation_id in slow and not released.is_set():
            hanging.add(operation_id)
            await released.wait()
            hanging.discard(operation_id)
        return await fetch(transport, request, **options)

    async with working(sandbox, max_in_flight=3) as (worker, memory):
        slow = {await submit(memory, "C0FFEE") for _ in range(2)}
        await until(lambda: slow <= sandbox.operations.keys())
        monkeypatch.setattr(Transport, "fetch", hang)
        await until(lambda: hanging == slow)
        for _ in range(5):
            await submit(memory, "C0FFEE")
        await until(lambda: len(sandbox.operations) == 7)
        sandbox.fail_next(times=None, method="GET")
        await until(lambda: worker.statistics.is_failing)
        sandbox.recover()
        await until(lambda: not worker.statistics.is_failing)
        assert hanging == slow
        assert renewals == {False, True}  # some polls used new connections
        released.set()


async def test_a_rate_limit_pauses_the_whole_intake(sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    async with working(sandbox, max_in_flight=4, schedule=wait_fixed(0.5)) as (worker, memory):
        for _ in range(30):
            await submit(memory, "C0FFEE")
        await until(lambda: len(sandbox.operations) == 30)
        sandbox.fail_next(status=429, times=14, retry_after=20)  # so many that it is the tenant's
        await until(lambda: worker.statistics.transient_failures == 14, every=0.1)
        await until(lambda: worker.statistics.in_flight == 0)
        sandbox.requests.clear()
        await asyncio.sleep(19)
        assert not sandbox.requests
        await asyncio.sleep(3)
        assert sandbox.requests
    [line] = [record.message for record in caplog.records if record.message.startswith("keyless.")]
    assert re.fullmatch(r'keyless\.refusing error="GET .* answered 429 \(Retry-After: 20 s\): .*" count=1', line)


async def test_a_cache_in_the_way_is_told(sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    async with working(sandbox) as (worker, memory):
        sandbox.fail_next(404, times=None, headers={"Age": "120"})
        await submit(memory, "C0FFEE")
        await until(lambda: worker.statistics.transient_failures > 5, every=0.1)
    [line] = [record.message for record in caplog.records if record.message.startswith("keyless.")]
    assert re.fullmatch(r'keyless\.refusing error="GET .*cache.*" count=1', line)


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_503_with_retry_after_puts_off_the_request_that_got_it_and_no_other(
    sandbox: Sandbox, method: str
) -> None:
    async with working(sandbox, max_in_flight=8) as (worker, memory):
        sandbox.fail_next(status=503, retry_after=2, method=method)
        first = await submit(memory, "C0FFEE")
        await until(lambda: worker.statistics.transient_failures == 1)
        paused = now()
        await ask(sandbox, memory)
        assert first not in sandbox.operations
        await until(lambda: first in sandbox.operations)
        assert now() > paused + 1.9


async def test_final_poll_starts_at_the_deadline(sandbox: Sandbox) -> None:
    async with working(sandbox, schedule=AT_THE_DEADLINE) as (_, memory):
        asked_at = now()
        operation_id = await submit(memory, "C0FFEE", expires_in=1.0)
        [event] = await all_outcomes(memory)
    [_before_the_create, poll] = polls_of(sandbox, operation_id)
    assert 0.99 < poll.at - asked_at < 2.0
    assert (event.outcome, event.answered, event.asked) == (Outcome.EXPIRED, True, True)


async def test_a_request_that_expires_before_anybody_was_asked_says_so(sandbox: Sandbox) -> None:
    async with working(sandbox, grace=0) as (_, memory):
        sandbox.fail_next(times=None)
        operation_id = await submit(memory, "C0FFEE", expires_in=0.5)
        [event] = await all_outcomes(memory)
    assert (event.outcome, event.answered, event.asked) == (Outcome.EXPIRED, False, False)
    assert operation_id not in sandbox.operations


@pytest.mark.parametrize("approved", [True, False])
async def test_request_first_delivered_after_its_deadline_gets_one_poll(
    client: KeylessClient, memory: SqliteBroker, sandbox: Sandbox, *, approved: bool
) -> None:
    await client.create_operation("C0", operation_id="txn-1")  # not for this request
    if approved:
        sandbox.approve("txn-1")
    sandbox.requests.clear()
    await publish(memory, {"operation_id": "txn-1", "created_at": LONG_AGO, "expires_in": 60})
    async with working(sandbox, memory):
        [event] = await all_outcomes(memory)
    reason = FailureReason.ALREADY_APPROVED if approved else FailureReason.CONFLICT
    assert (event.outcome, event.reason) == (Outcome.FAILED, reason)
    assert len(polls_of(sandbox, "txn-1")) == 1


async def test_one_failure_long_after_the_deadline_costs_no_approval(memory: SqliteBroker, sandbox: Sandbox) -> None:
    async with working(sandbox, memory, schedule=AT_THE_DEADLINE):
        asked_at = now()
        operation_id = await submit(memory, "C0", expires_in=2)
        await until(lambda: operation_id in sandbox.operations)
    sandbox.approve(operation_id)
    await until(lambda: now() > asked_at + 2.1)
    async with working(sandbox, memory, grace=0):
        sandbox.fail_next(times=2)
        [event] = await all_outcomes(memory)
    assert event.outcome is Outcome.APPROVED


async def test_nobody_is_asked_after_the_deadline(memory: SqliteBroker, sandbox: Sandbox) -> None:
    await publish(memory, {"operation_id": "txn-1", "created_at": LONG_AGO, "expires_in": 60})
    async with working(sandbox, memory):
        [event] = await all_outcomes(memory)
    assert (event.outcome, event.answered, event.asked) == (Outcome.EXPIRED, True, False)
    assert not sandbox.operations


#: What happens to the request besides, when the operation is there already.
BESIDES: dict[str, Callable[[Sandbox], object]] = {
    "nothing": lambda _: None,
    "its create is held off": lambda sandbox: sandbox.fail_next(status=429, retry_after=0.1, method="POST"),
    "its create is in doubt": lambda sandbox: sandbox.fail_next(status=503, method="POST"),
    "its first poll fails": lambda sandbox: sandbox.fail_next(method="GET"),
    "its first poll finds nothing": lambda sandbox: sandbox.fail_next(status=404, method="GET"),
}


@pytest.mark.parametrize("approved_before", [True, False])
@pytest.mark.parametrize("besides", BESIDES)
async def test_an_operation_from_before_the_request_is_never_taken_for_its_own(
    client: KeylessClient, sandbox: Sandbox, besides: str, *, approved_before: bool
) -> None:
    await client.create_operation("C0", operation_id="txn-1", operation_payload="Pay 40")
    if approved_before:
        sandbox.approve("txn-1")
    async with working(sandbox) as (_, memory):
        BESIDES[besides](sandbox)
        await publish(memory, {"operation_id": "txn-1", "operation_payload": "Pay 40"})
        if not approved_before:
            await until(lambda: bool(polls_of(sandbox, "txn-1")))
            sandbox.approve("txn-1")
        [event] = await all_outcomes(memory)
    assert event.outcome is Outcome.FAILED
    assert event.reason in {FailureReason.ALREADY_APPROVED, FailureReason.CONFLICT}
    if approved_before and besides != "its first poll finds nothing":  # else the create finds that the id is taken
        assert event.reason == FailureReason.ALREADY_APPROVED


async def test_bug_in_the_worker_fails_the_request_once_and_is_logged(
    sandbox: Sandbox, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "after_creation", lambda *_: 1 / 0)
    async with working(sandbox) as (worker, memory):
        operation_id = await submit(memory, "C0FFEE", context={"order": 7})
        [event] = await all_outcomes(memory)
        assert worker.statistics.deliveries == 1
        assert worker.statistics.is_ready
    assert (event.outcome, event.reason) == (Outcome.FAILED, FailureReason.INTERNAL)
    assert event.operation_id == operation_id
    assert event.read_context(dict[str, int]) == {"order": 7}
    [record] = [record for record in caplog.records if record.exc_info]
    assert "ZeroDivisionError" in caplog.text
    assert (record.levelno, record.getMessage()) == (logging.ERROR, f'delivery.failed operation_id="{operation_id}"')


async def test_no_more_deliveries_are_in_flight_than_there_is_room_for(sandbox: Sandbox) -> None:
    async with working(sandbox, max_in_flight=3, max_polls_per_second=None) as (_, memory):
        sandbox.requests.clear()
        sandbox.latency = 0.1
        for _ in range(12):
            await submit(memory, "C0FFEE", expires_in=1)
        await all_outcomes(memory)
    assert most_at_once(sandbox.requests) == 3


async def test_the_same_request_after_everything_about_it_was_forgotten_is_not_approved_again(sandbox: Sandbox) -> None:
    async with working(sandbox) as (_, memory):
        await submit(memory, "C0FFEE", operation_id="order-7", operation_payload="Pay 40")
        await until(lambda: "order-7" in sandbox.operations)
        sandbox.approve("order-7")
        [event] = await all_outcomes(memory)
        assert event.outcome is Outcome.APPROVED
    async with working(sandbox) as (_, memory):  # which remembers nothing
        await submit(memory, "C0FFEE", operation_id="order-7", operation_payload="Pay 40")
        [event] = await all_outcomes(memory)
    assert (event.outcome, event.reason) == (Outcome.FAILED, FailureReason.ALREADY_APPROVED)


class Remembering(wait_adaptive):
    """A schedule that remembers its observations, and fails to learn from them."""

    def __init__(self) -> None:
        super().__init__(min_interval=0.05, poll_cost=0.001, jitter=0)
        self.observations: list[tuple[float, float | None]] = []

    def observe(self, after: float, until: float | None) -> None:
        self.observations.append((after, until))
        raise RuntimeError("not today")


async def test_schedule_learns_when_people_approve_and_its_failure_costs_no_outcome(
    sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    schedule = Remembering()
    async with working(sandbox, schedule=schedule) as (worker, memory):
        operation_id = await submit(memory, "C0FFEE")
        await until(lambda: worker.statistics.deliveries >= 3)  # the first creates it, and the second polls it
        sandbox.approve(operation_id)
        [event] = await all_outcomes(memory)
        await until(lambda: "failed to learn" in caplog.text)
        assert worker.statistics.is_ready
    age = (event.decided_at - event.requested_at).total_seconds()
    assert schedule.observations == [(schedule.observations[0][0], age)]
    assert 0 < schedule.observations[0][0] < age


async def test_logs_hold_no_payload_no_context_and_no_key(
    sandbox: Sandbox, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG, "aiokeyless")
    secrets = {"operation_payload": "hidden payload", "context": msgspec.Raw(b'"hidden context"')}
    async with working(sandbox) as (_, memory):
        sandbox.fail_next()
        for operation_id in ("approved", "lying", "unreadable"):
            await publish(memory, {"operation_id": operation_id, "expires_in": 2, **secrets})
        await publish(memory, {"operation_id": "late", "created_at": LONG_AGO, **secrets})
        await publish(memory, {"operation_id": "..", **secrets})
        await publish(memory, {"operation_id": "no JSON"}, b"hidden payload, and no JSON")
        await until(lambda: len(sandbox.operations) == 3)
        sandbox.tamper("lying", operation_payload="another hidden payload")
        sandbox.tamper("unreadable", operation_payload=["hidden payload"])
        sandbox.approve("approved")
        await all_outcomes(memory)
        monkeypatch.setattr(processor, "after_creation", lambda *_: 1 / 0)
        await publish(memory, {"operation_id": "internal", **secrets})
        events = await all_outcomes(memory)
    lines = [JsonFormatter().format(record) for record in caplog.records if record.name.startswith("aiokeyless")]
    assert len(events) == 7
    assert {msgspec.json.decode(line, type=dict[str, object])["event"] for line in lines} >= {
        "worker.ready",
        "keyless.failed",
        "approval.approved",
        "approval.expired",
        "approval.failed",
        "delivery.failed",
        "worker.done",
    }
    assert not [line for line in [*lines, caplog.text] if "hidden" in line or sandbox.api_key in line]


async def test_an_outcome_that_a_full_disk_refused_comes_soon_after_there_is_room(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide, room_at = SqliteBroker.decide, now() + 20.0

    async def decide_with_room(broker: SqliteBroker, message: Message, event: ApprovalEvent) -> bool:
        if now() < room_at:
            raise RefusedError("the disk is full")
        return await decide(broker, message, event)

    monkeypatch.setattr(SqliteBroker, "decide", decide_with_room)
    async with working(sandbox) as (worker, memory):
        operation_id = await ask(sandbox, memory)
        sandbox.approve(operation_id)
        [event] = await read(memory)
        assert now() < room_at + 3.0
        assert worker.statistics.unsettled < 14  # without haste
    assert event.outcome is Outcome.APPROVED


@pytest.mark.parametrize(("kept_for", "claims_last"), [(100.0, 86_400.0), (86_400.0, 110.0)])
async def test_a_request_of_a_later_version_costs_nothing_and_fails_after_a_day_or_while_claims_are_kept(
    sandbox: Sandbox,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    kept_for: float,
    claims_last: float,
) -> None:
    monkeypatch.setattr(serving, "NEWER_KEPT_FOR", kept_for)
    monkeypatch.setattr(tables, "LONGEST_WAIT", claims_last)
    async with working(sandbox, grace=0.0) as (worker, memory):
        asked_before = len(sandbox.requests)
        await publish(memory, {"operation_id": "txn-1"}, b'{"version":2,"operation_id":"txn-1"}')
        await asyncio.sleep(99)
        facts = worker.statistics
        assert (facts.is_ready, facts.deliveries, facts.lateness, facts.fleet.waiting) == (True, 0, 0.0, 1)
        [event] = await read(memory)
    assert (event.operation_id, event.reason, event.deliveries) == ("txn-1", FailureReason.INVALID_REQUEST, 1)
    assert 100 <= (event.decided_at - event.requested_at).total_seconds() <= 103
    assert len(sandbox.requests) == asked_before
    told = 'request.newer operation_id="txn-1" version=2 count=1'
    assert [line for line in caplog.messages if line.startswith("request.newer")] == [told]


async def test_requests_that_are_none_leave_the_tokens_to_those_that_are(
    sandbox: Sandbox, memory: SqliteBroker
) -> None:
    async with working(sandbox, memory) as (worker, _):
        for number in range(2 * LEAST):
            await publish(memory, {"operation_id": f"txn-{number}"}, b"{")
        await read(memory, 2 * LEAST)
        assert worker._serving is not None
        assert worker._serving._budget.room(now()) >= LEAST
