"""Lets a tool act once its user has approved exactly this call: docs/howto/agents.md."""

import asyncio
import sqlite3
import uuid
from collections.abc import Callable
from contextlib import closing, suppress

from aiokeyless import (
    AlreadyApprovedError,
    ApprovalError,
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
        ticket = self._checkpoint(call, payload)
        if ticket is None or not ticket.remaining():
            return "refused: this call was about something else, or its time is up"
        try:
            with suppress(AlreadyApprovedError):  # this call's own question, which was approved meanwhile
                await self._client.create_operation(
                    self._user_id, operation_id=ticket.operation_id, operation_payload=payload, if_exists="resume"
                )
            operation = await self._client.hold_for_approval(ticket, seconds=seconds)
        except ApprovalError as error:  # time is up, or an answer about something else
            return f"refused: {type(error).__name__}"
        except KeylessError as error:
            again = error.is_transient or isinstance(error, ClientClosedError)  # not reachable, or this process stops
            return f"{'pending' if again else 'refused'}: {type(error).__name__}"
        if operation is None:
            return "pending: ask the user to look at the phone, and call again"
        done = self._record.execute("UPDATE calls SET state = 'done' WHERE id = ? AND state = 'asked'", (call,))
        return act() if done.rowcount == 1 else "done before"

    def _checkpoint(self, call: str, payload: str) -> ApprovalTicket | None:
        """Return the ticket of a call, after storing one for a new call; None if the call was about something else."""
        new = ApprovalTicket.for_operation(
            str(uuid.uuid4()),
            user_id=self._user_id,
            operation_payload=payload,
            expires_in=300,
            require_auth_type="biom",
        )
        row = (call, payload, new.to_json())
        self._record.execute("INSERT OR IGNORE INTO calls VALUES (?, ?, ?, 'asked')", row)
        shown, stored = self._record.execute("SELECT payload, ticket FROM calls WHERE id = ?", (call,)).fetchone()
        return ApprovalTicket.from_json(stored) if shown == payload else None


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
