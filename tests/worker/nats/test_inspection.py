"""How a fleet fares, on a real broker that is well, full, deleted, or does not answer."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from nats.js.api import AckPolicy, ConsumerConfig, DiscardPolicy
from nats_server import CLAIMS, CONSUMER, OUTCOMES, REQUEST_SUBJECT, REQUESTS, change_consumer
from waiting import PATIENCE

from aiokeyless.worker.broker import UnavailableError
from aiokeyless.worker.clock import BrokerClock
from aiokeyless.worker.messages import Outcome
from aiokeyless.worker.nats.fleet import KEYLESS, Fleet
from aiokeyless.worker.nats.inspection import inspect

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.js import JetStreamContext

    from aiokeyless.events import Inspection


async def inspected(connection: Client, fleet: Fleet = KEYLESS) -> Inspection:
    still = BrokerClock(lambda: datetime(2026, 11, 28, tzinfo=UTC), lambda: 0.0)
    return await inspect(fleet.jetstream(connection, PATIENCE), fleet, still)


@pytest.mark.parametrize(
    ("limits", "described"),
    [({"max_msgs": 2}, "it has 2 messages of at most 2"), ({"max_bytes": 4200}, "bytes of at most 4200")],
    ids=["messages", "bytes"],
)
async def test_a_full_stream_of_requests_is_named(
    connection: Client, stream: JetStreamContext, limits: dict[str, int], described: str
) -> None:
    config = (await stream.stream_info(REQUESTS)).config
    await stream.update_stream(config.evolve(discard=DiscardPolicy.NEW, **limits))
    assert (await inspected(connection)).problems == ()
    for _ in range(2):
        await stream.publish(REQUEST_SUBJECT, b"x" * 40)
    [problem] = (await inspected(connection)).problems
    assert problem.startswith(f"the stream {REQUESTS} is full: it has ")
    assert problem.endswith(described)


async def test_a_stream_of_requests_that_is_gone_is_named(connection: Client, stream: JetStreamContext) -> None:
    await stream.delete_stream(REQUESTS)
    ahead = BrokerClock()
    ahead.compare(datetime.now(UTC) + timedelta(hours=1), began=ahead.elapsed())
    told = await inspect(KEYLESS.jetstream(connection, PATIENCE), KEYLESS, ahead)
    assert told.problems == (f"the stream {REQUESTS} is gone",)
    assert told.clock_ahead == pytest.approx(3600.0, abs=PATIENCE)  # as last measured


async def test_a_consumer_that_is_gone_is_named(connection: Client, stream: JetStreamContext) -> None:
    await stream.delete_consumer(REQUESTS, CONSUMER)
    await stream.publish(REQUEST_SUBJECT, b"")
    told = await inspected(connection)
    assert (told.problems, told.waiting, told.backlog) == ((f"the consumer {CONSUMER} is gone",), 1, 0)


async def test_a_consumer_that_is_paused_is_named(connection: Client, stream: JetStreamContext) -> None:
    await connection.request(
        f"$JS.API.CONSUMER.PAUSE.{REQUESTS}.{CONSUMER}", b'{"pause_until": "2100-01-01T00:00:00Z"}', timeout=PATIENCE
    )
    await stream.publish(REQUEST_SUBJECT, b"")
    assert (await inspected(connection)).problems == (f"the consumer {CONSUMER} is paused",)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"max_deliver": 3}, "the consumer shop has other settings: max_deliver is 3, and must be unlimited"),
        ({"filter_subject": "keyless.approvals.failed", "max_deliver": 3}, None),
        ({"deliver_subject": "elsewhere"}, None),
    ],
    ids=["a reader", "another client that filters", "another client that is pushed to"],
)
async def test_what_is_wrong_with_a_readers_consumer_is_named_and_other_clients_have_their_own_settings(
    connection: Client, stream: JetStreamContext, changed: dict[str, object], problem: str | None
) -> None:
    await stream.publish(REQUEST_SUBJECT, b"")
    await change_consumer(connection, OUTCOMES, "shop", **changed)
    assert (await inspected(connection)).problems == (() if problem is None else (problem,))


@pytest.mark.usefixtures("stream")
async def test_a_broker_without_jetstream_for_the_fleet_does_not_answer(connection: Client) -> None:
    with pytest.raises(UnavailableError, match="JetStream does not answer: it is off, or not for this account"):
        await inspected(connection, Fleet(prefix="another.account"))


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"{}", "STREAM.INFO.KEYLESS_REQUESTS answers cannot be read: "),
        (b"no JSON", "STREAM.INFO.KEYLESS_REQUESTS answers cannot be read: "),
        (b'{"error": {"description": "\xff"}}', "STREAM.INFO.KEYLESS_REQUESTS answers cannot be read: "),
        (b'{"error": {"code": 503, "description": "no leader"}}', "^no leader$"),
        (b'{"error": {}}', "STREAM.INFO.KEYLESS_REQUESTS answers cannot be read: "),
    ],
)
async def test_what_is_no_answer_is_none(connection: Client, answer: bytes, told: str) -> None:
    async def reply(message: object) -> None:
        await connection.publish(message.reply, answer)  # type: ignore[attr-defined]  # nats-py's Msg

    await connection.subscribe("another.account.>", cb=reply)
    with pytest.raises(UnavailableError, match=told):
        await inspected(connection, Fleet(prefix="another.account"))


async def test_each_reader_of_many_is_counted_and_no_consumer_that_an_operator_looks_with(
    connection: Client, stream: JetStreamContext
) -> None:
    await stream.publish(KEYLESS.outcome_subject(Outcome.APPROVED), b"")
    names = [f"reader-{number}" for number in range(257)]  # an answer of JetStream has 256 at most
    for name in names:
        await stream.add_consumer(OUTCOMES, ConsumerConfig(durable_name=name, ack_policy=AckPolicy.EXPLICIT))
    await stream.add_consumer(OUTCOMES, ConsumerConfig(ack_policy=AckPolicy.EXPLICIT))
    told = await inspected(connection)
    assert told.unread == dict.fromkeys(names, 1)
    assert told.oldest_unread_age.keys() == {*names}


async def test_an_outcome_that_is_removed_has_no_age(connection: Client, stream: JetStreamContext) -> None:
    await stream.add_consumer(OUTCOMES, ConsumerConfig(durable_name="shop", ack_policy=AckPolicy.EXPLICIT))
    for _ in range(2):
        await stream.publish(KEYLESS.outcome_subject(Outcome.APPROVED), b"")
    await stream.delete_msg(OUTCOMES, 1)
    assert (await inspected(connection)).oldest_unread_age["shop"] > 0  # that of the other one

    async def hand_on(message: Msg) -> None:
        subject = message.subject.removeprefix("another.account.")
        if subject.startswith("STREAM.MSG.GET."):
            await stream.purge_stream(OUTCOMES)
        answer = await connection.request(f"$JS.API.{subject}", message.data, timeout=PATIENCE)
        await connection.publish(message.reply, answer.data)

    await connection.subscribe("another.account.>", cb=hand_on)
    told = await inspected(connection, Fleet(prefix="another.account"))
    assert (told.unread, told.oldest_unread_age) == ({"shop": 1}, {"shop": 0})


async def test_without_the_streams_that_workers_fill_nothing_is_unread(
    connection: Client, stream: JetStreamContext
) -> None:
    for name in (OUTCOMES, CLAIMS):
        await stream.delete_stream(name)
    told = await inspected(connection)
    assert told.unread == {}
    assert told.problems == (f"the stream {OUTCOMES} is gone", f"the stream {CLAIMS} is gone")
