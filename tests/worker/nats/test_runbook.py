"""The runbook of docs/howto/operating-workers.md: streams that are full, deleted or purged, on a real broker."""

from __future__ import annotations

import ast
import asyncio
import json
import re
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import nats
import nats.errors
import pytest
from nats.js.api import ConsumerConfig
from nats.js.errors import APIError
from nats_server import CLAIMS, OUTCOMES, REQUESTS, NatsServer, jetstream
from tenacity import wait_fixed
from waiting import PATIENCE, until

from aiokeyless.errors import BrokerError
from aiokeyless.worker import ApprovalWorker, FailureReason, Outcome, submit_approval
from benchmarks.soak.disk import full

from ..reading import read  # noqa: TID252

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox
    from aiokeyless.worker import ApprovalEvent

USER: Final = "C0"
PAGE: Final = Path(__file__).parents[3] / "docs" / "howto" / "operating-workers.md"


SHOP: Final = "shop"


def new_worker(client: KeylessClient, broker: NatsServer) -> ApprovalWorker:
    return ApprovalWorker(client, broker.url, schedule=wait_fixed(0.05))


async def ask(connection: Client, sandbox: Sandbox, operation_id: str) -> None:
    """Submit a request, and wait until its user is asked."""
    await submit_approval(connection, USER, operation_id=operation_id)
    await until(lambda: operation_id in sandbox.operations)


async def outcomes(connection: Client, count: int, reader: str = SHOP) -> list[ApprovalEvent]:
    async with asyncio.timeout(PATIENCE):
        return await read(connection, count, reader)


@asynccontextmanager
async def with_a_request_that_waits(
    client: KeylessClient, broker: NatsServer, connection: Client, sandbox: Sandbox
) -> AsyncGenerator[None]:
    async with new_worker(client, broker):
        await ask(connection, sandbox, "txn-1")
        yield


# -- full


async def fill(connection: Client) -> None:
    """Store messages until there is no room, not even for a small one."""
    stream = jetstream(connection)
    await stream.add_stream(name="FILLER", subjects=["filler"])
    for size in (512 << 10, 8 << 10, 1):
        with suppress(APIError):
            while True:
                await stream.publish("filler", bytes(size))


