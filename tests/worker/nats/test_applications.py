"""Both sides of a worker: nothing wrong is published, nothing is published twice, no event is lost on the way."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing, suppress
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import msgspec
import nats
import nats.errors
import pytest
from nats.js.api import AckPolicy, ConsumerConfig
from nats_server import OUTCOMES, REQUESTS, NatsServer, jetstream, prepare
from waiting import PATIENCE, until

from aiokeyless import ApprovalTicket, ConfigurationError
from aiokeyless.errors import InvalidIdentifierError
from aiokeyless.worker import ApprovalEvent, ApprovalRequest, BrokerError, Submission, submit_approval
from aiokeyless.worker.messages import MAX_CONTEXT, MAX_DEPTH, Outcome, request_name
from aiokeyless.worker.nats import EventKeys, NatsBroker, StreamSettings, is_outcome, readers
from aiokeyless.worker.nats import broker as nats_broker
from aiokeyless.worker.nats.event_keys import MESSAGE_ID
from aiokeyless.worker.nats.fleet import KEYLESS

from ..conformance.brokers import new_request  # noqa: TID252
from ..reading import an_event, outcomes  # noqa: TID252

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from nats.aio.client import Client
    from nats.js import JetStreamContext
    from nats.js.api import RawStreamMsg


async def stored(stream: JetStreamContext) -> int:
    return (await stream.stream_info(REQUESTS)).state.messages


async def request_in(stream: JetStreamContext, number: int = 1) -> tuple[ApprovalRequest, RawStreamMsg]:
    message = await stream.get_msg(REQUESTS, number)
    assert message.data is not None
    return msgspec.json.decode(message.data, type=ApprovalRequest), message


async def publish(stream: JetStreamContext, *names: str) -> None:
    """Publish events as a worker does."""
    for name in names:
        event = an_event(operation_id=name)
        await stream.publish(
            KEYLESS.outcome_subject(event.outcome), msgspec.json.encode(event), headers={MESSAGE_ID: name}
        )


FORGED = msgspec.json.encode(an_event(operation_id="forged"))


def deep_event(depth: int = 930) -> bytes:
    """An event that a decoder which recurses does not read everywhere."""
    return FORGED.removesuffix(b"null}") + b"[" * depth + b"]" * depth + b"}"


async def unacknowledged(stream: JetStreamContext, durable: str) -> tuple[int | None, int | None]:
    """How many events are with an application, and how many are still to come."""
    info = await stream.consumer_info(OUTCOMES, durable)
    return info.num_ack_pending, info.num_pending


async def become_unacknowledged(stream: JetStreamContext, durable: str, counts: tuple[int, int]) -> None:
    """Wait until so many events are with an application, and so many are still to come.

    The broker handles what a reader says of an event later than a question that it was asked afterwards.
    """

    async def are_so_many() -> bool:
        return await unacknowledged(stream, durable) == counts

    await until(are_so_many)


# -- asking


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


ENDLESS: list[object] = []
ENDLESS.append(ENDLESS)

#: The first day of the calendar begins in the year before it, in UTC.
TOO_EARLY = timezone(timedelta(hours=14))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"user_id": "xyz"}, "user_id"),
        ({"user_id": ""}, "user_id"),
        ({"user_id": 12}, "user_id"),
        ({"operation_id": ".."}, "operation_id"),
        ({"operation_id": ""}, "operation_id"),
        ({"operation_id": "a\n"}, "operation_id"),
        ({"operation_id": ApprovalTicket.for_operation("a", user_id="AB").to_json()}, "ApprovalTicket.from_json"),
        ({"operation_payload": 40}, "operation_payload"),
        ({"operation_payload": "\ud800"}, "operation_payload"),
        ({"operation_payload": "x" * (1 << 20)}, "operation_payload"),
        ({"external_user_id": "\ud800"}, "external_user_id"),
        *(({"expires_in": value}, "expires_in") for value in (0, -1, float("nan"), float("inf"), True, "120", 10**400)),
        pytest.param({"context": object()}, "context", id="context"),
        ({"context": ENDLESS}, "context cannot be written as JSON"),
        ({"context": "\ud800"}, "context"),
        ({"context": {1.5: {2}, (1, 2): 3}}, "context"),
        ({"context": "x" * MAX_CONTEXT}, f"context is {MAX_CONTEXT + 2} bytes"),
        ({"context": nested(MAX_DEPTH + 1)}, "context is nested more than 64 deep"),
        ({"context": nested(930)}, "context"),
        *(
            ({"created_at": value}, "created_at")
            for value in ("2026-11-24", 7, datetime(2026, 11, 24), datetime.min.replace(tzinfo=TOO_EARLY))  # noqa: DTZ001
        ),
    ],
)
async def test_a_wrong_argument_is_refused_by_name_and_nothing_is_published(
    connection: Client, stream: JetStreamContext, wrong: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigurationError, match=named):
        await submit_approval(connection, **{"user_id": "c0ffee", "operation_id": "txn-1", **wrong})
    assert await stored(stream) == 0


async def test_a_wrong_id_is_the_same_error_as_elsewhere(connection: Client) -> None:
    with pytest.raises(InvalidIdentifierError):
        await submit_approval(connection, "xyz", operation_id="txn-1")


async def test_a_request_is_stored_whole_when_it_was_submitted(connection: Client, stream: JetStreamContext) -> None:
    submission = await submit_approval(
        connection,
        "c0ffee",
        operation_id="txn 1",
        operation_payload="Pay 40",
        external_user_id="eve",
        expires_in=30,
        context={"order": 7},
    )
    request, message = await request_in(stream)
    assert submission == Submission(operation_id="txn 1", duplicate=False)
    assert request.operation_id == "txn 1"
    assert (request.version, request.user_id, request.operation_payload) == (1, "C0FFEE", "Pay 40")
    assert (request.external_user_id, request.expires_in) == ("eve", 30)
    assert bytes(request.context) == b'{"order":7}'
    assert request.created_at is None  # the stream's clock tells when, and not that of a machine that may be wrong
    assert message.subject == "keyless.approvals.request"


async def test_the_name_is_that_which_a_worker_reads(connection: Client, stream: JetStreamContext) -> None:
    await submit_approval(
        connection,
        "c0ffee",
        operation_id="\u00e9 / ",
        operation_payload="Pay 40",
        external_user_id="",
        expires_in=0.1,
        context={"a": 1},
    )
    request, message = await request_in(stream)
    assert (message.headers or {})[MESSAGE_ID] == request_name(request)


async def test_who_knows_a_whole_request_beforehand_can_make_it_count_as_submitted(
    connection: Client, stream: JetStreamContext
) -> None:
    ours: dict[str, Any] = {"operation_id": "order-7", "operation_payload": "Pay 40"}
    name = new_request(**ours).digest
    await stream.publish(KEYLESS.request_subject, b"no request", headers={MESSAGE_ID: name})
    assert (await submit_approval(connection, "C0FFEE", **ours)).duplicate  # a limit: nobody will be asked
    assert not (await submit_approval(connection, "C0FFEE", context="what nobody can guess", **ours)).duplicate


async def test_asking_before_any_worker_ever_ran_says_to_start_one_and_is_not_repeated(
    connection: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_broker, "_LEADERLESS_FOR", 0.0)
    repeated: list[int] = []
    monkeypatch.setattr(nats_broker, "error_delay", repeated.append)
    with pytest.raises(BrokerError, match=r"^the request .* was not stored, .*start a worker first"):
        await submit_approval(connection, "c0ffee", operation_id="txn-1")
    assert not repeated


async def test_a_stream_that_has_no_leader_yet_is_waited_for(
    connection: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To one who publishes, it is as if there were no stream."""
    refusals: list[int] = []

    def pause(failures: int) -> float:
        refusals.append(failures)
        return 0.01

    monkeypatch.setattr(nats_broker, "error_delay", pause)
    submitting = asyncio.create_task(submit_approval(connection, "c0ffee", operation_id="txn-1"))
    await until(lambda: len(refusals) > 1)
    stream = jetstream(connection)
    await prepare(stream, StreamSettings(), ack_wait=30)
    assert not (await submitting).duplicate
    assert await stored(stream) == 1


