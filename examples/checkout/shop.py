"""A web shop that is paid by an approval on the customer's phone; a timeout or a false answer never counts as one."""

import contextlib
import logging
import os
import secrets
import sqlite3
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Annotated

import uvicorn
from fastapi import Body, Cookie, Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, Field

import aiokeyless
from aiokeyless.shutdown import close_on_signals
from aiokeyless.signatures import TransactionVerifier

FINAL = ("paid", "refused", "cancelled", "timed_out", "declined")  # the last one until the customer is asked anew
log = logging.getLogger("uvicorn.error")


@contextlib.asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
    """Make one client for all customers. Close it when the server is told to stop: it stops once all streams ended."""
    async with aiokeyless.KeylessClient() as client, close_on_signals(client):  # its key is in the environment
        app.state.client = client
        app.state.verifier = TransactionVerifier(client, tenant=os.environ.get("CHECKOUT_TENANT", "sandbox"))
        yield


app = FastAPI(lifespan=lifespan)


class Order(BaseModel):
    """An order, and its row on disk. Its operation's id is made of its own, so that each question is asked once."""

    id: str = Field(default_factory=lambda: secrets.token_hex(8))
    session: str = Field(exclude=True)  # the page is told neither this nor the ticket
    user_id: str  # who must approve, in Keyless: a real shop has it from the customer's enrolment
    price: str = "38.00 EUR"
    payload: str = Field(default_factory=lambda o: f"Pay {o['price']} to Fern & Clay, order {o['id'][:6].upper()}")
    asked: int = 1  # how often: the questions before this one were declined, and are answered no more
    state: str = "open"  # then waiting or unknown (these may still be approved), or one of FINAL
    lifetime: float = float(os.environ.get("CHECKOUT_EXPIRES_IN", "120"))
    ticket: str | None = Field(default=None, exclude=True)

    @property
    def operation_id(self) -> str:
        """The operation of the question that counts."""
        return self.id if self.asked == 1 else f"{self.id}-{self.asked}"


db = sqlite3.connect(os.environ.get("CHECKOUT_DB", "checkout.sqlite3"), isolation_level=None)  # autocommit
db.row_factory = sqlite3.Row
db.execute(f"CREATE TABLE IF NOT EXISTS orders ({', '.join(Order.model_fields)}, PRIMARY KEY (id))")
db.execute("CREATE TABLE IF NOT EXISTS evidence (signed_sha256 PRIMARY KEY, order_id, token)")  # a token counts once


def find(session: str, order_id: str | None = None) -> Order | None:
    """Return a customer's order: the one with this id, or the latest."""
    query = "SELECT * FROM orders WHERE session = ? AND id = coalesce(?, id) ORDER BY rowid DESC"
    row = db.execute(query, (session, order_id)).fetchone()
    return Order(**row) if row else None


def move(order: Order, state: str, ticket: str | None = None) -> Order:
    """Change an order's state, unless it is final or was asked anew, and keep its ticket; return it as it is then.

    This ensures "paid once": the operation's id makes asking idempotent, and is not a lock on what follows from the
    approval. Many streams may learn of one approval; one of them changes the row, and that one ships.
    """
    change = "UPDATE orders SET state = ?, ticket = coalesce(ticket, ?)"
    query = change + " WHERE id = ? AND asked = ? AND state NOT IN (?, ?, ?, ?, ?)"
    if db.execute(query, (state, ticket, order.id, order.asked, *FINAL)).rowcount == 1 and state == "paid":
        log.info("order %s is paid: ship it", order.id)
    return find(order.session, order.id) or order


def by_id(order_id: str) -> Order:
    """Return any customer's order: the app on the phone has no session here, and its token is checked instead."""
    row = db.execute("SELECT * FROM orders WHERE id = ?", (order_id,)).fetchone()
    if row is None:
        raise HTTPException(404, "no such order")
    return Order(**row)


async def own_order(order_id: str, session: Annotated[str, Cookie()] = "") -> Order:
    """Return the order that the path names, to the customer who made it only."""
    if order := find(session, order_id):
        return order
    raise HTTPException(404, "no such order")


async def same_origin(request: Request) -> None:
    """Refuse a POST from another site's page; browsers send Origin with every POST."""
    if request.headers.get("origin", "").partition("://")[2] != request.headers.get("host"):
        raise HTTPException(403, "posted from another site")


@app.get("/")
async def page() -> FileResponse:
    """Show the shop."""
    return FileResponse(Path(__file__).with_name("shop.html"), headers={"X-Frame-Options": "DENY"})


@app.post("/order", dependencies=[Depends(same_origin)])
async def start(req: Request, response: Response, session: Annotated[str, Cookie()] = "", after: str = "") -> Order:
    """Return the latest order. Create one for a new customer, or instead of `after`, which is then cancelled."""
    last = find(session)
    if last and (last.id != after or last.state in ("open", "waiting")):
        return last
    if last:
        move(last, "cancelled")
    session = session if last else secrets.token_urlsafe(32)
    response.set_cookie("session", session, httponly=True, samesite="lax", secure=req.url.scheme == "https")
    order = Order(session=session, user_id=last.user_id if last else secrets.token_hex(8).upper())
    db.execute("INSERT INTO orders VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", tuple(dict(order).values()))
    return order


