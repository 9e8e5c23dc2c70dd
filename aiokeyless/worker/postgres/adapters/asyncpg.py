"""asyncpg."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final

import asyncpg

from aiokeyless.worker.postgres.names import in_schema

from .driver import Driver

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy
    from asyncpg.transaction import Transaction

    Connection = asyncpg.Connection[Any] | PoolConnectionProxy[Any]

ERRORS: Final = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)


class Adapter(Driver):
    """A connection, or what a pool gives."""

    errors: tuple[type[Exception], ...] = ERRORS
    example: ClassVar[str] = "'async with connection.transaction()'; with SQLAlchemy, pass the session itself"
    savepoint: ClassVar[str] = "a savepoint: 'async with connection.transaction()'"

    def __init__(self, connection: Connection, schema: str) -> None:
        super().__init__(connection, schema, blocks=False)
        self._connection = connection
        self._transaction: Transaction

    async def execute(self, statement: str, *arguments: object) -> tuple[Any, ...] | None:
        row = await self._connection.fetchrow(in_schema(self.schema, statement), *arguments)
        return None if row is None else tuple(row)

    def is_lost(self) -> bool:
        try:
            return self._connection.is_closed()
        except asyncpg.InterfaceError:  # its pool has taken it back
            return True

    async def begin(self) -> None:
        self._transaction = self._connection.transaction(isolation="read_committed")
        await self._transaction.start()

    async def commit(self) -> None:
        await self._transaction.commit()

    async def roll_back(self) -> None:
        if not self.is_lost():
            await self._transaction.rollback()  # if the body has ended it, the server only warns
