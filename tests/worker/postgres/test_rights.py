"""What each role may do, and what no search path and no temporary object changes."""

# ruff: noqa: S608  # the names are those of this test's own roles

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from aiokeyless.errors import BrokerError
from aiokeyless.worker import submit_approval
from aiokeyless.worker.postgres import PostgresBroker, PostgresConnection
from aiokeyless.worker.postgres.migrations import VERSION
from worker.conformance.brokers import LEASE, decide, new_request, submit, take_n

from .shop import decide_all, unread

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from postgres_server import PostgresServer

    from .shop import Connection

    LogIn = Callable[..., Awaitable[Connection]]


@pytest.fixture
async def log_in(
    admin: Connection, server: PostgresServer, database: str
) -> AsyncGenerator[Callable[..., Awaitable[Connection]]]:
    """Logs in as a user that is a member of some of the broker's roles, and of nothing else."""
    connections: list[Connection] = []

    async def log_in(*roles: str, name: str = "") -> Connection:
        user = f"{database}_{name or '_'.join(roles) or 'nobody'}"
        if not await admin.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", user):
            await admin.execute(f"CREATE ROLE {user} LOGIN")
        for role in roles:
            await admin.execute(f"GRANT keyless_{role} TO {user}")
        connections.append(await asyncpg.connect(server.url(database, user)))
        return connections[-1]

    yield log_in
    for connection in connections:
        await connection.close()


ASKER = ("SELECT keyless.submit('{}')",)
READER = (
    "SELECT keyless.add_reader('ledger')",
    "SELECT * FROM keyless.next_outcome('ledger')",
    "SELECT keyless.put_off_outcome('ledger', 1, 1)",
    "SELECT keyless.remove_reader('ledger')",
)
WORKER = (
    "SELECT * FROM keyless.take(1, 1, NULL, NULL, 1)",
    "SELECT * FROM keyless.take_overdue(1, 1, 1, 1)",
    "SELECT keyless.put_off('{1}', '{1}', '{1}', '{1}', '{1}')",
    "SELECT * FROM keyless.claim('{1}', '{1}', '{1}')",
    "SELECT keyless.unclaim(1, 1, 1)",
    "SELECT * FROM keyless.were_asked('{1}', '{1}')",
    "SELECT * FROM keyless.decide('{}', '{}', '{}', '{}')",
    "SELECT * FROM keyless.inspect()",
    "SELECT * FROM keyless.count_unread(1)",
    "SELECT * FROM keyless.list_unread(1, 1)",
    "SELECT keyless.restore()",
    "SELECT keyless.serve('https://keyless.test')",
    "SELECT keyless.welcome_readers()",
    "SELECT keyless.clean(0)",
)
NOBODY = (
    "SELECT * FROM keyless.deliver('{1}', 1)",
    "SELECT keyless.lock_requests('{1}', '{1}')",
    "SELECT keyless.check_reader('shop')",
    "CREATE TABLE keyless.mine (id integer)",
    "CREATE FUNCTION keyless.mine() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
    "ALTER FUNCTION keyless.restore() SECURITY INVOKER",
    "DROP SCHEMA keyless CASCADE",
    "INSERT INTO keyless.migration VALUES (99, 99)",
    "SET ROLE keyless_owner",
    *(
        statement.format(table)
        for table in ("request", "waiting", "outcome", "reader", "login", "unread", "welcome", "service")
        for statement in (
            "SELECT * FROM keyless.{}",
            "DELETE FROM keyless.{}",
            "TRUNCATE keyless.{}",
            "DROP TABLE keyless.{}",
            "SELECT 1; LOCK TABLE keyless.{} IN ACCESS SHARE MODE",
        )
    ),
    "INSERT INTO keyless.outcome VALUES (1, 'approved', '{}', now())",
    "UPDATE keyless.reader SET owner = session_user",
)


@pytest.mark.parametrize(
    ("role", "allowed"),
    [("asker", ASKER), ("reader", READER), ("worker", WORKER), ("", ())],
    ids=lambda role: str(role)[:6],
)
async def test_a_role_may_do_what_is_its_own_and_nothing_else(
    log_in: LogIn, role: str, allowed: tuple[str, ...]
) -> None:
    connection = await log_in(*([role] if role else []))
    for statement in allowed:
        with suppress(asyncpg.DataError):  # an empty object may be submitted, and is no request
            await connection.fetch(statement)
    for statement in (*ASKER, *READER, *WORKER, *NOBODY):
        if statement not in allowed:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)


