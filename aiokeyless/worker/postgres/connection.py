"""`PostgresConnection`: the application's own connection or session."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aiokeyless.errors import ConfigurationError
from aiokeyless.worker.broker import ApplicationSide, NewRequest, OutcomeDelivery
from aiokeyless.worker.tables import LARGEST_REQUEST

from .adapters import adapter_for
from .failures import broker_errors
from .names import SCHEMA, check_schema
from .transactions import store_request, take_outcome

if TYPE_CHECKING:
    from .adapters.driver import Driver


class PostgresConnection(ApplicationSide):
    """The application's side of the broker, on a connection or session of its own.

    For the schema ``keyless``, `submit_approval` and `next_outcome` also take the connection itself.

    Args:
        connection: The connection of asyncpg, psycopg, psycopg2 or Django, or the session or connection of SQLAlchemy.
            A request is stored in its transaction. For `next_outcome`, it must not be in a transaction: the outcome
            begins one, in which the body runs.
        schema: The broker's schema. Default: ``keyless``.

    Raises:
        ConfigurationError: It is no connection.
    """

    _schema: str = SCHEMA  # for the repr, also if __init__ raised

    def __init__(self, connection: Any, schema: str = SCHEMA) -> None:
        self.largest_request: int = LARGEST_REQUEST
        self._schema = check_schema(schema)
        driver = adapter_for(connection, self._schema)
        if driver is None:
            raise ConfigurationError(
                "broker must be a broker, a connection of asyncpg, psycopg, psycopg2 or Django, or a session or "
                f"connection of SQLAlchemy, not {type(connection).__name__}; PostgresBroker(pool) takes asyncpg's pool",
                argument="broker",
            )
        self._driver: Driver = driver

    def __repr__(self) -> str:
        return f"<PostgresConnection, schema {self._schema!r}>"

    async def submit(self, new: NewRequest) -> bool:
        """See `ApplicationSide`. The driver's own errors end the transaction, and are raised unchanged."""
        self._check_face()
        if not await self._driver.joins_transaction():
            raise ConfigurationError(
                "the connection must be in a transaction, so that the request is stored if and only if that commits: "
                f"submit inside {self._driver.example}",
                argument="broker",
            )
        return await store_request(self._driver, new)

    async def next_outcome(self, reader: str) -> OutcomeDelivery:
        self._check_face()
        with broker_errors(self._driver.schema, self._driver.errors):
            is_in_transaction = self._driver.is_in_transaction()  # Django may connect for it
        if is_in_transaction:
            raise ConfigurationError(
                "the connection must be in no transaction, since next_outcome begins one: commit or roll back first; "
                f"to read in yours, select from the SQL function {self._driver.schema}.next_outcome",
                argument="broker",
            )
        while True:
            outcome = await take_outcome(self._driver, reader)
            if outcome is not None:
                return outcome
            await self._driver.pause()

    def _check_face(self) -> None:
        """Check that a connection that blocks is used without an event loop, and any other one with it."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            if not self._driver.blocks:
                raise ConfigurationError(
                    "the connection is asynchronous: use aiokeyless.worker, which has the same functions",
                    argument="broker",
                ) from None
            return
        if self._driver.blocks:
            raise ConfigurationError(
                "the connection blocks, and this thread runs an event loop: use aiokeyless.sync in another thread",
                argument="broker",
            )
