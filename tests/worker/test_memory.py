"""A whole worker on a broker in memory: what the engine promises, on a clock that the test moves."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from tenacity import wait_fixed

from aiokeyless import ConfigurationError, KeylessClient
from aiokeyless.worker import (
    ApprovalEvent,
    ApprovalWorker,
    EventKeys,
    FailureReason,
    MemoryBroker,
    Outcome,
    Submission,
    approval_outcomes,
    submit_approval,
)
from aiokeyless.worker.engine import EXPIRES, Claim, Message, OutcomeMessage, Sealed

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from aiokeyless.sandbox import Sandbox

pytestmark = pytest.mark.platform

looptime = pytest.mark.looptime


@asynccontextmanager
async def working(client: KeylessClient, **options: Any) -> AsyncGenerator[MemoryBroker]:
    broker = MemoryBroker()
    async with ApprovalWorker(client, broker, **{"schedule": wait_fixed(1.0), **options}):
        yield broker


async def next_event(broker: MemoryBroker, reader: str = "test") -> ApprovalEvent:
    async with aclosing(approval_outcomes(broker, reader)) as events:
        return await anext(events)


async def created(sandbox: Sandbox, operation_id: str) -> None:
    while operation_id not in sandbox.operations:  # noqa: ASYNC110  # the sandbox has no event for it
        await asyncio.sleep(0.01)


# -- a worker


@looptime
async def test_an_approval_comes_out(client: KeylessClient, sandbox: Sandbox) -> None:
    async with working(client) as broker:
        submission = await submit_approval(broker, "c0ffee", operation_payload="Pay 40", context={"order": 7})
        await created(sandbox, submission.operation_id)
        assert broker.waiting == 1
        sandbox.approve(submission.operation_id)
        event = await next_event(broker)
        assert broker.waiting == 0
    assert (event.outcome, event.operation_id) == (Outcome.APPROVED, submission.operation_id)
    assert event.read_context(dict[str, int]) == {"order": 7}


@looptime
async def test_a_request_that_may_not_wait_so_long_fails_with_its_ids(client: KeylessClient, sandbox: Sandbox) -> None:
    async with working(client) as broker:
        submission = await submit_approval(broker, "c0ffee", operation_payload="Pay 40", expires_in=86_400.0 * 365)
        event = await next_event(broker)
    assert (event.outcome, event.reason) == (Outcome.FAILED, FailureReason.INVALID_REQUEST)
    assert (event.operation_id, event.user_id) == (submission.operation_id, "C0FFEE")
    assert event.detail is not None
    assert event.detail.startswith("expires_in is 3.1536e+07 s; the stream's duplicate window allows ")
    assert not sandbox.operations


TRACEPARENT = f"00-{1:032x}-{2:016x}-01"


@looptime
@pytest.mark.parametrize(
    ("sent", "handed_back"),
    [(TRACEPARENT, TRACEPARENT), (None, None), ("", None), ("00-nonsense", None), (TRACEPARENT + "\r\nX: y", None)],
)
async def test_an_event_carries_the_trace_of_its_request_and_nothing_else_that_the_header_may_hold(
    client: KeylessClient, sandbox: Sandbox, sent: str | None, handed_back: str | None
) -> None:
    request = msgspec.json.encode({"version": 1, "user_id": "c0ffee", "operation_id": "txn-1"})
    async with working(client) as broker:
        await broker.submit(request, "txn-1", sent)
        await created(sandbox, "txn-1")
        sandbox.approve("txn-1")
        event = await next_event(broker)
    assert (event.outcome, event.traceparent) == (Outcome.APPROVED, handed_back)


@looptime
async def test_a_request_that_cannot_be_read_keeps_its_trace(client: KeylessClient) -> None:
    async with working(client) as broker:
        await broker.submit(b"no request", "broken", TRACEPARENT)
        event = await next_event(broker)
    assert (event.outcome, event.traceparent) == (Outcome.FAILED, TRACEPARENT)


@looptime
async def test_a_submission_carries_the_trace_of_its_caller(client: KeylessClient, sandbox: Sandbox) -> None:
    trace = pytest.importorskip("opentelemetry.trace", reason="opentelemetry-api is not installed")
    span = trace.NonRecordingSpan(
        trace.SpanContext(trace_id=1, span_id=2, is_remote=False, trace_flags=trace.TraceFlags(1))
    )
    async with working(client) as broker:
        with trace.use_span(span):
            submission = await submit_approval(broker, "c0ffee")
        await created(sandbox, submission.operation_id)
        sandbox.approve(submission.operation_id)
        event = await next_event(broker)
    assert event.traceparent == TRACEPARENT


@looptime
async def test_nobody_waits_for_minutes_in_a_test(client: KeylessClient) -> None:
    loop = asyncio.get_running_loop()
    async with working(client, schedule=wait_fixed(50.0)) as broker:
        began = loop.time()
        await submit_approval(broker, "c0ffee", operation_id="txn-1", expires_in=300)
        event = await next_event(broker)
    assert (event.outcome, event.answered, event.deliveries) == (Outcome.EXPIRED, True, 7)
    assert loop.time() - began == pytest.approx(300, abs=5)
    assert (event.decided_at - event.requested_at).total_seconds() == pytest.approx(300, abs=5)
    assert broker.now() >= event.decided_at


@looptime
async def test_two_workers_share_the_requests(client: KeylessClient, sandbox: Sandbox) -> None:
    broker = MemoryBroker()
    first = ApprovalWorker(client, broker, max_in_flight=2)
    second = ApprovalWorker(client, broker, max_in_flight=2)
    async with first, second:
        for number in range(4):
            await submit_approval(broker, "c0ffee", operation_id=f"txn-{number}")
            await created(sandbox, f"txn-{number}")
            sandbox.approve(f"txn-{number}")
        events = [await next_event(broker) for _ in range(1)]
        async with aclosing(approval_outcomes(broker, "all")) as reading:
            events = [await anext(reading) for _ in range(4)]
    assert {event.outcome for event in events} == {Outcome.APPROVED}
    assert first.statistics.approved + second.statistics.approved == 4


@looptime
async def test_a_worker_that_ends_leaves_its_requests_to_the_next_one(client: KeylessClient, sandbox: Sandbox) -> None:
    broker = MemoryBroker()
    async with ApprovalWorker(client, broker):
        await submit_approval(broker, "c0ffee", operation_id="txn-1")
        await created(sandbox, "txn-1")
    sandbox.approve("txn-1")
    async with ApprovalWorker(client, broker):
        assert (await next_event(broker)).outcome is Outcome.APPROVED


@looptime
async def test_a_worker_that_is_cancelled_leaves_its_deliveries_to_the_next_one(
    client: KeylessClient, sandbox: Sandbox
) -> None:
    broker = MemoryBroker()
    worker = ApprovalWorker(client, broker)
    run = asyncio.create_task(worker.run())
    sandbox.latency = 0.2
    await submit_approval(broker, "c0ffee", operation_id="txn-1")
    while not worker.statistics.in_flight:  # noqa: ASYNC110  # there is no event for it
        await asyncio.sleep(0.01)
    run.cancel()
    await asyncio.wait([run])
    async with ApprovalWorker(client, broker):
        await created(sandbox, "txn-1")
        sandbox.approve("txn-1")
        assert (await next_event(broker)).outcome is Outcome.APPROVED


# -- requests


@looptime
async def test_the_same_request_is_stored_once() -> None:
    broker = MemoryBroker()
    first = await submit_approval(broker, "c0ffee", operation_id="txn-1")
    again = await submit_approval(broker, "C0FFEE", operation_id="txn-1")
    other = await submit_approval(broker, "C0FFEE", operation_id="txn-1", operation_payload="Pay 40")
    assert [first, again, other] == [
        Submission(operation_id="txn-1", message_id=None, duplicate=duplicate) for duplicate in (False, True, False)
    ]
    assert broker.waiting == 2


@looptime
async def test_a_request_that_is_too_large_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="shorten operation_payload"):
        await submit_approval(MemoryBroker(), "c0ffee", operation_payload="x" * (1 << 20))


# -- deliveries


class Hand:
    """An engine, and what it handed on."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.engine = broker.engine()
        self.messages: list[Message] = []

    async def open(self) -> None:
        await self.engine.connect(on_reconnect=lambda: None, on_loss=lambda _: None)
        await self.engine.prepare(ack_wait=30)
        await self.engine.open(deliver=self.messages.append, ended=lambda _: None)

    @property
    def texts(self) -> list[str]:
        return [message.data.decode() for message in self.messages]


