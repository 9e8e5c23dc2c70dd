"""What `--prepare` does with what others made before, or make at the same moment: it trusts nothing that it finds."""

# ruff: noqa: S608  # the names are those of this test's own roles

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import asyncpg
import pytest
from postgres_server import prepare

from aiokeyless.errors import BrokerError
from aiokeyless.worker.postgres.migrations import VERSION

if TYPE_CHECKING:
    from postgres_server import PostgresServer

ROBBED = "LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'ALTER ROLE {thief} SUPERUSER'; {result}; END $$"


class Thief:
    """A login that may do what a grant lets it, and would be a superuser if an installer ran its code."""

    def __init__(self, server: PostgresServer, database: str) -> None:
        self.name = f"{database}_thief"
        self._server, self._database = server, database
        server.execute(f"CREATE ROLE {self.name} LOGIN")

    def does(self, statements: str) -> None:
        self._server.execute(statements, self._database, self.name)

    def robbed(self, result: str = "RETURN NULL") -> str:
        """Return the body of a function that robs its caller."""
        return ROBBED.format(thief=self.name, result=result)

    @property
    def is_superuser(self) -> bool:
        return self._server.execute(f"SELECT rolsuper FROM pg_roles WHERE rolname = '{self.name}'") == [["t"]]


@pytest.fixture
def thief(server: PostgresServer, database: str) -> Thief:
    return Thief(server, database)


@pytest.fixture
def may_create(server: PostgresServer, database: str, thief: Thief) -> None:
    """Lets the thief create schemas, as somebody else's application may."""
    server.execute(f"GRANT CREATE ON DATABASE {database} TO {thief.name}")


async def test_no_function_in_public_runs_as_the_installer(server: PostgresServer, database: str, thief: Thief) -> None:
    server.execute(f"GRANT CREATE ON SCHEMA public TO {thief.name}", database)  # as up to PostgreSQL 14
    for function in ("quote_ident(name)", "getdatabaseencoding(text)", "to_regclass(varchar)", "max(integer[])"):
        thief.does(f"CREATE FUNCTION public.{function} RETURNS text {thief.robbed()}")
    thief.does(
        f"CREATE FUNCTION public.same(name, text) RETURNS boolean {thief.robbed()};"
        "CREATE OPERATOR public.= (LEFTARG = name, RIGHTARG = text, FUNCTION = public.same);"
        f"CREATE FUNCTION public.same(name, name) RETURNS boolean {thief.robbed()};"
        "CREATE OPERATOR public.= (LEFTARG = name, RIGHTARG = name, FUNCTION = public.same);"
    )
    for _ in range(2):
        await prepare(server.url(database))
    assert not thief.is_superuser


@pytest.mark.usefixtures("may_create")
async def test_a_view_in_place_of_the_table_of_versions_is_not_read(
    server: PostgresServer, database: str, thief: Thief
) -> None:
    thief.does(
        f"CREATE SCHEMA keyless; CREATE FUNCTION keyless.rob() RETURNS integer {thief.robbed()};"
        "CREATE VIEW keyless.migration AS SELECT keyless.rob() AS version, 1 AS oldest_worker;"
        "GRANT USAGE ON SCHEMA keyless TO PUBLIC; GRANT SELECT ON keyless.migration TO PUBLIC"
    )
    with pytest.raises(BrokerError, match=f"the schema 'keyless' belongs to {thief.name}, and not to postgres"):
        await prepare(server.url(database))
    assert not thief.is_superuser
    server.execute("CREATE ROLE visitor LOGIN")
    with pytest.raises(BrokerError, match=rf"keyless.migration is no ordinary table of {thief.name}"):
        await prepare(server.url(database, "visitor"))
    server.execute("DROP ROLE visitor")


@pytest.mark.usefixtures("may_create")
async def test_an_empty_schema_of_somebody_else_is_not_filled(
    server: PostgresServer, database: str, thief: Thief
) -> None:
    thief.does("CREATE SCHEMA keyless")
    with pytest.raises(BrokerError, match=f"belongs to {thief.name}"):
        await prepare(server.url(database))
    assert server.execute("SELECT FROM pg_class WHERE relnamespace = 'keyless'::regnamespace", database) == []


@pytest.mark.usefixtures("may_create")
async def test_an_installer_calls_no_function_of_a_schema_that_somebody_else_prepared(
    server: PostgresServer, database: str, thief: Thief
) -> None:
    await prepare(server.url(database, thief.name))
    thief.does(
        f"DROP FUNCTION keyless.restore; CREATE FUNCTION keyless.restore() RETURNS bigint {thief.robbed()};"
        "GRANT USAGE ON SCHEMA keyless TO PUBLIC; GRANT SELECT ON keyless.migration TO PUBLIC"
    )
    server.execute(f"CREATE ROLE {database}_admin LOGIN CREATEROLE")
    for user in ("postgres", f"{database}_admin"):
        with pytest.raises(BrokerError, match=f"belongs to {thief.name}, and not to {user}"):
            await prepare(server.url(database, user))
    assert not thief.is_superuser


