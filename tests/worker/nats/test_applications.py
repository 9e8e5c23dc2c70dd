"""Both sides of a worker: nothing wrong is published, nothing is published twice, no event is lost on the way."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import msgspec
import nats
import nats.errors
import pytest
from nats.js.errors import NotFoundError
from nats_server import OUTCOMES, REQUESTS, NatsServer, change_consumer, jetstream, prepare
from waiting import PATIENCE, until

from aiokeyless.worker import ApprovalEvent, ApprovalRequest, BrokerError, next_outcome, submit_approval
from aiokeyless.worker.messages import Outcome, request_name
from aiokeyless.worker.nats import EventKeys, NatsBroker, StreamSettings, intake, is_outcome, readers, streams
from aiokeyless.worker.nats import broker as nats_broker
from aiokeyless.worker.nats.event_keys import MESSAGE_ID
from aiokeyless.worker.nats.fleet import KEYLESS

from ..conformance.brokers import new_request  # noqa: TID252
from ..reading import an_event, outcomes, read  # noqa: TID252

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from nats.aio.client import Client
    from nats.js import JetStreamContext


async def stored(stream: JetStreamContext) -> int:
    return (await stream.stream_info(REQUESTS)).state.messages


async def publish(stream: JetStreamContext, *names: str) -> None:
    """Publish events as a worker does."""
    for name in names:
        event = an_event(operation_id=name)
        await stream.publish(
            KEYLESS.outcome_subject(event.outcome), msgspec.json.encode(event), headers={MESSAGE_ID: name}
        )


FORGED = msgspec.json.encode(an_event(operation_id="forged"))


async def become_unacknowledged(stream: JetStreamContext, durable: str, counts: tuple[int, int]) -> None:
    """Wait until so many events are with an application, and so many are still to come."""

    async def are_so_many() -> bool:
        info = await stream.consumer_info(OUTCOMES, durable)
        return (info.num_ack_pending, info.num_pending) == counts

    await until(are_so_many)


# -- asking


async def test_a_request_is_stored_under_the_name_that_a_worker_reads_and_without_a_time_of_this_machine(
    connection: Client, stream: JetStreamContext
) -> None:
    await submit_approval(connection, "c0ffee", operation_id="\u00e9 ? ", external_user_id="", context={"a": 1})
    message = await stream.get_msg(REQUESTS, 1)
    request = msgspec.json.decode(message.data or b"", type=ApprovalRequest)
    assert (message.headers or {})[MESSAGE_ID] == request_name(request)
    assert message.subject == "keyless.approvals.request"
    assert request.created_at is None  # the stream's clock tells when, and not that of a machine that may be wrong


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
    pause = Mock(return_value=0.01)
    monkeypatch.setattr(nats_broker, "error_delay", pause)
    submitting = asyncio.create_task(submit_approval(connection, "c0ffee", operation_id="txn-1"))
    await until(lambda: pause.call_count > 1)
    stream = jetstream(connection)
    await prepare(stream, StreamSettings(), ack_wait=30)
    assert not (await submitting).duplicate
    assert await stored(stream) == 1


async def test_a_request_that_the_stream_does_not_take_says_so_and_that_it_can_be_submitted_again(
    connection: Client, stream: JetStreamContext
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


def reading(connection: Client, durable: str = "shop") -> aclosing[AsyncGenerator[ApprovalEvent]]:
    return aclosing(outcomes(connection, durable))


async def name_of_next(events: AsyncGenerator[ApprovalEvent]) -> str | None:
    return (await asyncio.wait_for(anext(events), PATIENCE)).operation_id


async def test_tasks_that_begin_to_read_under_one_name_share_one_subscription_and_leave_no_task(
    connection: Client, stream: JetStreamContext
) -> None:
    await stored(stream)  # nats-py has what it keeps for answers
    tasks, subscriptions = asyncio.all_tasks(), len(connection._subs)
    readers = [asyncio.create_task(read(connection, reader="shop")) for _ in range(5)]
    await until(lambda: len(connection._subs) > subscriptions)
    await publish(stream, "a", "b", "c")
    await until(lambda: sum(reader.done() for reader in readers) == 3)
    assert {reader.result()[0].operation_id for reader in readers if reader.done()} == {"a", "b", "c"}
    assert len(connection._subs) == subscriptions + 1
    for reader in readers:
        reader.cancel()
    await connection.close()
    await until(lambda: asyncio.all_tasks() <= tasks)


async def test_after_a_reconnection_a_reader_pulls_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "EXPIRES", 2 * PATIENCE)  # the pull of before would be expected for so long
    monkeypatch.setattr(readers, "_READ_FOR", 0.01)
    options: dict[str, Any] = {"reconnect_time_wait": 0.05, "max_reconnect_attempts": -1, "error_cb": silent}
    async with NatsServer(tmp_path) as broker, await nats.connect(broker.url, **options) as connection:
        await prepare(jetstream(connection), ack_wait=30)
        coming = asyncio.create_task(name_of_next(outcomes(connection, "shop")))
        await until_it_waits(jetstream(connection))
        broker.kill()
        await until(lambda: not connection.is_connected)
        await broker.start()
        await until(lambda: connection.is_connected)
        await publish(jetstream(connection), "a")
        assert await coming == "a"


async def silent(_error: Exception) -> None:
    """nats-py would log that the broker is away."""


async def until_it_waits(stream: JetStreamContext) -> None:
    """Wait until a pull of the reader waits at its consumer."""

    async def is_waited_for() -> bool:
        with suppress(NotFoundError):
            return bool((await stream.consumer_info(OUTCOMES, "shop")).num_waiting)
        return False

    await until(is_waited_for)


async def test_an_event_is_kept_for_its_body_and_comes_again_soon_after_its_connection_is_gone(
    broker: NatsServer, connection: Client, stream: JetStreamContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (intake, streams):
        monkeypatch.setattr(module, "ACK_WAIT", 0.3)
    await publish(stream, "a")
    gone, begun = await nats.connect(broker.url), asyncio.Event()

    async def handle_and_lose_the_connection() -> None:
        async with next_outcome(gone, "shop"):
            begun.set()
            await asyncio.sleep(0.7)  # the real broker counts
            assert not other.done()
            await gone.close()

    handling = asyncio.create_task(handle_and_lose_the_connection())
    await begun.wait()
    other = asyncio.create_task(read(connection, reader="shop"))
    with pytest.raises(BrokerError, match="connection closed"):
        await handling
    [event] = await other
    assert event.operation_id == "a"


# -- the consumer of a reader


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"max_deliver": 3}, "max_deliver is 3, and must be unlimited"),
        ({"headers_only": True}, "headers_only is True, and must be unset"),
        ({"ack_wait": 10**9}, "ack_wait is 1 s, and must be 6 s or more"),
        (
            {"filter_subject": "keyless.approvals.failed"},
            "filter_subject is keyless.approvals.failed, and must be unset",
        ),
        ({"max_expires": 10**6}, "max_expires is 0.001 s, and must be unset"),
        ({"max_ack_pending": 1}, "max_ack_pending is 1, and must be unlimited"),
        ({"inactive_threshold": 60 * 10**9}, "inactive_threshold is 60 s, and must be unset"),
        ({"priority_groups": ["a"], "priority_policy": "overflow"}, "priority_groups is ['a'], and must be unset"),
    ],
    ids=str,
)
@pytest.mark.parametrize("when", ["before it reads", "while it reads"])
async def test_a_reader_corrects_what_an_operator_changed(
    connection: Client,
    stream: JetStreamContext,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    changed: dict[str, object],
    difference: str,
    when: str,
) -> None:
    monkeypatch.setattr(readers, "_CHECKED_EVERY", 0.0)
    monkeypatch.setattr(readers, "_READ_FOR", 0.1)
    await publish(stream, "a", "b")
    if when == "while it reads":
        await read(connection, 1, "shop")
    await change_consumer(connection, OUTCOMES, "shop", **changed)
    async with asyncio.timeout(PATIENCE):
        events = await read(connection, 1 if when == "while it reads" else 2, "shop")
    assert events[-1].operation_id == "b"
    [line] = [line for line in caplog.messages if line.startswith("reader.corrected")]
    assert f"the consumer shop of {OUTCOMES} has other settings: {difference}" in line


@pytest.mark.parametrize(
    ("changed", "difference", "refusal"),
    [
        ({"deliver_policy": "new"}, "deliver_policy is new, and must be all", "deliver policy can not be updated"),
        ({"ack_policy": "none"}, "ack_policy is none, and must be explicit", "ack policy can not be updated"),
        ({"replay_policy": "original"}, "replay_policy is original, and must be instant", "replay policy can not"),
        ({"mem_storage": True}, "mem_storage is True, and must be unset", "storage type can not be updated"),
        ({"deliver_subject": "elsewhere"}, "deliver_subject is elsewhere, and must be unset", "can not update push"),
    ],
    ids=str,
)
async def test_what_a_reader_may_not_correct_it_refuses_and_leaves_as_it_is(
    connection: Client, stream: JetStreamContext, changed: dict[str, object], difference: str, refusal: str
) -> None:
    await change_consumer(connection, OUTCOMES, "shop", **changed)
    before = await stream.consumer_info(OUTCOMES, "shop")
    with pytest.raises(BrokerError) as caught:
        await read(connection, reader="shop")
    assert str(caught.value).startswith(
        f"outcomes cannot be read: the consumer shop of {OUTCOMES} has other settings: "
    )
    assert f"{difference}; " in str(caught.value)
    assert f"may not change that ({refusal}" in str(caught.value)
    assert str(caught.value).endswith("read under another name, which gets all outcomes that are kept")
    assert await stream.consumer_info(OUTCOMES, "shop") == before


async def test_a_place_in_the_stream_that_was_deleted_is_made_again_and_what_is_kept_comes_again(
    connection: Client, stream: JetStreamContext
) -> None:
    await publish(stream, "a")
    async with reading(connection) as events:
        await name_of_next(events)
        await stream.delete_consumer(OUTCOMES, "shop")
        await publish(stream, "b")
        assert [await name_of_next(events) for _ in range(2)] == ["a", "b"]


async def test_a_reader_whose_stream_was_deleted_says_so_and_goes_on_with_the_next_one(
    connection: Client, stream: JetStreamContext
) -> None:
    await publish(stream, "a")
    async with reading(connection) as events:
        await name_of_next(events)
        await stream.delete_stream(OUTCOMES)
        with pytest.raises(BrokerError, match=r"^outcomes cannot be read: there is no stream; start a worker first"):
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


@pytest.mark.parametrize("data", [b"", b"{}"])
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
    assert 'outcome.unreadable place="2"' in record.getMessage()


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


async def test_an_outcome_under_the_subject_of_another_one_is_not_believed(
    stream: JetStreamContext, connection: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """A user who is permitted to say failed must not say approved."""
    await stream.publish(KEYLESS.outcome_subject(Outcome.FAILED), FORGED)
    await publish(stream, "genuine")
    async with aclosing(outcomes(connection, "reader")) as events:
        assert (await anext(events)).operation_id == "genuine"
    assert "approved under keyless.approvals.failed" in caplog.text


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
        with pytest.raises(
            BrokerError, match=r"may this user publish to \$JS\.API\.CONSUMER\.INFO\.KEYLESS_OUTCOMES\.test"
        ):
            await reader.next()
        assert asyncio.get_running_loop().time() - began >= 0.6
    finally:
        broker.resume()
