"""The streams and the consumer: made as they must be, shared, and never changed where they are somebody else's."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import nats
import pytest
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    DiscardPolicy,
    RetentionPolicy,
    StorageType,
    StreamConfig,
    StreamInfo,
    SubjectTransform,
)
from nats.js.errors import NotFoundError
from nats_server import CLAIMS, CONSUMER, OUTCOMES, REQUESTS, NatsServer, jetstream, prepare
from waiting import PATIENCE

from aiokeyless.worker import BrokerError
from aiokeyless.worker.broker import UnavailableError
from aiokeyless.worker.nats import Fleet, StreamSettings, streams
from aiokeyless.worker.nats.fleet import KEYLESS
from aiokeyless.worker.nats.streams import is_delivery, restore_consumer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.js import JetStreamContext

ACK_WAIT = 40.0
DAY = 24 * 3600.0


@pytest.fixture
async def stream(connection: Client) -> JetStreamContext:
    return jetstream(connection)


async def prepared(stream: JetStreamContext, **settings: Any) -> float:
    return await prepare(stream, StreamSettings(**settings), ack_wait=ACK_WAIT)


def requests(**changed: Any) -> StreamConfig:
    """The stream of requests as an operator makes it who does it right, but for what is changed."""
    settings: dict[str, Any] = {
        "name": REQUESTS,
        "subjects": ["keyless.approvals.request"],
        "retention": RetentionPolicy.WORK_QUEUE,
        "storage": StorageType.FILE,
        "duplicate_window": DAY,
    }
    return StreamConfig(**settings | changed)


def outcomes(**changed: Any) -> StreamConfig:
    settings: dict[str, Any] = {
        "name": OUTCOMES,
        "subjects": [f"keyless.approvals.{outcome}" for outcome in ("failed", "expired", "approved")],
        "storage": StorageType.FILE,
        "duplicate_window": DAY,
    }
    return StreamConfig(**settings | changed)


def claims(**changed: Any) -> StreamConfig:
    settings: dict[str, Any] = {
        "name": CLAIMS,
        "subjects": ["keyless.claims.*"],
        "storage": StorageType.FILE,
        "duplicate_window": DAY,
        "max_age": DAY,
    }
    return StreamConfig(**settings | changed)


@dataclass
class OperatorsConsumer(ConsumerConfig):
    """A consumer's settings, with some that nats-py does not know."""

    max_expires: int | None = None  # nanoseconds
    priority_groups: list[str] | None = None
    priority_policy: str | None = None


def consumer(**changed: Any) -> ConsumerConfig:
    settings: dict[str, Any] = {
        "durable_name": CONSUMER,
        "ack_policy": AckPolicy.EXPLICIT,
        "ack_wait": ACK_WAIT,
        "max_deliver": -1,
        "max_ack_pending": -1,
    }
    return OperatorsConsumer(**settings | changed)


async def settings_of(stream: JetStreamContext) -> tuple[StreamConfig, StreamConfig]:
    return (await stream.stream_info(REQUESTS)).config, (await stream.stream_info(OUTCOMES)).config


# -- made


async def test_what_is_missing_is_made_as_the_guarantees_need_it(stream: JetStreamContext) -> None:
    assert await prepared(stream) == DAY
    made, told = await settings_of(stream)
    assert made.subjects == ["keyless.approvals.request"]
    assert (made.retention, made.storage, made.num_replicas) == (RetentionPolicy.WORK_QUEUE, StorageType.FILE, 1)
    assert (made.duplicate_window, made.max_age) == (DAY, 0)
    assert (made.max_msgs, made.max_bytes, made.max_msgs_per_subject) == (-1, -1, -1)
    assert told.subjects == [f"keyless.approvals.{outcome}" for outcome in ("approved", "expired", "failed")]
    assert (told.retention, told.storage, told.num_replicas) == (RetentionPolicy.LIMITS, StorageType.FILE, 1)
    assert (told.duplicate_window, told.max_age) == (DAY, 7 * DAY)
    assert (told.max_msgs, told.max_bytes, told.max_msgs_per_subject) == (-1, -1, -1)
    claimed = (await stream.stream_info(CLAIMS)).config
    assert claimed.subjects == ["keyless.claims.*"]
    assert (claimed.retention, claimed.storage, claimed.num_replicas) == (RetentionPolicy.LIMITS, StorageType.FILE, 1)
    assert (claimed.duplicate_window, claimed.max_age) == (DAY, DAY)


