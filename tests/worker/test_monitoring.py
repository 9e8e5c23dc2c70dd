"""What a worker tells the listeners of its client, and the log of an outage: in memory, on a clock that moves."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pytest

from aiokeyless import AuthenticationError, BrokerError, ServerError
from aiokeyless._listeners import Listeners
from aiokeyless._rules.budget import Budget
from aiokeyless.events import (
    DeliveryEnded,
    Inspection,
    OutcomePublished,
    PollEnded,
    RequestEnded,
    ServiceChanged,
    WaitEnded,
    WaitOutcome,
    WaitStarted,
    WorkerInspected,
)
from aiokeyless.worker import ApprovalWorker, FailureReason, Outcome, submit_approval
from aiokeyless.worker.broker import Broker, RefusedError, UnavailableError
from aiokeyless.worker.monitoring import WorkerReporter
from aiokeyless.worker.sqlite import SqliteBroker

from .conformance.brokers import new_request
from .reading import an_event, approve_all, ask, read, working

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from aiokeyless.events import Event
    from aiokeyless.sandbox import Sandbox
    from aiokeyless.worker.messages import Message

pytestmark = pytest.mark.looptime

DESTINATION = ":memory:"
TRACEPARENT = f"00-{1:032x}-{2:016x}-01"
T = TypeVar("T")


class Told:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type[T]) -> list[T]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def told() -> Told:
    return Told()


async def test_how_the_worker_fares_is_told_every_5_seconds_and_at_its_end(told: Told, sandbox: Sandbox) -> None:
    async with working(sandbox, listeners=[told]) as (_, broker):
        await submit_approval(broker, "C0FFEE", operation_id="txn-1")
        await asyncio.sleep(12)
    inspections = told.of(WorkerInspected)
    assert [(event.fleet.waiting, event.is_ready, event.has_ended) for event in inspections] == [
        (0, True, False),
        (1, True, False),
        (1, True, False),
        (1, False, True),
    ]
    assert {(event.system, event.destination) for event in inspections} == {("sqlite", DESTINATION)}
    assert {(event.in_flight, event.duplicates, event.unsettled) for event in inspections} == {(0, 0, 0)}
    assert all(0 <= event.lateness < 1 for event in inspections)
    assert len({event.worker for event in inspections}) == 1


async def test_each_worker_of_a_process_has_a_number(told: Told, sandbox: Sandbox) -> None:
    for _ in range(2):
        async with working(sandbox, listeners=[told]):
            await asyncio.sleep(1)
    assert len({event.worker for event in told.of(WorkerInspected)}) == 2


async def test_each_delivery_and_each_poll_is_told_and_the_outcome_once(told: Told, sandbox: Sandbox) -> None:
    async with working(sandbox, listeners=[told]) as (_, broker):
        await ask(sandbox, broker, operation_payload="Pay 40")
        asyncio.get_running_loop().call_later(4.5, sandbox.approve, "txn-1")
        [event] = await read(broker)
        await asyncio.sleep(1)
    deliveries = told.of(DeliveryEnded)
    assert [delivery.number for delivery in deliveries] == [*range(1, event.deliveries + 1)]
    assert {(delivery.system, delivery.destination, delivery.error) for delivery in deliveries} == {
        ("sqlite", DESTINATION, None)
    }
    assert all(0 <= delivery.seconds < 1 for delivery in deliveries)
    assert all(0 <= poll.seconds < 1 for poll in told.of(PollEnded))
    missing, *pending, approved = told.of(PollEnded)
    assert (missing.result, missing.error) == ("missing", None)  # so it is created, and nothing has failed
    assert {poll.result for poll in pending} == {"pending"}
    assert approved.result == "approved"
    assert {(poll.waits, poll.operation_id, poll.lag, poll.is_final) for poll in told.of(PollEnded)} == {
        ((), "txn-1", None, False)
    }
    [outcome] = told.of(OutcomePublished)
    assert (outcome.operation_id, outcome.outcome, outcome.reason) == ("txn-1", "approved", None)
    assert outcome.deliveries == event.deliveries
    assert outcome.age == pytest.approx((event.decided_at - event.requested_at).total_seconds())
    assert 4.5 <= outcome.age <= 10
    assert (outcome.system, outcome.destination, outcome.traceparent) == ("sqlite", DESTINATION, None)
    assert len(told.of(RequestEnded)) == len(sandbox.requests)
    assert not told.of(WaitStarted)
    assert not told.of(WaitEnded)
    assert "Pay 40" not in repr(told.events)


async def test_a_final_poll_is_told_as_such_and_a_timeout_by_its_name(
    told: Told, sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aiokeyless.worker")
    async with working(sandbox, listeners=[told]) as (_, broker):
        await broker.submit(new_request("txn-1", TRACEPARENT, expires_in=5.0))
        await read(broker)
        await asyncio.sleep(1)
    assert [poll.is_final for poll in told.of(PollEnded)][-2:] == [False, True]
    [outcome] = told.of(OutcomePublished)
    assert (outcome.outcome, outcome.reason, outcome.traceparent) == ("timed_out", None, TRACEPARENT)
    facts = f'operation_id="txn-1" deliveries={outcome.deliveries} seconds={round(outcome.age, 3)}'
    [expired] = [record for record in caplog.records if record.message.startswith("approval.")]
    assert (expired.levelname, expired.message) == ("INFO", f"approval.expired {facts} answered=true asked=true")


@pytest.mark.parametrize(
    ("kind", "answered", "reason", "outcome"),
    [
        (Outcome.APPROVED, None, None, WaitOutcome.APPROVED),
        (Outcome.EXPIRED, True, None, WaitOutcome.TIMED_OUT),
        (Outcome.EXPIRED, False, None, WaitOutcome.UNKNOWN),
        (Outcome.FAILED, None, FailureReason.MISMATCH, WaitOutcome.REJECTED),
        (Outcome.FAILED, None, FailureReason.INCONSISTENT, WaitOutcome.REJECTED),
        (Outcome.FAILED, None, FailureReason.CONFLICT, WaitOutcome.FAILED),
        (Outcome.FAILED, None, FailureReason.INTERNAL, WaitOutcome.FAILED),
    ],
)
async def test_outcomes_are_told_in_the_words_for_waits_of_a_client(
    kind: Outcome, answered: bool | None, reason: FailureReason | None, outcome: WaitOutcome, memory: SqliteBroker
) -> None:
    told = Told()
    reporter = WorkerReporter(memory, Budget(), (), listeners=Listeners((told,)), on_loss=print)
    reporter.report_outcome(an_event(outcome=kind, answered=answered, reason=reason), is_new=True)
    [published] = told.of(OutcomePublished)
    assert (published.outcome, published.reason, published.age) == (outcome, reason, 9.0)


async def test_a_delivery_that_the_broker_does_not_settle_is_told_with_its_error(
    told: Told, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = [UnavailableError("the answer was lost")]
    put_off = SqliteBroker.put_off

    async def lose_once(self: SqliteBroker, *arguments: Any) -> None:
        await put_off(self, *arguments)
        if lost:
            raise lost.pop()

    monkeypatch.setattr(SqliteBroker, "put_off", lose_once)
    async with working(sandbox, listeners=[told]) as (_, broker):
        await ask(sandbox, broker)
        sandbox.approve("txn-1")
        await read(broker)
        await asyncio.sleep(1)
    assert [delivery.error for delivery in told.of(DeliveryEnded)] == ["BrokerError", None]


async def test_a_thousand_deliveries_that_the_broker_does_not_settle_are_one_line_of_the_log(
    memory: SqliteBroker, caplog: pytest.LogCaptureFixture
) -> None:
    reporter = WorkerReporter(memory, Budget(), (), listeners=Listeners(()), on_loss=print)
    for _ in range(1000):
        reporter.report_settlement(2, RefusedError("the disk is full"), started_at=0.0)
    assert [record.getMessage() for record in caplog.records] == ['delivery.unsettled error="the disk is full" count=1']
    assert reporter.statistics().unsettled == 1000


async def test_a_delivery_that_shows_that_the_key_is_refused_is_told_with_its_error(
    told: Told, sandbox: Sandbox, memory: SqliteBroker
) -> None:
    async with sandbox.client(listeners=[told]) as client:
        run = asyncio.create_task(ApprovalWorker(client, memory).run())
        await ask(sandbox, memory)
        sandbox.fail_next(status=401, times=None)
        with pytest.raises(AuthenticationError):
            await run
    # It is delivered once more, perhaps, and handed back, while the worker ends.
    assert "AuthenticationError" in {event.error for event in told.of(DeliveryEnded)}
    assert told.of(PollEnded)[-1].error == "AuthenticationError"
    assert not told.of(OutcomePublished)


async def test_an_outage_is_told_and_is_two_lines_of_the_log(
    told: Told, sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aiokeyless.worker")
    async with working(sandbox, listeners=[told], name="acme") as (_, broker):
        await ask(sandbox, broker, 6, expires_in=300)
        sandbox.fail_next(503, times=None)
        await asyncio.sleep(20)
        sandbox.recover()
        await asyncio.sleep(60)
        approve_all(sandbox)
        assert {event.outcome for event in await read(broker, 6)} == {Outcome.APPROVED}
    began, ended = told.of(ServiceChanged)
    assert (began.is_failing, began.error, began.waiting) == (True, "ServerError", 6)
    assert (ended.is_failing, ended.error, ended.waiting) == (False, None, 6)
    assert began.seconds < 10 + 1
    assert 19 < ended.seconds < 25
    failing, answering = [record for record in caplog.records if record.message.startswith("keyless.")]
    assert (failing.levelname, answering.levelname) == ("WARNING", "INFO")
    assert re.fullmatch(r'keyless.failing client="acme" error=".*503.*" waiting=6', failing.message)
    assert answering.message == f'keyless.answering client="acme" seconds={round(ended.seconds, 3)}'
    assert [told for told, _ in itertools.groupby(told.of(WorkerInspected), lambda event: event.is_failing)] == [
        *(False, True, False)
    ]


async def test_a_service_that_comes_and_goes_is_two_lines_a_minute(
    told: Told, sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aiokeyless.worker")
    async with working(sandbox, listeners=[told]) as (_, broker):
        await ask(sandbox, broker, 6, expires_in=300)
        for _ in range(3):
            sandbox.fail_next(503, times=None)
            await asyncio.sleep(15)
            sandbox.recover()
            await asyncio.sleep(2)
        assert [change.is_failing for change in told.of(ServiceChanged)] == [True, False] * 3
        assert len([record for record in caplog.records if record.message.startswith("keyless.")]) == 2
        sandbox.fail_next(503, times=None)  # and now it stays away
        await asyncio.sleep(30)
    assert [change.is_failing for change in told.of(ServiceChanged)] == [True, False] * 4  # the last: the worker ends
    assert len([record for record in caplog.records if record.message.startswith("keyless.")]) == 3


async def test_a_service_that_fails_when_its_worker_ends_is_told_to_fail_no_more(told: Told, sandbox: Sandbox) -> None:
    async with working(sandbox, listeners=[told]) as (_, broker):
        await ask(sandbox, broker, 20)
        sandbox.fail_next(503, times=None)
        await asyncio.sleep(20)
    began, ended = told.of(ServiceChanged)
    assert (began.is_failing, began.error) == (True, "ServerError")
    assert (ended.is_failing, ended.error) == (False, "ClientClosedError")


# -- the fleet, and what keeps a worker from being ready


NOW = datetime(2026, 11, 27, tzinfo=UTC)


class FakeBroker:
    """The broker, as it is inspected."""

    system = destination = "fake"

    def __init__(self) -> None:
        self.losses: list[BrokerError] = []
        self.told: Inspection | UnavailableError | BrokerError = Inspection()

    def now(self) -> datetime:
        return NOW

    async def inspect(self) -> Inspection:
        if not isinstance(self.told, Inspection):
            raise self.told
        return self.told


@pytest.fixture
def broker() -> FakeBroker:
    return FakeBroker()


@asynccontextmanager
async def reporting(broker: FakeBroker, budget: Budget | None = None) -> AsyncGenerator[WorkerReporter]:
    """Run a reporter; the body starts between two inspections."""
    reporter = WorkerReporter(
        cast("Broker", broker), budget or Budget(), (), listeners=Listeners(()), on_loss=broker.losses.append
    )
    watching = asyncio.create_task(reporter.watch())
    await asyncio.sleep(1)
    yield reporter
    watching.cancel()


def problems(reporter: WorkerReporter) -> list[str]:
    return list(reporter.statistics().problems)


async def test_an_inspection_that_fails_for_a_bug_is_a_problem_until_one_succeeds(
    broker: FakeBroker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> Inspection:
        raise LookupError("no such row")

    async with reporting(broker) as reporter:
        with monkeypatch.context() as patch:
            patch.setattr(broker, "inspect", fail)
            await asyncio.sleep(5)
            assert problems(reporter) == ["the broker does not answer: LookupError; see the log"]
        await asyncio.sleep(5)
        assert problems(reporter) == []
    failed, unready = caplog.records
    assert (failed.levelname, failed.message) == ("ERROR", "inspection.failed")
    assert failed.exc_info
    words = 'problems=["the broker does not answer: LookupError; see the log"] count=1'
    assert (unready.levelname, unready.message) == ("WARNING", f"worker.not_ready {words}")


def delivery(*, number: int = 1, waited: float = 0.0) -> Message:
    return cast("Message", SimpleNamespace(number=number, stored_at=NOW - timedelta(seconds=waited)))


async def test_the_last_failure_names_nobody_elses_operation(broker: FakeBroker) -> None:
    async with reporting(broker) as reporter:
        assert reporter.last_failure == "its answers take too long"
        reporter.report_exchange(ServerError(status=503, method="POST", path="/v2/users/C0FFEE/operations"))
        assert reporter.last_failure == "answered 503: the service failed; try again later"


async def test_a_broker_that_is_gone_for_good_ends_the_worker(broker: FakeBroker) -> None:
    async with reporting(broker):
        error = broker.told = BrokerError("the file is gone")
        await asyncio.sleep(5)
        assert broker.losses == [error]


async def test_a_silent_broker_is_a_problem_until_it_answers(broker: FakeBroker) -> None:
    async with reporting(broker) as reporter:
        broker.told = UnavailableError("nats: timeout")
        await asyncio.sleep(5)
        assert problems(reporter) == ["the broker does not answer: nats: timeout"]
        broker.told = Inspection(waiting=3)
        await asyncio.sleep(5)
        assert problems(reporter) == []
        assert reporter.statistics().fleet.waiting == 3


async def test_the_budget_has_tokens_for_the_requests_that_wait_in_the_fleet(broker: FakeBroker) -> None:
    budget = Budget()
    async with reporting(broker, budget):
        broker.told = Inspection(waiting=100)
        await asyncio.sleep(5)
        assert budget.room(0.0) == 300


async def test_what_the_broker_names_are_problems(broker: FakeBroker) -> None:
    async with reporting(broker) as reporter:
        broker.told = Inspection(problems=("a stream is gone", "another one is full"))
        await asyncio.sleep(5)
        assert problems(reporter) == ["a stream is gone", "another one is full"]


async def test_an_event_that_is_refused_is_a_problem_until_one_is_stored(broker: FakeBroker) -> None:
    async with reporting(broker) as reporter:
        reporter.report_settlement(1, RefusedError("insufficient storage"), started_at=0.0)
        assert problems(reporter) == ["the broker does not store outcomes or claims: insufficient storage"]
        reporter.report_outcome(an_event(), is_new=False)
        assert problems(reporter) == []


async def test_a_refusal_is_forgotten_where_nothing_is_stored_any_more(broker: FakeBroker) -> None:
    async with reporting(broker) as reporter:
        reporter.report_settlement(1, RefusedError("insufficient storage"), started_at=0.0)
        await asyncio.sleep(59)
        assert problems(reporter) != []
        await asyncio.sleep(2)
        assert problems(reporter) == []


async def test_requests_that_wait_while_none_is_delivered_are_a_problem_after_half_a_minute(broker: FakeBroker) -> None:
    async with reporting(broker) as reporter:
        broker.told = Inspection(waiting=9, backlog=7)
        await asyncio.sleep(5 + 28)
        assert problems(reporter) == []
        await asyncio.sleep(2)
        assert problems(reporter) == ["7 requests wait, and none was delivered to this worker for 31 s"]
        reporter.report_delivery(delivery())
        await asyncio.sleep(5)
        assert problems(reporter) == []


@pytest.mark.parametrize("reason", ["deliveries come", "nothing waits", "Keyless fares badly"])
async def test_requests_that_wait_for_a_reason_are_none_that_stand_still(broker: FakeBroker, reason: str) -> None:
    budget = Budget()
    async with reporting(broker, budget) as reporter:
        broker.told = Inspection(waiting=9, backlog=0 if reason == "nothing waits" else 7)
        if reason == "Keyless fares badly":
            budget.record_failure(10.0, started_at=0.0)
        for _ in range(20):
            if reason == "deliveries come":
                reporter.report_delivery(delivery(number=2))
            await asyncio.sleep(5)
        wrong = ["Keyless fails, and 7 new requests wait"] if reason == "Keyless fares badly" else []
        assert problems(reporter) == wrong
        assert reporter.statistics().is_failing is bool(wrong)


async def test_lateness_is_the_longest_wait_for_a_first_delivery_between_two_inspections(broker: FakeBroker) -> None:
    async with reporting(broker) as reporter:
        assert reporter.statistics().lateness == 0
        for message in (delivery(waited=3), delivery(waited=7.25), delivery(waited=4), delivery(number=2, waited=60)):
            reporter.report_delivery(message)
        await asyncio.sleep(5)
        assert reporter.statistics().lateness == 7.25
        reporter.report_delivery(delivery(waited=-3))  # from the future
        await asyncio.sleep(5)
        assert reporter.statistics().lateness == 0