async def hand_of(broker: MemoryBroker) -> Hand:
    hand = Hand(broker)
    await hand.open()
    return hand


@looptime
async def test_as_many_are_delivered_as_were_asked_for_in_order() -> None:
    broker = MemoryBroker()
    hand = await hand_of(broker)
    for text in "abc":
        await broker.submit(text.encode(), text)
    assert hand.texts == []
    await hand.engine.ask(2)
    assert (hand.texts, hand.engine.expected()) == (["a", "b"], 0)
    assert [(message.number, message.backlog) for message in hand.messages] == [(1, 2), (1, 1)]
    assert hand.messages[0].message_id == "a"
    assert len({message.name for message in hand.messages}) == 2


@looptime
async def test_a_pull_is_over_after_its_time() -> None:
    broker = MemoryBroker()
    hand = await hand_of(broker)
    await hand.engine.ask(2)
    assert hand.engine.expected() == 2
    await asyncio.sleep(EXPIRES)
    assert hand.engine.expected() == 0
    await broker.submit(b"a", "a")
    assert hand.texts == []


@looptime
async def test_what_is_put_off_comes_again_when_it_is_due_and_not_before() -> None:
    broker = MemoryBroker()
    hand = await hand_of(broker)
    await broker.submit(b"a", "a")
    await hand.engine.ask(2)
    await hand.messages[0].put_off(0.5)
    await asyncio.sleep(0.4)
    assert len(hand.messages) == 1
    await asyncio.sleep(0.2)
    assert [message.number for message in hand.messages] == [1, 2]


