"""The wait for an approval as a Temporal activity, and a transfer that happens once.

The wait heartbeats its ticket: where its worker dies, another one goes on with the same operation and deadline.
"""

import sqlite3
from dataclasses import dataclass
from enum import StrEnum

from temporalio import activity
from temporalio.exceptions import ApplicationError

from aiokeyless import (
    AlreadyApprovedError,
    ApprovalError,
    ApprovalTicket,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    ConfigurationError,
    KeylessClient,
    KeylessError,
    StatusError,
)

HEARTBEAT = 10.0  # seconds between two heartbeats
#: Statuses that say nothing against the request: a key that is refused is the worker's, and is fixed there.
RETRYABLE = frozenset({401, 403, 408, 425, 429})


class Outcome(StrEnum):
    """How a wait ended; what ends it otherwise is an error of the activity."""

    APPROVED = "approved"
    TIMED_OUT = "timed_out"  # not a denial: the user can still approve, and nothing may follow from it


@dataclass(frozen=True)
class Request:
    """What a user is asked; `operation_id` is the workflow's own, so that every attempt asks the same."""

    operation_id: str
    user_id: str
    payload: str
    expires_in: float = 120.0


class Approvals:
    """The activity, on one client for all waits of a worker."""

    def __init__(self, client: KeylessClient, *, heartbeat_every: float = HEARTBEAT) -> None:
        self._client = client
        self._heartbeat_every = heartbeat_every

    @activity.defn
    async def wait_for_approval(self, request: Request) -> Outcome:
        """Ask the user, unless an earlier attempt did, and wait until the ticket's end."""
        try:
            ticket = await self._ticket(request)
            while True:
                activity.heartbeat(ticket.to_json())
                if await self._client.hold_for_approval(ticket, seconds=self._heartbeat_every) is not None:
                    return Outcome.APPROVED
        except KeylessError as error:
            if isinstance(error, ApprovalTimeoutError) and not isinstance(error, ApprovalUnknownError):
                return Outcome.TIMED_OUT
            final = is_final(error)
            raise ApplicationError(str(error), type=type(error).__name__, non_retryable=final) from error

    async def _ticket(self, request: Request) -> ApprovalTicket:
        info = activity.info()
        if info.heartbeat_details:
            return ApprovalTicket.from_json(info.heartbeat_details[0])
        try:
            return await self._client.create_operation(
                request.user_id,
                operation_id=request.operation_id,
                operation_payload=request.payload,
                expires_in=request.expires_in,
                if_exists="resume",
                require_auth_type="biom",
            )
        except AlreadyApprovedError as error:
            if info.attempt == 1:
                raise  # the approval of an earlier request
            return error.ticket  # an earlier attempt asked, and its worker died before the first heartbeat


def is_final(error: KeylessError) -> bool:
    """Return whether another attempt would end in the same way: wrong input, or an answer about something else.

    An outage is not final, even at the ticket's end: the next attempt polls once more, and learns what became of it.
    """
    match error:
        case ApprovalUnknownError():
            return False
        case StatusError(status=status):
            return status < 500 and status not in RETRYABLE
    return isinstance(error, ConfigurationError | ApprovalError)


class Bank:
    """Moves money, once for an operation: Temporal runs an activity at least once."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database  # in autocommit
        database.execute("CREATE TABLE IF NOT EXISTS transfers (operation_id TEXT PRIMARY KEY, payload TEXT)")

    @activity.defn
    async def transfer(self, request: Request) -> bool:
        """Carry out an approved transfer; return whether this call did.

        A real bank gets the operation's id as its idempotency key, so that a crash after the row loses nothing.
        """
        query = "INSERT OR IGNORE INTO transfers VALUES (?, ?)"
        return self._database.execute(query, (request.operation_id, request.payload)).rowcount == 1
