"""What a worker makes of a service, and of a broker, that is wrong for a moment: in memory, on a clock that moves."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from unittest.mock import AsyncMock, Mock

import msgspec
import pytest
from tenacity import wait_fixed
from waiting import until

from aiokeyless import BadRequestError, BrokerError, ClientClosedError, KeylessClient
from aiokeyless._http.creation import OperationCreation
from aiokeyless._rules.budget import LEAST, Budget
from aiokeyless.events import DeliveryEnded
from aiokeyless.sandbox import Sandbox
from aiokeyless.worker import ApprovalRequest, ApprovalWorker, FailureReason, Outcome, serving, submit_approval
from aiokeyless.worker.broker import Claim, ExchangeResult, UnavailableError
from aiokeyless.worker.sqlite import SqliteBroker
from aiokeyless.worker.tables import Row, TableMessage

from .conformance.brokers import new_request
from .reading import approve_all, ask, created, now, polls_of, read, submit, working

if TYPE_CHECKING:
    from aiokeyless.events import Event
    from aiokeyless.worker.messages import Message

pytestmark = pytest.mark.looptime


@pytest.mark.parametrize("status", [403, 404])
async def test_a_gateway_that_refuses_all_is_asked_no_more_often_than_a_service(sandbox: Sandbox, status: int) -> None:
    """After half a minute without a good answer, the backoff grows."""
    async with working(sandbox, schedule=wait_fixed(5.0)) as (_, broker):
        await ask(sandbox, broker)
        sandbox.fail_next(status=status, times=None)
        await asyncio.sleep(45)
        before = len(sandbox.requests)
        await asyncio.sleep(18)
        # By the shortest delays of the backoff; after a 404, the operation is polled and created.
        assert len(sandbox.requests) - before <= 8
        sandbox.recover()
        sandbox.approve("txn-1")
        [event] = await read(broker)
    assert event.outcome is Outcome.APPROVED


async def test_a_create_that_is_refused_after_one_in_doubt_does_not_say_that_nobody_was_asked(sandbox: Sandbox) -> None:
    async with working(sandbox) as (_, broker):
        sandbox.drop_next(times=None, method="POST")
        await submit(broker)
        await asyncio.sleep(2)
        sandbox.recover()
        sandbox.fail_next(status=400, times=None, method="POST")
        [event] = await read(broker)
    assert event.reason == FailureReason.POLL_REFUSED


async def test_an_approval_that_comes_before_a_lost_create_is_found_counts() -> None:
    """The service takes the create, its answer is lost, and the user approves before the client checks."""
    async with Sandbox(auto_approve=0.5) as sandbox, working(sandbox) as (_, broker):
        sandbox.latency = 1.0
        sandbox.drop_next(times=1, stored=True, method="POST")
        await submit(broker)
        [event] = await read(broker)
    assert event.outcome is Outcome.APPROVED


async def test_an_approval_counts_whatever_the_time_that_the_service_gives_its_operation(sandbox: Sandbox) -> None:
    """The zone of its timestamps is not documented, and the clock of a machine may be wrong."""
    async with working(sandbox) as (_, broker):
        await ask(sandbox, broker)
        sandbox.tamper("txn-1", timestamp="2020-01-02T03:04:05.68")
        sandbox.approve("txn-1")
        [event] = await read(broker)
    assert event.outcome is Outcome.APPROVED


def a_later_delivery(broker: SqliteBroker) -> Message:
    """Return one of the only request, as if the one in flight had not been settled in time."""
    broker._store._connection.execute("UPDATE waiting SET deliveries = deliveries + 1")
    row = Row(*broker._store._one("SELECT id, name FROM request"))
    return TableMessage(row=row, body=b"", stored_at=datetime.now(UTC), number=2, is_untried=False)


@pytest.mark.parametrize("was_in_doubt", [False, True])
async def test_no_user_is_asked_after_a_claim_that_outlasts_the_deadline(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, *, was_in_doubt: bool
) -> None:
    claim, pauses = SqliteBroker.claim, [0.0] if was_in_doubt else []

    async def be_late(broker: SqliteBroker, message: Message) -> Claim:
        await asyncio.sleep(pauses.pop() if pauses else 5.0)
        return await claim(broker, message)

    monkeypatch.setattr(SqliteBroker, "claim", be_late)
    async with working(sandbox, grace=0) as (_, broker):
        if was_in_doubt:
            sandbox.drop_next(method="POST")
        await submit(broker, expires_in=4)
        async with asyncio.timeout(20):  # a lease is longer
            [event] = await read(broker)
    assert not sandbox.operations
    assert (event.outcome, event.asked) == (Outcome.EXPIRED, was_in_doubt)


async def test_nobody_is_asked_under_an_id_that_another_request_has_claimed(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two requests that take one id at the same time, one comes too late."""

    async def claim_too_late(_broker: SqliteBroker, _message: Message) -> Claim:
        return Claim.ANOTHERS

    monkeypatch.setattr(SqliteBroker, "claim", claim_too_late)
    async with working(sandbox) as (_, broker):
        await submit(broker)
        [event] = await read(broker)
    assert (event.outcome, event.reason) == (Outcome.FAILED, FailureReason.CONFLICT)
    assert not any(request.method == "POST" for request in sandbox.requests)


