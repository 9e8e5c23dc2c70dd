"""A whole worker on a broker in memory, on a clock that the test moves."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest
from waiting import until

from aiokeyless import BrokerError, ConfigurationError, KeylessClient
from aiokeyless.worker import ApprovalWorker, FailureReason, Outcome, submit_approval
from aiokeyless.worker.broker import ApplicationSide, OutcomeDelivery, UnavailableError
from aiokeyless.worker.sqlite import SqliteBroker

from .conformance.brokers import new_request
from .reading import ask, read, working

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiokeyless.sandbox import Sandbox
    from aiokeyless.worker.broker import NewRequest
    from aiokeyless.worker.messages import Message

looptime = pytest.mark.looptime
TRACEPARENT = f"00-{1:032x}-{2:016x}-01"


@looptime
async def test_a_preparation_is_for_workers_of_any_region(client: KeylessClient, memory: SqliteBroker) -> None:
    async with KeylessClient("a-key", region="sg") as unused:
        await ApprovalWorker(unused, memory).prepare()
        await ApprovalWorker(unused, "sqlite::memory:").prepare()  # which it opens and closes itself
    async with ApprovalWorker(client, memory) as worker:
        assert not worker.statistics.problems
    with pytest.raises(BrokerError, match="belongs to"):
        await memory.prepare(lease=60.0, service="https://us.keyless.test")


@looptime
@pytest.mark.parametrize(
    ("sent", "handed_back"),
    [(TRACEPARENT, TRACEPARENT), (None, None), ("", None), ("00-nonsense", None), (TRACEPARENT + "\r\nX: y", None)],
)
async def test_an_event_carries_the_trace_of_its_request_and_nothing_else_that_the_sender_may_put_there(
    sandbox: Sandbox, sent: str | None, handed_back: str | None
) -> None:
    async with working(sandbox) as (_, broker):
        await broker.submit(new_request("txn-1", sent))
        await until(lambda: "txn-1" in sandbox.operations)
        sandbox.approve("txn-1")
        [event] = await read(broker)
    assert (event.outcome, event.traceparent) == (Outcome.APPROVED, handed_back)


@looptime
async def test_a_request_that_cannot_be_read_fails_and_keeps_its_trace(
    sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    async with working(sandbox) as (_, broker):
        await broker.submit(msgspec.structs.replace(new_request("txn-1", TRACEPARENT), body=b"no request"))
        [event] = await read(broker)
    assert (event.outcome, event.reason) == (Outcome.FAILED, FailureReason.INVALID_REQUEST)
    assert 'reason="invalid_request" detail="the message is no request for an approval: ' in caplog.text
    assert str(event.detail) in caplog.text
    assert event.traceparent == TRACEPARENT


@looptime
async def test_a_submission_carries_the_trace_of_its_caller(sandbox: Sandbox) -> None:
    trace = pytest.importorskip("opentelemetry.trace", reason="opentelemetry-api is not installed")
    span = trace.NonRecordingSpan(
        trace.SpanContext(trace_id=1, span_id=2, is_remote=False, trace_flags=trace.TraceFlags(1))
    )
    async with working(sandbox) as (_, broker):
        with trace.use_span(span):
            await ask(sandbox, broker)
        sandbox.approve("txn-1")
        [event] = await read(broker)
    assert event.traceparent == TRACEPARENT


async def test_a_broker_that_is_not_open_is_refused(client: KeylessClient) -> None:
    with pytest.raises(ConfigurationError, match="not open"):
        await ApprovalWorker(client, SqliteBroker(":memory:")).run()


# -- a broker that fails


class Failing(SqliteBroker):
    """A broker in memory that fails as it is told."""

    def __init__(self) -> None:
        super().__init__(":memory:")
        self.error: Exception | None = None
        self.failures = 0

    async def take(self, up_to: int, within: float, *, untried: int | None = None) -> Sequence[Message]:
        if self.error is not None:
            self.failures += 1
            raise self.error
        return await super().take(up_to, within, untried=untried)


@looptime
async def test_a_broker_that_is_away_is_waited_for_and_keeps_the_worker_from_being_ready(
    sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aiokeyless.worker")
    async with Failing() as broker, working(sandbox, broker) as (worker, _):
        await asyncio.sleep(0)
        broker.error = UnavailableError("the cable is out")
        await asyncio.sleep(30)
        assert broker.failures < 30  # the pauses between the takes grow
        await submit_approval(broker, "c0ffee", operation_id="txn-1")
        assert caplog.text.count('broker.unavailable error="the cable is out"') == 1
        await broker._do(lambda store: store.repair(1.0))
        assert worker.statistics.problems == ("the broker does not answer: the cable is out",)
        assert "broker.available" not in caplog.text
        broker.error = None
        await until(lambda: "txn-1" in sandbox.operations)
        await asyncio.sleep(30)
        assert caplog.text.count("broker.available") == 1


@looptime
async def test_a_broker_that_is_gone_for_good_ends_the_worker(client: KeylessClient) -> None:
    async with Failing() as broker:
        worker = ApprovalWorker(client, broker)
        running = asyncio.create_task(worker.run())
        await asyncio.sleep(1)
        broker.error = BrokerError("the disk is broken")
        with pytest.raises(BrokerError, match="the disk is broken"):
            await running


async def test_a_drivers_connection_is_no_broker_for_a_worker(client: KeylessClient) -> None:
    class Connection(ApplicationSide):
        largest_request = 1

        async def submit(self, new: NewRequest) -> bool:
            raise NotImplementedError

        async def next_outcome(self, reader: str) -> OutcomeDelivery:
            raise NotImplementedError

    with pytest.raises(ConfigurationError, match="not a driver's connection") as caught:
        ApprovalWorker(client, cast("Any", Connection()))
    assert caught.value.argument == "broker"


@looptime
async def test_a_worker_that_fails_twice_raises_and_logs_its_first_failure(
    sandbox: Sandbox, memory: SqliteBroker, caplog: pytest.LogCaptureFixture
) -> None:
    async with sandbox.client(name="acme") as client:
        worker = ApprovalWorker(client, memory)
        running = asyncio.create_task(worker.run())
        await asyncio.sleep(1)
        worker._fail(BrokerError("first"))
        worker._fail(BrokerError("second"))
        with pytest.raises(BrokerError, match="first"):
            await running
    assert caplog.messages == ['worker.unfit client="acme" error="first"']


@looptime
async def test_a_worker_that_was_stopped_lets_the_body_go_on(sandbox: Sandbox) -> None:
    async with working(sandbox) as (worker, _):
        worker.stop()
        await asyncio.sleep(60)  # by then it has ended
        assert worker.statistics.problems == ("the worker is about to end",)
