"""A worker to be killed: ``worker_process.py NATS_URL KEYLESS_URL``, with the key in the environment.

What `aiokeyless worker` is, with a shorter request timeout.
"""

from __future__ import annotations

import asyncio
import sys

from aiokeyless import KeylessClient
from aiokeyless.worker import ApprovalWorker, BrokerError


async def work(nats_url: str, keyless_url: str) -> None:
    async with KeylessClient(base_url=keyless_url, request_timeout=0.5) as client:
        await ApprovalWorker(client, nats_url).run()


if __name__ == "__main__":
    try:
        asyncio.run(work(*sys.argv[1:]))
    except BrokerError as error:  # it was started while the broker was away; its parent starts it again
        sys.exit(str(error))
