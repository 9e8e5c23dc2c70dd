"""A long poll on FastAPI: `uvicorn fastapi_app:app`. Starlette is the same, with `Starlette(lifespan=lifespan)`."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from approvals import ask, client, state
from fastapi import FastAPI

from aiokeyless.shutdown import close_on_signals


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
    """Close the client when the signal arrives, not when uvicorn has waited for the requests."""
    async with close_on_signals(client):
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/approvals")
async def create() -> dict[str, str]:
    """Ask the user."""
    return await ask()


@app.get("/approvals/{operation_id}")
async def approval(operation_id: str) -> dict[str, str]:
    """Answer a long poll."""
    return await state(operation_id)
