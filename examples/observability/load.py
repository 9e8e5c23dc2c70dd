"""Customers who pay, at a sandbox that is down for a while: something to observe. It knows nothing of OpenTelemetry."""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass

from aiokeyless import KeylessClient, KeylessError
from aiokeyless.sandbox import Sandbox

USER = "C0FFEE"


@dataclass(frozen=True)
class Load:
    """What happens when, in seconds from the start."""

    arrivals: float = 4.0  # customers a second
    approval: float = 6.0  # median time after which a customer approves
    outage: tuple[float, float] = (40.0, 60.0)
    end: float = 120.0


async def run(client: KeylessClient, sandbox: Sandbox, load: Load) -> None:
    """Let customers come and pay until the end."""
    customers: set[asyncio.Task[None]] = set()
    outage = asyncio.create_task(_fail(sandbox, load))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(load.end):
            while True:
                customer = asyncio.create_task(_pay(client, sandbox, load))
                customers.add(customer)
                customer.add_done_callback(customers.discard)
                await asyncio.sleep(random.expovariate(load.arrivals))
    for task in (outage, *customers):
        task.cancel()
    await asyncio.wait([outage, *customers])


async def _fail(sandbox: Sandbox, load: Load) -> None:
    start, end = load.outage
    await asyncio.sleep(start)
    sandbox.fail_next(503, times=None)
    await asyncio.sleep(end - start)
    sandbox.recover()


async def _pay(client: KeylessClient, sandbox: Sandbox, load: Load) -> None:
    try:
        ticket = await client.create_operation(USER, operation_payload="Pay 40 to Alice")
    except KeylessError:
        return  # during the outage the shop sells nothing
    # The phone has its own connection to Keyless: people approve during the outage too.
    seconds = load.approval * random.lognormvariate(0, 0.5)
    phone = asyncio.get_running_loop().call_later(seconds, sandbox.approve, ticket.operation_id)
    try:
        await client.wait_for_approval(ticket)
    except KeylessError as error:
        print(f"not paid: {error}")
    finally:
        phone.cancel()


async def main() -> None:
    """Run it once."""
    async with Sandbox() as sandbox, sandbox.client() as client:
        await run(client, sandbox, Load())


if __name__ == "__main__":
    asyncio.run(main())
