"""examples/nats/start_worker.py on a real broker, by a user who may receive only at an inbox of their own."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import nats
from example_process import example_process
from nats_server import NatsServer, jetstream
from waiting import PATIENCE

from aiokeyless.sandbox import Sandbox
from aiokeyless.worker import next_outcome, submit_approval
from aiokeyless.worker.nats import EventKeys, Fleet, NatsBroker

FOLDER = Path(__file__).parents[2] / "examples" / "nats"
KEY = "a-key-of-the-workers-and-readers-only"
USERS = """authorization { users = [
  { user: shop, password: pass },
  { user: worker, password: pass, permissions: { subscribe: ["_INBOX_worker.>"] } }
] }"""


async def test_a_worker_that_a_program_starts_has_the_settings_of_the_program(tmp_path: Path) -> None:
    async with NatsServer(tmp_path, configuration=USERS) as server:
        variables = {"KEYLESS_BROKER": server.url.replace("//", "//worker:pass@"), "KEYLESS_EVENT_KEY": KEY}
        async with (
            asyncio.timeout(PATIENCE),
            Sandbox(auto_approve=0.1) as sandbox,
            await nats.connect(server.url, user="shop", password="pass") as connection,
            example_process("start_worker.py", folder=FOLDER, sandbox=sandbox, **variables) as process,
        ):
            assert process.stdout is not None
            assert b"worker.ready" in await process.stdout.readline()
            shop = NatsBroker(connection, fleet=Fleet(name="staging"), event_keys=EventKeys(KEY))
            await submit_approval(shop, "C0FFEE", operation_id="txn-1")
            async with next_outcome(shop, "shop") as event:
                assert event.outcome == "approved"
            config = (await jetstream(connection).stream_info("STAGING_REQUESTS")).config
            process.send_signal(signal.SIGTERM)
            await process.communicate()
    assert (process.returncode, config.duplicate_window) == (0, 6 * 3600)
