"""`PostgresConnection`: the application's own asyncpg connection."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar, Final

import asyncpg

from aiokeyless.errors import ConfigurationError

from .names import READS_EVERY, SCHEMA, check_schema, in_schema
from .transactions import Driver, DriverConnection, floors_of

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from asyncpg.pool import PoolConnectionProxy
    from asyncpg.transaction import Transaction

    Connection = asyncpg.Connection[Any] | PoolConnectionProxy[Any]

ERRORS: Final = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)
_ENDS_WITHIN: Final = 5.0  # seconds in which the server must end an uncommitted transaction


class PostgresConnection(DriverConnection):
    """The application's side of the broker, on an asyncpg connection of its own.

    For the schema ``keyless``, `submit_approval` and `next_outcome` also take the connection itself.

    Args:
        connection: The connection. A request is stored in the connection's transaction. For `next_outcome`, it must not
            be in a transaction: the outcome begins one, in which the body runs.
        schema: The broker's schema. Default: ``keyless``.

    Raises:
        ConfigurationError: It is no connection.
    """

    def __init__(self, connection: Connection, schema: str = SCHEMA) -> None:
        super().__init__(AsyncpgDriver(connection, schema))
        check_schema(schema)
        if not callable(getattr(connection, "is_in_transaction", None)):
            raise ConfigurationError(
                f"broker must be an asyncpg connection or a PostgresBroker, not {type(connection).__name__}; "
                "PostgresBroker(pool) makes one of a pool",
                argument="broker",
            )


class AsyncpgDriver(Driver):
    """asyncpg."""

    errors: tuple[type[Exception], ...] = ERRORS
    example: ClassVar[str] = "'async with connection.transaction()', or after the first statement of a session"
    savepoint: ClassVar[str] = "a savepoint: 'async with connection.transaction()'"

    def __init__(self, connection: Connection, schema: str) -> None:
        self.schema = schema
        self.floors = floors_of(connection)
        self._connection = connection
        self._transaction: Transaction

    async def execute(self, statement: str, *arguments: object) -> tuple[Any, ...] | None:
        row = await self._connection.fetchrow(in_schema(self.schema, statement), *arguments)
        return None if row is None else tuple(row)

    def is_in_transaction(self) -> bool:
        return self._connection.is_in_transaction()

    def joins_transaction(self) -> bool:
        return self._connection.is_in_transaction()

    async def begin(self) -> None:
        self._transaction = self._connection.transaction(isolation="read_committed")
        await self._transaction.start()

    async def commit(self) -> None:
        await self._transaction.commit()

    async def roll_back(self) -> None:
        if not self._connection.is_closed():
            await self._transaction.rollback()  # if the body has ended it, the server only warns

    async def pause(self) -> None:
        await asyncio.sleep(READS_EVERY)

    async def complete(self, step: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(step)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # retrieves a late error
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            with self.limit():
                while not task.done():
                    with suppress(asyncio.CancelledError):  # anyio's scopes cancel each await
                        await asyncio.wait({task})
            raise

    @contextmanager
    def limit(self) -> Iterator[None]:
        """Close a connection whose transaction takes too long to end. The server then ends the transaction itself."""
        giving_up = asyncio.get_running_loop().call_later(_ENDS_WITHIN, self._connection.terminate)
        try:
            yield
        finally:
            giving_up.cancel()
