"""Django, on psycopg 3 or psycopg2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from django.db import Error, transaction

from aiokeyless.errors import ConfigurationError
from aiokeyless.worker.postgres.names import in_schema

from .driver import PARAMETER, Driver

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


class Adapter(Driver):
    """Django's connection to a database, or its proxy for a thread's."""

    errors: tuple[type[Exception], ...] = (Error,)
    example: ClassVar[str] = "'with transaction.atomic()'"
    savepoint: ClassVar[str] = "a savepoint: 'with transaction.atomic()'"

    def __init__(self, connection: Any, schema: str) -> None:
        vendor = getattr(connection, "vendor", "a cache")  # whose proxy has the same type
        if vendor != "postgresql":
            raise ConfigurationError(
                f"the connection must be one to PostgreSQL, not to {vendor}: use a broker of its own, such as "
                "SqliteBroker",
                argument="broker",
            )
        super().__init__(connection.connection, schema, blocks=True)
        self._connection = connection
        self._atomic: AbstractContextManager[object] | None = None  # None if none was begun

    async def execute(self, statement: str, *arguments: object) -> tuple[Any, ...] | None:
        with self._connection.cursor() as cursor:
            cursor.execute(PARAMETER.sub("%s", in_schema(self.schema, statement)), arguments)
            row: tuple[Any, ...] | None = cursor.fetchone() if cursor.description else None
        self.raw: Any = self._connection.connection
        return row

    def is_in_transaction(self) -> bool:
        return not self._connection.get_autocommit()

    async def begin(self) -> None:
        atomic: Any = transaction.atomic(using=self._connection.alias, durable=True)
        atomic.__enter__()
        self._atomic = atomic
        await self.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")

    async def commit(self) -> None:
        self._end(None)

    async def roll_back(self) -> None:
        self._end(Exception)

    def _end(self, reason: type[Exception] | None) -> None:
        atomic, self._atomic = self._atomic, None
        if atomic is not None:
            atomic.__exit__(reason, None, None)
