"""What the servers of this folder share: they ask a user, and answer a long poll. Each of them imports it."""

from aiokeyless import (
    ApprovalError,
    ApprovalTicket,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    ClientClosedError,
    KeylessClient,
)

tickets: dict[str, ApprovalTicket] = {}  # a real site keeps them in its database, each with the user who may read it


async def ask(client: KeylessClient) -> dict[str, str]:
    """Ask the user; the ticket binds each later wait to this user and this payload."""
    ticket = await client.create_operation("C0FFEE", operation_payload="Pay 40 to Alice", require_auth_type="biom")
    tickets[ticket.operation_id] = ticket
    return {"operation_id": ticket.operation_id}


async def state(client: KeylessClient, operation_id: str) -> dict[str, str]:
    """Answer once the user has approved, or after 25 seconds that it is pending: the caller then asks again."""
    if (ticket := tickets.get(operation_id)) is None:  # an id out of a URL names a ticket, and is not waited for
        return {"state": "not asked"}
    try:
        operation = await client.hold_for_approval(ticket, seconds=25)
    except ApprovalUnknownError:  # perhaps approved: the caller asks again in a while, which polls once more
        return {"state": "unknown"}
    except ApprovalTimeoutError:
        return {"state": "timed out"}
    except ApprovalError:  # a PIN, or an answer about something else
        return {"state": "refused"}
    except ClientClosedError:  # the server stops: the caller asks the next one
        return {"state": "pending"}
    return {"state": "pending" if operation is None else "approved"}