async def test_a_request_that_the_stream_does_not_take_says_so_and_that_it_can_be_submitted_again(
    connection: Client,
    stream: JetStreamContext,
) -> None:
    await stream.update_stream((await stream.stream_info(REQUESTS)).config.evolve(sealed=True))
    with pytest.raises(BrokerError, match=r"not stored, as far as is known \(invalid operation on sealed stream\)"):
        await submit_approval(connection, "c0ffee", operation_id="txn-1")


async def test_a_broker_that_does_not_answer_is_given_up(
    connection: Client, stream: JetStreamContext, broker: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_broker, "_ANSWER_WITHIN", 0.2)
    broker.pause()
    try:
        with pytest.raises(
            BrokerError,
            match=r"as far as is known \(no answer in time: .*\); submit it again under the same operation_id, '",
        ):
            await submit_approval(connection, "c0ffee", operation_id="txn-1")
    finally:
        broker.resume()
    assert await stored(stream) in {0, 1}  # which of them is unknown


async def test_a_closed_connection_is_a_broker_error(broker: NatsServer) -> None:
    connection = await nats.connect(broker.url)
    await connection.close()
    with pytest.raises(BrokerError, match="connection to the broker was closed"):
        await submit_approval(connection, "c0ffee", operation_id="txn-1")
    with pytest.raises(BrokerError, match="connection to the broker was closed"):
        await anext(outcomes(connection, "shop"))


