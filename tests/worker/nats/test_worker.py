"""A worker on NATS: what only this broker does to one, and what users of it may do."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import msgspec
import nats
import pytest
from nats.aio.msg import Msg
from nats.js.api import DiscardPolicy, RePublish
from nats_server import CLAIMS, CONSUMER, OUTCOMES, REQUEST_SUBJECT, REQUESTS, NatsServer, jetstream
from tenacity import wait_fixed
from waiting import PATIENCE, until

from aiokeyless.sandbox import Sandbox
from aiokeyless.ticket import payload_digest
from aiokeyless.worker import (
    ApprovalEvent,
    ApprovalWorker,
    BrokerError,
    FailureReason,
    Outcome,
    approval_worker,
    submit_approval,
)
from aiokeyless.worker.messages import ApprovalRequest, request_name
from aiokeyless.worker.nats import EventKeys, Fleet, NatsBroker, StreamSettings
from aiokeyless.worker.nats import broker as nats_broker
from aiokeyless.worker.nats.event_keys import MESSAGE_ID, SIGNATURE
from aiokeyless.worker.nats.fleet import KEYLESS

from ..conformance.brokers import new_request  # noqa: TID252
from ..reading import an_event, now, polls_of, read  # noqa: TID252

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

    from nats.aio.client import Client
    from nats.js.api import ConsumerInfo

    from aiokeyless import KeylessClient

pytestmark = pytest.mark.platform

AT_THE_DEADLINE = wait_fixed(60)  # the deadline cuts it, so the final poll is the only one
#: Of a request for "txn-1" as `publish` makes it.
REQUEST = ApprovalRequest(version=1, user_id="C0", operation_id="txn-1")
EVENT_KEYS = EventKeys("a-key-of-the-workers-and-readers-only")


_OF_THE_BROKER = ("fleet", "event_keys", "settings", "connect_options")


@asynccontextmanager
async def working(client: KeylessClient, broker: NatsServer, **options: Any) -> AsyncGenerator[ApprovalWorker]:
    own = {name: options.pop(name) for name in _OF_THE_BROKER if name in options}
    async with NatsBroker(broker.url, **own) as opened:
        worker = ApprovalWorker(client, opened, **{"schedule": wait_fixed(0.05), **options})
        task = asyncio.create_task(worker.run())
        try:
            await until(lambda: worker.statistics.is_ready or task.done())
            yield worker
        finally:
            worker.stop()
            await task


async def submit(connection: Client, user_id: str, **options: Any) -> str:
    """Submit a request; return the operation's id."""
    options = {"operation_id": str(uuid.uuid4()), **options}
    return (await submit_approval(connection, user_id, **options)).operation_id


async def all_outcomes(connection: Client) -> list[ApprovalEvent]:
    """Wait until no request is left, and return every event that there is."""
    stream = jetstream(connection)

    async def no_request_is_left() -> bool:
        return (await stream.stream_info(REQUESTS)).state.messages == 0

    await until(no_request_is_left)
    return await read(connection, (await stream.stream_info(OUTCOMES)).state.messages, str(uuid.uuid4()))


async def publish(connection: Client, request: bytes | dict[str, Any]) -> None:
    """Publish a request, or what is none, as an application without our helper does: without a ``Nats-Msg-Id``."""
    data = request if isinstance(request, bytes) else msgspec.json.encode({"version": 1, "user_id": "C0", **request})
    await jetstream(connection).publish(REQUEST_SUBJECT, data, stream=REQUESTS)


async def consumer(connection: Client) -> ConsumerInfo:
    info: ConsumerInfo = await jetstream(connection).consumer_info(REQUESTS, CONSUMER)
    return info


