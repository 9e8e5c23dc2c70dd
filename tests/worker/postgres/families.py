"""Shops that differ only in how they reach their database; each does the same with it.

As a program, a shop in a process of its own, because Django's settings are those of a process, and a process can be
killed. Arguments: the family, the folder of the server's socket, the database, and what to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import signal
import sys
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from aiokeyless import sync, worker

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Coroutine

    from aiokeyless.worker import ApprovalEvent


class RefusalError(Exception):
    """What a body raises."""


async def result_of(returned: Any) -> Any:
    return await returned if inspect.isawaitable(returned) else returned


@contextlib.asynccontextmanager
async def entered(manager: Any) -> AsyncGenerator[Any]:
    if hasattr(manager, "__aenter__"):
        async with manager as inside:
            yield inside
    else:
        with manager as inside:
            yield inside


FAMILIES: dict[str, type[Family]] = {}


class Family:
    """A shop. One that blocks awaits nothing."""

    blocks: ClassVar[bool] = True
    target: Any

    def __init_subclass__(cls) -> None:
        FAMILIES[cls.__name__] = cls

    def __init__(self, folder: str, database: str) -> None:
        self.folder = folder
        self.database = database

    @property
    def url(self) -> str:
        return f"postgresql://postgres@/{self.database}?host={self.folder}"

    @abstractmethod
    async def connect(self) -> Any: ...

    async def close(self) -> None:
        await result_of(self.target.close())

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncGenerator[Any]:
        self.target = await self.connect()
        try:
            yield self.target
        finally:
            await self.close()

    @contextlib.asynccontextmanager
    async def next_outcome(self) -> AsyncGenerator[ApprovalEvent]:
        face: Any = sync if self.blocks else worker
        async with entered(face.next_outcome(self.target, "shop")) as event:
            yield event

    async def submit(self, operation_id: str) -> None:
        face: Any = sync if self.blocks else worker
        await result_of(face.submit_approval(self.target, "C0FFEE", operation_id=operation_id))

    async def execute(self, statement: str) -> None:
        await result_of(self.target.execute(statement))

    async def pay(self, operation_id: str) -> None:
        await self.execute(f"INSERT INTO payment VALUES ('{operation_id}')")  # noqa: S608  # a name of the tests

    def transaction(self) -> Any:
        return self.target.transaction()

    def savepoint(self) -> Any:
        return self.target.transaction()

    async def commit(self) -> None:
        await self.execute("COMMIT")

    def run(self, program: Coroutine[Any, Any, Any]) -> Awaitable[Any]:
        return asyncio.to_thread(finish, program) if self.blocks else program


def finish(program: Coroutine[Any, Any, Any]) -> Any:
    try:
        program.send(None)
    except StopIteration as returned:
        return returned.value
    raise AssertionError("it waits")


class Asyncpg(Family):
    blocks = False

    async def connect(self) -> Any:
        import asyncpg

        return await asyncpg.connect(self.url)


class Psycopg(Family):
    autocommit = True

    async def connect(self) -> Any:
        import psycopg
        from psycopg.rows import dict_row

        kind: Any = psycopg.Connection if self.blocks else psycopg.AsyncConnection
        return await result_of(kind.connect(self.url, autocommit=self.autocommit, row_factory=dict_row))


class PsycopgWithoutAutocommit(Psycopg):
    autocommit = False


class PsycopgAsync(Psycopg):
    blocks = False
    autocommit = False


class Psycopg2(Family):
    autocommit = False
    factory: str | None = None

    async def connect(self) -> Any:
        import psycopg2.extras

        factory = self.factory and getattr(psycopg2.extras, self.factory)
        connection = psycopg2.connect(self.url, cursor_factory=factory)
        connection.autocommit = self.autocommit
        return connection

    async def execute(self, statement: str) -> None:
        with self.target.cursor() as cursor:
            cursor.execute(statement)

    @contextlib.contextmanager
    def transaction(self) -> Any:
        assert self.target.autocommit == self.autocommit
        with self.target:
            yield

    @contextlib.contextmanager
    def savepoint(self) -> Any:
        with self.target.cursor() as cursor:
            cursor.execute("SAVEPOINT s")
            try:
                yield
            except BaseException:  # as the savepoints of the other drivers, after a cancellation, too
                cursor.execute("ROLLBACK TO s")
                raise

    async def commit(self) -> None:
        self.target.commit()


class Psycopg2Dict(Psycopg2):
    autocommit = True
    factory = "RealDictCursor"


class Table(DeclarativeBase):
    pass


class Payment(Table):
    __tablename__ = "payment"
    operation_id: Mapped[str] = mapped_column(primary_key=True)


class SqlalchemySession(Family):
    driver: ClassVar[str] = "psycopg2"

    async def connect(self) -> Any:
        self.engine: Any = (create_engine if self.blocks else create_async_engine)(
            f"postgresql+{self.driver}://postgres@/{self.database}?host={self.folder}",
            pool_pre_ping=self.driver == "asyncpg",  # then a call may hang before it has a connection
        )
        return self.session()

    def session(self) -> Any:
        return Session(self.engine)

    async def close(self) -> None:
        await super().close()
        await result_of(self.engine.dispose())

    async def execute(self, statement: str) -> None:
        await result_of(self.target.execute(text(statement)))

    async def pay(self, operation_id: str) -> None:
        self.target.add(Payment(operation_id=operation_id))  # and does not flush it

    def transaction(self) -> Any:
        return self.target.begin()

    def savepoint(self) -> Any:
        return self.target.begin_nested()

    async def commit(self) -> None:
        await result_of(self.target.commit())


class SqlalchemyPsycopg(SqlalchemySession):
    driver = "psycopg"

    def session(self) -> Any:
        return Session(self.engine, autobegin=False)


class SqlalchemyScoped(SqlalchemySession):
    def session(self) -> Any:
        return scoped_session(sessionmaker(self.engine))


class Sqlmodel(SqlalchemySession):
    def session(self) -> Any:
        import sqlmodel

        return sqlmodel.Session(self.engine)


class SqlalchemyConnection(SqlalchemySession):
    def session(self) -> Any:
        return self.engine.connect()

    async def pay(self, operation_id: str) -> None:
        await Family.pay(self, operation_id)


class SqlalchemyAsyncSession(SqlalchemySession):
    blocks = False
    driver = "asyncpg"

    def session(self) -> Any:
        return AsyncSession(self.engine)


class SqlalchemyAsyncPsycopg(SqlalchemyAsyncSession):
    driver = "psycopg"


class SqlalchemyAsyncConnection(SqlalchemyAsyncSession):
    async def connect(self) -> AsyncConnection:
        await super().connect()
        connection: AsyncConnection = await self.engine.connect()
        return connection

    def session(self) -> None: ...

    async def pay(self, operation_id: str) -> None:
        await Family.pay(self, operation_id)


class Django(Family):
    """Only in a process of its own."""

    driver = "psycopg"

    async def connect(self) -> Any:
        from django.conf import settings
        from django.db import connection

        if not settings.configured:
            if self.driver == "psycopg2":
                sys.modules["psycopg"] = None  # type: ignore[assignment]  # as if it were not installed
            host = {"NAME": self.database, "HOST": self.folder, "USER": "postgres"}
            settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", **host}})
        return connection

    async def execute(self, statement: str) -> None:
        with self.target.cursor() as cursor:
            cursor.execute(statement)
        assert self.driver in sys.modules
        assert self.driver in type(self.target.connection).__module__

    def transaction(self) -> Any:
        from django.db import transaction

        return transaction.atomic()

    def savepoint(self) -> Any:
        return self.transaction()


class DjangoPsycopg2(Django):
    driver = "psycopg2"


# -- how a body can end


async def ends(shop: Family, name: str) -> None:
    await shop.pay(name)


async def raises(shop: Family, name: str) -> None:
    await shop.pay(name)
    raise RefusalError


async def fails_in_a_savepoint(shop: Family, name: str) -> None:
    await shop.pay(name)
    with contextlib.suppress(Exception):
        async with entered(shop.savepoint()):
            await shop.execute("SELECT 1 / 0")


async def swallows_an_error(shop: Family, name: str) -> None:
    await shop.pay(name)
    with contextlib.suppress(Exception):
        await shop.execute("SELECT 1 / 0")


async def breaks_a_constraint(shop: Family, name: str) -> None:
    await shop.pay(name)
    await shop.execute("INSERT INTO item VALUES ('none')")


async def commits(shop: Family, name: str) -> None:
    await shop.pay(name)
    await shop.commit()


async def loses_its_backend(shop: Family, name: str) -> None:
    await shop.pay(name)
    with contextlib.suppress(Exception):
        await shop.execute("SELECT pg_terminate_backend(pg_backend_pid())")


async def is_cut_before_its_commit(shop: Family, name: str) -> None:
    await shop.pay(name)
    await shop.execute("SELECT 'cut before'")


async def is_cut_after_its_commit(shop: Family, name: str) -> None:
    await shop.pay(name)
    await shop.execute("SELECT 'cut after'")


async def is_cancelled(shop: Family, name: str) -> None:
    await shop.pay(name)
    async with asyncio.timeout(0):
        await asyncio.sleep(60)


async def is_cancelled_in_a_statement(shop: Family, name: str) -> None:
    await shop.pay(name)
    async with asyncio.timeout(0.2):
        await shop.execute("SELECT pg_sleep(60)")


async def handle(shop: Family, names: list[str]) -> dict[str, str]:
    """Handle an outcome for each way in which a body can end; return what the shop met."""
    met: dict[str, str] = {}
    while len(met) < len(names):
        async with shop.connected():
            await handle_one(shop, met)
    return met


async def handle_one(shop: Family, met: dict[str, str]) -> None:
    seen, name = dict(met), ""
    try:
        async with shop.next_outcome() as event:
            name = str(event.operation_id)
            met[name] = "nothing"
            await (raises if name in seen else globals()[name])(shop, name)  # it comes again, if it was not handled
    except Exception as error:  # noqa: BLE001  # the table has them all
        met[name] = type(error).__name__
        met.update(seen)
    if not name.startswith(("loses", "is_cut")):  # the target is as it was before
        async with entered(shop.transaction()):
            await shop.execute("INSERT INTO after VALUES ('written')")


async def ask(shop: Family, names: list[str]) -> None:
    """Place orders, of which each fourth is rolled back."""
    async with shop.connected():
        for place, name in enumerate(names):
            with contextlib.suppress(RefusalError):
                async with entered(shop.transaction()):
                    await shop.submit(name)
                    if place % 4 == 3:
                        raise RefusalError


async def settle(shop: Family, names: list[str]) -> None:
    """Pay for orders, without an end; in a body that is named, fail first, and then be killed."""
    async with shop.connected():
        for what in [*names, *[""] * 1000]:
            with contextlib.suppress(RefusalError):
                async with shop.next_outcome() as event:
                    await shop.pay(str(event.operation_id))
                    if what == "raise":
                        raise RefusalError
                    if what == "kill":
                        os.kill(os.getpid(), signal.SIGKILL)


def main(family: str, folder: str, database: str, act: str, *names: str) -> None:
    shop = FAMILIES[family](folder, database)
    program = {"handle": handle, "ask": ask, "settle": settle}[act](shop, list(names))
    sys.stdout.write(json.dumps(finish(program) if shop.blocks else asyncio.run(program)))


if __name__ == "__main__":
    main(*sys.argv[1:])