# -- reading


@pytest.fixture
def _short_pulls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_READ_FOR", 0.1)


def reading(connection: Client, durable: str = "shop") -> aclosing[AsyncGenerator[ApprovalEvent]]:
    return aclosing(outcomes(connection, durable))


async def name_of_next(events: AsyncGenerator[ApprovalEvent]) -> str | None:
    return (await asyncio.wait_for(anext(events), PATIENCE)).operation_id


async def test_events_come_from_the_oldest_on_in_order(connection: Client, stream: JetStreamContext) -> None:
    await publish(stream, "a", "b")
    async with reading(connection) as events:
        assert [await name_of_next(events) for _ in range(2)] == ["a", "b"]
        await publish(stream, "c")
        assert await name_of_next(events) == "c"


async def test_an_application_that_is_slow_with_one_event_holds_no_other(
    connection: Client, stream: JetStreamContext
) -> None:
    await publish(stream, "a", "b", "c")
    async with reading(connection) as slow, reading(connection) as quick:
        assert await name_of_next(slow) == "a"
        assert [await name_of_next(quick) for _ in range(2)] == ["b", "c"]


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
        stream = jetstream(connection)
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


async def test_a_cancelled_reader_leaves_no_task_and_one_subscription_of_the_connection(
    connection: Client, stream: JetStreamContext
) -> None:
    await stored(stream)  # nats-py has what it keeps for answers
    tasks, subscriptions = asyncio.all_tasks(), len(connection._subs)
    reader = asyncio.create_task(name_of_next(outcomes(connection, "shop")))
    await until(lambda: len(connection._subs) == subscriptions + 1)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await until(lambda: asyncio.all_tasks() == tasks)
    with suppress(TimeoutError):
        async with asyncio.timeout(0.1):
            await name_of_next(outcomes(connection, "shop"))
    assert len(connection._subs) == subscriptions + 1


async def test_reading_before_any_worker_ever_ran_says_to_start_one(connection: Client) -> None:
    with pytest.raises(BrokerError, match=r"^outcomes cannot be read: there is no stream; start a worker first"):
        await anext(outcomes(connection, "shop"))


async def test_a_name_that_is_taken_for_something_else_is_one_line(
    connection: Client, stream: JetStreamContext
) -> None:
    await stream.add_consumer(OUTCOMES, durable_name="shop", deliver_subject="elsewhere", ack_policy="explicit")
    with pytest.raises(BrokerError, match=r"^outcomes cannot be read: [^{}]*$"):
        await anext(outcomes(connection, "shop"))


@pytest.mark.usefixtures("_short_pulls")
async def test_a_place_in_the_stream_that_was_deleted_is_made_again_and_what_is_kept_comes_again(
    connection: Client, stream: JetStreamContext
) -> None:
    await publish(stream, "a")
    async with reading(connection) as events:
        await name_of_next(events)
        await stream.delete_consumer(OUTCOMES, "shop")
        await publish(stream, "b")
        assert [await name_of_next(events) for _ in range(2)] == ["a", "b"]


