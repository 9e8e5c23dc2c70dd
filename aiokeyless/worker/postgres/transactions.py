"""Requests and outcomes in the transactions of an application's own connection, the same for each driver.

This module imports no driver: asyncpg's is in `connection`, those of psycopg and Django are in `blocking`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Final
from weakref import WeakKeyDictionary

from aiokeyless.errors import BrokerError, ConfigurationError, InvalidRequestError
from aiokeyless.worker.broker import ApplicationSide, NewRequest, OutcomeDelivery, UnavailableError
from aiokeyless.worker.tables import LARGEST_REQUEST, Row

from .failures import broker_errors, first_line, is_about_request, state_of
from .floors import Floor

if TYPE_CHECKING:
    from collections.abc import Coroutine

#: The SQL state of a reader that is not added yet.
_NEW_READER: Final = "42704"
_FLOORS: Final[WeakKeyDictionary[object, defaultdict[tuple[str, str], Floor]]] = WeakKeyDictionary()


class Driver(ABC):
    """A connection, and what its driver does with it. A driver that blocks awaits nothing.

    Attributes:
        errors: The errors that it raises.
        example: How an application begins a transaction.
        savepoint: What an application uses for statements that may fail.
        schema: The broker's schema.
        floors: From when each reader looks for outcomes, by schema and reader.
    """

    errors: tuple[type[Exception], ...]
    example: ClassVar[str]
    savepoint: ClassVar[str]
    schema: str
    floors: defaultdict[tuple[str, str], Floor]

    @abstractmethod
    async def execute(self, statement: str, *arguments: object) -> tuple[Any, ...] | None:
        """Execute a statement of the schema, and return its first row, if it has rows."""

    @abstractmethod
    def is_in_transaction(self) -> bool:
        """Return whether a transaction has begun."""

    @abstractmethod
    def joins_transaction(self) -> bool:
        """Return whether the next statement is in a transaction that the application must commit."""

    @abstractmethod
    async def begin(self) -> None:
        """Begin a transaction: READ COMMITTED, because it must see a commit for which it has waited."""

    @abstractmethod
    async def commit(self) -> None:
        """Commit the transaction that was begun."""

    @abstractmethod
    async def roll_back(self) -> None:
        """Roll back the transaction that was begun, if there is one."""

    @abstractmethod
    async def pause(self) -> None:
        """Wait before the next poll for an outcome."""

    async def release(self) -> None:  # noqa: B027  # an application keeps its connection
        """Do what is to be done once an outcome is handled or put off."""

    async def complete(self, step: Coroutine[Any, Any, None]) -> None:
        """Do a step to its end, even if the caller is cancelled, so that no connection stays in a transaction."""
        await step

    def limit(self) -> AbstractContextManager[None]:
        """Limit the time of the body."""
        return nullcontext()

    async def execute_alone(self, statement: str, *arguments: object) -> None:
        """Execute a statement in a transaction of its own."""
        await self.begin()
        try:
            await self.execute(statement, *arguments)
        except BaseException:  # after a cancellation, too, no transaction may stay open
            await self.roll_back()
            raise
        await self.commit()


class DriverConnection(ApplicationSide):
    """The application's side of the broker, on its own connection."""

    def __init__(self, driver: Driver) -> None:
        self.largest_request: int = LARGEST_REQUEST
        self._driver = driver

    def __repr__(self) -> str:
        return f"<{type(self).__name__}, schema {self._driver.schema!r}>"

    async def submit(self, new: NewRequest) -> bool:
        """See `ApplicationSide`. The driver's own errors end the transaction, and are raised unchanged."""
        if not self._driver.joins_transaction():
            raise ConfigurationError(
                "the connection must be in a transaction, so that the request is stored if and only if that commits: "
                f"submit inside {self._driver.example}",
                argument="broker",
            )
        return await store_request(self._driver, new)

    async def next_outcome(self, reader: str) -> OutcomeDelivery:
        if self._driver.is_in_transaction():
            raise ConfigurationError(
                "the connection must be in no transaction, since next_outcome begins one; in one of your own, use the "
                f"function {self._driver.schema}.next_outcome",
                argument="broker",
            )
        while True:
            outcome = await take_outcome(self._driver, reader)
            if outcome is not None:
                return outcome
            await self._driver.pause()