async def test_the_owner_of_the_functions_cannot_log_in(admin: Connection) -> None:
    roles = await admin.fetch("SELECT rolname, rolcanlogin, rolsuper FROM pg_roles WHERE rolname LIKE 'keyless\\_%'")
    assert {row[0] for row in roles} == {"keyless_owner", "keyless_asker", "keyless_reader", "keyless_worker"}
    assert not any(row[1] or row[2] for row in roles)
    owners = await admin.fetch(
        "SELECT DISTINCT pg_get_userbyid(proowner), prosecdef, proconfig[1] FROM pg_proc"
        " WHERE pronamespace = 'keyless'::regnamespace"
    )
    assert [tuple(row) for row in owners] == [("keyless_owner", True, "search_path=pg_catalog, pg_temp")]


async def test_a_readers_name_belongs_to_who_added_it_or_to_a_role_that_it_was_given_to(
    broker: PostgresBroker, admin: Connection, log_in: LogIn, database: str
) -> None:
    await decide_all(broker, "a")
    ledger, other = await log_in("reader", name="ledger"), await log_in("reader", name="other")
    await ledger.execute("SELECT keyless.add_reader('ledger')")
    for statement in (*READER,):
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="belongs to another login"):
            await other.execute(statement)
    with pytest.raises(BrokerError, match="belongs to another login"):
        await PostgresConnection(other).next_outcome("ledger")
    # Logins that change, as those of a vault do, are members of one role.
    await admin.execute(f"CREATE ROLE {database}_team; GRANT {database}_team TO {database}_other")
    await admin.execute("UPDATE keyless.reader SET owner = $1 WHERE name = 'ledger'", f"{database}_team")
    await admin.execute("SELECT keyless.welcome_readers()")
    outcome = await PostgresConnection(other).next_outcome("ledger")
    await outcome.mark_handled()
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await ledger.execute(READER[1])
    await admin.execute(f"DROP OWNED BY {database}_team; DROP ROLE {database}_team")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await other.execute(READER[1])


async def test_a_login_has_at_most_100_readers_however_it_adds_them(admin: Connection, log_in: LogIn) -> None:
    logins = [await log_in("reader", name="ledger") for _ in range(3)]

    async def add(login: Connection, number: int) -> None:
        async with login.transaction():
            for place in range(40):
                await login.execute("SELECT keyless.add_reader($1)", f"reader-{number}-{place}")

    results = await asyncio.gather(*(add(*pair) for pair in zip(logins, range(3), strict=True)), return_exceptions=True)
    assert [type(error) for error in results if error is not None] == [asyncpg.ProgramLimitExceededError]
    assert await admin.fetchval("SELECT count(*) FROM keyless.reader WHERE owner <> 'postgres'") == 80
    for place in range(20):
        await logins[0].execute("SELECT keyless.add_reader($1)", f"more-{place}")
    await logins[0].execute("SELECT keyless.add_reader('more-0')")  # which it has
    with pytest.raises(asyncpg.ProgramLimitExceededError, match="100 readers"):
        await logins[0].execute("SELECT keyless.add_reader('too-many')")
    await logins[0].execute("SELECT keyless.remove_reader('more-0')")
    transaction = logins[1].transaction(isolation="repeatable_read")
    await transaction.start()
    await logins[1].execute("SELECT 1")  # so that it counts as of now
    await logins[0].execute("SELECT keyless.add_reader('one-more')")
    with pytest.raises(asyncpg.SerializationError):
        await logins[1].execute("SELECT keyless.add_reader('too-many')")
    await transaction.rollback()
    other = await log_in("reader", name="other")
    await other.execute("SELECT keyless.add_reader('others')")


async def test_a_reader_that_its_login_removes_gets_nothing_and_may_be_added_again(
    broker: PostgresBroker, admin: Connection, log_in: LogIn
) -> None:
    ledger = await log_in("reader", name="ledger")
    await ledger.execute("SELECT keyless.add_reader('ledger')")
    await admin.execute("SELECT keyless.welcome_readers()")
    await decide_all(broker, "a")
    await ledger.execute("SELECT keyless.remove_reader('ledger')")
    assert await unread(admin, "ledger") == {}
    await decide_all(broker, "b")
    assert await unread(admin, "ledger") == {}
    assert await unread(admin) == {"a": 0, "b": 0}
    with pytest.raises(asyncpg.UndefinedObjectError):
        await ledger.execute("SELECT keyless.remove_reader('ledger')")
    await ledger.execute("SELECT keyless.add_reader('ledger')")
    await admin.execute("SELECT keyless.welcome_readers()")
    assert await unread(admin, "ledger") == {"a": 0, "b": 0}


