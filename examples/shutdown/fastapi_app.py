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


@app.post("/approvals/{order}")
async def create(request: Request, order: str) -> dict[str, str]:
    """Ask the user."""
    return await ask(request.state.client, order)


@app.get("/approvals/{order}")
async def approval(request: Request, order: str) -> dict[str, str]:
    """Answer a long poll."""
    return await state(request.state.client, order)