def floors_of(connection: object) -> defaultdict[tuple[str, str], Floor]:
    """Return the floors of a connection, which an application passes anew for each outcome."""
    try:
        return _FLOORS.setdefault(connection, defaultdict(Floor))
    except TypeError:  # a pool of asyncpg has a new object for each use of a connection
        return defaultdict(Floor)


async def store_request(driver: Driver, new: NewRequest) -> bool:
    """Store a request in the transaction of a connection; return whether it was stored already."""
    try:
        row = await driver.execute("SELECT {}.submit($1::text, $2::text)", new.body.decode(), new.traceparent)
    except driver.errors as error:
        if is_about_request(error):
            raise InvalidRequestError(first_line(error)) from None
        raise
    assert row is not None  # noqa: S101  # the function returns a value
    return bool(row[0])


async def take_outcome(driver: Driver, reader: str) -> Outcome | None:
    """Begin a transaction, and take an outcome in it. If there is none, end the transaction and return None."""
    floor = driver.floors[driver.schema, reader]
    with broker_errors(driver.schema, driver.errors):
        row, is_new_reader = None, False
        try:
            await driver.complete(driver.begin())
            with floor.look() as look:
                row = await driver.execute(
                    "SELECT id, name, event, pg_current_xact_id()::text, oldest"
                    " FROM {}.next_outcome($1::text, $2::double precision)",
                    reader,
                    look.floor,
                )
                look.oldest = None if row is None else row[-1]
        except driver.errors as error:
            if state_of(error) != _NEW_READER:
                raise
            is_new_reader = True
        finally:
            if row is None:
                await driver.complete(driver.roll_back())
        if is_new_reader:
            await driver.complete(driver.execute_alone("SELECT {}.add_reader($1::text)", reader))
    return None if row is None else Outcome(driver, reader, row)


class Outcome(OutcomeDelivery):
    """An outcome in the transaction that handles it.

    Args:
        driver: The connection, in the transaction that was begun on it.
        reader: The reader.
        row: The id and the name of its request, its event as JSON, the server's number of the transaction, and when the
            oldest unread outcome was due.
    """

    __slots__ = ("_driver", "_number", "_reader", "_row")

    def __init__(self, driver: Driver, reader: str, row: tuple[Any, ...]) -> None:
        id_, name, event, self._number, _ = row
        self._row = Row(id_, name)
        self.data: bytes = event.encode()
        self.place: str = f"request-{self._row.id}"
        self._driver = driver
        self._reader = reader

    async def mark_handled(self) -> None:
        """Commit; see `OutcomeDelivery`.

        Raises:
            ConfigurationError: The body has ended the transaction itself.
            BrokerError: The transaction is not committed, or its result is unknown.
        """
        try:
            await self._driver.complete(self._commit())
        finally:
            await self._driver.release()

    async def put_off(self, delay: float | None = None) -> None:
        """Roll back, and put it off; see `OutcomeDelivery`."""
        try:
            with broker_errors(self._driver.schema, self._driver.errors):
                await self._driver.complete(self._put_off(delay))
        finally:
            await self._driver.release()

    async def _commit(self) -> None:
        try:
            with broker_errors(self._driver.schema, self._driver.errors):
                await self._check()
                await self._driver.commit()
        except UnavailableError as error:
            raise BrokerError(
                "the transaction of an outcome was not committed, as far as is known; if it was not, the outcome comes "
                f"again: {error}"
            ) from None

    async def _check(self) -> None:
        """Check that there is a transaction to commit. A COMMIT of a failed one is a silent rollback."""
        try:
            await self._driver.execute("SET CONSTRAINTS ALL IMMEDIATE")
            row = await self._driver.execute("SELECT pg_current_xact_id_if_assigned()::text")
        except self._driver.errors as error:
            await self._put_off()
            raise BrokerError(
                "the transaction of an outcome was rolled back, and the outcome comes again: a statement of the body "
                f"failed, or broke a constraint that is checked at the end ({first_line(error)}); for what may fail, "
                f"use {self._driver.savepoint}"
            ) from error
        if row is None or row[0] != self._number:
            await self._put_off()
            raise ConfigurationError(
                "the body of next_outcome must not end its transaction: what it did after that is rolled back"
            )

    async def _put_off(self, delay: float | None = None) -> None:
        with self._driver.limit():
            await self._driver.roll_back()
            await self._driver.execute_alone(
                "SELECT {}.put_off_outcome($1::text, $2::bigint, $3::bigint, $4::double precision)",
                self._reader,
                *self._row,
                delay,
            )
