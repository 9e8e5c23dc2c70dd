"""An application's own connection of each family: one table of promises for all."""

# ruff: noqa: ARG001, PT012  # admin has made the tables; a body has several statements

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import signal
import sys
import time
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import asyncpg
import psycopg
import pytest
from django.utils.connection import ConnectionProxy
from msgspec.structs import replace
from sqlalchemy import create_engine, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session
from waiting import PATIENCE, until

from aiokeyless import BrokerError, ConfigurationError, sync, worker
from aiokeyless.worker import Outcome
from aiokeyless.worker.broker import UnavailableError
from aiokeyless.worker.postgres import PostgresBroker
from aiokeyless.worker.postgres.adapters import driver
from aiokeyless.worker.postgres.adapters.asyncpg import Adapter as AsyncpgAdapter
from benchmarks.cutting_proxy import CuttingProxy
from worker.conformance.brokers import decide, outcome_of, submit, take_n

from . import families
from .families import FAMILIES, Family, RefusalError, ask, handle
from .shop import decide_all, operations, payments, unread

sys.path.append(str(Path(__file__).parents[3] / "examples" / "postgres_shop"))

import driver_orders  # examples are programs, not a package
import session_orders
import tables

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator

    from postgres_server import PostgresServer
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

    from .shop import Connection

#: What the shop meets after each body; whether the order is paid; whether its outcome comes again.
TABLE = {
    "ends": ("nothing", True, False),
    "raises": ("RefusalError", False, True),
    "fails_in_a_savepoint": ("nothing", True, False),
    "swallows_an_error": ("BrokerError", False, True),
    "breaks_a_constraint": ("BrokerError", False, True),
    "commits": ("ConfigurationError", True, False),
    "loses_its_backend": ("BrokerError", False, True),
    "is_cut_before_its_commit": ("BrokerError", False, True),
    "is_cut_after_its_commit": ("BrokerError", True, False),
    "is_cancelled": ("TimeoutError", False, True),
    "is_cancelled_in_a_statement": ("TimeoutError", False, True),
}


#: Django's settings are a process's, so each of its tests starts one.
SLOW = {name: pytest.mark.slow if "Django" in name else () for name in FAMILIES}


@pytest.fixture(params=[pytest.param(name, marks=marks) for name, marks in SLOW.items()])
def shop(request: pytest.FixtureRequest, server: PostgresServer, database: str) -> Family:
    return FAMILIES[request.param](str(server.folder), database)


async def start(shop: Family, *arguments: str) -> asyncio.subprocess.Process:
    program = [families.__file__, type(shop).__name__, shop.folder, shop.database, *arguments]
    return await asyncio.create_subprocess_exec(sys.executable, *program, stdout=asyncio.subprocess.PIPE)


async def run(shop: Family, act: Any, *names: str) -> Any:
    if "Django" not in type(shop).__name__:
        return await shop.run(act(shop, list(names)))
    process = await start(shop, act.__name__, *names)
    output, _ = await process.communicate()
    assert process.returncode == 0
    return json.loads(output)


async def test_however_a_body_ends_its_writes_and_the_outcome_are_committed_together_or_neither(
    broker: PostgresBroker, admin: Connection, server: PostgresServer, shop: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver.Driver, "ends_within", PATIENCE)  # a busy machine may take longer to end a statement
    await admin.execute(
        """
        CREATE TABLE after (name text);
        CREATE TABLE item (payment text REFERENCES payment DEFERRABLE INITIALLY DEFERRED)
        """
    )
    table = {name: row for name, row in TABLE.items() if not (shop.blocks and "cancelled" in name)}
    await decide_all(broker, *table)
    async with asyncio.timeout(PATIENCE), CuttingProxy(server) as proxy:
        shop.folder = str(proxy.folder)
        met = await run(shop, handle, *table)
    paid, left = await payments(admin), await unread(admin)
    assert {name: (met[name], name in paid, name in left) for name in met} == table


async def test_a_request_is_stored_if_and_only_if_its_transaction_commits(admin: Connection, shop: Family) -> None:
    await run(shop, ask, "a", "b", "c", "d", "e")
    assert await operations(admin) == {"a", "b", "c", "e"}