@pytest.mark.slow
async def test_a_broker_that_is_full_takes_no_request_and_loses_none_that_it_has(
    tmp_path: Path, sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    # With this timeout, what could not be decided is delivered again after 13 s, not 40.
    async with (
        NatsServer(tmp_path, configuration="jetstream: { max_file_store: 4MB }") as broker,
        sandbox.client(request_timeout=1) as client,
        await nats.connect(broker.url) as connection,
        with_a_request_that_waits(client, broker, connection, sandbox),
    ):
        await fill(connection)
        with pytest.raises(BrokerError, match="not stored, as far as is known"):
            await submit_approval(connection, USER, operation_id="txn-2")
        sandbox.approve("txn-1")
        await until(lambda: "delivery.unsettled" in caplog.text)
        await jetstream(connection).delete_stream("FILLER")
        await ask(connection, sandbox, "txn-2")
        [event] = await outcomes(connection, 1)
    assert (event.operation_id, event.outcome) == ("txn-1", Outcome.APPROVED)


@pytest.mark.slow
async def test_a_full_disk_is_a_problem_and_nothing_is_lost_once_there_is_room_and_the_broker_was_restarted(
    tmp_path: Path, disk: Path, sandbox: Sandbox
) -> None:
    async with (
        NatsServer(tmp_path, "-js", "-sd", str(disk / "store"), jetstream=False) as broker,
        sandbox.client(request_timeout=1) as client,
        await nats.connect(broker.url) as connection,
        new_worker(client, broker) as worker,
    ):
        await ask(connection, sandbox, "txn-1")
        with full(disk):
            sandbox.approve("txn-1")
            problem = "the broker does not store outcomes or claims: no answer in time: the broker is away, or its"
            await until(lambda: any(found.startswith(problem) for found in worker.statistics.problems))
            with pytest.raises(BrokerError, match=r"not stored, as far as is known .*its disk is full"):
                await submit_approval(connection, USER, operation_id="txn-2", context="x" * 10_000)
        stored = worker.statistics.approved
        broker.stop()
        await broker.start()
        await submit_approval(connection, USER, operation_id="txn-2", context="x" * 10_000)
        await until(lambda: "txn-2" in sandbox.operations)
        [event] = await outcomes(connection, 1)
        await until(lambda: worker.statistics.is_ready)
    assert stored == 0
    assert (event.operation_id, event.outcome) == ("txn-1", Outcome.APPROVED)


# -- deleted


async def test_requests_that_were_deleted_go_on_once_they_are_submitted_again(
    client: KeylessClient, broker: NatsServer, connection: Client, sandbox: Sandbox
) -> None:
    worker = new_worker(client, broker)
    working = asyncio.create_task(worker.run())
    await until(lambda: worker.statistics.is_ready)
    await ask(connection, sandbox, "txn-1")
    await jetstream(connection).delete_stream(REQUESTS)
    with pytest.raises(BrokerError, match=f"^the stream {REQUESTS} is gone, and the requests in it$"):
        await asyncio.wait_for(working, PATIENCE)
    async with new_worker(client, broker):  # makes the stream
        assert not (await submit_approval(connection, USER, operation_id="txn-1")).duplicate
        sandbox.approve("txn-1")
        [event] = await outcomes(connection, 1)
    assert (event.operation_id, event.outcome) == ("txn-1", Outcome.APPROVED)
    assert len(sandbox.operations) == 1


async def test_outcomes_that_were_deleted_are_gone_and_later_ones_come_after_a_restart_of_the_workers(
    client: KeylessClient, broker: NatsServer, connection: Client, sandbox: Sandbox
) -> None:
    async with with_a_request_that_waits(client, broker, connection, sandbox):
        await ask(connection, sandbox, "txn-2")
        sandbox.approve("txn-2")
        await outcomes(connection, 1, "others")
        await jetstream(connection).delete_stream(OUTCOMES)
    with pytest.raises(BrokerError, match="start a worker first"):
        await outcomes(connection, 1)
    async with new_worker(client, broker):
        sandbox.approve("txn-1")
        [event] = await outcomes(connection, 1)
    assert (event.operation_id, event.outcome) == ("txn-1", Outcome.APPROVED)
    assert (await client.get_operation("txn-2")).is_approved  # which no event says any more


@pytest.mark.parametrize("deleted", [True, False], ids=["deleted", "purged"])
async def test_without_its_claim_an_approval_does_not_count(
    client: KeylessClient, broker: NatsServer, connection: Client, sandbox: Sandbox, *, deleted: bool
) -> None:
    stream = jetstream(connection)
    async with with_a_request_that_waits(client, broker, connection, sandbox):
        await (stream.delete_stream if deleted else stream.purge_stream)(CLAIMS)
    async with new_worker(client, broker):
        sandbox.approve("txn-1")
        await ask(connection, sandbox, "txn-2")  # asked after that: nothing is wrong with it
        sandbox.approve("txn-2")
        first, second = sorted(await outcomes(connection, 2), key=lambda event: event.operation_id or "")
    assert (first.operation_id, first.outcome, first.reason) == (
        "txn-1",
        Outcome.FAILED,
        FailureReason.ALREADY_APPROVED,
    )
    assert (second.operation_id, second.outcome) == ("txn-2", Outcome.APPROVED)


# -- edited


async def test_an_outcome_beyond_a_limit_of_deliveries_is_read_under_another_name_only(
    client: KeylessClient, broker: NatsServer, connection: Client, sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    stream = jetstream(connection)
    async with with_a_request_that_waits(client, broker, connection, sandbox):
        limited = ConsumerConfig(durable_name=SHOP, max_deliver=1, ack_wait=6, max_ack_pending=-1)
        await stream.add_consumer(OUTCOMES, limited)
        sandbox.approve("txn-1")
        other = await stream.pull_subscribe_bind(SHOP, OUTCOMES)
        [lost] = await other.fetch(1, timeout=PATIENCE)
        await lost.nak()
        with pytest.raises(nats.errors.TimeoutError):  # JetStream gives it up when it would deliver it again
            await other.fetch(1, timeout=0.5)
        reading = asyncio.create_task(read(connection, reader=SHOP))
        await until(lambda: "reader.corrected" in caplog.text)
        place = await stream.consumer_info(OUTCOMES, SHOP)
        assert (place.config.max_deliver, place.num_pending, place.num_ack_pending) == (-1, 0, 0)
        [event] = await outcomes(connection, 1, "shop-again")
        assert (event.operation_id, event.outcome) == ("txn-1", Outcome.APPROVED)
        assert not reading.done()
        reading.cancel()


# -- purged


async def test_requests_that_were_purged_count_as_stored_until_their_stream_is_made_anew(
    client: KeylessClient, broker: NatsServer, connection: Client, sandbox: Sandbox
) -> None:
    async with with_a_request_that_waits(client, broker, connection, sandbox):
        await jetstream(connection).purge_stream(REQUESTS)
        assert (await submit_approval(connection, USER, operation_id="txn-1")).duplicate  # and nothing is stored
        assert (await jetstream(connection).stream_info(REQUESTS)).state.messages == 0
    await jetstream(connection).delete_stream(REQUESTS)
    async with new_worker(client, broker):
        await submit_approval(connection, USER, operation_id="txn-1")
        sandbox.approve("txn-1")
        [event] = await outcomes(connection, 1)
    assert (event.operation_id, event.outcome) == ("txn-1", Outcome.APPROVED)


async def test_outcomes_that_were_purged_are_gone_and_readers_go_on_with_later_ones(
    client: KeylessClient, broker: NatsServer, connection: Client, sandbox: Sandbox
) -> None:
    async with with_a_request_that_waits(client, broker, connection, sandbox):
        sandbox.approve("txn-1")
        await outcomes(connection, 1, "others")
        await jetstream(connection).purge_stream(OUTCOMES)
        await ask(connection, sandbox, "txn-2")
        sandbox.approve("txn-2")
        [event] = await outcomes(connection, 1)
    assert event.operation_id == "txn-2"
    assert (await client.get_operation("txn-1")).is_approved  # which no event says any more


# -- restored


async def back_up(connection: Client, stream: str) -> tuple[dict[str, object], list[bytes]]:
    """Take a snapshot of a stream and its consumers, as ``nats stream backup`` does."""
    chunks: list[bytes] = []

    async def receive(message: Msg) -> None:
        chunks.append(message.data)
        if message.reply:
            await message.respond(b"")

    inbox = connection.new_inbox()
    subscription = await connection.subscribe(inbox, cb=receive)
    asked = json.dumps({"deliver_subject": inbox}).encode()
    answer = await connection.request(f"$JS.API.STREAM.SNAPSHOT.{stream}", asked, timeout=PATIENCE)
    await until(lambda: bool(chunks) and not chunks[-1])
    await subscription.unsubscribe()
    return json.loads(answer.data), chunks


async def restore(connection: Client, stream: str, facts: dict[str, object], chunks: list[bytes]) -> None:
    """Put a snapshot back, as ``nats stream restore`` does."""
    subject, wanted = f"$JS.API.STREAM.RESTORE.{stream}", {"config": facts["config"], "state": facts["state"]}
    answer = await connection.request(subject, json.dumps(wanted).encode(), timeout=PATIENCE)
    place = json.loads(answer.data)["deliver_subject"]
    answers = [await connection.request(place, chunk, timeout=PATIENCE) for chunk in chunks]
    assert "error" not in json.loads(answers[-1].data)


async def test_streams_that_are_restored_go_on_where_the_backup_was_made(
    client: KeylessClient, broker: NatsServer, connection: Client, sandbox: Sandbox
) -> None:
    async with with_a_request_that_waits(client, broker, connection, sandbox):
        await ask(connection, sandbox, "txn-0")
        sandbox.approve("txn-0")
        await outcomes(connection, 1)
        backups = {stream: await back_up(connection, stream) for stream in (REQUESTS, CLAIMS, OUTCOMES)}
    for stream, backup in backups.items():
        await jetstream(connection).delete_stream(stream)
        await restore(connection, stream, *backup)
    async with new_worker(client, broker) as worker:
        sandbox.approve("txn-1")
        [event] = await outcomes(connection, 1)
        assert worker.statistics.problems == ()
        assert not (await submit_approval(connection, USER, operation_id="txn-0")).duplicate
        [again] = await outcomes(connection, 1)
    assert (event.operation_id, event.outcome) == ("txn-1", Outcome.APPROVED)
    assert (again.operation_id, again.outcome) == ("txn-0", Outcome.APPROVED)


# -- made by hand


async def test_in_an_account_that_demands_limits_the_streams_of_the_page_serve(
    tmp_path: Path, client: KeylessClient, sandbox: Sandbox
) -> None:
    limits = "jetstream: { max_file: 4GB, max_bytes_required: true }, users: [ { user: operator, password: PASSWORD } ]"
    configuration = f"jetstream: {{}}\naccounts: {{ KEYLESS: {{ {limits} }} }}"
    async with NatsServer(tmp_path, configuration=configuration) as broker:
        url = broker.url.replace("nats://", "nats://operator:PASSWORD@")
        with pytest.raises(BrokerError, match="requires a stream config to have max bytes set"):
            await ApprovalWorker(client, url).run()
        [code] = re.findall(r"```py\n(.*?)```", PAGE.read_text(), re.DOTALL)
        code = code.replace("nats://operator:PASSWORD@127.0.0.1:4222", url).replace(
            '"num_replicas": 3', '"num_replicas": 1'
        )
        names: dict[str, Any] = {"nats": nats}
        await eval(compile(code, PAGE, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)  # noqa: S307  # it is ours
        async with names["connection"], ApprovalWorker(client, url) as worker:
            await ask(names["connection"], sandbox, "txn-1")
            sandbox.approve("txn-1")
            [event] = await outcomes(names["connection"], 1)
            assert worker.statistics.problems == ()
    assert event.outcome is Outcome.APPROVED