@looptime
async def test_of_two_events_of_one_name_the_first_is_kept() -> None:
    broker = MemoryBroker()
    hand = await hand_of(broker)
    for text in "ab":
        await broker.submit(text.encode(), text)
    await hand.engine.ask(2)
    stored = [await message.decide(Sealed(Outcome.FAILED, b"{}", "name")) for message in hand.messages]
    assert (stored, broker.waiting) == ([True, False], 0)


@looptime
async def test_an_id_belongs_to_one_request_until_that_gives_it_back() -> None:
    claims = MemoryBroker().engine().claims
    taken = [await claims.take("txn-1", request) for request in ("a", "b", "a")]
    assert [claim for claim, _ in taken] == [Claim.NEW, Claim.ANOTHERS, Claim.HELD]
    assert not await claims.release("txn-1", "a", taken[0].token)  # another delivery took it meanwhile
    assert (await claims.is_held("txn-1", "a"), await claims.is_held("txn-1", "b")) == (True, False)
    assert await claims.release("txn-1", "a", taken[2].token)
    assert (await claims.take("txn-1", "b")).claim is Claim.NEW


# -- outcomes


async def decided(broker: MemoryBroker, *events: bytes) -> None:
    hand = await hand_of(broker)
    for number, event in enumerate(events):
        await broker.submit(b"", str(number))
        await hand.engine.ask(1)
        await hand.messages[-1].decide(Sealed(Outcome.FAILED, event, str(number)))
    await hand.engine.close()


