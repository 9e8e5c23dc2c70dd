"""The reader on other connections: what `settle` writes there is committed with the outcome, or neither is.

On a session `settle` calls ``session.add(...)``, on psycopg ``connection.execute(...)``, on psycopg2 it executes by a
cursor. Nobody commits but `next_outcome`.
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import psycopg
import psycopg2.extensions
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from aiokeyless import sync, worker
from aiokeyless.worker import ApprovalEvent

Async = TypeVar("Async", AsyncSession, psycopg.AsyncConnection)
Sync = TypeVar("Sync", Session, psycopg.Connection, psycopg2.extensions.connection)


async def read_async(connection: Async, settle: Callable[[Async, ApprovalEvent], Awaitable[None]]) -> None:
    """Settle orders as their outcomes come, until `settle` raises."""
    while True:
        async with worker.next_outcome(connection, "shop") as event:
            await settle(connection, event)


def read(connection: Sync, settle: Callable[[Sync, ApprovalEvent], None]) -> None:
    """Do the same without an event loop."""
    while True:
        with sync.next_outcome(connection, "shop") as event:
            settle(connection, event)
