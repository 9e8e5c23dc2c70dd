"""Requests and outcomes in the transactions of a connection of psycopg or Django, for `aiokeyless.sync`.

These drivers block, so the coroutines of this module await nothing. Each ends at its first step, in the caller's
thread.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from aiokeyless.errors import BrokerError, ConfigurationError, InvalidRequestError
from aiokeyless.worker.broker import ApplicationSide, NewRequest, OutcomeDelivery
from aiokeyless.worker.tables import LARGEST_REQUEST

from .names import READS_EVERY, within
from .refusals import (
    ended_by_body,
    first_line,
    inside_transaction,
    missing_schema,
    not_confirmed,
    outside_transaction,
    rolled_back,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

_SCHEMA: Final = "keyless"
#: libpq's PQTRANS_IDLE.
_IDLE: Final = 0
#: SQL states: for a wrong request, or one with another's operation id; for a missing or old schema; for a new reader.
_WRONG: Final = ("22", "23505", "54001")
_MISSING: Final = ("3F000", "42883", "42P01")
_NEW_READER: Final = "42704"


class _Driver(ABC):
    """The operations that a driver must have.

    Attributes:
        error: The root of its errors.
    """

    error: type[Exception]

    def execute(self, statement: str, *arguments: object) -> tuple[Any, ...] | None:
        """Execute a statement of the schema, and return its first row, if it has rows."""
        with self._cursor() as cursor:
            cursor.execute(within(_SCHEMA, statement), arguments)
            row: tuple[Any, ...] | None = cursor.fetchone() if cursor.description else None
            return row

    @abstractmethod
    def _cursor(self) -> AbstractContextManager[Any]:
        """Return a cursor whose rows are tuples."""

    @abstractmethod
    def is_in_transaction(self) -> bool:
        """Whether a transaction has begun."""

    @abstractmethod
    def would_begin(self) -> bool:
        """Whether the next statement is in a transaction that the caller must commit, even if it begins one."""

    @abstractmethod
    def transaction(self) -> AbstractContextManager[object]:
        """Return a new transaction, for a connection without one."""


class _Psycopg(_Driver):
    def __init__(self, connection: Any) -> None:
        from psycopg.rows import tuple_row  # noqa: PLC0415  # an application that has a connection has psycopg

        self.error = connection.Error
        self._connection = connection
        self._row = tuple_row

    def _cursor(self) -> AbstractContextManager[Any]:
        cursor: AbstractContextManager[Any] = self._connection.cursor(row_factory=self._row)
        return cursor

    def is_in_transaction(self) -> bool:
        status: int = self._connection.info.transaction_status
        return status != _IDLE

    def would_begin(self) -> bool:
        return not self._connection.autocommit or self.is_in_transaction()

    def transaction(self) -> AbstractContextManager[object]:
        transaction: AbstractContextManager[object] = self._connection.transaction()
        return transaction


class _Django(_Driver):
    def __init__(self, connection: Any) -> None:
        from django.db import Error, transaction  # noqa: PLC0415  # as above

        if connection.vendor != "postgresql":
            raise ConfigurationError(
                f"the connection must be one to PostgreSQL, not to {connection.vendor}: use a broker of its own, such "
                "as SqliteBroker",
                argument="broker",
            )
        self.error = Error
        self._connection = connection
        self._atomic: Any = transaction.atomic

    def _cursor(self) -> AbstractContextManager[Any]:
        cursor: AbstractContextManager[Any] = self._connection.cursor()
        return cursor

    def is_in_transaction(self) -> bool:
        return not self._connection.get_autocommit()

    def would_begin(self) -> bool:
        return self.is_in_transaction()

    def transaction(self) -> AbstractContextManager[object]:
        atomic: AbstractContextManager[object] = self._atomic(using=self._connection.alias, durable=True)
        return atomic


def side_of(connection: Any) -> BlockingConnection | None:
    """Return the application's side on a connection of psycopg or Django; None for anything else.

    Raises:
        ConfigurationError: It is Django's connection to another database.
    """
    if hasattr(connection, "in_atomic_block"):
        return BlockingConnection(_Django(connection))
    if hasattr(connection, "pgconn") and hasattr(connection, "__enter__"):  # not psycopg's AsyncConnection
        return BlockingConnection(_Psycopg(connection))
    return None


class BlockingConnection(ApplicationSide):
    """The application's side of the broker in the schema ``keyless``, on its own connection."""

    def __init__(self, driver: _Driver) -> None:
        self.largest_request: int = LARGEST_REQUEST
        self._driver = driver

    async def submit(self, new: NewRequest) -> bool:
        """See `ApplicationSide`. The driver's own errors end the transaction, and are raised unchanged."""
        if not self._driver.would_begin():
            raise outside_transaction("'with connection.transaction()', in Django 'with transaction.atomic()'")
        try:
            row = self._driver.execute("SELECT {}.submit(%s::text, %s::text)", new.body.decode(), new.traceparent)
        except self._driver.error as error:
            if _state(error).startswith(_WRONG):
                raise InvalidRequestError(first_line(error)) from None
            raise
        assert row is not None  # noqa: S101  # the function returns a value
        return bool(row[0])

    async def next_outcome(self, reader: str) -> OutcomeDelivery:
        """See `ApplicationSide`."""
        if self._driver.is_in_transaction():
            raise inside_transaction(_SCHEMA)
        while True:
            outcome = _Outcome(self._driver, reader)
            if outcome.take():
                return outcome
            time.sleep(READS_EVERY)  # noqa: ASYNC251  # it blocks: see the module