def failed(operation_id: str, version: int = 1) -> bytes:
    return (
        f'{{"version":{version},"outcome":"failed","operation_id":"{operation_id}","requested_at":'
        '"2026-11-24T12:00:00Z","decided_at":"2026-11-24T12:00:00Z","deliveries":1}'
    ).encode()


@looptime
async def test_each_reader_gets_every_event_once() -> None:
    broker = MemoryBroker()
    await decided(broker, failed("a"), failed("b"))
    for reader in ("one", "other"):
        async with aclosing(approval_outcomes(broker, reader)) as events:
            assert [(await anext(events)).operation_id for _ in range(2)] == ["a", "b"]
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(events), 100)


@looptime
async def test_an_event_that_was_not_handled_comes_again() -> None:
    broker = MemoryBroker()
    await decided(broker, failed("a"))
    assert [(await next_event(broker)).operation_id for _ in range(2)] == ["a", "a"]


@looptime
async def test_an_event_is_with_one_of_two_processes_of_a_reader() -> None:
    broker = MemoryBroker()
    await decided(broker, failed("a"), failed("b"))
    async with (
        aclosing(approval_outcomes(broker, "shop")) as one,
        aclosing(approval_outcomes(broker, "shop")) as other,
    ):
        assert [(await anext(events)).operation_id for events in (one, other)] == ["a", "b"]


@looptime
async def test_what_is_no_event_is_skipped_and_a_newer_one_is_left_for_later(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker = MemoryBroker()
    await decided(broker, b"no event", failed("a", version=2), failed("b"))
    loop = asyncio.get_running_loop()
    async with aclosing(approval_outcomes(broker, "shop")) as events:
        began = loop.time()
        assert (await anext(events)).operation_id == "b"
        coming = asyncio.ensure_future(anext(events))
        await asyncio.sleep(130)
        assert not coming.done()
        coming.cancel()
        await asyncio.wait([coming])
    assert caplog.text.count("outcome.unreadable") == 1
    assert caplog.text.count("outcome.newer") == 3  # now, and after a minute each
    assert loop.time() - began == pytest.approx(130, abs=1)


@looptime
async def test_what_is_no_event_is_skipped_for_good_by_a_reader_with_keys_too(caplog: pytest.LogCaptureFixture) -> None:
    """What an asker can have the broker store, by a reply subject, must not come again each minute for a week."""
    broker = MemoryBroker()
    await decided(broker, b'{"stream":"KEYLESS_REQUESTS","seq":1}', failed("unsigned"))
    async with aclosing(approval_outcomes(broker, "shop", event_keys=KEYS)) as events:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(events), 130)
    assert caplog.text.count("outcome.unreadable") == 1
    assert "outcome.unsigned sequence=1 count=1" in caplog.text  # a key may be wrong: it comes again


KEYS = EventKeys("a-key-of-the-workers-and-readers-only")
OTHER_KEYS = EventKeys("a-key-that-was-given-by-mistake-instead")


async def signed(broker: MemoryBroker) -> None:
    """Store an event that a worker with keys decided."""
    hand = await hand_of(broker)
    await broker.submit(b"", "a")
    await hand.engine.ask(1)
    data = failed("a")
    await hand.messages[-1].decide(Sealed(Outcome.FAILED, data, "a", KEYS.sign(data, fleet=broker.fleet_name)))
    await hand.engine.close()


async def read_with_wrong_keys(broker: MemoryBroker, seconds: float) -> None:
    async with aclosing(approval_outcomes(broker, "shop", event_keys=OTHER_KEYS)) as events:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(events), seconds)


@looptime
@pytest.mark.parametrize("deliveries", range(1, 9))
async def test_an_event_without_a_valid_signature_comes_again_after_twice_as_long_each_time(deliveries: int) -> None:
    """A reader with a wrong key that is set right within four hours loses nothing."""
    broker = MemoryBroker()
    await signed(broker)
    loop = asyncio.get_running_loop()
    began, due = loop.time(), 60.0 * (2**deliveries - 1)
    await read_with_wrong_keys(broker, due - 10)
    async with asyncio.timeout(60), aclosing(approval_outcomes(broker, "shop", event_keys=KEYS)) as events:
        assert (await anext(events)).operation_id == "a"
    assert loop.time() - began == pytest.approx(due, abs=1)


