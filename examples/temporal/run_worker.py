"""A Temporal worker with the workflow and its activities; any number of them share the waits."""

import asyncio
import os
import sqlite3
from contextlib import closing

from activities import Approvals, Bank
from temporalio.client import Client
from temporalio.worker import Worker
from transfer import TASK_QUEUE, Transfer

import aiokeyless


async def main() -> None:
    """Run until Ctrl-C: what is under way goes on at another worker, or at this one when it runs again."""
    address = os.environ.get("TEMPORAL_ADDRESS", "127.0.0.1:7233")
    try:
        temporal = await Client.connect(address)
    except RuntimeError as error:
        raise SystemExit(f"there is no Temporal server at {address}: {error}") from None
    file = os.environ.get("TRANSFERS_DB", "transfers.sqlite3")
    with closing(sqlite3.connect(file, isolation_level=None)) as database:
        async with aiokeyless.KeylessClient() as client:
            activities = [Approvals(client).wait_for_approval, Bank(database).transfer]
            await Worker(temporal, task_queue=TASK_QUEUE, workflows=[Transfer], activities=activities).run()


if __name__ == "__main__":
    asyncio.run(main())
