"""A long poll on Litestar: `uvicorn litestar_app:app`."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from approvals import ask, client, state
from litestar import Litestar, get, post

from aiokeyless.shutdown import close_on_signals


@asynccontextmanager
async def lifespan(_app: Litestar) -> AsyncGenerator[None]:
    """Close the client when the signal arrives; on_shutdown would come after the server has waited."""
    async with close_on_signals(client):
        yield


@post("/approvals")
async def create() -> dict[str, str]:
    """Ask the user."""
    return await ask()


@get("/approvals/{operation_id:str}")
async def approval(operation_id: str) -> dict[str, str]:
    """Answer a long poll."""
    return await state(operation_id)


app = Litestar([create, approval], lifespan=[lifespan])
