"""A long poll on FastAPI: `uvicorn fastapi_app:app`. Starlette is the same, with `Starlette(lifespan=lifespan)`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from aiokeyless import ApprovalTimeoutError, ClientClosedError, KeylessClient
from aiokeyless.shutdown import close_on_signals

client = KeylessClient()


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Close the client when the signal arrives, not when uvicorn has waited for the requests."""
    async with close_on_signals(client):
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/approvals/{operation_id}")
async def approval(operation_id: str) -> dict[str, str]:
    """Answer once the operation is approved, or that it is pending: the caller then asks again."""
    try:
        await client.wait_for_approval(operation_id, timeout=25)
    except (ApprovalTimeoutError, ClientClosedError):
        return {"state": "pending"}
    return {"state": "approved"}