async def test_a_create_that_a_later_delivery_overtook_ends_no_request(
    client: KeylessClient, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, memory: SqliteBroker
) -> None:
    """A broker may deliver a request again while its first delivery is in flight."""
    run, is_overtaken = OperationCreation.run, asyncio.Event()

    async def be_overtaken(creation: OperationCreation, **options: Any) -> object:
        if not is_overtaken.is_set():
            is_overtaken.set()
            await memory.claim(a_later_delivery(memory))
            await client.create_operation("C0FFEE", operation_id="txn-1")
        return await run(creation, **options)

    monkeypatch.setattr(OperationCreation, "run", be_overtaken)
    async with working(sandbox, memory):
        await ask(sandbox, memory)
        await asyncio.sleep(3)
        sandbox.approve("txn-1")
        [event] = await read(memory)
    assert event.outcome is Outcome.APPROVED


@pytest.fixture
def patient_key_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a worker in use."""
    monkeypatch.setattr(serving, "KEY_CHECKS", (1.0, 2.0, 4.0, 8.0, 15.0))


@pytest.mark.usefixtures("patient_key_checks")
async def test_a_key_that_is_refused_for_a_moment_ends_no_worker(
    sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aiokeyless.worker")
    async with working(sandbox) as (worker, broker):
        await ask(sandbox, broker, 10)
        sandbox.latency = 0.5  # several are refused before the first check
        sandbox.fail_next(status=401, times=None)
        await asyncio.sleep(6)
        [problem] = worker.statistics.problems
        assert problem.startswith("Keyless refuses the key: GET /v2/operations/")
        sandbox.recover()
        approve_all(sandbox)
        events = await read(broker, 10)
        assert worker.statistics.is_ready
    assert {event.outcome for event in events} == {Outcome.APPROVED}
    assert caplog.text.count("keyless.key_refused") == caplog.text.count("keyless.key_accepted") == 1


async def test_a_key_that_was_replaced_while_it_was_refused_is_no_refusal_of_the_key(
    sandbox: Sandbox, memory: SqliteBroker, caplog: pytest.LogCaptureFixture
) -> None:
    keys = [sandbox.api_key]

    def newest() -> str:
        if sandbox.requests and sandbox.requests[-1].status == 401:
            keys.append("the new key")
        return keys[-1]

    async with KeylessClient(newest, base_url=sandbox.url) as client, ApprovalWorker(client, memory) as worker:
        await ask(sandbox, memory)
        sandbox._api._key = "the new key"
        await asyncio.sleep(2)
        sandbox.approve("txn-1")
        [event] = await read(memory)
        assert worker.statistics.transient_failures == 1
    assert event.outcome is Outcome.APPROVED
    assert "keyless.key_refused" not in caplog.text


async def test_a_gateway_that_refuses_the_check_of_the_key_in_another_way_ends_no_worker(sandbox: Sandbox) -> None:
    async with working(sandbox) as (worker, broker):
        await ask(sandbox, broker)
        sandbox.fail_next(status=401, times=1)
        sandbox.fail_next(status=403, times=2)
        await asyncio.sleep(5)
        sandbox.approve("txn-1")
        [event] = await read(broker)
        assert not worker.statistics.is_draining
    assert event.outcome is Outcome.APPROVED


@pytest.mark.usefixtures("patient_key_checks")
async def test_a_client_that_is_closed_while_its_key_is_checked_ends_the_worker(
    client: KeylessClient, sandbox: Sandbox, caplog: pytest.LogCaptureFixture, memory: SqliteBroker
) -> None:
    run = asyncio.create_task(ApprovalWorker(client, memory).run())
    await ask(sandbox, memory)
    sandbox.fail_next(status=401, times=None)
    await until(lambda: 'keyless.key_refused error="GET' in caplog.text)
    await client.aclose()
    with pytest.raises(ClientClosedError):
        await run


async def test_a_key_whose_checks_are_refused_in_another_way_ends_the_worker(
    client: KeylessClient, sandbox: Sandbox, memory: SqliteBroker
) -> None:
    run = asyncio.create_task(ApprovalWorker(client, memory).run())
    await ask(sandbox, memory)
    sandbox.fail_next(status=401, times=1)
    sandbox.fail_next(status=400, times=None)
    with pytest.raises(BadRequestError):
        await run


class Forgetful(SqliteBroker):
    """A broker in memory that remembers a request for so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(":memory:")
        self.seconds = seconds

    async def prepare(self, *, lease: float, service: str) -> float:
        await super().prepare(lease=lease, service=service)
        return self.seconds


