"""A worker beside a web server, in one process: ``uvicorn worker_lifespan:app``.

It needs FastAPI and uvicorn; ``KEYLESS_BROKER``, ``KEYLESS_BASE_URL`` and ``KEYLESS_API_KEY`` in the
environment. Starlette is the same, with ``Starlette(lifespan=lifespan)``.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from aiokeyless import KeylessClient
from aiokeyless.worker import ApprovalWorker


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Run a worker while the server runs. If the worker fails, end the process, so that both are started again."""
    async with KeylessClient() as client, ApprovalWorker(client, os.environ["KEYLESS_BROKER"]):
        try:
            yield
        except asyncio.CancelledError:  # the worker has failed, and the server would go on without it
            signal.raise_signal(signal.SIGTERM)
            raise


app = FastAPI(lifespan=lifespan)


@app.get("/")
async def index() -> dict[str, str]:
    """Answer as the rest of an application does."""
    return {"state": "serving"}
