"""A long poll on Litestar: `uvicorn litestar_app:app`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from litestar import Litestar, get

from aiokeyless import ApprovalTimeoutError, ClientClosedError, KeylessClient
from aiokeyless.shutdown import close_on_signals

client = KeylessClient()


@asynccontextmanager
async def lifespan(_app: Litestar) -> AsyncIterator[None]:
    """Close the client when the signal arrives; on_shutdown would come after the server has waited."""
    async with close_on_signals(client):
        yield


@get("/approvals/{operation_id:str}")
async def approval(operation_id: str) -> dict[str, str]:
    """Answer once the operation is approved, or that it is pending: the caller then asks again."""
    try:
        await client.wait_for_approval(operation_id, timeout=25)
    except (ApprovalTimeoutError, ClientClosedError):
        return {"state": "pending"}
    return {"state": "approved"}


app = Litestar([approval], lifespan=[lifespan])
