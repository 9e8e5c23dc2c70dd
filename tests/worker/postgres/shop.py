"""What a shop does with its database, and what the tests look for in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from worker.conformance.brokers import decide_all as decide_all  # noqa: PLC0414  # for the tests here

if TYPE_CHECKING:
    import asyncpg

    from aiokeyless.worker.messages import ApprovalEvent

    Connection = asyncpg.Connection[Any]


class RefusalError(Exception):
    """What a body raises."""


async def operations(admin: Connection) -> set[str]:
    return {row[0] for row in await admin.fetch("SELECT operation_id FROM keyless.request")}


async def pay(connection: Connection, event: ApprovalEvent) -> None:
    await connection.execute("INSERT INTO payment VALUES ($1)", event.operation_id)


async def payments(admin: Connection) -> set[str]:
    return {row[0] for row in await admin.fetch("SELECT operation_id FROM payment")}


async def unread(admin: Connection, reader: str = "shop") -> dict[str, int]:
    """Return which outcomes a reader has not handled, and how often it failed to."""
    rows = await admin.fetch(
        "SELECT r.operation_id, u.failures FROM keyless.unread u JOIN keyless.request r ON r.id = u.id"
        " WHERE u.reader = $1",
        reader,
    )
    return {row[0]: row[1] for row in rows}
