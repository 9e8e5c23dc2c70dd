"""Both sides of a worker: nothing wrong is published, nothing is published twice, no event is lost on the way."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
import nats
import nats.errors
import pytest
from nats.js.errors import NotFoundError
from nats_server import NatsServer, until

from aiokeyless import ConfigurationError
from aiokeyless.errors import InvalidIdentifierError
from aiokeyless.worker import (
    ApprovalEvent,
    ApprovalRequest,
    BrokerError,
    StreamSettings,
    applications,
    approval_outcomes,
    submit_approval,
)
from aiokeyless.worker.messages import (
    MAX_CONTEXT,
    MESSAGE_ID,
    ROOM_FOR_EVENT,
    VERSION,
    Outcome,
    derived_operation_id,
    read_request,
)
from aiokeyless.worker.streams import OUTCOMES, REQUESTS, prepare

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from nats.aio.client import Client
    from nats.js import JetStreamContext
    from nats.js.api import RawStreamMsg


@pytest.fixture
async def stream(connection: Client) -> JetStreamContext:
    """The streams, as a worker makes them."""
    stream = connection.jetstream()
    await prepare(stream, StreamSettings(), ack_wait=30)
    return stream


async def stored(stream: JetStreamContext) -> int:
    return (await stream.stream_info(REQUESTS)).state.messages


async def request_in(stream: JetStreamContext, number: int = 1) -> tuple[ApprovalRequest, RawStreamMsg]:
    message = await stream.get_msg(REQUESTS, number)
    assert message.data is not None
    return msgspec.json.decode(message.data, type=ApprovalRequest), message


async def publish(stream: JetStreamContext, *names: str) -> None:
    """Publish events as a worker does."""
    for name in names:
        event = ApprovalEvent(
            version=VERSION,
            outcome=Outcome.APPROVED,
            operation_id=name,
            requested_at=datetime.now(UTC),
            decided_at=datetime.now(UTC),
            deliveries=1,
        )
        await stream.publish(event.outcome.subject, msgspec.json.encode(event), headers={MESSAGE_ID: name})


async def unacknowledged(stream: JetStreamContext, durable: str) -> tuple[int | None, int | None]:
    """How many events are with an application, and how many are still to come."""
    info = await stream.consumer_info(OUTCOMES, durable)
    return info.num_ack_pending, info.num_pending


# -- asking


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"user_id": "xyz"}, "user_id"),
        ({"user_id": ""}, "user_id"),
        ({"user_id": 12}, "user_id"),
        ({"operation_id": ".."}, "operation_id"),
        ({"operation_id": ""}, "operation_id"),
        ({"operation_id": "a\n"}, "operation_id"),
        ({"operation_payload": 40}, "operation_payload"),
        ({"operation_payload": "\ud800"}, "operation_payload"),
        ({"operation_payload": "x" * ((1 << 20) - ROOM_FOR_EVENT)}, "operation_payload"),
        ({"external_user_id": "\ud800"}, "external_user_id"),
        *(({"expires_in": value}, "expires_in") for value in (0, -1, float("nan"), float("inf"), True, "120", 10**400)),
        ({"context": object()}, "context"),
        ({"context": "\ud800"}, "context"),
        ({"context": {1.5: {2}, (1, 2): 3}}, "context"),
        ({"context": "x" * MAX_CONTEXT}, f"context is {MAX_CONTEXT + 2} bytes"),
        *(
            ({"message_id": value}, "message_id")
            for value in ("", " ", " a", "a" * 513, "a\r\nNats-Rollup: all", "\u00e9", "\ud800", 7)
        ),
    ],
    ids=lambda value: ascii(value)[:60],
)
async def test_a_wrong_argument_is_refused_by_name_and_nothing_is_published(
    connection: Client, stream: JetStreamContext, wrong: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigurationError, match=named):
        await submit_approval(connection, **{"user_id": "c0ffee", **wrong})
    assert await stored(stream) == 0


async def test_a_context_without_end_is_refused(connection: Client, stream: JetStreamContext) -> None:
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(ConfigurationError, match="context cannot be written as JSON"):
        await submit_approval(connection, "c0ffee", context=endless)
    assert await stored(stream) == 0


async def test_a_wrong_id_is_the_same_error_as_elsewhere(connection: Client) -> None:
    with pytest.raises(InvalidIdentifierError):
        await submit_approval(connection, "xyz")


async def test_a_request_is_stored_whole_when_it_was_submitted(connection: Client, stream: JetStreamContext) -> None:
    before = datetime.now(UTC)
    operation_id = await submit_approval(
        connection,
        "c0ffee",
        operation_id="txn 1",
        operation_payload="Pay 40",
        external_user_id="eve",
        expires_in=30,
        context={"order": 7},
    )
    request, message = await request_in(stream)
    assert operation_id == request.operation_id == "txn 1"
    assert (request.version, request.user_id, request.operation_payload) == (1, "C0FFEE", "Pay 40")
    assert (request.external_user_id, request.expires_in) == ("eve", 30)
    assert bytes(request.context) == b'{"order":7}'
    assert request.created_at is not None
    assert before <= request.created_at <= datetime.now(UTC)
    assert message.subject == "keyless.approvals.request"


@pytest.mark.parametrize("names", [{}, {"message_id": "order 7"}, {"operation_id": "\u00e9 / "}], ids=repr)
async def test_the_id_that_is_returned_is_the_one_that_a_worker_reads(
    connection: Client, stream: JetStreamContext, names: dict[str, Any]
) -> None:
    operation_id = await submit_approval(connection, "c0ffee", **names)
    pull = await stream.pull_subscribe_bind("keyless-approvals", REQUESTS)
    [message] = await pull.fetch(1)
    delivery = read_request(
        message.data,
        message_id=(message.headers or {})[MESSAGE_ID],
        message="message-1",
        stored_at=message.metadata.timestamp,
        number=1,
        longest=1e5,
        largest=1e6,
    )
    assert delivery.ticket.operation_id == operation_id
    await pull.unsubscribe()


@pytest.mark.parametrize("name", ["message_id", "operation_id"])
async def test_submitted_again_under_the_same_name_it_is_the_same_request(
    connection: Client, stream: JetStreamContext, name: str
) -> None:
    first = await submit_approval(connection, "c0ffee", **{name: "order-7"})  # type: ignore[arg-type]
    again = await submit_approval(connection, "c0ffee", **{name: "order-7"})  # type: ignore[arg-type]
    assert first == again
    assert await stored(stream) == 1


async def test_submitted_again_without_a_name_it_is_another_request(
    connection: Client, stream: JetStreamContext
) -> None:
    assert await submit_approval(connection, "c0ffee") != await submit_approval(connection, "c0ffee")
    assert await stored(stream) == 2


async def test_a_message_id_names_a_request_and_not_an_operation(connection: Client, stream: JetStreamContext) -> None:
    assert await submit_approval(connection, "c0ffee", message_id="order-7") == derived_operation_id("order-7")
    assert await submit_approval(connection, "c0ffee", operation_id="order-7") == "order-7"
    assert await stored(stream) == 2


async def test_operation_ids_that_a_header_would_make_alike_are_different_requests(
    connection: Client, stream: JetStreamContext
) -> None:
    for operation_id in ("a", "a ", " a", "A"):
        await submit_approval(connection, "c0ffee", operation_id=operation_id)
    assert await stored(stream) == 4


async def test_asking_before_any_worker_ever_ran_says_to_start_one(connection: Client) -> None:
    with pytest.raises(BrokerError, match=r"^the request .* was not stored: .*start a worker first"):
        await submit_approval(connection, "c0ffee")


async def test_a_request_that_the_stream_does_not_take_says_so_and_that_it_can_be_submitted_again(
    connection: Client,
    stream: JetStreamContext,
) -> None:
    await stream.update_stream((await stream.stream_info(REQUESTS)).config.evolve(sealed=True))
    with pytest.raises(BrokerError, match=r"not stored, as far as is known \(invalid operation on sealed stream\)"):
        await submit_approval(connection, "c0ffee")


async def test_a_broker_that_does_not_answer_is_given_up(
    connection: Client, stream: JetStreamContext, broker: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(applications, "_PUBLISH_WITHIN", 0.2)
    broker.pause()
    try:
        with pytest.raises(BrokerError, match=r"as far as is known \(nats: timeout\); submit it again under the same"):
            await submit_approval(connection, "c0ffee")
    finally:
        broker.resume()
    assert await stored(stream) in {0, 1}  # nobody knows


async def test_a_closed_connection_is_a_broker_error(broker: NatsServer) -> None:
    connection = await nats.connect(broker.url)
    await connection.close()
    with pytest.raises(BrokerError, match="connection closed"):
        await submit_approval(connection, "c0ffee")
    with pytest.raises(BrokerError, match="connection closed"):
        await anext(approval_outcomes(connection, "shop"))


# -- reading


@pytest.fixture
def _short_pulls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(applications, "_READ_FOR", 0.1)


@pytest.fixture
def _short_acks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(applications, "_ACK_WAIT", 0.2)


def reading(connection: Client, durable: str = "shop") -> aclosing[AsyncGenerator[ApprovalEvent]]:
    return aclosing(approval_outcomes(connection, durable))


async def name_of_next(events: AsyncGenerator[ApprovalEvent]) -> str | None:
    return (await asyncio.wait_for(anext(events), 20)).operation_id


async def test_events_come_from_the_oldest_on_in_order(connection: Client, stream: JetStreamContext) -> None:
    await publish(stream, "a", "b")
    async with reading(connection) as events:
        assert [await name_of_next(events) for _ in range(2)] == ["a", "b"]
        await publish(stream, "c")
        assert await name_of_next(events) == "c"


async def test_an_event_is_acknowledged_when_the_next_one_is_asked_for_and_not_before(
    connection: Client, stream: JetStreamContext
) -> None:
    await publish(stream, "a", "b", "c")
    async with reading(connection) as events:
        await name_of_next(events)
        assert await unacknowledged(stream, "shop") == (1, 2)
        await name_of_next(events)
        assert await unacknowledged(stream, "shop") == (1, 1)


async def test_an_application_that_comes_back_goes_on_where_it_was(
    connection: Client, stream: JetStreamContext
) -> None:
    await publish(stream, "a", "b", "c")
    async with reading(connection) as events:
        assert [await name_of_next(events) for _ in range(2)] == ["a", "b"]  # b is not dealt with
    async with reading(connection) as events:
        assert await name_of_next(events) == "c"
    assert await unacknowledged(stream, "shop") == (2, 0)


@pytest.mark.usefixtures("_short_acks")
async def test_an_event_whose_handling_raised_comes_again(connection: Client, stream: JetStreamContext) -> None:
    await publish(stream, "a")

    async def handle_one(broken: bool) -> str | None:
        async with reading(connection) as events:
            async for event in events:
                if broken:
                    raise ZeroDivisionError
                return event.operation_id
        return None

    with pytest.raises(ZeroDivisionError):
        await handle_one(broken=True)
    assert await asyncio.wait_for(handle_one(broken=False), 20) == "a"


async def test_processes_that_share_a_name_share_the_events(stream: JetStreamContext, broker: NatsServer) -> None:
    names = {str(number) for number in range(20)}
    read: dict[int, list[str]] = {1: [], 2: []}

    async def process(number: int) -> None:
        async with await nats.connect(broker.url) as connection, reading(connection) as events:
            async for event in events:
                assert event.operation_id is not None
                read[number].append(event.operation_id)

    async def both_wait() -> bool:
        with suppress(NotFoundError):
            waiting: int | None = (await stream.consumer_info(OUTCOMES, "shop")).num_waiting
            return waiting == 2
        return False

    tasks = [asyncio.create_task(process(number)) for number in read]
    await until(both_wait)
    await publish(stream, *names)
    await until(lambda: len(read[1] + read[2]) >= len(names))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert read[1]
    assert read[2]
    assert sorted(read[1] + read[2]) == sorted(names)


async def test_an_application_that_is_slow_with_one_event_holds_no_other(
    connection: Client, stream: JetStreamContext
) -> None:
    await publish(stream, "a", "b", "c")
    async with reading(connection) as slow, reading(connection) as quick:
        assert await name_of_next(slow) == "a"
        assert [await name_of_next(quick) for _ in range(2)] == ["b", "c"]


async def test_applications_of_different_names_get_all_events_each(
    connection: Client, stream: JetStreamContext
) -> None:
    await publish(stream, "a")
    async with reading(connection, "shop") as shop, reading(connection, "audit") as audit:
        assert [await name_of_next(events) for events in (shop, audit)] == ["a", "a"]


@pytest.mark.usefixtures("_short_pulls")
async def test_where_nothing_comes_for_long_it_is_asked_for_again(connection: Client, stream: JetStreamContext) -> None:
    pulls = await connection.subscribe("$JS.API.CONSUMER.MSG.NEXT.>")
    async with reading(connection) as events:
        coming = asyncio.create_task(name_of_next(events))
        for _ in range(3):
            await pulls.next_msg(20)
        await publish(stream, "a")
        assert await coming == "a"


@pytest.mark.usefixtures("_short_pulls")
async def test_a_broker_that_is_away_for_a_while_is_waited_for(tmp_path: Path) -> None:
    broker, patience = NatsServer(tmp_path), {"reconnect_time_wait": 0.05, "error_cb": silent}
    await broker.start()
    async with await nats.connect(broker.url, **patience, max_reconnect_attempts=-1) as connection:
        stream = connection.jetstream()
        await prepare(stream, StreamSettings(), ack_wait=30)
        async with reading(connection) as events:
            coming = asyncio.create_task(name_of_next(events))
            await until(lambda: len(connection._subs) > 1)
            broker.kill()
            await until(lambda: not connection.is_connected)
            await broker.start()
            await until(lambda: connection.is_connected)
            await publish(stream, "a")
            assert await coming == "a"
    broker.stop()


async def test_a_refusal_that_passes_is_waited_out(connection: Client, stream: JetStreamContext) -> None:
    pulls = await connection.subscribe("$JS.API.CONSUMER.MSG.NEXT.>")
    async with reading(connection) as events:
        coming = asyncio.create_task(name_of_next(events))
        pull = await pulls.next_msg(20)
        await connection.publish(pull.reply, headers={"Status": "503"})  # as a cluster does that elects a leader
        await pulls.next_msg(20)
        await publish(stream, "a")
        assert await coming == "a"


async def silent(_error: Exception) -> None:
    """nats-py would log that the broker is away."""


async def test_an_early_break_leaves_no_task_and_no_subscription(connection: Client, stream: JetStreamContext) -> None:
    await publish(stream, "a")
    tasks, subscriptions = asyncio.all_tasks(), len(connection._subs)
    async with reading(connection) as events:
        async for _ in events:
            assert len(connection._subs) == subscriptions + 1
            break
    assert (asyncio.all_tasks(), len(connection._subs)) == (tasks, subscriptions)


async def test_a_cancelled_reader_leaves_no_task_and_no_subscription(
    connection: Client, stream: JetStreamContext
) -> None:
    await stored(stream)  # nats-py has what it keeps for answers
    tasks, subscriptions = asyncio.all_tasks(), len(connection._subs)
    reader = asyncio.create_task(name_of_next(approval_outcomes(connection, "shop")))
    await until(lambda: len(connection._subs) == subscriptions + 1)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await until(lambda: asyncio.all_tasks() == tasks)
    assert len(connection._subs) == subscriptions


@pytest.mark.parametrize("durable", ["", "a.b", "a b", "*", ">", "\u00e9", "a\n", "x" * 129], ids=ascii)
async def test_a_name_that_cannot_be_kept_is_refused(connection: Client, durable: str) -> None:
    with pytest.raises(ConfigurationError, match="durable must be 1 to 128 letters"):
        await anext(approval_outcomes(connection, durable))


async def test_reading_before_any_worker_ever_ran_says_to_start_one(connection: Client) -> None:
    with pytest.raises(BrokerError, match=r"^outcomes cannot be read: there is no stream; start a worker first"):
        await anext(approval_outcomes(connection, "shop"))


async def test_a_name_that_is_taken_for_something_else_is_one_line(
    connection: Client, stream: JetStreamContext
) -> None:
    await stream.add_consumer(OUTCOMES, durable_name="shop", deliver_subject="elsewhere", ack_policy="explicit")
    with pytest.raises(BrokerError, match=r"^outcomes cannot be read: [^{}]*$"):
        await anext(approval_outcomes(connection, "shop"))


@pytest.mark.usefixtures("_short_pulls")
async def test_a_place_in_the_stream_that_was_deleted_is_an_error_and_not_a_wait_without_end(
    connection: Client, stream: JetStreamContext
) -> None:
    await publish(stream, "a")
    async with reading(connection) as events:
        await name_of_next(events)
        await stream.delete_consumer(OUTCOMES, "shop")
        with pytest.raises(BrokerError, match=r"^outcomes cannot be read: consumer not found$"):
            await name_of_next(events)


async def test_a_connection_that_is_closed_ends_the_reading(broker: NatsServer, stream: JetStreamContext) -> None:
    await publish(stream, "a")
    connection = await nats.connect(broker.url)
    async with reading(connection) as events:
        await name_of_next(events)
        await connection.close()
        with pytest.raises(BrokerError, match=r"^outcomes cannot be read: nats: connection closed$"):
            await name_of_next(events)


async def test_a_message_that_is_no_event_is_named_so_that_it_can_be_deleted(
    connection: Client, stream: JetStreamContext
) -> None:
    await publish(stream, "a")
    await stream.publish(Outcome.FAILED.subject, b"{}")
    async with reading(connection) as events:
        await name_of_next(events)
        with pytest.raises(BrokerError, match=rf"^message 2 of stream {OUTCOMES} is no event of a worker: .*missing"):
            await name_of_next(events)


async def test_a_broker_that_says_nothing_when_reading_begins_is_waited_for_and_not_for_ever(
    connection: Client, broker: NatsServer, stream: JetStreamContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    hasty = connection.jetstream(timeout=0.2)
    monkeypatch.setattr(applications, "_ATTEMPTS", 3)
    broker.pause()
    try:
        began = asyncio.get_running_loop().time()
        with pytest.raises(nats.errors.TimeoutError):
            await applications._subscribed(hasty, "test")
        assert 0.6 <= asyncio.get_running_loop().time() - began < 5
    finally:
        broker.resume()
    await (await applications._subscribed(stream, "test")).unsubscribe()