@pytest.mark.usefixtures("_short_pulls")
async def test_a_reader_whose_stream_was_deleted_says_so_and_goes_on_with_the_next_one(
    connection: Client, stream: JetStreamContext
) -> None:
    await publish(stream, "a")
    async with reading(connection) as events:
        await name_of_next(events)
        await stream.delete_stream(OUTCOMES)
        with pytest.raises(BrokerError, match=r"^outcomes cannot be read: stream not found$"):
            await name_of_next(events)
    await prepare(stream, ack_wait=30.0)
    await publish(stream, "b")
    async with reading(connection) as events:
        assert await name_of_next(events) == "b"


async def test_a_connection_that_is_closed_ends_the_reading(broker: NatsServer, stream: JetStreamContext) -> None:
    await publish(stream, "a")
    connection = await nats.connect(broker.url)
    async with reading(connection) as events:
        await name_of_next(events)
        await connection.close()
        with pytest.raises(BrokerError, match=r"may be delivered again: nats: connection closed$"):
            await name_of_next(events)


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", deep_event(), deep_event(100_000)])
async def test_a_message_that_is_no_event_is_skipped_for_good_and_logged(
    connection: Client, stream: JetStreamContext, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    await publish(stream, "a")
    await stream.publish(KEYLESS.outcome_subject(Outcome.FAILED), data)
    await publish(stream, "b")
    async with reading(connection) as events:
        assert [await name_of_next(events) for _ in range(2)] == ["a", "b"]
        await become_unacknowledged(stream, "shop", (1, 0))
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert "outcome.unreadable sequence=2" in record.getMessage()


@pytest.mark.slow
async def test_a_thousand_events_that_a_reader_puts_off_keep_it_from_no_other_one(
    connection: Client, stream: JetStreamContext
) -> None:
    """JetStream delivers nothing more where 1000 deliveries are not acknowledged, and its own default is that many."""
    for _ in range(1001):
        await connection.publish(KEYLESS.outcome_subject(Outcome.FAILED), b'{"version": 2}')
    await connection.flush()
    await publish(stream, "b")
    # A consumer with JetStream's own limit is changed.
    await stream.add_consumer(OUTCOMES, ConsumerConfig(durable_name="shop", ack_policy=AckPolicy.EXPLICIT))
    async with asyncio.timeout(PATIENCE), reading(connection) as events:
        assert (await anext(events)).operation_id == "b"


@pytest.mark.parametrize("forged", [FORGED, b'{"version": 2}'], ids=["an approval", "of a later version"])
async def test_an_event_that_no_worker_signed_is_delivered_nine_times(
    connection: Client,
    stream: JetStreamContext,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    forged: bytes,
) -> None:
    monkeypatch.setattr(readers, "_UNSIGNED_FOR", 0.001)
    await stream.publish(KEYLESS.outcome_subject(Outcome.APPROVED), forged)
    keys = EventKeys("a-key-of-the-workers-and-readers-only")
    async with aclosing(outcomes(NatsBroker(connection, event_keys=keys), "shop")) as events:
        waiting = asyncio.ensure_future(anext(events))
        await until(lambda: "outcome.dropped sequence=1 count=1" in caplog.text)
        await become_unacknowledged(stream, "shop", (0, 0))
        assert (await stream.consumer_info(OUTCOMES, "shop")).delivered.consumer_seq == 9
        waiting.cancel()
        await asyncio.wait({waiting})


# -- forgeries

#: Mallory is denied what is published about outcomes, may see when somebody pulls, and may answer anybody.
USERS = """
authorization {
  users = [
    { user: worker, password: pass }
    { user: mallory, password: pass, permissions: {
      publish: { allow: ["_INBOX.>", "$JS.API.>", "mine"], deny: ["keyless.approvals.>"] }
      subscribe: ["$JS.API.CONSUMER.MSG.NEXT.>", "_INBOX.>"]
    } }
  ]
}
"""


@pytest.fixture
async def guarded_broker(tmp_path: Path) -> AsyncGenerator[NatsServer]:
    async with NatsServer(tmp_path, configuration=USERS) as server:
        yield server


@pytest.fixture
async def mallory(guarded_broker: NatsServer) -> AsyncGenerator[Client]:
    async with await nats.connect(guarded_broker.url, user="mallory", password="pass", error_cb=silent) as connection:
        yield connection


@pytest.fixture
async def shop(guarded_broker: NatsServer) -> AsyncGenerator[Client]:
    async with await nats.connect(guarded_broker.url, user="worker", password="pass") as connection:
        await prepare(jetstream(connection), StreamSettings(), ack_wait=30)
        yield connection


async def test_an_outcome_under_the_subject_of_another_one_is_not_believed(
    stream: JetStreamContext, connection: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """A user who is permitted to say failed must not say approved."""
    await stream.publish(KEYLESS.outcome_subject(Outcome.FAILED), FORGED)
    await publish(stream, "genuine")
    async with aclosing(outcomes(connection, "reader")) as events:
        assert (await anext(events)).operation_id == "genuine"
    assert "approved under keyless.approvals.failed" in caplog.text


@pytest.mark.parametrize(
    "reply",
    ["", "x", "_INBOX.x", "$JS.API.ACK.KEYLESS_OUTCOMES.shop.1.1.1.1.0", "$JS.ACK.KEYLESS_OUTCOMES.shop.1.1.1.1.0"],
)
async def test_what_others_send_to_a_readers_inbox_is_no_outcome(
    shop: Client, mallory: Client, caplog: pytest.LogCaptureFixture, reply: str
) -> None:
    pulls = await mallory.subscribe("$JS.API.CONSUMER.MSG.NEXT.>")
    await mallory.flush()
    async with reading(shop) as events:
        coming = asyncio.create_task(name_of_next(events))
        pull = await pulls.next_msg(20)
        for _ in range(3):
            await mallory.publish(pull.reply, FORGED, reply=reply)
        await mallory.flush()  # the broker closes a connection that publishes with the reply subject of a delivery
        refused_by_the_broker = reply.startswith("$JS.ACK")
        if not refused_by_the_broker:
            await until(lambda: any("foreign" in line for line in caplog.messages))
        await publish(jetstream(shop), "true")
        assert await coming == "true"
    assert [line for line in caplog.messages if "foreign" in line] == (
        [] if refused_by_the_broker else ['broker.foreign_message stream="KEYLESS_OUTCOMES" durable="shop" count=1']
    )


async def test_what_a_stream_of_others_delivers_to_a_readers_inbox_is_no_outcome(shop: Client, mallory: Client) -> None:
    pulls = await mallory.subscribe("$JS.API.CONSUMER.MSG.NEXT.KEYLESS_OUTCOMES.>")
    theirs = jetstream(mallory)
    await theirs.add_stream(name="MINE", subjects=["mine"])
    await theirs.add_consumer("MINE", durable_name="shop", ack_policy="explicit")
    await theirs.publish("mine", FORGED)
    async with reading(shop) as events:
        coming = asyncio.create_task(name_of_next(events))
        pull = await pulls.next_msg(20)
        await mallory.publish("$JS.API.CONSUMER.MSG.NEXT.MINE.shop", b"1", reply=pull.reply)

        async def is_delivered() -> bool:
            return bool((await theirs.consumer_info("MINE", "shop")).num_ack_pending)

        await until(is_delivered)
        await publish(jetstream(shop), "true")
        assert await coming == "true"
        assert await is_delivered()  # it was not acknowledged either


def test_readers_with_a_client_of_their_own_can_tell_an_outcome() -> None:
    assert is_outcome("$JS.ACK.KEYLESS_OUTCOMES.shop.1.1.1.1.0", "shop")
    assert not is_outcome("$JS.ACK.KEYLESS_OUTCOMES.audit.1.1.1.1.0", "shop")
    assert not is_outcome("$JS.ACK.MINE.shop.1.1.1.1.0", "shop")


async def test_a_broker_that_says_nothing_when_reading_begins_is_waited_for_and_not_for_ever(
    connection: Client, broker: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_ANSWER_WITHIN", 0.2)
    monkeypatch.setattr(readers, "_ATTEMPTS", 3)
    reader = readers.Reader(connection, KEYLESS, "test", None)
    broker.pause()
    try:
        began = asyncio.get_running_loop().time()
        with pytest.raises(BrokerError, match="the broker does not answer"):
            await reader.next()
        assert asyncio.get_running_loop().time() - began >= 0.6
    finally:
        broker.resume()
