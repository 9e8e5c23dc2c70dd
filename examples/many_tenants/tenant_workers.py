"""A worker for each tenant, in one process: `python tenant_workers.py`."""

import asyncio
import logging
import signal

import asyncpg
from tenants import DATABASE_URL, Registry, Tenant, make_client

from aiokeyless.worker import ApprovalWorker
from aiokeyless.worker.postgres import PostgresBroker

log = logging.getLogger("tenants")
AGAIN = 10.0  # seconds after which a worker that has ended is started again


class Supervisor:
    """The worker of a tenant, which is started again whenever it ends."""

    def __init__(self, tenant: Tenant, pool: asyncpg.Pool) -> None:
        self._client = make_client(tenant)
        self._running = asyncio.create_task(self._run(pool, f"keyless_{tenant.name}"))

    async def aclose(self) -> None:
        """Finish the deliveries in flight, then close the client."""
        if not self._running.cancelling():  # a second one would cut the first one off
            self._running.cancel()
        await asyncio.wait({self._running})
        await self._client.aclose()

    async def _run(self, pool: asyncpg.Pool, schema: str) -> None:
        while True:
            try:
                async with PostgresBroker(pool, schema) as broker, ApprovalWorker(self._client, broker):
                    await asyncio.Event().wait()  # until it fails, or is cancelled
            except Exception as error:  # noqa: BLE001  # such as a wrong key; nothing ends the supervisor
                log.warning("%s: %s", schema, error)
            await asyncio.sleep(AGAIN)


async def reset_nothing(_connection: asyncpg.Connection) -> None:
    """Do nothing: asyncpg's own reset is a statement after each transaction, and workers change no setting."""


async def main() -> None:
    """Work until SIGTERM."""
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    async with (
        asyncpg.create_pool(
            DATABASE_URL, min_size=0, max_size=20, statement_cache_size=0, timeout=10, reset=reset_nothing
        ) as pool,
        Registry(lambda tenant: Supervisor(tenant, pool)),
    ):
        await stopped.wait()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    asyncio.run(main())
