"""Requests and outcomes in the transactions of an application's own connection, the same for each driver."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from aiokeyless.errors import BrokerError, ConfigurationError, ConflictError, InvalidRequestError
from aiokeyless.worker.broker import NewRequest, OutcomeDelivery, UnavailableError, public_errors
from aiokeyless.worker.tables import Row

from .failures import broker_errors, first_line, lasting_error, state_of

if TYPE_CHECKING:
    from .adapters.driver import Driver

#: SQL states of `submit` about the request: its text is no JSON, a value is wrong, or it is nested too deep.
_WRONG: Final = ("22", "54001")
#: The SQL state of `submit` if another request has the operation id.
_TAKEN: Final = "23505"
#: The SQL state of a reader that is not added yet.
_NEW_READER: Final = "42704"


async def store_request(driver: Driver, new: NewRequest) -> bool:
    """Store a request in the transaction of a connection; return whether it was stored already."""
    try:
        row = await driver.execute("SELECT {}.submit($1, $2)", new.body.decode(), new.traceparent)
    except driver.errors as error:
        if state_of(error) == _TAKEN:
            raise ConflictError(first_line(error)) from None
        if state_of(error).startswith(_WRONG):
            raise InvalidRequestError(first_line(error)) from None
        if (lasting := lasting_error(driver.schema, error)) is not None:
            raise lasting from None
        raise
    assert row is not None  # noqa: S101  # the function returns a value
    return bool(row[0])


async def take_outcome(driver: Driver, reader: str) -> PostgresOutcome | None:
    """Begin a transaction, and take an outcome in it. If there is none, end the transaction and return None."""
    floor = driver.floors[driver.schema, reader]
    with broker_errors(driver.schema, driver.errors), driver.limit(driver.answers_within):
        row, is_new_reader = None, False
        try:
            await driver.complete(driver.begin())
            if not driver.is_open():
                raise ConfigurationError(
                    "the connection must not be in AUTOCOMMIT, in which nothing is rolled back", argument="broker"
                )
            with floor.search() as search:
                row = await driver.execute(
                    "SELECT id, name, event, pg_current_xact_id()::text, oldest FROM {}.next_outcome($1, $2)",
                    reader,
                    search.floor,
                )
                search.oldest = None if row is None else row[-1]
        except driver.errors as error:
            if state_of(error) != _NEW_READER:
                raise
            is_new_reader = True
        finally:
            if row is None:
                # A cancellation stays one, and a connection that is lost says so at its next use.
                with driver.limit(driver.ends_within), suppress(*driver.errors):
                    await driver.complete(driver.roll_back())
        if is_new_reader:
            await driver.complete(driver.execute_alone("SELECT {}.add_reader($1)", reader))
    return None if row is None else PostgresOutcome(driver, reader, row)


class PostgresOutcome(OutcomeDelivery):
    """An outcome in the transaction that handles it."""

    __slots__ = ("_driver", "_number", "_reader", "_row")

    def __init__(self, driver: Driver, reader: str, row: tuple[Any, ...]) -> None:
        id_, name, event, self._number, _ = row  # the number is the server's, of the transaction
        self._row = Row(id_, name)
        self.data: bytes = event.encode()
        self.place: str = f"request-{self._row.id}"
        self._driver = driver
        self._reader = reader

    async def mark_handled(self) -> None:
        try:
            await self._driver.complete(self._commit())
        finally:
            await self._driver.release()

    async def put_off(self, delay: float | None = None) -> None:
        try:
            with broker_errors(self._driver.schema, self._driver.errors):
                await self._driver.complete(self._put_off(delay))
        finally:
            await self._driver.release()

    async def _commit(self) -> None:
        doubt = "the transaction of an outcome was not committed, as far as is known; then it comes again: "
        with (
            public_errors(doubt),
            broker_errors(self._driver.schema, self._driver.errors),
            self._driver.limit(self._driver.answers_within),
        ):
            await self._check()
            await self._driver.commit()

    async def _check(self) -> None:
        """Check that there is a transaction to commit. A COMMIT of a failed one is a silent rollback."""
        try:
            await self._driver.flush()
            await self._driver.execute("SET CONSTRAINTS ALL IMMEDIATE")
            row = await self._driver.execute("SELECT pg_current_xact_id_if_assigned()::text")
        except self._driver.errors as error:
            await self._put_off(lost_by=f": {first_line(error)}")
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

    async def _put_off(self, delay: float | None = None, *, lost_by: str = "") -> None:
        with self._driver.limit(self._driver.ends_within):
            await self._driver.roll_back()
            if self._driver.is_lost():  # a session would make another one
                raise UnavailableError(f"the connection is lost{lost_by}")
            await self._driver.execute_alone(
                "SELECT {}.put_off_outcome($1, $2, $3, $4)", self._reader, *self._row, delay
            )
