"""A worker on NATS with settings that the command line does not have: ``python worker.py``.

``KEYLESS_BROKER``, ``KEYLESS_EVENT_KEY`` and ``KEYLESS_API_KEY`` are in the environment.
"""

import asyncio
import logging
import os
import signal

from aiokeyless import KeylessClient
from aiokeyless.worker import ApprovalWorker
from aiokeyless.worker.nats import EventKeys, Fleet, NatsBroker, StreamSettings


async def main() -> None:
    """Work until SIGTERM."""
    broker = NatsBroker(
        os.environ["KEYLESS_BROKER"],
        fleet=Fleet(name="staging"),
        event_keys=EventKeys.from_environment(),
        settings=StreamSettings(duplicate_window=6 * 3600),
        connect_options={"inbox_prefix": "_INBOX_worker"},
    )
    async with KeylessClient() as client, broker:
        worker = ApprovalWorker(client, broker, max_polls_per_second=200)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
        await worker.run()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    asyncio.run(main())