@pytest.mark.slow
@pytest.mark.parametrize("shop", ["Asyncpg", "Psycopg2Dict", "SqlalchemyAsyncSession"], indirect=True)
async def test_each_order_that_was_committed_is_paid_once_whatever_fails(
    broker: PostgresBroker, admin: Connection, shop: Family
) -> None:
    asking = await start(shop, "ask", *(f"order-{number}" for number in range(20)))
    assert await asking.wait() == 0
    for message in await take_n(broker, 15):
        assert await decide(broker, message)
    dying = await start(shop, "settle", "raise", "kill")
    assert await dying.wait() == -signal.SIGKILL
    assert await payments(admin) == set()
    settling = await start(shop, "settle")

    async def is_over() -> bool:
        return not await unread(admin) or settling.returncode is not None

    await until(is_over)
    settling.kill()
    assert await settling.wait() == -signal.SIGKILL  # a second payment would have ended it
    assert await payments(admin) == {f"order-{number}" for number in range(20) if number % 4 != 3}


async def decide_orders(broker: PostgresBroker, admin: Connection) -> None:
    """Place orders, of which only one is approved by a face under its own text, and one is late."""
    for name, payload, outcome, factor in (
        ("paid", "Pay 40", Outcome.APPROVED, "biom"),
        ("of another text", "Pay 4000", Outcome.APPROVED, "biom"),
        ("by a PIN", "Pay 40", Outcome.APPROVED, "pin"),
        ("late", "Pay 40", Outcome.EXPIRED, None),
    ):
        await admin.execute("INSERT INTO orders VALUES ($1, 'C0FFEE', 'Pay 40', 'asked')", name)
        await submit(broker, name)
        (message,) = await take_n(broker, 1)
        digest = sha256(payload.encode()).hexdigest()
        event = replace(outcome_of(message, outcome), user_id="C0FFEE", payload_sha256=digest, auth_type=factor)
        assert await broker.decide(message, event)


async def orders(admin: Connection) -> dict[str, str]:
    rows = await admin.fetch("SELECT id, state FROM orders UNION SELECT 'of ' || order_id, 'payment' FROM payments")
    return {row[0]: row[1] for row in rows}


def replace_sleep(monkeypatch: pytest.MonkeyPatch, sleep: Callable[[], None]) -> None:
    """Replace the pauses of the example's readers of sessions."""

    async def sleep_async(_seconds: float) -> None:
        sleep()

    blocking_time = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _seconds: sleep())
    monkeypatch.setattr(session_orders, "time", blocking_time)
    monkeypatch.setattr(session_orders, "asyncio", SimpleNamespace(sleep=sleep_async))


SETTLED = {"paid": "paid", "of paid": "payment", "of another text": "asked", "by a PIN": "asked", "late": "not paid"}


