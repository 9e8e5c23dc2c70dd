"""Twenty waits that live through an outage of the service, for the tests of what is told of it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox


async def live_through_an_outage(sandbox: Sandbox, client: KeylessClient, user_id: str) -> None:
    """Wait twenty times, let the service fail for 20 s of the loop's clock, and approve all a minute later."""
    async with asyncio.TaskGroup() as tasks:
        for number in range(20):
            await client.create_operation(user_id, operation_id=f"op-{number}")
            tasks.create_task(client.wait_for_approval(f"op-{number}", timeout=300))
        await asyncio.sleep(5)
        sandbox.fail_next(503, times=None)
        await asyncio.sleep(20)
        sandbox.recover()
        await asyncio.sleep(60)
        for number in range(20):
            sandbox.approve(f"op-{number}")
