"""Log in by approving on the phone: no request is open for long, and one approval is used once.

A phone shows one login at a time, few in ten minutes, and the number that the page shows: docs/howto/prompt-bombing.md.
"""

import logging
import os
import secrets
import sqlite3
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, NamedTuple, TypedDict

import uvicorn
from fastapi import Body, Cookie, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import FileResponse
from phones import ACCOUNTS, open_record

from aiokeyless import (
    AlreadyApprovedError,
    ApprovalError,
    ApprovalTicket,
    ApprovalTimeoutError,
    ClientClosedError,
    KeylessClient,
    KeylessError,
)
from aiokeyless.shutdown import close_on_signals

UNREACHABLE = "We cannot reach Keyless. There is nothing wrong with your phone; try again in a moment."
ELSEWHERE = (
    "Your phone asks about a login in another browser. Approve it only if it is yours, or try again in 2 minutes."
)
LIFETIME = float(os.environ.get("LOGIN_EXPIRES_IN", "120"))
SESSION = 12 * 3600.0  # seconds from the question until its session ends
PROMPTS, PERIOD = 5, 600.0  # a user is asked so often at most, in so many seconds
UNLISTED = 5.0  # seconds for which the service may not list a new operation yet
# The account still has the user who was asked, and not a new one, such as after a theft.
SAME_USER = "EXISTS (SELECT 1 FROM users WHERE users.account = logins.account AND users.user_id = logins.user_id)"


class State(TypedDict):
    """What lives as long as the server."""

    client: KeylessClient
    record: sqlite3.Connection


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncGenerator[State]:
    """Open the record and the client. The signal that stops the server closes the client, which ends the long polls."""
    record = open_record()
    record.execute(
        "CREATE TABLE IF NOT EXISTS logins"
        " (id PRIMARY KEY, browser, email, account, ticket, state, user_id, number, asked)"
    )
    async with KeylessClient() as client, close_on_signals(client):
        yield {"client": client, "record": record}
    record.close()


def client_of(request: Request) -> KeylessClient:
    """Return the one client of the process."""
    client: KeylessClient = request.state.client
    return client


def record_of(request: Request) -> sqlite3.Connection:
    """Return the record of logins and sessions."""
    record: sqlite3.Connection = request.state.record
    return record


def is_https(request: Request) -> bool:
    """Return whether the browser came by TLS, by uvicorn's word: it believes the X-Forwarded-Proto of a known proxy."""
    return request.url.scheme == "https"


Client = Annotated[KeylessClient, Depends(client_of)]
Record = Annotated[sqlite3.Connection, Depends(record_of)]
log = logging.getLogger("uvicorn.error")


async def no_store(response: Response) -> None:
    """Keep answers out of caches: some keep any for an hour, and give it to everybody."""
    response.headers["Cache-Control"] = "no-store"


app = FastAPI(lifespan=lifespan, dependencies=[Depends(no_store)])


@app.get("/")
async def page() -> FileResponse:
    """Show the page."""
    return FileResponse(Path(__file__).with_name("login.html"), headers={"X-Frame-Options": "DENY"})


@app.post("/login")
async def start(
    client: Client,
    record: Record,
    response: Response,
    email: Annotated[str, Body(embed=True)],
    *,
    browser: Annotated[str, Cookie()] = "",
    secure: Annotated[bool, Depends(is_https)],
) -> dict[str, str | float]:
    """Ask the phone of the user with this address, and bind the login to this browser by a cookie."""
    account = ACCOUNTS.get(email.lower())
    if account is None:
        raise HTTPException(404, "We do not know this address.")
    linked = record.execute("SELECT user_id FROM users WHERE account = ?", (account,)).fetchone()
    if linked is None:
        raise HTTPException(409, "This account has no phone yet.")
    [user] = linked
    number = f"{secrets.randbelow(1000):03}"
    new = Prompt(secrets.token_hex(8), secrets.token_urlsafe(32), number, time.time() + LIFETIME)
    listed_at = time.time()  # before the list is asked for: it may be slow, and lack what was created meanwhile
    try:
        pending = {operation.operation_id for operation in await client.get_pending_operations(user)}
        prompt = reserve(record, new, user, email.lower(), pending, listed_at=listed_at)
        if prompt is not new and prompt.browser != browser:
            raise HTTPException(409, ELSEWHERE)
        response.set_cookie("browser", prompt.browser, httponly=True, samesite="lax", secure=secure)
        if prompt.state == "asking":
            await ask(client, user, prompt)
            query = "UPDATE logins SET state = 'pending', asked = ? WHERE id = ? AND state = 'asking'"
            record.execute(query, (time.time(), prompt.login))
    except KeylessError as error:
        if not (error.is_transient or isinstance(error, ClientClosedError)):  # else the phone may show it
            record.execute("UPDATE logins SET state = 'failed' WHERE id = ? AND state = 'asking'", (new.login,))
        # With the cookie, if there is one: the next request of this browser goes on with this login.
        raise HTTPException(503, UNREACHABLE, dict(response.headers)) from error
    return {"id": prompt.login, "number": prompt.number, "left": prompt.ends - time.time()}


async def ask(client: KeylessClient, user: str, prompt: "Prompt") -> None:
    """Create the operation of a login. If an earlier request was interrupted, it is there already, perhaps approved."""
    with suppress(AlreadyApprovedError):
        await client.create_operation(
            user,
            operation_id=prompt.login,
            operation_payload=prompt.payload,
            expires_in=LIFETIME,
            if_exists="resume",
        )
        notify_phone(user, prompt.login)


