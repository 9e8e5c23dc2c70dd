"""`PostgresConnection`: requests and outcomes in the transactions of an application's own asyncpg connection."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import asyncpg

from aiokeyless.errors import ConfigurationError
from aiokeyless.worker.broker import ApplicationSide, NewRequest, OutcomeDelivery, UnavailableError
from aiokeyless.worker.tables import LARGEST_REQUEST

from .failures import broker_errors, request_errors
from .names import READS_EVERY, check_schema, within
from .refusals import ended_by_body, inside_transaction, not_confirmed, outside_transaction, rolled_back

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from asyncpg.pool import PoolConnectionProxy
    from asyncpg.transaction import Transaction

    Connection = asyncpg.Connection[Any] | PoolConnectionProxy[Any]

_ENDS_WITHIN: Final = 5.0  # seconds in which the server must end an uncommitted transaction


class PostgresConnection(ApplicationSide):
    """The application's side of the broker, on an asyncpg connection of its own.

    For the schema ``keyless``, `submit_approval` and `next_outcome` also take the connection itself.

    Args:
        connection: The connection. A request is stored in the connection's transaction. For `next_outcome`, it must not
            be in a transaction: the outcome begins one, in which the body runs.
        schema: The broker's schema. Default: ``keyless``.

    Raises:
        ConfigurationError: It is no connection.
    """

    def __init__(self, connection: Connection, schema: str = "keyless") -> None:
        if not callable(getattr(connection, "is_in_transaction", None)):
            raise ConfigurationError(
                f"broker must be an asyncpg connection or a PostgresBroker, not {type(connection).__name__}; "
                "PostgresBroker(pool) makes one of a pool",
                argument="broker",
            )
        self.largest_request: int = LARGEST_REQUEST
        self._connection = connection
        self._schema = check_schema(schema)

    def __repr__(self) -> str:
        return f"<PostgresConnection, schema {self._schema!r}>"

    async def submit(self, new: NewRequest) -> bool:
        """See `ApplicationSide`. The driver's own errors end the transaction, and are raised unchanged."""
        if not self._connection.is_in_transaction():
            raise outside_transaction(
                "'async with connection.transaction()', or after the first statement of a session"
            )
        with request_errors():
            return await store_request(self._connection, self._schema, new)

    async def next_outcome(self, reader: str) -> OutcomeDelivery:
        """See `ApplicationSide`."""
        if self._connection.is_in_transaction():
            raise inside_transaction(self._schema)
        while True:
            outcome = await take_outcome(self._connection, self._schema, reader)
            if outcome is not None:
                return outcome
            await asyncio.sleep(READS_EVERY)


async def store_request(connection: Connection, schema: str, new: NewRequest) -> bool:
    """Store a request in the transaction of a connection; return whether it was stored already."""
    is_duplicate: bool = await connection.fetchval(
        within(schema, "SELECT {}.submit($1::text, $2::text)"), new.body.decode(), new.traceparent
    )
    return is_duplicate


async def take_outcome(connection: Connection, schema: str, reader: str) -> Outcome | None:
    """Begin a transaction, and take an outcome in it. If there is none, end the transaction and return None."""
    with broker_errors(schema):
        transaction = connection.transaction(isolation="read_committed")
        found, is_new_reader = None, False
        try:
            await finished(transaction.start(), connection)
            found = await connection.fetchrow(
                within(schema, "SELECT id, event, pg_current_xact_id()::text FROM {}.next_outcome($1::text)"), reader
            )
        except asyncpg.UndefinedObjectError:
            is_new_reader = True
        finally:
            if found is None:
                await finished(_roll_back(connection, transaction), connection)
        if is_new_reader:
            await finished(_add_reader(connection, schema, reader), connection)
        if found is None:
            return None
    id_, event, number = found
    return Outcome(connection, transaction, schema=schema, reader=reader, id_=id_, event=event, number=number)


async def _add_reader(connection: Connection, schema: str, reader: str) -> None:
    async with connection.transaction():
        await connection.execute(within(schema, "SELECT {}.add_reader($1::text)"), reader)


class Outcome(OutcomeDelivery):
    """An outcome in the transaction that handles it.

    Args:
        connection: The connection.
        transaction: The transaction that was begun on it.
        schema: The broker's schema.
        reader: The reader.
        id_: The outcome.
        event: Its event, as JSON.
        number: The server's number of the transaction.
    """

    __slots__ = ("_connection", "_id", "_number", "_reader", "_schema", "_transaction")

    def __init__(
        self,
        connection: Connection,
        transaction: Transaction,
        *,
        schema: str,
        reader: str,
        id_: int,
        event: str,
        number: str,
    ) -> None:
        self.data: bytes = event.encode()
        self.place: str = f"request-{id_}"
        self._connection = connection
        self._transaction = transaction
        self._schema = schema
        self._reader = reader
        self._id = id_
        self._number = number

    async def handled(self) -> None:
        """Commit; see `OutcomeDelivery`.

        Raises:
            ConfigurationError: The body has ended the transaction itself.
            BrokerError: The transaction is not committed, or its result is unknown.
        """
        await finished(self._commit(), self._connection)

    async def put_off(self, delay: float | None = None) -> None:
        """Roll back, and put it off; see `OutcomeDelivery`."""
        with broker_errors(self._schema):
            await finished(self._put_off(delay), self._connection)

    async def _commit(self) -> None:
        try:
            with broker_errors(self._schema):
                await self._check()
                await self._transaction.commit()
        except UnavailableError as error:
            raise not_confirmed(error) from None

    async def _check(self) -> None:
        """Check that there is a transaction to commit. A COMMIT of a failed one is a silent rollback."""
        try:
            await self._connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
            number = await self._connection.fetchval("SELECT pg_current_xact_id_if_assigned()::text")
        except (asyncpg.InFailedSQLTransactionError, asyncpg.IntegrityConstraintViolationError) as error:
            await self._put_off(None)
            raise rolled_back(error, "a savepoint: 'async with connection.transaction()'") from error
        if number != self._number:
            await self._put_off(None)
            raise ended_by_body()

    async def _put_off(self, delay: float | None) -> None:
        with _limited(self._connection):
            await _roll_back(self._connection, self._transaction)
            async with self._connection.transaction():
                await self._connection.execute(
                    within(self._schema, "SELECT {}.put_off_outcome($1::text, $2::bigint, $3::double precision)"),
                    self._reader,
                    self._id,
                    delay,
                )


async def _roll_back(connection: Connection, transaction: Transaction) -> None:
    if not connection.is_closed():
        await transaction.rollback()  # if the body has ended it, the server only warns


async def finished(doing: Coroutine[Any, Any, None], connection: Connection) -> None:
    """Finish a step even if the caller is cancelled, so that no connection stays in a transaction."""
    task = asyncio.ensure_future(doing)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # retrieves a late error
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        with _limited(connection):
            while not task.done():
                with suppress(asyncio.CancelledError):  # anyio's scopes cancel each await
                    await asyncio.wait({task})
        raise


@contextmanager
def _limited(connection: Connection) -> Iterator[None]:
    """Close a connection whose transaction takes too long to end. The server then ends the transaction itself."""
    giving_up = asyncio.get_running_loop().call_later(_ENDS_WITHIN, connection.terminate)
    try:
        yield
    finally:
        giving_up.cancel()