@looptime
async def test_an_event_without_a_valid_signature_is_dropped_after_four_hours_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker = MemoryBroker()
    await signed(broker)
    await read_with_wrong_keys(broker, 5 * 3600)
    assert caplog.text.count("outcome.dropped sequence=0 count=1") == 1
    async with aclosing(approval_outcomes(broker, "shop", event_keys=KEYS)) as events:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(events), 7 * 24 * 3600)
    async with aclosing(approval_outcomes(broker, "bank", event_keys=KEYS)) as events:  # it is there for others
        assert (await anext(events)).operation_id == "a"


class FarAway(MemoryBroker):
    """A broker that takes a second for each delivery."""

    async def outcomes(self, reader: str) -> AsyncGenerator[OutcomeMessage]:
        async with aclosing(super().outcomes(reader)) as messages:
            async for message in messages:
                await asyncio.sleep(1)
                yield message


@looptime
@pytest.mark.parametrize("version", [1, 2])
async def test_any_number_of_events_that_no_worker_signed_keep_a_reader_from_no_genuine_one(version: int) -> None:
    """Each is due again before all of them were seen: put off for as long each time, they would come for ever."""
    broker = FarAway()
    await decided(broker, *(failed("forged", version) for _ in range(100)))
    await signed(broker)
    async with asyncio.timeout(9 * 100 + 2), aclosing(approval_outcomes(broker, "shop", event_keys=KEYS)) as events:
        assert (await anext(events)).operation_id == "a"


# -- the fixtures


async def test_the_fixtures_are_a_whole_worker(
    keyless_worker: ApprovalWorker, keyless_broker: MemoryBroker, keyless_sandbox: Sandbox
) -> None:
    async with asyncio.timeout(60):
        await submit_approval(keyless_broker, "c0ffee", operation_id="txn-1")
        await created(keyless_sandbox, "txn-1")
        keyless_sandbox.approve("txn-1")
        assert (await next_event(keyless_broker)).outcome is Outcome.APPROVED
    assert keyless_worker.statistics.approved == 1


# -- the rate


@looptime
@pytest.mark.parametrize(("limit", "most"), [(2.0, 45), (None, 400)])
async def test_no_more_polls_are_made_in_a_second_than_it_may(
    client: KeylessClient, sandbox: Sandbox, limit: float | None, most: int
) -> None:
    async with working(client, max_polls_per_second=limit) as broker:
        for number in range(10):
            await submit_approval(broker, "c0ffee", operation_id=f"txn-{number}", expires_in=300)
        await asyncio.sleep(20)
        polls = [record for record in sandbox.requests if record.method == "GET"]
        assert most / 4 < len(polls) <= most
        assert set(sandbox.operations) == {f"txn-{number}" for number in range(10)}


@looptime
async def test_a_429_costs_no_request_its_outcome(client: KeylessClient, sandbox: Sandbox) -> None:
    async with working(client, max_polls_per_second=None) as broker:
        for number in range(10):
            await submit_approval(broker, "c0ffee", operation_id=f"txn-{number}", expires_in=300)
        await asyncio.sleep(10)
        sandbox.fail_next(429, method="GET")
        await asyncio.sleep(3)
        for number in range(10):
            sandbox.approve(f"txn-{number}")
        async with aclosing(approval_outcomes(broker, "test")) as events:
            outcomes = [(await anext(events)).outcome for _ in range(10)]
    assert outcomes == [Outcome.APPROVED] * 10


def test_a_rate_that_is_no_positive_number_is_refused() -> None:
    client = KeylessClient("key", base_url="http://localhost:1")
    with pytest.raises(ConfigurationError, match="max_polls_per_second"):
        ApprovalWorker(client, max_polls_per_second=0)
