"""An application's own connection of psycopg or Django, for `aiokeyless.sync`.

These drivers block, so the coroutines of this module await nothing. Each ends at its first step, in the caller's
thread.
"""

from __future__ import annotations

import re
import time
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Final

from aiokeyless.errors import ConfigurationError

from .names import READS_EVERY, SCHEMA, in_schema
from .transactions import Driver, DriverConnection, floors_of

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

#: libpq's PQTRANS_IDLE.
_IDLE: Final = 0
_PARAMETER: Final = re.compile(r"\$\d")


def side_of(connection: Any) -> DriverConnection | None:
    """Return the application's side on a connection of psycopg or Django; None for anything else.

    Raises:
        ConfigurationError: It is Django's connection to another database.
    """
    if hasattr(connection, "in_atomic_block"):
        return DriverConnection(_Django(connection))
    if hasattr(connection, "pgconn") and hasattr(connection, "__enter__"):  # not psycopg's AsyncConnection
        return DriverConnection(_Psycopg(connection))
    return None


class _RolledBack(Exception):  # noqa: N818  # no error: it tells the transaction how it ends
    """Ends a transaction."""


class _BlockingDriver(Driver):
    example: ClassVar[str] = "'with connection.transaction()', in Django 'with transaction.atomic()'"
    savepoint: ClassVar[str] = "a savepoint"
    schema = SCHEMA

    def __init__(self, connection: Any) -> None:
        self.floors = floors_of(connection)
        self._connection = connection
        self._transaction: AbstractContextManager[object] | None = None  # None if none was begun

    @abstractmethod
    def _cursor(self) -> AbstractContextManager[Any]:
        """Return a cursor whose rows are tuples."""

    @abstractmethod
    def _new_transaction(self) -> AbstractContextManager[object]:
        """Return a new transaction, for a connection without one."""

    async def execute(self, statement: str, *arguments: object) -> tuple[Any, ...] | None:
        with self._cursor() as cursor:
            cursor.execute(_PARAMETER.sub("%s", in_schema(self.schema, statement)), arguments)
            row: tuple[Any, ...] | None = cursor.fetchone() if cursor.description else None
            return row

    async def begin(self) -> None:
        transaction = self._new_transaction()
        transaction.__enter__()
        self._transaction = transaction
        await self.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")

    async def commit(self) -> None:
        self._end(None)

    async def roll_back(self) -> None:
        self._end(_RolledBack())

    def _end(self, reason: _RolledBack | None) -> None:
        transaction, self._transaction = self._transaction, None
        if transaction is not None:
            transaction.__exit__(None if reason is None else _RolledBack, reason, None)

    async def pause(self) -> None:
        time.sleep(READS_EVERY)  # noqa: ASYNC251  # it blocks: see the module


class _Psycopg(_BlockingDriver):
    def __init__(self, connection: Any) -> None:
        from psycopg.rows import tuple_row  # noqa: PLC0415  # an application that has a connection has psycopg

        super().__init__(connection)
        self.errors = (connection.Error,)
        self._row = tuple_row

    def _cursor(self) -> AbstractContextManager[Any]:
        cursor: AbstractContextManager[Any] = self._connection.cursor(row_factory=self._row)
        return cursor

    def is_in_transaction(self) -> bool:
        status: int = self._connection.info.transaction_status
        return status != _IDLE

    def joins_transaction(self) -> bool:
        return not self._connection.autocommit or self.is_in_transaction()

    def _new_transaction(self) -> AbstractContextManager[object]:
        transaction: AbstractContextManager[object] = self._connection.transaction()
        return transaction


class _Django(_BlockingDriver):
    def __init__(self, connection: Any) -> None:
        from django.db import Error, transaction  # noqa: PLC0415  # as above

        if connection.vendor != "postgresql":
            raise ConfigurationError(
                f"the connection must be one to PostgreSQL, not to {connection.vendor}: use a broker of its own, such "
                "as SqliteBroker",
                argument="broker",
            )
        super().__init__(connection)
        self.floors = floors_of(connection.connection)  # the driver's: Django's own may be a proxy
        self.errors = (Error,)
        self._atomic: Any = transaction.atomic

    def _cursor(self) -> AbstractContextManager[Any]:
        cursor: AbstractContextManager[Any] = self._connection.cursor()
        return cursor

    def is_in_transaction(self) -> bool:
        return not self._connection.get_autocommit()

    def joins_transaction(self) -> bool:
        return self.is_in_transaction()

    def _new_transaction(self) -> AbstractContextManager[object]:
        atomic: AbstractContextManager[object] = self._atomic(using=self._connection.alias, durable=True)
        return atomic
