"""A long poll on Quart: `hypercorn --workers 0 quart_app:app`.

With more workers, Hypercorn's main process tells them to stop without a signal, so nothing can close the client before
they have waited for their requests: then run one process for each worker, and let your service manager start them.
"""

from collections.abc import AsyncGenerator

from quart import Quart

from aiokeyless import ApprovalTimeoutError, ClientClosedError, KeylessClient
from aiokeyless.shutdown import close_on_signals

client = KeylessClient()
app = Quart(__name__)


@app.while_serving
async def lifespan() -> AsyncGenerator[None]:
    """Close the client when the signal arrives; after_serving would come after the server has waited."""
    async with close_on_signals(client):
        yield


@app.get("/approvals/<operation_id>")
async def approval(operation_id: str) -> dict[str, str]:
    """Answer once the operation is approved, or that it is pending: the caller then asks again."""
    try:
        await client.wait_for_approval(operation_id, timeout=25)
    except (ApprovalTimeoutError, ClientClosedError):
        return {"state": "pending"}
    return {"state": "approved"}