async def test_no_wait_outlives_what_the_broker_remembers(client: KeylessClient) -> None:
    async with Forgetful(100.0) as broker, ApprovalWorker(client, broker, grace=30):
        began = now()
        for number in range(100):  # more than there are tokens for polls
            await submit_approval(broker, "C0FFEE", operation_id=f"too-long-{number}", expires_in=71)
        events = await read(broker, 100)
        assert now() - began < 2.0
    assert {event.reason for event in events} == {FailureReason.INVALID_REQUEST}
    assert "allows 70 s" in (events[0].detail or "")


async def test_a_broker_that_leaves_no_time_to_wait_is_one_line(client: KeylessClient) -> None:
    async with Forgetful(30.0) as broker:
        with pytest.raises(
            BrokerError, match=r"^the broker allows waits of 30 s, which leaves no time .* grace of 30 s"
        ):
            await ApprovalWorker(client, broker, grace=30).run()
        async with ApprovalWorker(client, broker, grace=29):
            pass


@pytest.mark.parametrize(
    ("count", "fault"),
    [(100, {"status": 503}), (4, {"status": 429, "retry_after": 120})],  # 4: a few of the tokens
    ids=["outage", "long pause"],
)
async def test_an_outage_or_a_long_pause_keeps_no_application_waiting_past_deadline_and_grace(
    sandbox: Sandbox, count: int, fault: dict[str, Any]
) -> None:
    async with working(sandbox, grace=5) as (_, broker):
        await ask(sandbox, broker, count, expires_in=30)
        began = now()
        sandbox.latency = 0.2
        sandbox.fail_next(times=None, **fault)
        events = await read(broker, count)
    assert {(event.outcome, event.answered, event.asked) for event in events} == {(Outcome.EXPIRED, False, True)}
    assert now() - began < 30 + 5 + 20


