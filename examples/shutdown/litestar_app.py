"""A long poll on Litestar: `uvicorn litestar_app:app`."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from approvals import USER, ask, state
from litestar import Litestar, Request, Response, get, post
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
async def create(request: Request[None, None, State], order: str) -> Response[dict[str, str]]:
    """Ask the user."""
    answer, status = await ask(request.app.state.client, USER, order)
    return Response(answer, status_code=status)


@get("/approvals/{order:str}")
async def approval(request: Request[None, None, State], order: str) -> Response[dict[str, str]]:
    """Answer a long poll."""
    answer, status = await state(request.app.state.client, USER, order)
    return Response(answer, status_code=status)


app = Litestar([create, approval], lifespan=[lifespan])
