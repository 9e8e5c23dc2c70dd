"""What a fleet learned, in a key-value bucket of a real broker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import nats
import pytest
from nats_server import NatsServer

from aiokeyless.worker.engine import EngineError, Learned
from aiokeyless.worker.nats.learned import read, write

if TYPE_CHECKING:
    from pathlib import Path

    from nats.aio.client import Client
    from nats.js import JetStreamContext


@pytest.fixture
async def stream(connection: Client) -> JetStreamContext:
    stream = connection.jetstream()
    await stream.create_key_value(bucket="shared")
    return stream


async def test_what_was_written_is_read_by_the_fleet_that_wrote_it(stream: JetStreamContext) -> None:
    assert await read(stream, "shared", "staging") == Learned(None, 0)
    assert await write(stream, "shared", "staging", b"state", 0)
    assert (await read(stream, "shared", "staging")).state == b"state"
    assert await read(stream, "shared", "production") == Learned(None, 0)


async def test_only_what_was_read_last_is_replaced(stream: JetStreamContext) -> None:
    assert await write(stream, "shared", "staging", b"first", 0)
    assert not await write(stream, "shared", "staging", b"second", 0)
    first = await read(stream, "shared", "staging")
    assert first.state == b"first"
    assert await write(stream, "shared", "staging", b"second", first.revision)
    assert not await write(stream, "shared", "staging", b"third", first.revision)


async def test_a_key_that_was_deleted_is_written_anew(stream: JetStreamContext) -> None:
    await write(stream, "shared", "staging", b"state", 0)
    await (await stream.key_value("shared")).delete("staging")
    deleted = await read(stream, "shared", "staging")
    assert deleted.state is None
    assert not await write(stream, "shared", "staging", b"new", 0)
    assert await write(stream, "shared", "staging", b"new", deleted.revision)


async def test_the_three_permissions_of_the_guide_are_enough(tmp_path: Path) -> None:
    configuration = tmp_path / "nats.conf"
    configuration.write_text(
        """
        authorization { users = [
          { user: operator, password: p }
          { user: worker, password: p, permissions: {
              subscribe: "_INBOX.>"
              publish: [
                "$JS.API.STREAM.INFO.KV_learned"
                "$JS.API.DIRECT.GET.KV_learned.$KV.learned.keyless"
                "$KV.learned.keyless"
              ] } }
        ] }
        """
    )
    server = NatsServer(tmp_path, "-c", str(configuration))
    await server.start()
    try:
        async with (
            await nats.connect(server.url, user="operator", password="p") as operator,
            await nats.connect(server.url, user="worker", password="p") as worker,
        ):
            await operator.jetstream().create_key_value(bucket="learned", direct=True)
            stream = worker.jetstream()
            assert await read(stream, "learned", "keyless") == Learned(None, 0)
            assert await write(stream, "learned", "keyless", b"state", 0)
            assert (await read(stream, "learned", "keyless")).state == b"state"
    finally:
        server.stop()


async def test_a_bucket_that_is_missing_is_said_to_be(stream: JetStreamContext) -> None:
    with pytest.raises(EngineError, match=r"^there is no such bucket; "):
        await read(stream, "another", "staging")
    with pytest.raises(EngineError, match=r"^there is no such bucket; "):
        await write(stream, "another", "staging", b"state", 0)