def notify_phone(user: str, login: str) -> None:
    """Send a push notification: a real one is sent by Firebase or APNs, and is harmless twice."""
    print(f"push to the phone of {user}: {login}", flush=True)


class Prompt(NamedTuple):
    """A login that a phone shows."""

    login: str
    browser: str
    number: str
    ends: float  # by this machine's clock
    state: str = "asking"

    @property
    def payload(self) -> str:
        """What the app must show: with the number of the page, so that users approve what they started."""
        return f"Log in to Fern & Clay? Number {self.number}"


def reserve(
    record: sqlite3.Connection, new: Prompt, user: str, email: str, pending: set[str], *, listed_at: float
) -> Prompt:
    """Return the login that the user's phone shows, or else store the new one, before the user is asked."""
    with record:
        record.execute("BEGIN IMMEDIATE")  # no other process asks this user meanwhile
        shown = prompt_on_phone(record, user, pending, listed_at)
        if shown is None:
            ticket = ApprovalTicket.for_operation(
                new.login,
                user_id=user,
                operation_payload=new.payload,
                expires_in=LIFETIME,
                require_auth_type="biom",
            )
            whose = email, ACCOUNTS[email]
            row = (new.login, new.browser, *whose, ticket.to_json(), "asking", user, new.number, time.time())
            record.execute("INSERT INTO logins VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    return shown or new


def prompt_on_phone(record: sqlite3.Connection, user: str, pending: set[str], listed_at: float) -> Prompt | None:
    """Return the login that the user's phone shows now, or None if it may be asked.

    An operation stays pending after its login has ended, so one that is older than a login's lifetime does not count.
    The list may lack what was created after it was asked for, or shortly before.
    """
    now = time.time()
    query = "SELECT id, browser, number, state, asked FROM logins WHERE user_id = ? AND asked > ?"
    asked = record.execute(query, (user, now - PERIOD)).fetchall()
    for login, browser, number, state, since in asked:
        is_unlisted = state == "asking" or (state == "pending" and since > listed_at - UNLISTED)
        is_shown = login in pending or is_unlisted
        if is_shown and since > now - LIFETIME:
            return Prompt(login, browser, number, since + LIFETIME, state)
    if sum(state != "failed" for *_, state, _ in asked) >= PROMPTS:
        raise HTTPException(429, "This phone was asked too often. Try again in 10 minutes.")
    return None


@app.get("/login/{login}")
async def follow(
    login: str,
    client: Client,
    record: Record,
    *,
    browser: Annotated[str, Cookie()] = "",
    wait: Annotated[float, Query(gt=0, le=55)] = 25,
) -> dict[str, str]:
    """Answer as soon as the login is decided, or that it is pending after `wait` seconds: the page then asks again."""
    query = "SELECT ticket, state FROM logins WHERE id = ? AND browser = ?"
    found = record.execute(query, (login, browser)).fetchone()
    if found is None:
        raise HTTPException(404, "no login of this browser")
    stored, state = found
    if state in {"asking", "pending"}:
        state = await outcome(client, ApprovalTicket.from_json(stored), wait)
    if state != "pending":
        # The first to know decides, across tabs, repeated requests and processes; a later answer changes nothing.
        still = f"state IN ('asking', 'pending') AND (? != 'approved' OR {SAME_USER})"
        query = f"UPDATE logins SET state = ? WHERE id = ? AND {still}"  # noqa: S608  # a constant
        if record.execute(query, (state, login, state)).rowcount == 1:
            log.info("login %s: %s", login, state)
        [state] = record.execute("SELECT state FROM logins WHERE id = ?", (login,)).fetchone()
    return {"state": state}


async def outcome(client: KeylessClient, ticket: ApprovalTicket, seconds: float) -> str:
    """Return what a login has come to after so many seconds at most."""
    if not ticket.remaining():
        return "timed_out"  # an approval that is found after the end logs nobody in
    try:
        operation = await client.hold_for_approval(ticket, seconds=seconds)
    except ApprovalTimeoutError:
        return "timed_out"
    except ApprovalError:
        return "refused"  # an answer about something else
    except ClientClosedError:
        return "pending"  # the server stops; the page asks the next one
    except KeylessError as error:
        raise HTTPException(503, UNREACHABLE) from error
    return "pending" if operation is None else "approved"


@app.get("/me")
async def me(record: Record, browser: Annotated[str, Cookie()] = "") -> dict[str, str]:
    """Say who is logged in: an approved login is the session of the browser that started it."""
    is_session = f"browser = ? AND state = 'approved' AND asked > ? AND {SAME_USER}"
    query = f"SELECT email FROM logins WHERE {is_session}"  # noqa: S608  # a constant
    found = record.execute(query, (browser, time.time() - SESSION)).fetchone()
    if found is None:
        raise HTTPException(401, "not logged in")
    return {"email": found[0]}


@app.post("/logout", status_code=204)
async def log_out(record: Record, browser: Annotated[str, Cookie()] = "") -> None:
    """End the session of this browser, and of whoever copied its cookie."""
    record.execute("UPDATE logins SET state = 'logged_out' WHERE browser = ? AND state = 'approved'", (browser,))


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ.get("LOGIN_PORT", "8000")))
