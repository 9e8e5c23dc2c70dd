"""A long poll on FastAPI: `uvicorn fastapi_app:app`. Starlette is the same, with `Starlette(lifespan=lifespan)`."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from approvals import USER, ask, state
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from aiokeyless import KeylessClient
from aiokeyless.shutdown import close_on_signals


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncGenerator[dict[str, KeylessClient]]:
    """Make the client, and close it when the signal arrives, not when uvicorn has waited for the requests."""
    async with KeylessClient() as client, close_on_signals(client):
        yield {"client": client}


app = FastAPI(lifespan=lifespan)


@app.post("/approvals/{order}")
async def create(request: Request, order: str) -> JSONResponse:
    """Ask the user."""
    return JSONResponse(*await ask(request.state.client, USER, order))


@app.get("/approvals/{order}")
async def approval(request: Request, order: str) -> JSONResponse:
    """Answer a long poll."""
    return JSONResponse(*await state(request.state.client, USER, order))
