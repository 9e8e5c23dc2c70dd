"""psycopg2."""

from __future__ import annotations

from typing import Any, ClassVar

import psycopg2
from psycopg2.extensions import cursor as tuple_cursor

from aiokeyless.worker.postgres.names import in_schema

from .driver import PARAMETER, Driver


class Adapter(Driver):
    """A connection, whatever its factory of cursors, with or without autocommit."""

    errors: tuple[type[Exception], ...] = (psycopg2.Error,)
    example: ClassVar[str] = "'with connection', or without autocommit"
    savepoint: ClassVar[str] = "SAVEPOINT"

    def __init__(self, connection: Any, schema: str) -> None:
        super().__init__(connection, schema, blocks=True)
        self._is_autocommit: bool = connection.autocommit

    async def execute(self, statement: str, *arguments: object) -> tuple[Any, ...] | None:
        with self.raw.cursor(cursor_factory=tuple_cursor) as cursor:
            cursor.execute(PARAMETER.sub("%s", in_schema(self.schema, statement)), arguments)
            row: tuple[Any, ...] | None = cursor.fetchone() if cursor.description else None
            return row

    async def begin(self) -> None:
        self.raw.autocommit = False  # then the first statement begins one
        await self.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")

    async def commit(self) -> None:
        self.raw.commit()
        self.raw.autocommit = self._is_autocommit

    async def roll_back(self) -> None:
        if not self.raw.closed:
            self.raw.rollback()
            self.raw.autocommit = self._is_autocommit