@app.post("/order/{order_id}/pay", dependencies=[Depends(same_origin)])
async def pay(order: Annotated[Order, Depends(own_order)]) -> Order:
    """Ask the customer's phone: once per question, however often and in however many tabs Pay is clicked."""
    if order.ticket:
        return order
    try:
        ticket = await app.state.client.create_operation(
            order.user_id,
            operation_id=order.operation_id,
            operation_payload=order.payload,
            expires_in=order.lifetime,
            require_auth_type="biom",
        )
    except aiokeyless.ConflictError:  # asked before, maybe approved: the wait compares content and factor
        ticket = aiokeyless.ApprovalTicket.for_operation(
            order.operation_id,
            user_id=order.user_id,
            operation_payload=order.payload,
            expires_in=order.lifetime,
            require_auth_type="biom",
        )
    except aiokeyless.KeylessError as error:  # the operation may exist: clicking again is safe, and finds it
        log.warning("order %s: %s", order.id, error)
        raise HTTPException(503, "Keyless is not reachable") from error
    notify_phone(ticket)
    return move(order, "waiting", ticket.to_json())


def notify_phone(ticket: aiokeyless.ApprovalTicket) -> None:
    """Send a push notification: a real one is sent by Firebase or APNs, and is harmless twice."""
    print(f"push to the phone of {ticket.user_id}: {ticket.operation_id}", flush=True)


@app.post("/order/{order_id}/decline", dependencies=[Depends(same_origin)])
async def decline(order: Annotated[Order, Depends(own_order)]) -> Order:
    """Take the customer's word, given on the page: from here on an approval pays for nothing.

    The phone has no word for it: who leaves the scan may try again.
    """
    return move(order, "declined")


@app.post("/order/{order_id}/again", dependencies=[Depends(same_origin)])
async def ask_again(order: Annotated[Order, Depends(own_order)]) -> Order:
    """Ask anew after the customer declined: by a new operation, since the declined one stays pending.

    The payload tells the customer which is which.
    """
    payload = f"{order.payload.partition(', request ')[0]}, request {order.asked + 1}"
    change = "UPDATE orders SET asked = asked + 1, payload = ?, ticket = NULL, state = 'open'"
    query = change + " WHERE id = ? AND asked = ? AND state = 'declined'"
    db.execute(query, (payload, order.id, order.asked))  # no second time where it is clicked in two tabs
    return await pay(find(order.session, order.id) or order)


@app.get("/order/{order_id}/events", response_class=EventSourceResponse)
async def follow(order: Annotated[Order, Depends(own_order)]) -> AsyncIterator[ServerSentEvent]:
    """Follow the wait from its current state; if the ticket has expired, poll once more."""
    if order.ticket and order.state not in FINAL:
        ticket = aiokeyless.ApprovalTicket.from_json(order.ticket)
        yield ServerSentEvent(data={"state": "waiting", "left": ticket.remaining()}, retry=1000)
        try:
            async with contextlib.aclosing(app.state.client.watch_approval(ticket, explain=True)) as updates:
                async for update in updates:
                    reasons = [attempt.reason for attempt in update.attempts if attempt.failed]
                    news = {"trouble": update.error is not None, "reason": reasons[-1] if reasons else None}
                    yield ServerSentEvent(data={"state": "waiting", **news})
            end = "paid"  # only an approval of this ticket gets here: everything else raises
        except aiokeyless.ApprovalUnknownError:  # perhaps approved
            end = "unknown"
        except aiokeyless.ApprovalTimeoutError:  # final before the customer is told: a late approval pays for nothing
            end = "timed_out"
        except aiokeyless.ClientClosedError:
            return  # the server is stopping; the browser reconnects by itself, and resumes the wait
        except aiokeyless.KeylessError as error:  # a rejected answer, or an error such as a wrong key
            log.warning("order %s: %s", order.id, error)
            end = "refused" if isinstance(error, aiokeyless.ApprovalError) else "unknown"
        order = move(order, end)
    yield ServerSentEvent(data={"state": order.state})


@app.post("/order/{order_id}/evidence")
async def keep_evidence(order_id: str, token: Annotated[str, Body(embed=True)]) -> dict[str, str]:
    """Keep the token that the customer's app hands over. It is evidence, and pays for nothing."""
    order = by_id(order_id)
    try:
        signed = await app.state.verifier.verify(token, user_id=order.user_id, transaction_data=order.payload)
    except aiokeyless.SignatureError as error:
        log.warning("order %s: %s", order.id, error)
        raise HTTPException(503 if error.is_transient else 422, "this is no evidence") from error
    row = (signed.signed_sha256, order.id, token)
    if db.execute("INSERT OR IGNORE INTO evidence VALUES (?, ?, ?)", row).rowcount == 1:
        log.info("order %s: evidence kept", order.id)
    return {"sha256": signed.signed_sha256}


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.run(app, port=int(os.environ.get("CHECKOUT_PORT", "8000")))