class _RolledBack(Exception):  # noqa: N818  # no error: it tells the transaction how it ends
    """Ends a transaction."""


class _Outcome(OutcomeDelivery):
    """An outcome in the transaction that handles it."""

    __slots__ = ("_driver", "_id", "_number", "_reader", "_transaction")

    def __init__(self, driver: _Driver, reader: str) -> None:
        self._driver = driver
        self._reader = reader
        self._transaction = driver.transaction()

    def take(self) -> bool:
        """Begin the transaction, and take an outcome in it. If there is none, end the transaction and return False."""
        with _errors(self._driver):
            self._transaction.__enter__()
            try:
                # As the first statement: a transaction that waits for another's commit must see that commit.
                self._driver.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
                row = self._driver.execute(
                    "SELECT id, event, pg_current_xact_id()::text FROM {}.next_outcome(%s::text)", self._reader
                )
            except self._driver.error as error:
                self._roll_back()
                if _state(error) != _NEW_READER:
                    raise
                with self._driver.transaction():
                    self._driver.execute("SELECT {}.add_reader(%s::text)", self._reader)
                return False
            except BaseException:  # such as KeyboardInterrupt
                self._roll_back()
                raise
            if row is None:
                self._roll_back()
                return False
        self._id, event, self._number = row
        self.data, self.place = event.encode(), f"request-{self._id}"
        return True

    async def handled(self) -> None:
        """Commit; see `OutcomeDelivery`.

        Raises:
            ConfigurationError: The body has ended the transaction itself.
            BrokerError: The transaction is not committed, or its result is unknown.
        """
        try:
            self._driver.execute("SET CONSTRAINTS ALL IMMEDIATE")
            row = self._driver.execute("SELECT pg_current_xact_id_if_assigned()::text")
        except self._driver.error as error:  # a COMMIT of a failed transaction is a silent rollback
            await self.put_off()
            raise rolled_back(first_line(error), "a savepoint") from error
        if row != (self._number,):
            await self.put_off()
            raise ended_by_body()
        try:
            self._transaction.__exit__(None, None, None)
        except self._driver.error as error:
            raise not_confirmed(first_line(error)) from error

    async def put_off(self, delay: float | None = None) -> None:
        """Roll back, and put it off; see `OutcomeDelivery`."""
        with _errors(self._driver):
            self._roll_back()
            with self._driver.transaction():
                self._driver.execute(
                    "SELECT {}.put_off_outcome(%s::text, %s::bigint, %s::double precision)",
                    self._reader,
                    self._id,
                    delay,
                )

    def _roll_back(self) -> None:
        self._transaction.__exit__(_RolledBack, _RolledBack(), None)


@contextmanager
def _errors(driver: _Driver) -> Iterator[None]:
    """Raise a driver's errors as the broker's."""
    try:
        yield
    except driver.error as error:
        if _state(error) in _MISSING:
            raise missing_schema(_SCHEMA) from None
        raise BrokerError(f"outcomes cannot be read: {first_line(error)}") from None


def _state(error: BaseException) -> str:
    """Return the SQL state of an error, even if Django has wrapped it."""
    return getattr(error.__cause__ or error, "sqlstate", None) or ""