@pytest.mark.parametrize("who", ["the worker", "its broker"])
async def test_what_was_away_past_the_grace_and_is_back_before_keyless_is_costs_no_approval(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    async with working(sandbox, grace=5) as (worker, broker):
        if who == "its broker":
            await asyncio.sleep(60)
            monkeypatch.setattr(broker, "take", AsyncMock(side_effect=UnavailableError("away")))
            await until(lambda: bool(worker.statistics.problems))
        sandbox.fail_next(times=None)
        late: dict[str, Any] = {"created_at": broker.now() - timedelta(seconds=100), "expires_in": 20}
        for number in range(100):
            await submit_approval(broker, "C0FFEE", operation_id=f"late-{number}", started_by="phone", **late)
            sandbox.approve(f"late-{number}", user_id="C0FFEE")
        monkeypatch.undo()
        await asyncio.sleep(3)
        sandbox.recover()
        events = await read(broker, 100)
    assert {event.outcome for event in events} == {Outcome.APPROVED}


@pytest.mark.parametrize(("call", "seconds"), [("has_claim", 2), ("put_off", 2), ("decide", 2), ("put_off", 50)])
async def test_no_request_waits_for_a_lease_once_a_broker_that_was_away_is_back(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, call: str, seconds: int
) -> None:
    async with working(sandbox) as (_, broker):
        await ask(sandbox, broker, 2)
        monkeypatch.setattr(broker, call, AsyncMock(side_effect=UnavailableError("away")))
        sandbox.approve("txn-1")
        await asyncio.sleep(seconds)
        monkeypatch.undo()
        sandbox.approve("txn-2")
        async with asyncio.timeout(7):  # a lease is 40 s
            events = await read(broker, 2)
    assert {event.outcome for event in events} == {Outcome.APPROVED}


async def test_a_failure_that_the_broker_counted_but_did_not_confirm_counts_once(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_off, told = SqliteBroker.put_off, list[ApprovalRequest]()

    async def put_off_in_doubt(broker: SqliteBroker, message: Message, delay: float, result: ExchangeResult) -> None:
        await put_off(broker, message, delay, result)
        if result is ExchangeResult.FAILED:
            raise UnavailableError("no answer")

    async with working(sandbox, on_created=told.append) as (_, broker):
        await ask(sandbox, broker)
        monkeypatch.setattr(SqliteBroker, "put_off", put_off_in_doubt)
        sandbox.fail_next()
        await asyncio.sleep(5)
        sandbox.approve("txn-1")
        await read(broker)
    assert len(told) == 1  # with only failures before, an operation that is found counts as one that nobody was told of


async def test_a_short_pause_costs_no_approval_past_its_grace(sandbox: Sandbox) -> None:
    async with working(sandbox, grace=30) as (worker, broker):
        await ask(sandbox, broker, 4)
        sandbox.fail_next(status=429, retry_after=20, times=14)  # so many that the limit is the tenant's
        await asyncio.sleep(70)  # each gets it at about 0, 20, 40 and 60 s
        assert worker.statistics.transient_failures == 14
        late: dict[str, Any] = {"created_at": broker.now() - timedelta(seconds=100), "expires_in": 20}
        await submit_approval(broker, "C0FFEE", operation_id="late", started_by="phone", **late)
        sandbox.approve("late", user_id="C0FFEE")
        [event] = await read(broker)
    assert (event.operation_id, event.outcome, event.deliveries) == ("late", Outcome.APPROVED, 1)


async def test_a_worker_in_a_long_pause_keeps_no_request_from_another_worker(
    sandbox: Sandbox, memory: SqliteBroker
) -> None:
    async with working(sandbox, memory) as (paused, _):
        await asyncio.sleep(0.5)  # so it waits for deliveries
        assert paused._serving is not None
        paused._serving._rate.paused_until = now() + 120.0
        async with working(sandbox, memory):
            await submit(memory, 20)
            async with asyncio.timeout(5):
                await created(sandbox, 20)
        assert paused.statistics.deliveries >= 1
        assert paused.statistics.polls == 0


async def test_a_message_that_is_no_request_waits_for_the_end_of_an_outage_too(sandbox: Sandbox) -> None:
    async with working(sandbox) as (worker, broker):
        sandbox.fail_next(status=503, times=None)
        await submit(broker, 100)
        await until(lambda: worker.statistics.is_failing)
        for number in range(5):
            await broker.submit(msgspec.structs.replace(new_request(f"broken-{number}"), body=b"no request"))
        await asyncio.sleep(5)
        sandbox.recover()
        events = await read(broker, 5)
    assert {event.reason for event in events} == {FailureReason.INVALID_REQUEST}


# -- the budget, and creates that fail


class Spent(Budget):
    """A budget without a token."""

    def room(self, now: float) -> int:
        return 0


async def test_a_request_that_is_decided_without_an_exchange_takes_no_token_and_no_slot(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with working(sandbox, grace=0) as (worker, broker):
        assert worker._serving is not None
        budget, take = worker._serving._budget, Mock()
        monkeypatch.setattr(worker._serving._slots, "take", take)
        worker._serving._rate.paused_until = now() + 120.0
        await asyncio.sleep(2)
        await submit(broker, 50, created_at=broker.now() - timedelta(seconds=100), expires_in=20)
        events = await read(broker, 50)
        assert (worker.statistics.polls, budget.room(now())) == (0, LEAST)
    assert {(event.outcome, event.answered) for event in events} == {(Outcome.EXPIRED, False)}
    assert not take.called


async def test_without_a_token_none_but_overdue_requests_are_taken(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with working(sandbox, grace=0) as (worker, broker):
        assert worker._serving is not None
        monkeypatch.setattr(worker._serving, "_budget", Spent())
        await asyncio.sleep(2)
        await submit_approval(broker, "C0FFEE", operation_id="in-time")
        await submit(broker, created_at=broker.now() - timedelta(seconds=100), expires_in=20)
        [event] = await read(broker)
        await asyncio.sleep(20)
        assert (worker.statistics.deliveries, worker.statistics.polls) == (1, 0)
    assert (event.operation_id, event.outcome, event.answered) == ("txn-1", Outcome.EXPIRED, False)


@pytest.mark.parametrize("has_token", [True, False])
async def test_a_final_poll_that_fails_past_the_grace_is_repeated_if_there_is_a_token(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, *, has_token: bool
) -> None:
    async with working(sandbox, grace=0) as (worker, broker):
        if not has_token:
            assert worker._serving is not None
            monkeypatch.setattr(worker._serving._processor, "_budget", Spent())
        await asyncio.sleep(2)
        sandbox.fail_next(times=2)
        late: dict[str, Any] = {"created_at": broker.now() - timedelta(seconds=100), "expires_in": 20}
        await submit(broker, started_by="phone", **late)
        sandbox.approve("txn-1", user_id="C0FFEE")
        [event] = await read(broker)
    assert event.outcome is (Outcome.APPROVED if has_token else Outcome.EXPIRED)
    assert len(polls_of(sandbox, "txn-1")) == (3 if has_token else 1)


async def first_delivery(sandbox: Sandbox, **options: Any) -> tuple[float, int]:
    """Let creates fail; return how long the first delivery of a request took, and how many creates it sent."""
    ended: list[tuple[float, int]] = []

    def hear(event: Event) -> None:
        if isinstance(event, DeliveryEnded):
            ended.append((event.seconds, sum(request.method == "POST" for request in sandbox.requests)))

    is_spent = options.pop("is_spent", False)
    async with working(sandbox, listeners=[hear]) as (worker, broker):
        if is_spent:
            assert worker._serving is not None
            worker._serving._processor._budget = Spent()
        await submit(broker, **options)
        await until(lambda: bool(ended))
    return ended[0]


async def test_a_create_that_fails_is_repeated_for_5_s_each_time_after_a_poll_that_found_nothing(
    sandbox: Sandbox,
) -> None:
    sandbox.fail_next(times=None, method="POST")
    seconds, creates = await first_delivery(sandbox)
    assert 3 < seconds <= 5
    assert creates >= 5
    for before, request in pairwise(sandbox.requests):
        assert request.method == "GET" or (before.method, before.status) == ("GET", 404)


@pytest.mark.parametrize(
    ("fault", "options"),
    [
        ({"status": 503}, {"is_spent": True}),
        ({"status": 429, "retry_after": 6}, {}),
        ({"status": 503}, {"expires_in": 0.2}),
    ],
    ids=["no token", "a longer Retry-After", "the deadline"],
)
async def test_a_create_that_fails_is_not_repeated(
    sandbox: Sandbox, fault: dict[str, Any], options: dict[str, Any]
) -> None:
    sandbox.fail_next(times=None, method="POST", **fault)
    seconds, creates = await first_delivery(sandbox, **options)
    assert (round(seconds, 1), creates) == (0, 1)


async def test_a_create_is_repeated_until_the_deadline_and_not_after_it(sandbox: Sandbox) -> None:
    sandbox.fail_next(times=None, method="POST")
    seconds, creates = await first_delivery(sandbox, expires_in=2)
    assert seconds < 2
    assert creates >= 2


async def test_a_poll_that_finds_nothing_until_the_deadline_tells_nobody_of_an_operation(sandbox: Sandbox) -> None:
    told: list[ApprovalRequest] = []
    sandbox.fail_next(times=None, method="POST")
    sandbox.latency = 0.6  # the poll after the failed create begins before the deadline, and ends after it
    async with working(sandbox, on_created=told.append) as (_, broker):
        await submit(broker, expires_in=2.4)
        [event] = await read(broker)
    assert (event.outcome, told) == (Outcome.EXPIRED, [])


async def test_a_failing_request_is_polled_as_often_as_by_a_loop_for_half_a_minute(sandbox: Sandbox) -> None:
    async with working(sandbox) as (_, broker):
        await ask(sandbox, broker)
        sandbox.fail_next(times=None)
        sandbox.requests.clear()
        await asyncio.sleep(25)
    assert 25 <= len(sandbox.requests) <= 50  # its backoff counts two failures: 0.5 to 1 s
