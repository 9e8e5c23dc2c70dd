"""A long poll on FastAPI: `uvicorn fastapi_app:app`. Starlette is the same, with `Starlette(lifespan=lifespan)`."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from approvals import ask, state
from fastapi import FastAPI, Request

from aiokeyless import KeylessClient
from aiokeyless.shutdown import close_on_signals


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncGenerator[dict[str, KeylessClient]]:
    """Make the client, and close it when the signal arrives, not when uvicorn has waited for the requests."""
    async with KeylessClient() as client, close_on_signals(client):
        yield {"client": client}


app = FastAPI(lifespan=lifespan)


@app.post("/approvals")
async def create(request: Request) -> dict[str, str]:
    """Ask the user."""
    return await ask(request.state.client)


@app.get("/approvals/{operation_id}")
async def approval(request: Request, operation_id: str) -> dict[str, str]:
    """Answer a long poll."""
    return await state(request.state.client, operation_id)
