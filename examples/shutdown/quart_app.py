"""A long poll on Quart: `hypercorn --workers 0 quart_app:app`.

With more workers, Hypercorn's main process tells them to stop without a signal, so nothing can close the client before
they have waited for their requests: then run one process for each worker, and let your service manager start them.
"""

from collections.abc import AsyncGenerator

from approvals import USER, Answer, ask, state
from quart import Quart

from aiokeyless import KeylessClient
from aiokeyless.shutdown import close_on_signals

app = Quart(__name__)


@app.while_serving
async def lifespan() -> AsyncGenerator[None]:
    """Make the client, and close it when the signal arrives; after_serving would come after the server has waited."""
    async with KeylessClient() as client, close_on_signals(client):
        app.config["client"] = client
        yield


@app.post("/approvals/<order>")
async def create(order: str) -> Answer:
    """Ask the user."""
    return await ask(app.config["client"], USER, order)


@app.get("/approvals/<order>")
async def approval(order: str) -> Answer:
    """Answer a long poll."""
    return await state(app.config["client"], USER, order)
