"""psycopg 3, of both faces."""

from __future__ import annotations

from typing import Any, ClassVar

import psycopg
from psycopg.rows import tuple_row

from aiokeyless.worker.postgres.names import in_schema

from .driver import PARAMETER, Driver, result_of


class Adapter(Driver):
    """A connection, whatever its factories of rows and cursors, with or without autocommit."""

    errors: tuple[type[Exception], ...] = (psycopg.Error,)
    example: ClassVar[str] = "'with connection.transaction()', or 'async with'"
    savepoint: ClassVar[str] = "a savepoint: 'with connection.transaction()', or 'async with'"

    def __init__(self, connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any], schema: str) -> None:
        super().__init__(connection, schema, blocks=isinstance(connection, psycopg.Connection))
        self._cursor: Any = psycopg.Cursor if self.blocks else psycopg.AsyncCursor
        self._transaction: Any = None  # None if none was begun

    async def execute(self, statement: str, *arguments: object) -> tuple[Any, ...] | None:
        cursor = self._cursor(self.raw, row_factory=tuple_row)
        await result_of(cursor.execute(PARAMETER.sub("%s", in_schema(self.schema, statement)), arguments))
        row: tuple[Any, ...] | None = await result_of(cursor.fetchone()) if cursor.description else None
        return row

    async def begin(self) -> None:
        transaction = self.raw.transaction()
        await result_of(transaction.__enter__() if self.blocks else transaction.__aenter__())
        self._transaction = transaction
        await self.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")

    async def commit(self) -> None:
        await self._end(None)

    async def roll_back(self) -> None:
        await self._end(psycopg.Rollback())

    async def _end(self, reason: psycopg.Rollback | None) -> None:
        transaction, self._transaction = self._transaction, None
        if transaction is not None:
            leave = transaction.__exit__ if self.blocks else transaction.__aexit__
            await result_of(leave(reason and psycopg.Rollback, reason, None))
