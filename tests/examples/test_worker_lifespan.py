"""The worker in the lifespan of a web server: a real server, a real broker, and a worker that fails."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import nats
from example_process import ADDRESS, example_process, printed
from nats_server import REQUESTS, jetstream
from waiting import PATIENCE

from aiokeyless.sandbox import Sandbox
from aiokeyless.worker import next_outcome, submit_approval

if TYPE_CHECKING:
    from nats_server import NatsServer


EXAMPLES = Path(__file__).parents[2] / "examples"


async def test_a_worker_that_fails_ends_the_process_of_its_server(broker: NatsServer) -> None:
    command = ("-m", "uvicorn", "--port", "0", "worker_lifespan:app")
    async with (
        asyncio.timeout(PATIENCE),
        Sandbox(auto_approve=0.1) as sandbox,
        aiohttp.ClientSession() as http,
        await nats.connect(broker.url) as connection,
        example_process(*command, folder=EXAMPLES, sandbox=sandbox, KEYLESS_BROKER=broker.url) as server,
    ):
        async with http.get((await printed(server, ADDRESS))[1]) as answer:
            assert await answer.json() == {"state": "serving"}
        await submit_approval(connection, "C0FFEE", operation_id="txn-1")
        async with next_outcome(connection, "test") as event:
            assert event.outcome == "approved"
        await jetstream(connection).delete_stream(REQUESTS)  # which no worker can do without
        rest, _ = await server.communicate()
    assert server.returncode != 0
    assert f"the stream {REQUESTS} is gone" in rest.decode()