async def test_a_worker_of_the_workers_role_needs_no_other_right(
    admin: Connection, log_in: LogIn, server: PostgresServer, database: str
) -> None:
    await admin.execute("SELECT keyless.submit($1)", new_request("a").body.decode())
    await log_in("worker", name="worker")
    async with PostgresBroker(server.url(database, f"{database}_worker")) as broker:
        await broker.prepare(lease=LEASE, service="")
        (message,) = await take_n(broker, 1)
        assert await decide(broker, message)
        with pytest.raises(BrokerError, match="permission denied for function submit; check which roles"):
            await submit(broker, "b")
        with pytest.raises(BrokerError, match="permission denied for function next_outcome; check which roles"):
            await broker.next_outcome("shop")


async def test_an_installer_that_may_not_make_roles_owns_the_schema_itself(
    server: PostgresServer, database: str
) -> None:
    server.execute(f"CREATE ROLE {database}_app LOGIN; GRANT CREATE ON DATABASE {database} TO {database}_app", database)
    async with PostgresBroker(server.url(database, f"{database}_app"), schema=f"{database}_k") as broker:
        await broker.prepare(lease=LEASE, service="")
        await decide_all(broker, "a")
        outcome = await broker.next_outcome("shop")
        await outcome.mark_handled()
    owner = server.execute(f"SELECT nspowner::regrole FROM pg_namespace WHERE nspname = '{database}_k'", database)
    assert owner == [[f"{database}_app"]]
    assert server.execute(f"SELECT count(*) FROM pg_roles WHERE rolname LIKE '{database}\\_k\\_%'") == [["0"]]


async def test_a_schema_that_an_administrator_made_is_filled_by_its_owner(
    server: PostgresServer, database: str
) -> None:
    server.execute(
        f"CREATE ROLE {database}_app LOGIN; CREATE ROLE {database}_k_worker;"
        f"CREATE SCHEMA {database}_k AUTHORIZATION {database}_app",
        database,
    )
    async with PostgresBroker(server.url(database, f"{database}_app"), schema=f"{database}_k") as broker:
        await broker.prepare(lease=LEASE, service="")
    server.execute(f"SET ROLE {database}_k_worker; SELECT * FROM {database}_k.inspect()", database)


async def test_a_login_that_may_make_nothing_is_told_who_can(server: PostgresServer, database: str) -> None:
    server.execute(f"CREATE ROLE {database}_app LOGIN")
    async with PostgresBroker(server.url(database, f"{database}_app")) as broker:
        with pytest.raises(BrokerError, match=f"version 0 of {VERSION}.*worker --prepare"):
            await broker.prepare(lease=LEASE, service="")
        with pytest.raises(BrokerError, match=r"is missing.*worker --prepare"):
            await submit_approval(broker, "C0FFEE", operation_id="a")


# -- hostile sessions


async def test_no_search_path_and_no_temporary_object_changes_what_a_function_does(
    broker: PostgresBroker, admin: Connection, connection: Connection
) -> None:
    # Objects that shadow what the functions use, and that raise if they are used.
    await admin.execute(
        """
        CREATE SCHEMA hostile;
        CREATE FUNCTION hostile.trap(anyelement, anyelement) RETURNS boolean LANGUAGE plpgsql AS
            $$ BEGIN RAISE 'trapped'; END $$;
        CREATE FUNCTION hostile.clock_timestamp() RETURNS timestamptz LANGUAGE plpgsql AS
            $$ BEGIN RAISE 'trapped'; END $$;
        CREATE OPERATOR hostile.= (LEFTARG = anyelement, RIGHTARG = anyelement, FUNCTION = hostile.trap);
        CREATE OPERATOR hostile.<= (LEFTARG = anyelement, RIGHTARG = anyelement, FUNCTION = hostile.trap);
        CREATE TABLE hostile.request (id bigint);
        CREATE TABLE hostile.waiting (id bigint);
        CREATE TABLE hostile.pg_roles (id bigint);
        """
    )
    await connection.execute(
        "CREATE TEMP TABLE request (id bigint); CREATE TEMP TABLE waiting (id bigint);"
        "CREATE TEMP TABLE unread (id bigint); CREATE TEMP TABLE pg_roles (id bigint);"
        "SET search_path = hostile, pg_temp, pg_catalog"
    )
    await decide_all(broker, "a")
    for statement in (
        'SELECT keyless.submit(\'{"version": 1, "user_id": "C0FFEE", "operation_id": "b"}\')',
        "SELECT * FROM keyless.take(10, 1, NULL, NULL, 1)",
        "SELECT * FROM keyless.inspect()",
        "SELECT * FROM keyless.count_unread(10)",
        "SELECT * FROM keyless.list_unread(10, 10)",
        "SELECT keyless.restore()",
    ):
        await connection.fetch(statement)
    row: Any = await connection.fetchrow("SELECT * FROM keyless.next_outcome('shop')")
    assert (row["operation_id"], row["outcome"]) == ("a", "approved")
    assert {message.number for message in await take_n(broker, 1)} == {2}