async def test_the_consumer_delivers_without_end_and_any_number_at_once(stream: JetStreamContext) -> None:
    await prepared(stream)
    made = (await stream.consumer_info(REQUESTS, CONSUMER)).config
    assert made is not None
    assert (made.durable_name, made.ack_policy, made.ack_wait) == (CONSUMER, AckPolicy.EXPLICIT, ACK_WAIT)
    assert (made.max_deliver, made.max_ack_pending) == (-1, -1)
    assert (made.deliver_policy, made.deliver_subject, made.filter_subject) == (DeliverPolicy.ALL, None, None)


async def test_an_operator_chooses_the_duplicate_window_and_how_long_outcomes_are_kept(
    stream: JetStreamContext,
) -> None:
    assert await prepared(stream, duplicate_window=600.0, max_age=3600.0) == 600
    made, told = await settings_of(stream)
    assert (made.duplicate_window, told.duplicate_window, told.max_age) == (600, 600, 3600)


async def test_outcomes_are_kept_at_least_for_the_duplicate_window(stream: JetStreamContext) -> None:
    await prepared(stream, max_age=60.0)
    assert (await settings_of(stream))[1].max_age == DAY


async def test_made_by_ten_workers_at_once_they_are_made_once(stream: JetStreamContext) -> None:
    assert await asyncio.gather(*(prepared(stream) for _ in range(10))) == [DAY] * 10


async def test_made_once_they_are_found(stream: JetStreamContext) -> None:
    await prepared(stream)
    before = await settings_of(stream)
    assert await prepared(stream) == DAY
    assert await settings_of(stream) == before


# -- found


async def test_what_an_operator_made_well_is_used(stream: JetStreamContext) -> None:
    await stream.add_stream(
        requests(max_msgs=10_000, max_msg_size=4096, discard=DiscardPolicy.NEW, description="ours", num_replicas=1)
    )
    strict = {"discard": DiscardPolicy.NEW, "discard_new_per_subject": True}
    await stream.add_stream(outcomes(max_age=DAY, max_msgs_per_subject=10_000, **strict))
    await stream.add_consumer(REQUESTS, consumer(ack_wait=100, max_waiting=512))
    assert await prepared(stream, max_age=DAY) == DAY


async def test_a_larger_duplicate_window_is_used_and_the_smaller_of_two_counts(stream: JetStreamContext) -> None:
    await stream.add_stream(requests(duplicate_window=3 * DAY))
    await stream.add_stream(outcomes(duplicate_window=2 * DAY))
    assert await prepared(stream) == 2 * DAY
    assert (await stream.stream_info(CLAIMS)).config.max_age == 2 * DAY


