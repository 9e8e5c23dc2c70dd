"""Lets a tool act once its user has approved exactly this call: docs/howto/agents.md."""

import asyncio
import sqlite3
import uuid
from collections.abc import Callable
from contextlib import closing, suppress

from aiokeyless import (
    AlreadyApprovedError,
    ApprovalTicket,
    ClientClosedError,
    KeylessClient,
    KeylessError,
)

TABLE = "CREATE TABLE IF NOT EXISTS calls (id PRIMARY KEY, payload, ticket, state)"


class Guard:
    """Lets a tool act once its user has approved: the user of the session that the agent works for."""

    def __init__(self, client: KeylessClient, record: sqlite3.Connection, user_id: str) -> None:
        self._client = client
        self._record = record
        self._user_id = user_id
        record.execute(TABLE)

    async def guarded(self, call: str, payload: str, act: Callable[[], str], *, seconds: float = 50) -> str:
        """Act once the user has approved this payload; while the answer is "pending", call again with the same call."""
        ticket, state = self._checkpoint(call, payload)
        if state != "asked":
            return state
        if not ticket.remaining():
            return self._decide(call, "refused: its time is up")
        try:
            with suppress(AlreadyApprovedError):  # this call's own question, which was approved meanwhile
                await self._client.create_operation(
                    self._user_id, operation_id=ticket.operation_id, operation_payload=payload, if_exists="resume"
                )
            operation = await self._client.hold_for_approval(ticket, seconds=seconds)
        except KeylessError as error:
            why = type(error).__name__
            if error.is_transient or isinstance(error, ClientClosedError):  # not reachable, or this process stops
                return f"pending: {why}"
            return self._decide(call, f"refused: {why}")  # such as a timeout, or an answer about something else
        if operation is None:
            return "pending: ask the user to look at the phone, and call again"
        return self._decide(call, "done before", act)

    def _decide(self, call: str, state: str, act: Callable[[], str] | None = None) -> str:
        """Decide a call before the agent is told: the first decision counts, and a late approval lets nothing act."""
        change = "UPDATE calls SET state = ? WHERE id = ? AND state = 'asked'"
        if self._record.execute(change, (state, call)).rowcount == 1 and act is not None:
            return act()
        return str(self._record.execute("SELECT state FROM calls WHERE id = ?", (call,)).fetchone()[0])

    def _checkpoint(self, call: str, payload: str) -> tuple[ApprovalTicket, str]:
        """Return ticket and state of a call, after storing both for a new call: it is asked, or what to answer."""
        new = ApprovalTicket.for_operation(
            str(uuid.uuid4()),
            user_id=self._user_id,
            operation_payload=payload,
            expires_in=300,
            require_auth_type="biom",
        )
        row = (call, payload, new.to_json())
        self._record.execute("INSERT OR IGNORE INTO calls VALUES (?, ?, ?, 'asked')", row)
        query = "SELECT payload, ticket, state FROM calls WHERE id = ?"
        shown, stored, state = self._record.execute(query, (call,)).fetchone()
        state = state if shown == payload else "refused: this call was about something else"
        return ApprovalTicket.from_json(stored), state


async def one_process(call: str, *, seconds: float) -> None:
    """Handle a call in a process of its own."""
    with closing(sqlite3.connect("calls.sqlite3", isolation_level=None)) as record:  # each statement commits
        async with KeylessClient() as client:
            guard = Guard(client, record, "C0FFEE")
            print(await guard.guarded(call, "Delete the project Fern", lambda: "deleted", seconds=seconds))


async def main() -> None:
    """Call three times: the user needs longer than the first, the second is after a restart, the third repeats it."""
    call = f"session-1/{uuid.uuid4()}"  # a real one is the session's name and the framework's id of the tool call
    for seconds in (0.5, 50, 50):
        await one_process(call, seconds=seconds)


if __name__ == "__main__":
    asyncio.run(main())