@pytest.mark.parametrize("read", [session_orders.read, session_orders.read_async])
async def test_the_examples_reader_of_sessions_settles_what_fits_and_goes_on_after_a_lost_connection(
    broker: PostgresBroker,
    admin: Connection,
    *,
    engine: Engine,
    async_engine: AsyncEngine,
    read: Callable[[Any], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def end_or_settle(session: Session, event: worker.ApprovalEvent) -> None:
        if event.operation_id == "end":
            raise RefusalError
        settle(session, event)

    replace_sleep(monkeypatch, lambda: None)
    settle = session_orders.settle
    monkeypatch.setattr(session_orders, "settle", end_or_settle)
    tables.Table.metadata.create_all(engine)
    await decide_orders(broker, admin)
    if inspect.iscoroutinefunction(read):
        reading = asyncio.create_task(read(async_engine))
    else:
        reading = asyncio.create_task(blocking(lambda: read(engine)))
    await until(lambda: unread_is(admin, {}))
    assert await orders(admin) == SETTLED
    await admin.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
        " AND pid <> pg_backend_pid() AND application_name <> 'aiokeyless'"
    )
    await decide_all(broker, "end")
    with pytest.raises(RefusalError):
        await reading


@pytest.mark.parametrize("read", [session_orders.read, session_orders.read_async])
async def test_the_examples_reader_of_sessions_says_once_that_the_schema_is_missing(
    broker: PostgresBroker,
    admin: Connection,
    *,
    engine: Engine,
    async_engine: AsyncEngine,
    read: Callable[[Any], Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pauses = iter(range(3))

    def sleep() -> None:
        if next(pauses, None) is None:
            raise RefusalError

    await broker.aclose()  # whose chores and the removal would wait for each other
    await admin.execute("DROP SCHEMA keyless CASCADE")
    replace_sleep(monkeypatch, sleep)
    with pytest.raises(RefusalError):
        await (read(async_engine) if inspect.iscoroutinefunction(read) else blocking(lambda: read(engine)))
    (said,) = [record for record in caplog.records if record.name == "settle"]
    assert said.levelname == "WARNING"
    assert "run aiokeyless worker --prepare" in said.getMessage()


@pytest.mark.parametrize("shop", ["Psycopg", "PsycopgAsync", "Psycopg2", "Psycopg2Dict"], indirect=True)
async def test_the_examples_reader_of_each_driver_settles_what_fits(
    broker: PostgresBroker, admin: Connection, engine: Engine, shop: Family
) -> None:
    tables.Table.metadata.create_all(engine)
    await decide_orders(broker, admin)
    async with shop.connected() as connection:
        for _ in range(4):
            if shop.blocks:
                await blocking(lambda: driver_orders.settle_next(connection))
            else:
                await driver_orders.settle_next_async(connection)
    assert await orders(admin) == SETTLED
    assert await unread(admin) == {}


async def unread_is(admin: Connection, expected: dict[str, int]) -> bool:
    return await unread(admin) == expected


# -- what is refused, before anything is stored or taken


async def blocking(call: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(call)


def outcome_in(target: Any) -> Any:
    return sync.next_outcome(target, "shop").__enter__()


def ask_in(target: Any) -> Any:
    return sync.submit_approval(target, "C0FFEE", operation_id="a")


@pytest.fixture
def engine(admin: Connection, server: PostgresServer, database: str) -> Iterator[Engine]:
    engine = create_engine(f"postgresql+psycopg2://postgres@/{database}?host={server.folder}")
    yield engine
    engine.dispose()


@pytest.fixture
async def async_engine(admin: Connection, server: PostgresServer, database: str) -> AsyncGenerator[AsyncEngine]:
    engine = create_async_engine(f"postgresql+psycopg://postgres@/{database}?host={server.folder}")
    yield engine
    await engine.dispose()


@pytest.mark.parametrize("call", [outcome_in, ask_in])
async def test_a_session_in_autocommit_is_refused_although_it_says_that_it_is_in_a_transaction(
    broker: PostgresBroker, admin: Connection, engine: Engine, call: Callable[[Any], Any]
) -> None:
    await decide_all(broker, "b")
    autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
    with Session(autocommit) as session, pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
        await blocking(lambda: call(session))
    with autocommit.connect() as connection, pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
        await blocking(lambda: call(connection))
    assert await operations(admin) == {"b"}
    assert await unread(admin) == {"b": 0}


async def test_a_session_that_is_in_a_transaction_gets_no_outcome(engine: Engine) -> None:
    with Session(engine) as session:
        session.execute(text("SELECT 1"))
        with pytest.raises(ConfigurationError, match="commit or roll back first"):
            await blocking(lambda: outcome_in(session))


async def test_a_session_that_is_joined_to_an_outer_transaction_asks_in_it_and_gets_no_outcome(
    admin: Connection, engine: Engine
) -> None:
    with engine.connect() as connection, connection.begin() as outer, Session(connection) as session:
        with pytest.raises(ConfigurationError, match="must be in no transaction"):
            await blocking(lambda: outcome_in(session))
        await blocking(lambda: ask_in(session))
        session.commit()
        outer.rollback()
    assert await operations(admin) == set()


async def test_a_session_that_does_not_begin_by_itself_asks_in_no_transaction(engine: Engine) -> None:
    with Session(engine, autobegin=False) as session, pytest.raises(InvalidRequestError, match="Autobegin"):
        await blocking(lambda: ask_in(session))


async def test_a_connection_for_the_other_face_is_refused(engine: Engine, async_engine: AsyncEngine) -> None:
    with Session(engine) as session, pytest.raises(ConfigurationError, match=r"use aiokeyless\.sync"):
        await worker.submit_approval(session, "C0FFEE", operation_id="a")
    async with AsyncSession(async_engine) as asynchronous:
        for call in (ask_in, outcome_in):
            with pytest.raises(ConfigurationError, match=r"use aiokeyless\.worker"):
                await blocking(lambda call=call: call(asynchronous))  # type: ignore[misc]  # a loop's variable


async def test_an_asynchronous_scoped_session_is_called_first(admin: Connection, async_engine: AsyncEngine) -> None:
    sessions = async_scoped_session(async_sessionmaker(async_engine), asyncio.current_task)
    async with sessions.begin():
        await worker.submit_approval(sessions, "C0FFEE", operation_id="a")
    await sessions.remove()
    assert await operations(admin) == {"a"}


def test_what_is_over_another_driver_or_no_connection_is_refused() -> None:
    other = create_engine("sqlite://")
    with Session(other) as session, pytest.raises(ConfigurationError, match="must be asyncpg, psycopg or psycopg2"):
        ask_in(session)
    with pytest.raises(ConfigurationError, match="not Engine"):
        ask_in(other)
    with pytest.raises(ConfigurationError, match="not to a cache"):
        ask_in(ConnectionProxy({"default": object()}, "default"))


async def test_a_missing_schema_is_named_to_who_asks_as_to_who_reads(server: PostgresServer) -> None:
    async with await psycopg.AsyncConnection.connect(server.url(server.new_database())) as connection:
        for call in (worker.submit_approval(connection, "C0FFEE", operation_id="a"), read(connection)):
            with pytest.raises(BrokerError, match="run aiokeyless worker --prepare"):
                await call
            await connection.rollback()


async def read(target: Any) -> None:
    async with worker.next_outcome(target, "shop"):
        pass


# -- connections that are lost


@pytest.mark.parametrize(
    "shop", ["Asyncpg", "Psycopg", "PsycopgAsync", "Psycopg2", "SqlalchemyAsyncSession"], indirect=True
)
async def test_a_lost_connection_is_not_one_that_is_in_a_transaction(
    broker: PostgresBroker, admin: Connection, shop: Family
) -> None:
    await decide_all(broker, "a")

    async def lose() -> list[str]:
        met = []
        async with shop.connected():
            for _ in range(2):
                try:
                    async with shop.next_outcome():
                        await families.loses_its_backend(shop, "a")
                except Exception as error:  # noqa: BLE001  # under test
                    met.append(type(error).__name__)
        return met

    assert await shop.run(lose()) == ["BrokerError", "BrokerError"]


@pytest.mark.parametrize("shop", ["Asyncpg", "PsycopgAsync", "Psycopg2"], indirect=True)
async def test_a_body_that_takes_longer_than_an_administrator_allows_loses_its_connection_and_no_outcome(
    broker: PostgresBroker, admin: Connection, server: PostgresServer, shop: Family
) -> None:
    await decide_all(broker, "a")

    async def take_long() -> None:
        async with shop.connected(), shop.next_outcome():
            await shop.execute(
                "SET LOCAL idle_in_transaction_session_timeout = '50ms'; INSERT INTO payment VALUES ('a')"
            )
            while is_idle_in_transaction(server, shop.database):
                pass

    with pytest.raises(BrokerError, match=r"as far as is known.* the connection is lost: "):
        await shop.run(take_long())
    assert (await payments(admin), await unread(admin)) == (set(), {"a": 0})


def is_idle_in_transaction(server: PostgresServer, database: str) -> bool:
    state = "SELECT 1 FROM pg_stat_activity WHERE state LIKE 'idle in transaction%' AND datname = "
    return server.execute(f"{state} '{database}'") != []


async def test_an_outcome_of_the_pool_is_lost_with_its_connection_and_comes_again(
    broker: PostgresBroker, admin: Connection, server: PostgresServer, database: str
) -> None:
    await decide_all(broker, "a")
    server.execute(f"ALTER DATABASE {database} SET idle_in_transaction_session_timeout = '50ms'")
    async with asyncpg.create_pool(server.url(database), min_size=0) as pool, PostgresBroker(pool) as limited:
        for end in "mark_handled", "put_off":
            outcome = await limited.next_outcome("shop")
            await until(lambda: pool.get_size() == 0)
            with pytest.raises((BrokerError, UnavailableError), match="the connection is lost"):
                await getattr(outcome, end)()
    assert await unread(admin) == {"a": 0}


async def test_what_a_session_has_not_sent_is_a_statement_of_the_body(
    broker: PostgresBroker, admin: Connection, server: PostgresServer, database: str
) -> None:
    await decide_all(broker, "a")
    await admin.execute("INSERT INTO payment VALUES ('a')")
    shop = families.SqlalchemySession(str(server.folder), database)

    async def program() -> None:
        async with shop.connected():
            with pytest.raises(BrokerError, match="and the outcome comes again"):
                async with shop.next_outcome():
                    await shop.pay("a")

    await shop.run(program())
    assert await unread(admin) == {"a": 1}


# -- cancellation


@pytest.mark.usefixtures("admin")
@pytest.mark.parametrize("shop", ["Psycopg2", "Psycopg2Dict"], indirect=True)
async def test_psycopg2_is_in_its_mode_again_after_an_interruption(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "time", SimpleNamespace(sleep=Mock(side_effect=KeyboardInterrupt)))

    async def program() -> None:
        async with shop.connected() as connection:
            with pytest.raises(KeyboardInterrupt):
                async with shop.next_outcome():
                    pass
            assert connection.autocommit is shop.autocommit

    await shop.run(program())


async def test_an_error_that_comes_after_a_cancellation_is_no_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    begun, failing = asyncio.Event(), asyncio.Event()

    async def fail() -> None:
        begun.set()
        await failing.wait()
        raise ConnectionError

    task = asyncio.create_task(AsyncpgAdapter(Mock(), "keyless").complete(fail()))
    await begun.wait()
    task.cancel()
    await asyncio.sleep(0)
    failing.set()
    await asyncio.wait({task})
    assert task.cancelled()
    del task
    gc.collect()
    assert caplog.messages == []


@pytest.mark.usefixtures("admin")
@pytest.mark.parametrize("shop", ["Asyncpg", "PsycopgAsync"], indirect=True)
async def test_a_cancellation_while_it_waits_leaves_no_transaction_behind(shop: Family) -> None:
    async with shop.connected() as connection:
        for turns in range(0, 40, 3):
            waiting = asyncio.create_task(read(connection))  # which would be refused in a transaction
            for _ in range(turns):
                await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting


@pytest.mark.parametrize("shop", ["Asyncpg", "SqlalchemyAsyncPsycopg"], indirect=True)
async def test_a_server_that_hangs_at_the_end_of_a_cancelled_body_costs_the_connection(
    broker: PostgresBroker, admin: Connection, server: PostgresServer, shop: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver.Driver, "ends_within", 0.1)
    await decide_all(broker, "a")
    async with shop.connected(), admin.transaction():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as limit, shop.next_outcome():
                # Queued until this transaction ends; then putting the outcome off waits for it.
                locking = asyncio.create_task(admin.execute("LOCK TABLE keyless.reader"))
                await until(lambda: server.execute("SELECT count(*) FROM pg_locks WHERE NOT granted") != [["0"]])
                limit.reschedule(asyncio.get_running_loop().time())
                await asyncio.sleep(60)
        await locking
    assert await unread(admin) == {"a": 0}


# -- hosts that are gone


ASYNCHRONOUS = ["Asyncpg", "PsycopgAsync", "SqlalchemyAsyncSession", "SqlalchemyAsyncPsycopg"]


@contextmanager
def gone(server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the host of a server vanish, and wait for an answer for a short time only."""
    with monkeypatch.context() as patched, server.paused():
        patched.setattr(driver.Driver, "answers_within", 0.1)
        patched.setattr(driver.Driver, "ends_within", 0.1)
        # psycopg waits five seconds for the server to cancel a statement.
        patched.setattr(psycopg.AsyncConnection, "cancel_safe", Mock(side_effect=psycopg.OperationalError))
        yield


class Pauses:
    """The pauses of readers between two polls, which a test ends."""

    def __init__(self) -> None:
        self.begun, self.may_end = asyncio.Event(), asyncio.Event()

    async def pause(self) -> None:
        self.begun.set()
        await self.may_end.wait()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> Pauses:
    pauses = Pauses()
    monkeypatch.setattr(driver.Driver, "pause", lambda _driver: pauses.pause())
    return pauses


@pytest.mark.usefixtures("admin")
@pytest.mark.parametrize("shop", ASYNCHRONOUS, indirect=True)
async def test_a_reader_does_not_wait_for_a_host_that_is_gone(
    server: PostgresServer, shop: Family, pauses: Pauses, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with shop.connected() as connection:
        waiting = asyncio.create_task(read(connection))
        await pauses.begun.wait()
        with gone(server, monkeypatch), pytest.raises(BrokerError, match=r"cannot be read: no answer within 0\.1 s"):
            pauses.may_end.set()
            await waiting


@pytest.mark.usefixtures("admin")
async def test_a_broker_does_not_wait_for_a_host_that_is_gone(
    broker: PostgresBroker, server: PostgresServer, pauses: Pauses, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = asyncio.create_task(broker.next_outcome("shop"))
    await pauses.begun.wait()
    with gone(server, monkeypatch), pytest.raises(UnavailableError, match=r"no answer within 0\.1 s"):
        pauses.may_end.set()
        await waiting


@pytest.mark.parametrize("shop", ASYNCHRONOUS, indirect=True)
async def test_an_outcome_does_not_wait_for_a_host_that_was_lost_in_its_body(
    broker: PostgresBroker, admin: Connection, server: PostgresServer, shop: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    await decide_all(broker, "a")
    async with shop.connected():
        with ExitStack() as lost, pytest.raises(BrokerError, match=r"as far as is known.* no answer within 0\.1 s"):
            async with shop.next_outcome():
                await shop.pay("a")
                lost.enter_context(gone(server, monkeypatch))
    assert await payments(admin) == set()
    assert await unread(admin) == {"a": 0}
