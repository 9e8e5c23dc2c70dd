"""The streams and the consumers: made as they must be, checked, and never changed if they are an operator's."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import nats
import pytest
from nats.js.errors import NotFoundError
from nats_server import CLAIMS, CONSUMER, OUTCOMES, REQUESTS, NatsServer, jetstream, prepare
from waiting import PATIENCE

from aiokeyless.worker import BrokerError
from aiokeyless.worker.broker import UnavailableError
from aiokeyless.worker.clock import BrokerClock
from aiokeyless.worker.nats import Fleet, StreamSettings, streams
from aiokeyless.worker.nats.failures import broker_errors
from aiokeyless.worker.nats.fleet import KEYLESS
from aiokeyless.worker.nats.inspection import inspect
from aiokeyless.worker.nats.streams import ensure_workers, is_delivery, request

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.js import JetStreamContext

ACK_WAIT = 40.0
SECOND = 10**9
HOUR = 3600 * SECOND
DAY = 24 * HOUR

#: The streams and the consumer as an operator makes them who does it right.
WELL_MADE: dict[str, dict[str, Any]] = {
    REQUESTS: {"subjects": ["keyless.approvals.request"], "retention": "workqueue", "duplicate_window": DAY},
    OUTCOMES: {
        "subjects": [f"keyless.approvals.{outcome}" for outcome in ("failed", "expired", "approved")],
        "duplicate_window": DAY,
    },
    CLAIMS: {"subjects": ["keyless.claims.*"], "duplicate_window": DAY, "max_age": DAY},
    CONSUMER: {"ack_policy": "explicit", "ack_wait": 40 * SECOND, "max_deliver": -1, "max_ack_pending": -1},
}


@pytest.fixture
async def stream(connection: Client) -> JetStreamContext:
    return jetstream(connection)


async def prepared(stream: JetStreamContext, **settings: Any) -> float:
    return await prepare(stream, StreamSettings(**settings), ack_wait=ACK_WAIT)


async def make(stream: JetStreamContext, name: str, **changed: Any) -> None:
    """Make a stream or the consumer as an operator does."""
    config = WELL_MADE[name] | changed
    if name == CONSUMER:
        place = f"{REQUESTS}.{CONSUMER}"
        await request(stream, f"CONSUMER.CREATE.{place}", stream_name=REQUESTS, config=config | {"durable_name": name})
    else:
        await request(stream, f"STREAM.CREATE.{name}", name=name, **config)


async def settings_of(stream: JetStreamContext, name: str) -> dict[str, Any]:
    of = f"CONSUMER.INFO.{REQUESTS}.{name}" if name == CONSUMER else f"STREAM.INFO.{name}"
    config: dict[str, Any] = (await request(stream, of))["config"]
    return config


async def problems(stream: JetStreamContext) -> str:
    found = await inspect(stream, KEYLESS, BrokerClock(), settings=StreamSettings(), ack_wait=ACK_WAIT)
    return "\n".join(found.problems)


# -- made


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (REQUESTS, {"subjects": ["keyless.approvals.request"], "retention": "workqueue", "max_age": 0}),
        (
            OUTCOMES,
            {
                "subjects": [f"keyless.approvals.{outcome}" for outcome in ("approved", "expired", "failed")],
                "retention": "limits",
                "max_age": 7 * DAY,
            },
        ),
        (CLAIMS, {"subjects": ["keyless.claims.*"], "retention": "limits", "max_age": DAY}),
        (CONSUMER, WELL_MADE[CONSUMER] | {"durable_name": CONSUMER, "deliver_policy": "all", "max_waiting": 8192}),
    ],
)
async def test_what_is_missing_is_made_as_the_guarantees_need_it(
    stream: JetStreamContext, name: str, settings: dict[str, Any]
) -> None:
    of_streams = {"storage": "file", "num_replicas": 1, "duplicate_window": DAY} | dict.fromkeys(
        ("max_msgs", "max_bytes", "max_msgs_per_subject", "max_msg_size"), -1
    )
    assert await prepared(stream) == DAY / SECOND
    made = await settings_of(stream, name)
    assert made == made | settings | ({} if name == CONSUMER else of_streams)
    assert await problems(stream) == ""
    assert await prepared(stream) == DAY / SECOND
    assert await settings_of(stream, name) == made


async def test_an_operator_chooses_the_duplicate_window_and_how_long_outcomes_are_kept(
    stream: JetStreamContext,
) -> None:
    assert await prepared(stream, duplicate_window=600.0, max_age=3600.0) == 600
    assert (await settings_of(stream, REQUESTS))["duplicate_window"] == 600 * SECOND
    told = await settings_of(stream, OUTCOMES)
    assert (told["duplicate_window"], told["max_age"]) == (600 * SECOND, HOUR)
    # `aiokeyless inspect` does not know what the operator chose.
    assert (await inspect(stream, KEYLESS, BrokerClock())).problems == ()


async def test_outcomes_are_kept_at_least_for_the_duplicate_window(stream: JetStreamContext) -> None:
    await prepared(stream, max_age=60.0)
    assert (await settings_of(stream, OUTCOMES))["max_age"] == DAY


async def test_made_by_ten_workers_at_once_they_are_made_once(stream: JetStreamContext) -> None:
    assert await asyncio.gather(*(prepared(stream) for _ in range(10))) == [DAY / SECOND] * 10


# -- found


async def test_what_an_operator_made_well_is_used(stream: JetStreamContext) -> None:
    await make(stream, REQUESTS, max_msgs=10_000, max_msg_size=4096, discard="new", description="ours")
    await make(stream, OUTCOMES, max_age=DAY, max_bytes=1 << 30, discard="new")
    await make(stream, CONSUMER, ack_wait=100 * SECOND, max_waiting=512)
    assert await prepared(stream, max_age=DAY / SECOND) == DAY / SECOND
    assert await problems(stream) == ""


async def test_a_larger_duplicate_window_is_used_and_the_smaller_of_two_counts(stream: JetStreamContext) -> None:
    await make(stream, REQUESTS, duplicate_window=3 * DAY)
    await make(stream, OUTCOMES, duplicate_window=2 * DAY)
    assert await prepared(stream) == 2 * DAY / SECOND
    assert (await settings_of(stream, CLAIMS))["max_age"] == 2 * DAY
    assert await problems(stream) == ""


@pytest.mark.parametrize(
    ("name", "changed", "difference"),
    [
        (REQUESTS, {"subjects": ["other"]}, "subjects is ['other'], and must be ['keyless.approvals.request']"),
        (REQUESTS, {"retention": "limits"}, "retention is limits, and must be workqueue"),
        (REQUESTS, {"storage": "memory"}, "storage is memory, and must be file"),
        (REQUESTS, {"duplicate_window": 2 * HOUR}, "duplicate_window is 7200 s, and must be 86400 s or more"),
        (REQUESTS, {"max_age": 2 * DAY}, "max_age is 172800 s, and must be unset"),
        (REQUESTS, {"max_msgs": 10}, "max_msgs is 10, and must be unlimited"),
        (REQUESTS, {"max_msgs_per_subject": 9, "discard": "new"}, "max_msgs_per_subject is 9, and must be unlimited"),
        (REQUESTS, {"allow_rollup_hdrs": True}, "allow_rollup_hdrs is True, and must be unset"),
        (REQUESTS, {"allow_msg_ttl": True}, "allow_msg_ttl is True, and must be unset"),
        (REQUESTS, {"no_ack": True}, "no_ack is True, and must be unset"),
        (OUTCOMES, {"subjects": ["keyless.approvals.approved"]}, "subjects is"),
        (OUTCOMES, {"retention": "interest"}, "retention is interest, and must be limits"),
        (OUTCOMES, {"duplicate_window": HOUR, "max_age": HOUR}, "duplicate_window is 3600 s, and must be 86400 s"),
        (OUTCOMES, {"max_msg_size": 1024}, "max_msg_size is 1024, and must be unlimited"),
        (OUTCOMES, {"sources": [{"name": "OTHERS"}]}, "sources is [{'name': 'OTHERS'}], and must be unset"),
        (
            OUTCOMES,
            {"subject_transform": {"src": "keyless.approvals.*", "dest": "moved.{{wildcard(1)}}"}},
            "subject_transform is",
        ),
        (OUTCOMES, {"consumer_limits": {"inactive_threshold": HOUR}}, "consumer_limits is"),
        (CLAIMS, {"subjects": ["keyless.claims.>"]}, "subjects is"),
        (CLAIMS, {"max_age": 0}, "max_age is 0 s, and must be 86400 s"),
        (CONSUMER, {"ack_wait": 5 * SECOND}, "ack_wait is 5 s, and must be 40 s or more"),
        (CONSUMER, {"max_deliver": 3}, "max_deliver is 3, and must be unlimited"),
        (CONSUMER, {"max_ack_pending": 1000}, "max_ack_pending is 1000, and must be unlimited"),
        (CONSUMER, {"filter_subject": "keyless.approvals.request"}, "filter_subject is"),
        (CONSUMER, {"deliver_subject": "elsewhere"}, "deliver_subject is elsewhere, and must be unset"),
        (CONSUMER, {"backoff": [40 * SECOND]}, "backoff is"),
        (CONSUMER, {"headers_only": True}, "headers_only is True, and must be unset"),
        (CONSUMER, {"max_expires": SECOND // 2}, "max_expires is 0.5 s, and must be unset"),
        (CONSUMER, {"priority_groups": ["a"], "priority_policy": "overflow"}, "priority_groups is ['a'], and must"),
        (CONSUMER, {"inactive_threshold": HOUR}, "inactive_threshold is 3600 s, and must be unset"),
    ],
)
async def test_a_wrong_setting_is_refused_in_one_line_left_as_it_is_and_found_by_each_inspection(
    stream: JetStreamContext, name: str, changed: dict[str, Any], difference: str
) -> None:
    await make(stream, REQUESTS, **(changed if name == REQUESTS else {}))
    if name != REQUESTS:
        await make(stream, name, **changed)
    before = await settings_of(stream, name)
    with pytest.raises(BrokerError) as caught:
        await prepared(stream)
    kind = "consumer" if name == CONSUMER else "stream"
    line, _, remedy = str(caught.value).partition("; change it, or delete it" if kind == "stream" else "; delete it")
    assert line.startswith(f"the {kind} {name} has other settings: ")
    assert difference in line
    assert remedy
    assert "\n" not in line
    assert await settings_of(stream, name) == before
    assert line in (await problems(stream)).splitlines()


async def test_of_a_duplicate_window_that_was_shortened_the_stream_is_named_and_no_other(
    stream: JetStreamContext,
) -> None:
    await prepared(stream)
    changed = await settings_of(stream, OUTCOMES) | {"duplicate_window": 5 * SECOND, "max_age": 5 * SECOND}
    await request(stream, f"STREAM.UPDATE.{OUTCOMES}", **changed)
    line = f"the stream {OUTCOMES} has other settings: duplicate_window is 5 s, and must be 86400 s or more"
    assert await problems(stream) == line
    assert (await inspect(stream, KEYLESS, BrokerClock())).problems == (line,)  # what the operator chose is not known


async def test_a_stream_with_too_few_replicas_is_refused(stream: JetStreamContext) -> None:
    await make(stream, REQUESTS)
    with pytest.raises(BrokerError, match="num_replicas is 1, and must be 3"):
        await prepared(stream, replicas=3)


async def test_replicas_that_the_broker_has_no_servers_for_are_refused_in_one_line(stream: JetStreamContext) -> None:
    with pytest.raises(BrokerError, match=r"^the broker refused .*: replicas > 1 not supported in non-clustered mode$"):
        await prepared(stream, replicas=3)


# -- a broker that does not let us


@pytest.fixture
async def without_jetstream(tmp_path: Path) -> AsyncGenerator[Client]:
    async with NatsServer(tmp_path, jetstream=False) as server, await nats.connect(server.url) as connection:
        yield connection


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
        with pytest.raises(UnavailableError), broker_errors():
            await ensure_workers(connection.jetstream(timeout=0.2), KEYLESS, ACK_WAIT)
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
    real, missed = streams.request, list[str]()

    async def just_before_it_was_made(stream: JetStreamContext, subject: str, **asked: object) -> dict[str, Any]:
        if not missed:
            missed.append(subject)
            raise NotFoundError
        return await real(stream, subject, **asked)

    monkeypatch.setattr(streams, "request", just_before_it_was_made)
    with pytest.raises(BrokerError, match=f"belongs to {OURS}, and this worker to {THEIRS}"):
        await made(stream, KEYLESS, THEIRS)
    assert missed == [f"STREAM.INFO.{REQUESTS}"]


async def test_streams_that_say_nothing_of_their_service_get_that_of_their_first_worker_and_keep_all_else(
    stream: JetStreamContext,
) -> None:
    await make(stream, REQUESTS, description="Ours", max_bytes=1 << 30, discard="new", metadata={"team": "payments"})
    await prepared(stream)
    before = await settings_of(stream, REQUESTS)
    await made(stream, KEYLESS, OURS)
    after = await settings_of(stream, REQUESTS)
    assert after == before | {"metadata": before["metadata"] | {"aiokeyless-service": OURS}}
    with pytest.raises(BrokerError, match=f"belongs to {OURS}, and this worker to {THEIRS}"):
        await made(stream, KEYLESS, THEIRS)
    await prepared(stream)


async def test_of_two_first_workers_whose_records_cross_one_is_told_at_its_next_inspection(
    stream: JetStreamContext,
) -> None:
    """NATS changes a stream without a condition: both have read that there is no record, and both have written one."""
    await made(stream, KEYLESS, THEIRS)
    assert (await inspect(stream, KEYLESS, BrokerClock(), service=THEIRS)).problems == ()
    with pytest.raises(BrokerError, match=f"belongs to {THEIRS}, and this worker to {OURS}"):
        await inspect(stream, KEYLESS, BrokerClock(), service=OURS)
