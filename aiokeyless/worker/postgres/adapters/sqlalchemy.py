"""SQLAlchemy, of both faces: what is asynchronous does the same with the synchronous object that it has inside."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from aiokeyless.errors import ConfigurationError
from aiokeyless.worker.postgres.names import in_schema

from .driver import PARAMETER, Driver, result_of

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_DRIVERS: Final = ("asyncpg", "psycopg", "psycopg_async", "psycopg2")


class Adapter(Driver):
    """A session, which executes and commits itself, with all that it has not flushed; or a connection."""

    errors: tuple[type[Exception], ...] = (SQLAlchemyError, OSError)
    example: ClassVar[str] = "'with session.begin()' or 'with connection.begin()', without AUTOCOMMIT"
    savepoint: ClassVar[str] = "a savepoint: begin_nested()"

    def __init__(self, target: Any, schema: str) -> None:
        inner = getattr(target, "sync_session", None) or getattr(target, "sync_connection", None)
        self._target: Session | Connection = inner or target
        self._run: Any = target.run_sync if inner else lambda step: step(None)
        self._bind = self._target.get_bind() if isinstance(self._target, Session) else self._target
        if self._bind.dialect.driver not in _DRIVERS:
            raise ConfigurationError(
                f"the driver of SQLAlchemy must be asyncpg, psycopg or psycopg2, not {self._bind.dialect.driver}",
                argument="broker",
            )
        super().__init__(None, schema, blocks=inner is None, owner=self._bind.engine)

    async def _do(self, step: Callable[[], T]) -> T:
        result: T = await result_of(self._run(lambda _: step()))
        return result

    async def execute(self, statement: str, *arguments: object) -> tuple[Any, ...] | None:
        # The space: text() takes no name before a colon.
        query = text(PARAMETER.sub(r":p\1 ", in_schema(self.schema, statement)))

        def fetch() -> tuple[Any, ...] | None:
            connection = self._target.connection() if isinstance(self._target, Session) else self._target
            self.raw = connection.connection.driver_connection
            result = connection.execute(query, {f"p{place}": value for place, value in enumerate(arguments, 1)})
            row = result.first() if result.returns_rows else None
            return None if row is None else tuple(row)

        return await self._do(fetch)

    def is_in_transaction(self) -> bool:
        return self._target.in_transaction() or (isinstance(self._bind, Connection) and self._bind.in_transaction())

    async def begin(self) -> None:
        self.raw: Any = None  # until the engine gives one, perhaps another, and perhaps only after a ping
        async with nullcontext() if self.blocks else asyncio.timeout(self.answers_within):  # nothing can be cut
            await self._do(self._target.begin)
            await self.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")

    async def flush(self) -> None:
        if not self._target.in_transaction():  # the body has ended it, which the check finds
            await self._do(self._target.begin)
        await self._do(getattr(self._target, "flush", bool))

    async def commit(self) -> None:
        await self._do(self._target.commit)

    async def roll_back(self) -> None:
        await self._do(self._target.rollback)