@pytest.mark.usefixtures("may_create")
async def test_a_member_of_a_superusers_role_calls_no_function_of_another(
    server: PostgresServer, database: str, thief: Thief
) -> None:
    await prepare(server.url(database, thief.name))
    thief.does(
        "DROP FUNCTION keyless.restore; CREATE FUNCTION keyless.restore() RETURNS bigint LANGUAGE plpgsql AS "
        f"$$ BEGIN SET ROLE {database}_root; EXECUTE 'ALTER ROLE {thief.name} SUPERUSER'; RETURN 0; END $$;"
        "GRANT USAGE ON SCHEMA keyless TO PUBLIC; GRANT SELECT ON keyless.migration TO PUBLIC"
    )
    server.execute(
        f"CREATE ROLE {database}_root SUPERUSER; CREATE ROLE {database}_w LOGIN NOINHERIT;"
        f"GRANT {database}_root TO {database}_w"
    )
    with pytest.raises(BrokerError, match=f"belongs to {thief.name}, and not to {database}_w"):
        await prepare(server.url(database, f"{database}_w"))
    assert not thief.is_superuser


async def test_a_search_path_of_the_databases_owner_is_not_followed(
    server: PostgresServer, database: str, thief: Thief
) -> None:
    server.execute(f"ALTER DATABASE {database} OWNER TO {thief.name}")
    thief.does(
        f"CREATE SCHEMA mine; CREATE FUNCTION mine.clock_timestamp() RETURNS timestamptz {thief.robbed()};"
        f"CREATE FUNCTION mine.getdatabaseencoding() RETURNS name {thief.robbed()};"
        f"ALTER DATABASE {database} SET search_path = mine, pg_catalog"
    )
    await prepare(server.url(database))
    assert not thief.is_superuser


@pytest.mark.parametrize(
    "made",
    [
        # From PostgreSQL 16 on, who may make roles is no superuser, but may join each role that it made.
        "CREATE ROLE {schema}_owner; GRANT {schema}_owner TO {thief}",
        "CREATE ROLE {schema}_worker; GRANT {schema}_worker TO {thief}",
        "CREATE ROLE {schema}_owner LOGIN",
        """
        CREATE ROLE {schema}_owner; GRANT {schema}_owner TO postgres, {thief};
        CREATE SCHEMA {schema} AUTHORIZATION {schema}_owner
        """,
    ],
    ids=["an owner", "a worker", "an owner that logs in", "a membership"],
)
async def test_a_role_that_another_made_before_is_given_nothing(
    server: PostgresServer, database: str, made: str
) -> None:
    schema, thief = f"{database}_k", f"{database}_thief"
    server.execute(f"CREATE ROLE {thief} LOGIN CREATEROLE; GRANT CREATE ON DATABASE {database} TO {thief}")
    server.execute(made.format(schema=schema, thief=thief), database, thief)
    with pytest.raises(BrokerError, match=f"belongs to {schema}_owner, and not to|{schema}_worker.* already exists"):
        await prepare(server.url(database), schema)
    assert server.execute(f"SELECT FROM pg_class WHERE relnamespace = to_regnamespace('{schema}')", database) == []


@pytest.mark.parametrize(
    "made",
    [
        "ALTER ROLE {schema}_owner LOGIN",
        "REVOKE {schema}_owner FROM postgres",  # who is a superuser, and so has each right of each role
        "ALTER SCHEMA {schema} OWNER TO {schema}_worker",
    ],
)
async def test_the_owner_without_login_counts_only_for_its_members(
    server: PostgresServer, database: str, made: str
) -> None:
    schema = f"{database}_k"
    await prepare(server.url(database), schema)
    server.execute(made.format(schema=schema), database)
    with pytest.raises(BrokerError, match=f"belongs to {schema}_(owner|worker), and not to postgres"):
        await prepare(server.url(database), schema)


async def test_a_worker_is_told_whose_schema_needs_a_migration(server: PostgresServer, database: str) -> None:
    server.execute(
        f"CREATE ROLE {database}_app LOGIN; CREATE ROLE {database}_w LOGIN; GRANT {database}_app TO {database}_w;"
        f"CREATE SCHEMA keyless AUTHORIZATION {database}_app",
        database,
    )
    with pytest.raises(BrokerError, match=f"version 0 of {VERSION}, and belongs to {database}_app: .*--prepare as it"):
        await prepare(server.url(database, f"{database}_w"))


# -- at the same moment


@pytest.mark.slow
async def test_the_first_workers_of_two_databases_make_the_roles_once(own_server: PostgresServer) -> None:
    databases = [own_server.new_database() for _ in range(6)]
    await asyncio.gather(*(prepare(own_server.url(database)) for database in databases for _ in range(2)))
    roles = own_server.execute("SELECT rolname FROM pg_roles WHERE rolname LIKE 'keyless\\_%' ORDER BY 1")
    assert roles == [["keyless_asker"], ["keyless_owner"], ["keyless_reader"], ["keyless_worker"]]


async def test_workers_that_fill_an_empty_schema_at_once_migrate_once(server: PostgresServer, database: str) -> None:
    server.execute("CREATE SCHEMA keyless", database)
    await asyncio.gather(*(prepare(server.url(database)) for _ in range(6)))
    assert server.execute("SELECT version FROM keyless.migration", database) == [[str(VERSION)]]


async def test_who_may_only_read_the_versions_holds_up_no_migration(server: PostgresServer, database: str) -> None:
    await prepare(server.url(database))
    server.execute(f"CREATE ROLE {database}_w LOGIN; GRANT keyless_worker TO {database}_w")
    reader = await asyncpg.connect(server.url(database, f"{database}_w"))
    transaction = reader.transaction()
    await transaction.start()
    await reader.execute("LOCK TABLE keyless.migration IN ACCESS SHARE MODE")
    server.execute("BEGIN; LOCK TABLE keyless.migration IN EXCLUSIVE MODE NOWAIT; COMMIT", database)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await reader.execute("LOCK TABLE keyless.migration IN ROW EXCLUSIVE MODE")
    await transaction.rollback()
    await reader.close()