@pytest.mark.parametrize(
    ("found", "difference"),
    [
        (requests(subjects=["keyless.approvals.request", "more"]), "subjects is"),
        (requests(subjects=["other"]), r"subjects is \['other'\], and must be \['keyless.approvals.request'\]"),
        (requests(retention=RetentionPolicy.LIMITS), "retention is limits, and must be workqueue"),
        (requests(retention=RetentionPolicy.INTEREST), "retention is interest, and must be workqueue"),
        (requests(storage=StorageType.MEMORY), "storage is memory, and must be file"),
        (requests(duplicate_window=120), "duplicate_window is 120.0, and must be 86400 or more"),
        (requests(max_age=2 * DAY), "max_age is 172800.0, and must be unlimited: messages would vanish"),
        (requests(max_msgs=10), "max_msgs is 10, and must be unlimited: what is over it is dropped"),
        (requests(max_bytes=1 << 20), "max_bytes is 1048576, and"),
        (requests(max_msgs_per_subject=1), "max_msgs_per_subject is 1, and"),
        (outcomes(subjects=["keyless.approvals.approved"]), "subjects is"),
        (outcomes(retention=RetentionPolicy.INTEREST), "retention is interest, and must be limits"),
        (outcomes(storage=StorageType.MEMORY), "storage is memory, and must be file"),
        (
            outcomes(duplicate_window=120, max_age=120),
            "duplicate_window is 120.0, .*; max_age is 120.0, and must be 86400 or more",
        ),
        (outcomes(max_msgs=10), "max_msgs is 10"),
        (requests(max_msgs_per_subject=9, discard=DiscardPolicy.NEW), "max_msgs_per_subject is 9, and must be"),
        (requests(allow_rollup_hdrs=True), "allow_rollup_hdrs is True, and must be off: by them a publisher removes"),
        (requests(allow_msg_ttl=True), "allow_msg_ttl is True, and must be off: by it a publisher has messages vanish"),
        (requests(no_ack=True), "no_ack is True"),
        (
            outcomes(subject_transform=SubjectTransform("keyless.approvals.*", "moved.{{wildcard(1)}}")),
            "subject_transform is .*moved.*, and must be unset",
        ),
        (
            outcomes(max_msg_size=1024),
            "max_msg_size is 1024, and must be unlimited: what is over it would never be stored",
        ),
        (claims(allow_rollup_hdrs=True), "allow_rollup_hdrs is True"),
        (claims(max_msg_size=32), "max_msg_size is 32, and"),
        (claims(subjects=["keyless.claims.>"]), "subjects is"),
        (claims(max_age=2 * DAY), "max_age is 172800.0, and must be 86400, the duplicate window"),
        (claims(max_age=0), "max_age is 0.0, and must be 86400, the duplicate window"),
        (claims(max_age=3600, duplicate_window=3600), "max_age is 3600.0, and must be 86400 or more"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
async def test_a_stream_with_other_settings_is_refused_in_one_line_that_names_them_and_left_as_it_is(
    stream: JetStreamContext, found: StreamConfig, difference: str
) -> None:
    assert found.name is not None
    before = (await stream.add_stream(found)).config
    refusal = rf"^stream {found.name} exists with other settings: .*{difference}"
    with pytest.raises(BrokerError, match=refusal) as caught:
        await prepared(stream)
    assert "\n" not in str(caught.value)
    assert (await stream.stream_info(found.name)).config == before


async def test_a_stream_with_too_few_replicas_is_refused(stream: JetStreamContext) -> None:
    await stream.add_stream(requests())
    with pytest.raises(BrokerError, match="num_replicas is 1, and must be 3"):
        await prepared(stream, replicas=3)


@pytest.mark.parametrize(
    ("found", "difference"),
    [
        ({"ack_wait": 5}, "ack_wait is 5.0, and must be 40 or more"),
        ({"max_deliver": 3}, "max_deliver is 3, and must be unlimited"),
        ({"max_ack_pending": 1000}, "max_ack_pending is 1000, and must be unlimited"),
        ({"filter_subject": "keyless.approvals.request"}, "filter_subject is"),
        ({"filter_subjects": ["keyless.approvals.request"]}, "filter_subjects is"),
        ({"deliver_subject": "elsewhere"}, "deliver_subject is elsewhere, and must be unset"),
        ({"backoff": [40.0, 60.0]}, "backoff is"),
        ({"headers_only": True}, "headers_only is True"),
        ({"pause_until": "2999-01-01T00:00:00Z"}, "pause_until is 2999"),
        ({"max_expires": 500_000_000}, "max_expires is 500000000, and must be unset"),
        ({"priority_groups": ["a"], "priority_policy": "overflow"}, r"priority_groups is \['a'\], and must be unset"),
    ],
)
async def test_a_consumer_with_other_settings_is_refused_in_one_line_that_names_them_and_left_as_it_is(
    stream: JetStreamContext, found: dict[str, Any], difference: str
) -> None:
    await stream.add_stream(requests())
    before = (await stream.add_consumer(REQUESTS, consumer(**found))).config
    refusal = rf"^consumer {CONSUMER} of stream {REQUESTS} exists with other settings: .*{difference}"
    with pytest.raises(BrokerError, match=refusal) as caught:
        await prepared(stream)
    assert "\n" not in str(caught.value)
    assert (await stream.consumer_info(REQUESTS, CONSUMER)).config == before


async def test_a_subject_that_is_another_streams_is_refused_in_one_line(stream: JetStreamContext) -> None:
    await stream.add_stream(StreamConfig(name="ALL", subjects=["keyless.>"]))
    with pytest.raises(BrokerError, match=r"^the broker refused .*: subjects overlap with an existing stream$"):
        await prepared(stream)


async def test_replicas_that_the_broker_has_no_servers_for_are_refused_in_one_line(stream: JetStreamContext) -> None:
    with pytest.raises(BrokerError, match=r"^the broker refused .*: replicas > 1 not supported in non-clustered mode$"):
        await prepared(stream, replicas=3)


# -- a broker that does not let us


@pytest.fixture
async def without_jetstream(tmp_path: Path) -> AsyncGenerator[Client]:
    server = NatsServer(tmp_path, jetstream=False)
    await server.start()
    async with await nats.connect(server.url) as connection:
        yield connection
    server.stop()


async def test_a_broker_without_jetstream_is_one_line(without_jetstream: Client) -> None:
    with pytest.raises(BrokerError, match=r"^the broker has no JetStream at \$JS\.API: start it with -js"):
        await prepared(jetstream(without_jetstream))


@pytest.mark.parametrize(
    ("code", "err_code", "description"),
    [
        # What nats-server 2.15 answers before its cluster has a leader, and before the leader has heard of all servers.
        (503, 10008, "JetStream system temporarily unavailable"),
        (400, 10005, "no suitable peers for placement, peer offline"),
    ],
)
async def test_a_cluster_that_is_not_complete_yet_is_one_line_that_says_when_to_start_again(
    without_jetstream: Client, code: int, err_code: int, description: str
) -> None:
    answer = json.dumps({"error": {"code": code, "err_code": err_code, "description": description}})

    async def refuse(request: Msg) -> None:
        await request.respond(answer.encode())

    await without_jetstream.subscribe("$JS.API.STREAM.INFO.>", cb=refuse)
    with pytest.raises(BrokerError) as caught:
        await prepared(jetstream(without_jetstream))
    assert str(caught.value) == (
        f"the broker's cluster is incomplete ({description}): start again when all of its servers are up; "
        "there must be as many as replicas"
    )


async def test_a_domain_that_is_not_there_is_one_line_that_names_it(connection: Client) -> None:
    fleet = Fleet(prefix="$JS.hub.API")
    stream = fleet.jetstream(connection, timeout=PATIENCE)
    with pytest.raises(BrokerError, match=r"^the broker has no JetStream at \$JS\.hub\.API: .* correct the prefix$"):
        await streams.prepare(stream, fleet, StreamSettings(), ack_wait=ACK_WAIT, service=OURS)


CONFIGURATION = """
authorization {
  users = [
    { user: nobody, password: pass, permissions: { publish: { deny: [">"] } } }
    { user: reader, password: pass, permissions: { publish: { allow: ["$JS.API.STREAM.INFO.>"] } } }
  ]
}
"""


@pytest.fixture
async def strict_broker(tmp_path: Path) -> AsyncGenerator[NatsServer]:
    async with NatsServer(tmp_path, configuration=CONFIGURATION) as server:
        yield server


async def silent(_error: Exception) -> None:
    """nats-py would log what the broker does not permit."""


async def test_a_user_without_permission_is_told_within_seconds(strict_broker: NatsServer) -> None:
    for user in ("nobody", "reader"):
        async with await nats.connect(strict_broker.url, user=user, password="pass", error_cb=silent) as connection:
            began = time.monotonic()
            with pytest.raises(BrokerError, match=r"^the broker did not answer .* publish to \$JS\.API\.>"):
                await prepared(connection.jetstream(timeout=0.2))
            assert time.monotonic() - began < 20


# -- the consumer, again


async def test_where_the_consumer_has_no_leader_the_broker_is_unavailable(strict_broker: NatsServer) -> None:
    async with await nats.connect(strict_broker.url, user="nobody", password="pass", error_cb=silent) as connection:
        began = time.monotonic()
        with pytest.raises(UnavailableError):
            await restore_consumer(connection.jetstream(timeout=0.2), KEYLESS, ack_wait=ACK_WAIT)
        assert (
            time.monotonic() - began < 4
        )  # nats-py's own timeout is five seconds, in which nothing would be delivered


# -- deliveries


@pytest.mark.parametrize(
    ("reply", "is_one"),
    [
        ("$JS.ACK.S.c.1.2.3.4.5", True),
        ("$JS.ACK._.hash.S.c.1.2.3.4.5.random", True),
        ("$JS.ACK.hub.hash.S.c.1.2.3.4.5", True),
        ("", False),
        ("_INBOX.a", False),
        ("$JS.ACK.S.c", False),
        ("$JS.ACK.S.c.1.2.3.4", False),
        ("$JS.ACK.S.c.1.2.3.4.5.6", False),
        ("$JS.ACK.S.d.1.2.3.4.5", False),
        ("$JS.ACK.T.c.1.2.3.4.5", False),
        ("$JS.ACK.S.c.hash.S2.c2.1.2.3.4.5.6", False),
        ("$JS.NAK.S.c.1.2.3.4.5", False),
        ("x.$JS.ACK.S.c.1.2.3.4", False),
    ],
)
def test_a_delivery_is_told_by_the_reply_that_no_client_can_choose(reply: str, is_one: bool) -> None:
    assert is_delivery(reply, "S", "c") is is_one


# -- whose fleet it is

OURS, THEIRS = "https://api.keyless.io", "https://staging.example.com"


async def made(stream: JetStreamContext, fleet: Fleet, service: str) -> float:
    return await streams.prepare(stream, fleet, StreamSettings(), ack_wait=ACK_WAIT, service=service)


async def test_of_two_environments_that_start_at_once_one_is_told_whose_the_fleet_is(
    stream: JetStreamContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    await made(stream, KEYLESS, OURS)
    real, missed = stream.stream_info, list[str]()

    async def just_before_it_was_made(name: str) -> StreamInfo:
        if not missed:
            missed.append(name)
            raise NotFoundError
        return await real(name)

    monkeypatch.setattr(stream, "stream_info", just_before_it_was_made)
    with pytest.raises(BrokerError, match=f"belongs to {OURS}, and this worker to {THEIRS}"):
        await made(stream, KEYLESS, THEIRS)
    assert missed == [REQUESTS]


async def test_streams_that_say_nothing_of_their_service_get_that_of_their_first_worker_and_keep_all_else(
    stream: JetStreamContext,
) -> None:
    await stream.add_stream(
        requests(description="Ours", max_bytes=1 << 30, discard=DiscardPolicy.NEW, metadata={"team": "payments"})
    )
    await prepared(stream)
    before = (await streams.request(stream, f"STREAM.INFO.{REQUESTS}"))["config"]
    await made(stream, KEYLESS, OURS)
    after = (await streams.request(stream, f"STREAM.INFO.{REQUESTS}"))["config"]
    assert after == before | {"metadata": before["metadata"] | {"aiokeyless-service": OURS}}
    with pytest.raises(BrokerError, match=f"belongs to {OURS}, and this worker to {THEIRS}"):
        await made(stream, KEYLESS, THEIRS)
    await prepared(stream)
