"""Approvals for many tenants, in one process: `uvicorn tenants_app:app`."""

import logging
import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Annotated, NamedTuple

from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy import update
from sqlalchemy.dialects.postgresql import insert
from tenants import Approval, Registry, Table, engine, make_client, sessions

from aiokeyless import (
    AlreadyApprovedError,
    ApprovalError,
    ApprovalTicket,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    ClientClosedError,
    KeylessError,
)
from aiokeyless.shutdown import close_on_signals

log = logging.getLogger("tenants")
EXPIRES_IN = 120.0  # seconds for an approval
LATE = timedelta(seconds=2)  # after them, for a browser on its way: what is found later pays nothing
OPEN = ("asking", "asked")  # asking: the answer to the create may be lost, and the phone was not told
clients = Registry(make_client)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
    """Make the tables, as a migration would, and the clients."""
    async with engine.begin() as connection:
        await connection.run_sync(Table.metadata.create_all)
    async with clients, close_on_signals(clients):
        yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


class Login(NamedTuple):
    """Who is logged in."""

    tenant: str
    user_id: str


def login() -> Login:
    """Return who is logged in. Take both from your session, and neither from the browser."""
    raise HTTPException(401)


@app.post("/approvals/{order}")
async def ask(order: str, who: Annotated[Login, Depends(login)]) -> dict[str, str]:
    """Ask the user about an order, once, however often the browser repeats it."""
    client = clients.get(who.tenant, to_ask=True)
    if client is None:
        raise HTTPException(403)
    text = f"Pay order {order}"  # a real site has it from the order, and asks a user few at once
    new = ApprovalTicket.for_operation(
        str(uuid.uuid4()),
        user_id=who.user_id,
        operation_payload=text,
        expires_in=EXPIRES_IN,
        require_auth_type="biom",
    )
    async with sessions.begin() as session:  # before asking
        values = {"tenant": who.tenant, "order_id": order, "user_id": who.user_id, "ticket": new.to_json()}
        await session.execute(insert(Approval).values(values).on_conflict_do_nothing())
    row = await find(order, who)
    ticket = ApprovalTicket.from_json(row.ticket)
    if row.state == "asking" and ticket.remaining():
        try:
            await client.create_operation(
                who.user_id, operation_id=ticket.operation_id, operation_payload=text, if_exists="resume"
            )
        except AlreadyApprovedError:
            pass  # `approval` finds it
        except KeylessError as error:
            log.warning("%r of %r: %s", order, client, error)
            return {"state": "not asked"}  # perhaps: the browser asks once more
        async with sessions.begin() as session:
            told = update(Approval).where(Approval.tenant == who.tenant, Approval.order_id == order)
            told = told.where(Approval.state == "asking").values(state="asked").returning(Approval.order_id)
            if (await session.scalars(told)).first():
                notify_phone(ticket)
        return {"state": "asked"}
    return {"state": row.state}


@app.get("/approvals/{order}")
async def approval(order: str, who: Annotated[Login, Depends(login)]) -> dict[str, str]:
    """Answer once an order is decided, or after 25 seconds that it is pending: the caller then asks again."""
    row = await find(order, who)
    client = clients.get(who.tenant)
    if row.state not in OPEN or client is None:
        return {"state": row.state if client else "unknown"}
    try:
        ticket = ApprovalTicket.from_json(row.ticket)
        operation = await client.hold_for_approval(ticket, seconds=25, if_missing="wait")
        state = "pending" if operation is None else await decide(row, "approved")
    except ClientClosedError:  # the server stops, or the tenant is suspended
        state = "pending"
    except ApprovalTimeoutError as error:
        state = "unknown" if isinstance(error, ApprovalUnknownError) else await decide(row, "timed out")
    except ApprovalError:  # a PIN, or an answer about something else
        state = await decide(row, "refused")
    except KeylessError as error:  # such as a wrong key
        log.warning("%r of %r: %s", order, client, error)
        state = "unknown"
    return {"state": state}


def notify_phone(ticket: ApprovalTicket) -> None:
    """Send a push notification: your own function. It is called once, after the operation is there."""
    print(f"push to {ticket.user_id}: {ticket.operation_id}", flush=True)


async def find(order: str, who: Login) -> Approval:
    """Return what this user of this tenant was asked. Its connection is given back before the wait."""
    async with sessions() as session:
        row = await session.get(Approval, (who.tenant, order))
    if row is None or row.user_id != who.user_id:
        raise HTTPException(404)
    return row


async def decide(asked: Approval, state: str) -> str:
    """Store an outcome before anybody is told: the first one counts, and an approval after it changes nothing."""
    async with sessions.begin() as session:
        row = await session.get(Approval, (asked.tenant, asked.order_id), with_for_update=True)
        if row is None:  # the tenant was deleted
            raise HTTPException(404)
        if row.state in OPEN:
            is_late = not ApprovalTicket.from_json(row.ticket).remaining(datetime.now(UTC) - LATE)
            row.state = "timed out" if state == "approved" and is_late else state
            # here, if it is "approved" now, store the payment, too
        return row.state
