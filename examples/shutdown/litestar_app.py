"""A long poll on Litestar: `uvicorn litestar_app:app`."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from approvals import ask, state
from litestar import Litestar, Request, get, post
from litestar.datastructures import State

from aiokeyless import KeylessClient
from aiokeyless.shutdown import close_on_signals


@asynccontextmanager
async def lifespan(app: Litestar) -> AsyncGenerator[None]:
    """Make the client, and close it when the signal arrives; on_shutdown would come after the server has waited."""
    async with KeylessClient() as client, close_on_signals(client):
        app.state.client = client
        yield


@post("/approvals/{order:str}")
async def create(request: Request[None, None, State], order: str) -> dict[str, str]:
    """Ask the user."""
    return await ask(request.app.state.client, order)


@get("/approvals/{order:str}")
async def approval(request: Request[None, None, State], order: str) -> dict[str, str]:
    """Answer a long poll."""
    return await state(request.app.state.client, order)


app = Litestar([create, approval], lifespan=[lifespan])
