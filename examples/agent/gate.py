"""The gate between an agent and money: what the code wrote, one person approves, and one approval acts once.

The agent, which may be wrong, tricked or lying, chooses the arguments and nothing else: not whom to ask, not the text
of the question, not whether it was approved.
"""

import secrets
import sqlite3
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Literal, NamedTuple, TypeAlias

from pydantic import BaseModel, Field, StringConstraints

from aiokeyless import (
    AlreadyApprovedError,
    ApprovalError,
    ApprovalTicket,
    ApprovalTimeoutError,
    KeylessClient,
    KeylessError,
)

# What may stand in a text on a phone: no line break, no invisible and no bidirectional character.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z .'-]{0,39}$")]
Amount = Annotated[Decimal, Field(gt=0, le=1000, decimal_places=2)]
GRACE = timedelta(seconds=10)  # after the end, to spend an approval that the final poll found
OPEN = "state IN ('asked', 'approved')"  # asked: undecided; approved: not used yet
State: TypeAlias = Literal["approved", "spent", "pending", "timed_out", "refused", "unreachable"]


class Transfer(BaseModel, frozen=True):
    """The validated arguments."""

    amount: Amount
    recipient: Name

    @property
    def payload(self) -> str:
        """What the user is asked: made by code from the validated arguments, never by the agent."""
        return f"Pay {self.amount:.2f} EUR to {self.recipient}"


class Answer(NamedTuple):
    """What a request has come to."""

    state: State
    request: str


class Gate:
    """Asks one user for transfers, and lets each approval act once.

    Args:
        client: The client.
        record: The record of the requests, in autocommit mode; processes and users may share the file.
        user_id: Whom to ask: of the session that the agent works for, never an argument of its tools.
        expires_in: Seconds within which an approval counts.
    """

    def __init__(
        self, client: KeylessClient, record: sqlite3.Connection, user_id: str, *, expires_in: float = 300.0
    ) -> None:
        self._client = client
        self._record = record
        self._user_id = user_id.upper()
        self._expires_in = expires_in
        record.execute(
            "CREATE TABLE IF NOT EXISTS requests (id PRIMARY KEY, user_id, payload, arguments, ticket, created, state)"
        )
        # At most one open request of a user for a transfer: an agent that repeats itself asks nobody again.
        record.execute(f"CREATE UNIQUE INDEX IF NOT EXISTS one_open ON requests (user_id, payload) WHERE {OPEN}")

    async def hold(self, transfer: Transfer, *, request: str | None = None, seconds: float = 50.0) -> Answer:
        """Ask for a transfer, or go on with the open request for it, for so many seconds at most.

        Args:
            transfer: What to do.
            request: The request to go on with. Default: the open one for this transfer, else a new one.
            seconds: How long to wait: less than the time-out of what calls the tool.
        """
        if request is None:
            request = self._open(transfer)
        found = self._record.execute(
            "SELECT ticket, created, state FROM requests WHERE id = ? AND user_id = ? AND payload = ?",
            (request, self._user_id, transfer.payload),
        ).fetchone()
        if found is None:
            return Answer("refused", request)  # no such request, or one of somebody else or for something else
        stored, created, state = found
        ticket = ApprovalTicket.from_json(stored)
        if not ticket.remaining():  # neither an approval that is found after the end counts, nor one unused until then
            state = self._change(request, "timed_out", OPEN)
        elif state == "asked":
            state = await self._outcome(request, ticket, transfer, seconds, created=created)
        return Answer(state, request)

    async def wait(self, transfer: Transfer) -> Answer:
        """Ask for a transfer, and hold until that is decided or cannot be known."""
        answer = await self.hold(transfer)
        while answer.state == "pending":
            answer = await self.hold(transfer, request=answer.request)
        return answer

    def find(self, request: str) -> tuple[Transfer, ApprovalTicket] | None:
        """Return what a request is for."""
        query = "SELECT arguments, ticket FROM requests WHERE id = ? AND user_id = ?"
        row = self._record.execute(query, (request, self._user_id)).fetchone()
        return row and (Transfer.model_validate_json(row[0]), ApprovalTicket.from_json(row[1]))

    def cancel(self, request: str) -> None:
        """Let an approval that comes later count for nothing. The phone still shows the request."""
        if self.find(request) is not None:
            self._change(request, "refused", OPEN)

    def spend(self, transfer: Transfer, request: str) -> bool:
        """Use up an approval; return whether it was there, for exactly this transfer, and neither used nor too old.

        Only who gets True may act. A crash right after it leaves a transfer that is marked and not made: use the
        request's id as the idempotency key of the payment, and repeat what is marked and not confirmed.
        """
        found = self.find(request)
        if found is None or not found[1].remaining(datetime.now(UTC) - GRACE):
            return False
        query = "UPDATE requests SET state = 'spent' WHERE (id, user_id, payload, state) = (?, ?, ?, 'approved')"
        return self._record.execute(query, (request, self._user_id, transfer.payload)).rowcount == 1

    def _open(self, transfer: Transfer) -> str:
        """Return the open request for a transfer, after making one where there was none; nobody is asked here."""
        request = secrets.token_hex(8)
        ticket = ApprovalTicket.for_operation(
            request,
            user_id=self._user_id,
            operation_payload=transfer.payload,
            expires_in=self._expires_in,
            require_auth_type="biom",
        )
        row = (request, self._user_id, transfer.payload, transfer.model_dump_json(), ticket.to_json(), False, "asked")
        self._record.execute("INSERT OR IGNORE INTO requests VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        query = f"SELECT id FROM requests WHERE user_id = ? AND payload = ? AND {OPEN}"  # noqa: S608  # OPEN is a constant
        found = self._record.execute(query, (self._user_id, transfer.payload)).fetchone()
        return str(found[0]) if found else request

    async def _outcome(
        self, request: str, ticket: ApprovalTicket, transfer: Transfer, seconds: float, *, created: bool
    ) -> State:
        try:
            if not created:
                await self._create(request, ticket, transfer)
            operation = await self._client.hold_for_approval(ticket, seconds=seconds)
        except ApprovalTimeoutError:
            return self._decide(request, "timed_out")
        except ApprovalError:
            return self._decide(request, "refused")  # an answer about something else
        except KeylessError:
            return "unreachable"  # or this server stops: the next one goes on
        return "pending" if operation is None else self._decide(request, "approved")

    async def _create(self, request: str, ticket: ApprovalTicket, transfer: Transfer) -> None:
        """Create the operation, once: after a crash it may be there already, pending or approved."""
        # Approved already: the record says that the request is open, so the approval is its own, and was not used.
        with suppress(AlreadyApprovedError):
            await self._client.create_operation(
                self._user_id,
                operation_id=request,
                operation_payload=transfer.payload,
                expires_in=ticket.remaining(),
                if_exists="resume",
            )
        # Here an application sends its push notification: docs/howto/notify-the-phone.md.
        self._record.execute("UPDATE requests SET created = TRUE WHERE id = ?", (request,))

    def _decide(self, request: str, state: State) -> State:
        """Decide a request that is undecided, and return what it is then: another process may have been first."""
        return self._change(request, state, "state = 'asked'")

    def _change(self, request: str, state: State, where: str) -> State:
        query = f"UPDATE requests SET state = ? WHERE id = ? AND {where}"  # noqa: S608  # both callers pass a constant
        self._record.execute(query, (state, request))
        now: State = self._record.execute("SELECT state FROM requests WHERE id = ?", (request,)).fetchone()[0]
        return now