@pytest.fixture
async def impatient_client(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[KeylessClient]:
    """A client with which a delivery that was not acknowledged is repeated after 3.5 s."""
    monkeypatch.setattr(approval_worker, "_SETTLED_WITHIN", 0.5)
    monkeypatch.setattr(nats_broker, "_ANSWER_WITHIN", 0.5)
    monkeypatch.setattr(approval_worker, "_MARGIN", 0.0)
    async with sandbox.client(request_timeout=1) as client:
        yield client


@pytest.fixture
def one_ack_is_lost(monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Lose the first acknowledgement of a request; the broker delivers it again at once, not after its ack wait."""
    acknowledge = Msg.ack
    lost: list[Msg] = []

    async def ack(message: Msg) -> None:
        if lost or message.subject != REQUEST_SUBJECT:
            await acknowledge(message)
        else:
            lost.append(message)
            await message.nak(delay=0.2)

    monkeypatch.setattr(Msg, "ack", ack)
    return lambda: bool(lost)


async def test_a_trace_travels_in_the_header_that_instrumentations_know(
    client: KeylessClient, broker: NatsServer, connection: Client, sandbox: Sandbox
) -> None:
    traceparent = f"00-{1:032x}-{2:016x}-01"
    async with working(client, broker):
        await NatsBroker(connection).submit(new_request("txn-1", traceparent))
        await until(lambda: "txn-1" in sandbox.operations)
        sandbox.approve("txn-1")
        [event] = await read(connection)
    message = await jetstream(connection).get_msg(OUTCOMES, 1)
    assert event.traceparent == traceparent
    assert message.headers is not None
    assert message.headers["traceparent"] == traceparent


def test_a_fleet_is_told_apart_by_its_destination() -> None:
    broker = NatsBroker("nats://127.0.0.1:4222", fleet=Fleet(name="staging"))
    assert (broker.system, broker.destination) == ("nats", "staging.approvals.request")


async def test_two_environments_on_one_broker_never_approve_each_others_requests(
    client: KeylessClient, broker: NatsServer, connection: Client, sandbox: Sandbox
) -> None:
    async with Sandbox(auto_approve=0.0) as staging, staging.client() as theirs, working(client, broker):
        with pytest.raises(BrokerError, match=f"'keyless' on this broker belongs to {sandbox.url}, .*{staging.url}"):
            await ApprovalWorker(theirs, broker.url).run()
        fleet = Fleet(name="staging")
        async with working(theirs, broker, fleet=fleet):
            operation_id = await submit(connection, "C0FFEE")
            other = NatsBroker(connection, fleet=fleet)
            await submit_approval(other, "C0FFEE", operation_id="txn-1")
            assert [event.outcome for event in await read(other)] == [Outcome.APPROVED]
            await until(lambda: operation_id in sandbox.operations)
        assert (len(sandbox.operations), len(staging.operations)) == (1, 1)


# -- the deadline


@pytest.mark.slow
async def test_a_request_that_outlived_its_claim_does_not_say_that_nobody_was_asked(
    client: KeylessClient, broker: NatsServer, connection: Client, sandbox: Sandbox
) -> None:
    options: dict[str, Any] = {"grace": 0, "settings": StreamSettings(duplicate_window=3), "schedule": AT_THE_DEADLINE}
    async with working(client, broker, **options):
        operation_id = await submit(connection, "C0FFEE", expires_in=2.9)
        await until(lambda: operation_id in sandbox.operations)

    async def no_claim_is_left() -> bool:
        return (await jetstream(connection).stream_info(CLAIMS)).state.messages == 0

    await until(no_claim_is_left)  # no worker runs for longer than claims are kept
    sandbox.fail_next(times=None)
    async with working(client, broker, **options):
        [event] = await all_outcomes(connection)
    assert (event.outcome, event.answered, event.asked) == (Outcome.EXPIRED, False, True)


# -- one request, one operation


async def test_two_requests_for_one_operation_have_one_outcome(
    client: KeylessClient, broker: NatsServer, connection: Client, sandbox: Sandbox
) -> None:
    async with working(client, broker) as worker:
        for _ in range(2):  # without a name by which the stream could tell
            await publish(connection, {"operation_id": "txn-1"})
        await until(lambda: "txn-1" in sandbox.operations)
        await until(lambda: len(polls_of(sandbox, "txn-1")) >= 4)
        sandbox.approve("txn-1")
        [event] = await all_outcomes(connection)
        assert (worker.statistics.approved, worker.statistics.duplicates) == (1, 1)
    assert event.outcome is Outcome.APPROVED
    assert list(sandbox.operations) == ["txn-1"]


async def test_id_that_is_taken_by_another_request_is_a_conflict_and_costs_that_one_nothing(
    client: KeylessClient, broker: NatsServer, connection: Client, sandbox: Sandbox
) -> None:
    ours = {"operation_id": "txn-1", "operation_payload": "Pay 40"}
    async with working(client, broker):
        await publish(connection, ours)
        await until(lambda: "txn-1" in sandbox.operations)
        await publish(connection, {**ours, "context": "the other"})
        [conflict] = await read(connection)
        sandbox.approve("txn-1")
        [event] = await read(connection)
    assert (conflict.outcome, conflict.reason) == (Outcome.FAILED, FailureReason.CONFLICT)
    assert conflict.read_context(str) == "the other"
    assert (event.outcome, event.user_id) == (Outcome.APPROVED, "C0")
    assert event.read_context(object) is None
    assert event.payload_sha256 == payload_digest("Pay 40")


async def test_an_id_whose_request_was_refused_is_free_for_another_one(
    client: KeylessClient, broker: NatsServer, connection: Client, sandbox: Sandbox
) -> None:
    async with working(client, broker):
        sandbox.fail_next(status=400, method="POST")
        await publish(connection, {"operation_id": "txn-1", "user_id": "DEAD"})
        [refused] = await read(connection)
        await publish(connection, {"operation_id": "txn-1", "user_id": "C0"})
        await until(lambda: "txn-1" in sandbox.operations)
        sandbox.approve("txn-1")
        [approved] = await read(connection)
    assert (refused.reason, approved.outcome) == (FailureReason.REJECTED, Outcome.APPROVED)


# -- answers and messages that are not to be trusted


@pytest.mark.parametrize(
    "message",
    [
        b"\xff no JSON",
        {},  # neither an id nor a Nats-Msg-Id that could stand for one
    ],
)
async def test_message_that_is_no_request_fails_at_once_and_never_comes_again(
    client: KeylessClient, broker: NatsServer, connection: Client, sandbox: Sandbox, message: bytes | dict[str, Any]
) -> None:
    async with working(client, broker) as worker:
        await publish(connection, message)
        [event] = await all_outcomes(connection)
        left = await consumer(connection)
        assert worker.statistics.deliveries == 1
    assert (event.outcome, event.reason, event.deliveries) == (Outcome.FAILED, FailureReason.INVALID_REQUEST, 1)
    assert event.read_context(object) is None
    assert (left.num_ack_pending, left.num_redelivered, left.num_pending) == (0, 0, 0)
    assert not sandbox.operations


# -- crashes


SIGNED = msgspec.json.encode(an_event(outcome=Outcome.FAILED, operation_id="txn-0"))


@pytest.mark.usefixtures("one_ack_is_lost")
@pytest.mark.parametrize(
    ("data", "headers"),
    [(b"forged", {}), (SIGNED, {SIGNATURE: EVENT_KEYS.sign(SIGNED, fleet="keyless")})],
    ids=["by a forger", "by a worker, for another request"],  # who may read has signed events, and may store them again
)
async def test_an_event_that_was_stored_under_the_name_of_an_outcome_does_not_keep_the_genuine_one_out(
    client: KeylessClient,
    broker: NatsServer,
    connection: Client,
    sandbox: Sandbox,
    caplog: pytest.LogCaptureFixture,
    *,
    data: bytes,
    headers: dict[str, str],
) -> None:
    """The name of an outcome follows from the request, so that who knows the one knows the other."""
    name = {MESSAGE_ID: request_name(REQUEST)}
    subject, stream = KEYLESS.outcome_subject(Outcome.FAILED), jetstream(connection)
    async with working(client, broker, event_keys=EVENT_KEYS) as worker:
        await stream.publish(subject, data, stream=OUTCOMES, headers={**headers, **name})
        await publish(connection, {"operation_id": "txn-1"})
        await until(lambda: "txn-1" in sandbox.operations)
        sandbox.approve("txn-1")
        await until(lambda: worker.statistics.duplicates == 1)  # the first delivery's, whose ack was lost
        assert worker.statistics.approved == 1
    assert (await stream.stream_info(OUTCOMES)).state.messages == 2
    assert "outcome.forged sequence=1" in caplog.text


async def test_an_event_that_was_removed_since_is_not_stored_again(
    client: KeylessClient, broker: NatsServer, connection: Client, sandbox: Sandbox
) -> None:
    """A worker with an event key reads what is there in place of its event."""
    stored = {MESSAGE_ID: request_name(REQUEST)}
    subject, stream = KEYLESS.outcome_subject(Outcome.FAILED), jetstream(connection)
    async with working(client, broker, event_keys=EVENT_KEYS) as worker:
        await stream.publish(subject, b"the other's", stream=OUTCOMES, headers=stored)
        await stream.purge_stream(OUTCOMES)
        await publish(connection, {"operation_id": "txn-1"})
        await until(lambda: "txn-1" in sandbox.operations)
        sandbox.approve("txn-1")
        await until(lambda: worker.statistics.duplicates == 1)
    assert (await stream.stream_info(OUTCOMES)).state.messages == 0


@pytest.mark.parametrize("is_gone", [True, False], ids=["gone", "full"])
@pytest.mark.parametrize(("name", "expires_in"), [(OUTCOMES, 0.01), (CLAIMS, 3600.0)])
async def test_while_what_a_worker_stores_is_refused_it_is_not_ready(
    client: KeylessClient,
    broker: NatsServer,
    connection: Client,
    monkeypatch: pytest.MonkeyPatch,
    *,
    name: str,
    expires_in: float,
    is_gone: bool,
) -> None:
    monkeypatch.setattr("aiokeyless.worker.monitoring._EVERY", 0.05)
    stream = jetstream(connection)
    async with working(client, broker) as worker:
        if is_gone:
            await stream.delete_stream(name)
        else:
            config = (await stream.stream_info(name)).config
            await stream.update_stream(config.evolve(max_msgs=1, discard=DiscardPolicy.NEW))
        for _ in range(2):
            await submit(connection, "C0FFEE", expires_in=expires_in)
        refused = f"the broker does not store outcomes or claims: {'' if is_gone else 'maximum messages exceeded'}"
        await until(lambda: any(one.startswith(refused) for one in worker.statistics.problems))


@pytest.mark.slow
async def test_approval_that_is_seen_while_the_broker_is_away_is_not_lost(
    impatient_client: KeylessClient, broker: NatsServer, connection: Client, sandbox: Sandbox
) -> None:
    async with working(impatient_client, broker) as worker:
        operation_id = await submit(connection, "C0FFEE")
        await until(lambda: operation_id in sandbox.operations)
        sandbox.approve(operation_id)
        sandbox.latency = 0.5
        seen = len(polls_of(sandbox, operation_id))
        await until(lambda: len(polls_of(sandbox, operation_id)) > seen)
        broker.kill()
        await until(lambda: worker.statistics.in_flight == 0)  # the answer came, its event could not be published
        await until(lambda: not worker.statistics.is_ready)
        sandbox.latency = 0
        await broker.start()
        [event] = await all_outcomes(connection)
        await until(lambda: worker.statistics.is_ready)
    assert event.outcome is Outcome.APPROVED


# -- a broker that does not do as it should


async def test_consumer_that_is_deleted_is_made_again_without_haste(
    client: KeylessClient, broker: NatsServer, connection: Client, sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    async with working(client, broker):
        await publish(connection, {"operation_id": "before"})
        await until(lambda: "before" in sandbox.operations)
        await jetstream(connection).delete_consumer(REQUESTS, CONSUMER)
        await publish(connection, {"operation_id": "after"})
        await until(lambda: "after" in sandbox.operations)
        for operation_id in ("before", "after"):  # the former is delivered for the first time again
            sandbox.approve(operation_id)
        events = await all_outcomes(connection)
    assert sorted((event.operation_id, event.outcome) for event in events) == [
        ("after", Outcome.APPROVED),
        ("before", Outcome.APPROVED),
    ]
    assert 0 < sum("broker.refused" in record.getMessage() for record in caplog.records) < 5


async def test_connection_that_the_broker_ends_for_good_ends_the_worker(
    client: KeylessClient, broker: NatsServer
) -> None:
    worker = ApprovalWorker(client, broker.url)
    running = asyncio.create_task(worker.run())
    await until(lambda: worker.statistics.is_ready)
    assert isinstance(worker._broker, NatsBroker)
    assert worker._broker._connection is not None
    transport = worker._broker._connection._transport
    assert transport is not None
    transport.write(b"NONSENSE\r\n")
    with pytest.raises(BrokerError, match=r"^the broker ended the connection for good: nats: unknown protocol"):
        await asyncio.wait_for(running, PATIENCE)


async def test_stop_ends_a_worker_whose_broker_says_nothing(
    impatient_client: KeylessClient, broker: NatsServer, connection: Client
) -> None:
    await connection.close()
    try:
        async with working(impatient_client, broker) as worker:
            broker.pause()
            worker.stop()
            began = now()
    finally:
        broker.resume()
    assert now() - began < 30  # without a bound it waits until the broker answers


async def test_event_of_the_largest_request_is_stored(
    client: KeylessClient, broker: NatsServer, connection: Client, sandbox: Sandbox
) -> None:
    request = {"operation_id": "\N{GRINNING FACE}" * 512, "external_user_id": ""}
    size = len(msgspec.json.encode({"version": 1, "user_id": "C0", **request}))
    request["external_user_id"] = "x" * (NatsBroker(connection).largest_request - size)
    async with working(client, broker) as worker:
        await publish(connection, request)
        await until(lambda: bool(sandbox.operations))
        sandbox.approve(request["operation_id"])
        [event] = await all_outcomes(connection)
        assert worker.statistics.is_ready
    assert (event.outcome, event.external_user_id) == (Outcome.APPROVED, request["external_user_id"])


async def test_a_claim_that_a_stream_of_others_republished_makes_one_tap_count_for_no_second_request(
    client: KeylessClient, broker: NatsServer, connection: Client, sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    """A user who may not publish claims has the broker write one: that the second request holds the operation id."""
    async with working(client, broker, event_keys=EVENT_KEYS):
        await submit(connection, "C0", operation_id="txn-1", context={"order": 7})
        await until(lambda: "txn-1" in sandbox.operations)
        sandbox.approve("txn-1")
        await read(connection)
        theirs, claim = jetstream(connection), KEYLESS.claim_subject(sha256(b"txn-1").hexdigest())
        await theirs.add_stream(name="MINE", subjects=["mine"], republish=RePublish(src="mine", dest=claim))
        second = request_name(msgspec.structs.replace(REQUEST, context=msgspec.Raw(b'{"order":8}')))
        await theirs.publish("mine", second.encode())

        async def is_written() -> bool:
            return (await theirs.get_last_msg(CLAIMS, claim)).data == second.encode()

        await until(is_written)
        await submit(connection, "C0", operation_id="txn-1", context={"order": 8})
        events = await all_outcomes(connection)
    assert [(event.outcome, event.reason, event.read_context(dict)["order"]) for event in events] == [
        (Outcome.APPROVED, None, 7),
        (Outcome.FAILED, FailureReason.ALREADY_APPROVED, 8),
    ]
    assert "claim.unsigned sequence=" in caplog.text


async def test_an_approval_that_a_stream_of_others_republished_is_believed_by_no_reader_with_the_key(
    tmp_path: Path, sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    """A user who may not publish outcomes has the broker do it."""
    users = (
        "authorization { users = [ { user: worker, password: p }, { user: mallory, password: p, permissions: { "
        'publish: { allow: ["$JS.API.>", "mine", "_INBOX.>"] }, subscribe: ["_INBOX.>"] } } ] }'
    )
    async with (
        NatsServer(tmp_path, configuration=users) as broker,
        sandbox.client() as client,
        await nats.connect(broker.url, user="worker", password="p") as ours,
        await nats.connect(broker.url, user="mallory", password="p") as mallory,
        working(client, broker, event_keys=EVENT_KEYS, connect_options={"user": "worker", "password": "p"}),
    ):
        theirs = jetstream(mallory)
        # The broker publishes what is republished by itself, and asks no permissions.
        republish = RePublish(src="mine", dest="keyless.approvals.approved")
        await theirs.add_stream(name="MINE", subjects=["mine"], republish=republish)
        await theirs.publish("mine", msgspec.json.encode(an_event(operation_id="forged")))

        async def is_stored() -> bool:
            return (await jetstream(ours).stream_info(OUTCOMES)).state.messages == 1

        await until(is_stored)  # the broker's permissions did not keep it out
        assert [event.operation_id for event in await read(ours, 1, "trusting")] == ["forged"]
        operation_id = await submit(ours, "C0FFEE")
        await until(lambda: operation_id in sandbox.operations)
        sandbox.approve(operation_id)
        async with asyncio.timeout(PATIENCE):
            [event] = await read(NatsBroker(ours, event_keys=EVENT_KEYS), reader="careful")
        assert event.operation_id == operation_id
    assert "outcome.unsigned sequence=1 count=1" in caplog.text
