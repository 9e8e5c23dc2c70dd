"""A shop that stores an order and the request for its approval in one transaction: both are there, or neither."""

import contextlib
import os
from collections.abc import AsyncGenerator
from typing import Annotated

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from tables import DATABASE_URL, Order, Table

from aiokeyless import BrokerError
from aiokeyless.worker import submit_approval

engine = create_async_engine(DATABASE_URL.replace("postgresql:", "postgresql+asyncpg:", 1), pool_pre_ping=True)
sessions = async_sessionmaker(engine, expire_on_commit=False)


@contextlib.asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
    """Make the tables, as a migration would."""
    async with engine.begin() as connection:
        await connection.run_sync(Table.metadata.create_all)
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


@app.exception_handler(OSError)
@app.exception_handler(DBAPIError)
@app.exception_handler(BrokerError)
async def fail(_request: Request, error: OSError | DBAPIError | BrokerError) -> JSONResponse:
    """Answer 503 if another try is worth it, else 500. On a session, a database that is away is its driver's error."""
    if isinstance(error, DBAPIError):
        may_pass = error.connection_invalidated
    else:
        may_pass = not isinstance(error, BrokerError) or error.is_transient
    if not may_pass:
        raise error
    return JSONResponse({"error": "The shop is busy. Try again."}, 503, {"Retry-After": "1"})


class NewOrder(BaseModel):
    """An order from the shop's pages, which take the user from their session, and never from the customer.

    A page chooses the order's id, so that a second click is the same order.
    """

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,64}$")]
    user_id: Annotated[str, Field(pattern=r"^[0-9A-F]{1,128}$")]
    amount: Annotated[str, Field(pattern=r"^[0-9]{1,9}\.[0-9]{2}$")]


@app.post("/orders")
async def place(new: NewOrder) -> dict[str, str]:
    """Store an order, and have its customer asked."""
    order = Order(id=new.id, user_id=new.user_id, text=f"Pay {new.amount} EUR to Fern & Clay, order {new.id}")
    with contextlib.suppress(IntegrityError):  # it is there already
        async with sessions.begin() as session:
            session.add(order)
            await session.flush()
            await submit_approval(
                session, order.user_id, operation_id=order.id, operation_payload=order.text, require_auth_type="biom"
            )
        notify_phone(order)  # after the commit: a worker asks within 0.2 s
    return await show(new.id)


def notify_phone(order: Order) -> None:
    """Send a push notification: a real one is sent by Firebase or APNs, and is harmless twice."""
    print(f"push to the phone of {order.user_id}: {order.id}", flush=True)


@app.get("/")
async def status() -> str:
    """Answer that the shop is open."""
    return "open"


@app.get("/orders/{order_id}")
async def show(order_id: str) -> dict[str, str]:
    """Return how an order stands."""
    async with sessions() as session:
        order = await session.get(Order, order_id)
    if order is None:
        raise HTTPException(404)
    return {"id": order.id, "text": order.text, "state": order.state}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("SHOP_PORT", "8000")))
