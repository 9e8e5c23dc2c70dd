"""docs/howto/operating-postgres.md, tried as it is written, on a server that the worker does not own; and the guide."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest
from postgres_server import PostgresServer
from waiting import PATIENCE, until

from aiokeyless.errors import BrokerError
from aiokeyless.sandbox import Sandbox
from aiokeyless.worker import ApprovalWorker, next_outcome, submit_approval
from aiokeyless.worker.broker import UnavailableError
from aiokeyless.worker.postgres import PostgresBroker
from worker.conformance.brokers import LEASE, decide, new_request, operation_of, outcome_of, submit, take_n

HOWTO = Path(__file__).parents[3] / "docs" / "howto"
PAGE = HOWTO / "operating-postgres.md"
TEXT = PAGE.read_text()
APART, ROLES, TEAM, GRANTS, SEQUENCE, MADE_ROLES, REMOVED_READER, ERASED, REMOVED = re.findall(
    r"^ *```sql\n(.*?)^ *```$", TEXT, re.DOTALL | re.MULTILINE
)


#: Each test starts a server of its own, and programs.
pytestmark = pytest.mark.slow


async def prepare(url: str, *options: str) -> tuple[int | None, str]:
    """Run `aiokeyless worker --prepare`; return its exit status and its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KEYLESS_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aiokeyless", "worker", "--broker", url, "--prepare", *options),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode()


async def test_the_page_for_operators_works_as_it_is_written(own_server: PostgresServer) -> None:
    database = own_server.new_database()
    own_server.execute(f"CREATE ROLE admin LOGIN CREATEROLE; GRANT CREATE ON DATABASE {database} TO admin")
    assert await prepare(own_server.url(database, "admin")) == (0, "")
    own_server.execute(ROLES, database, "admin")
    own_server.execute(TEAM, database, "admin")
    async with PostgresBroker(own_server.url(database, "approvals")) as broker:
        await broker.prepare(lease=LEASE, service="")
        await ask_and_read(own_server, database, broker)
        assert (await broker.inspect()).unread == {"shop": 0}
        assert await broker.list_unread(10) == []
    own_server.execute(ERASED, database, "admin")
    own_server.execute("SELECT keyless.add_reader('old')", database)
    own_server.execute(REMOVED_READER, database, "admin")
    assert own_server.execute("SELECT name FROM keyless.reader", database) == [["shop"]]
    own_server.execute(REMOVED, database, "admin")


async def test_the_worker_of_another_environment_reads_and_approves_nothing(own_server: PostgresServer) -> None:
    own_server.execute("CREATE DATABASE shop")
    staging = own_server.new_database()
    own_server.execute(f"CREATE ROLE admin LOGIN CREATEROLE; GRANT CREATE ON DATABASE shop, {staging} TO admin")
    own_server.execute(APART)
    assert await prepare(own_server.url("shop", "admin")) == (0, "")
    assert await prepare(own_server.url(staging, "admin"), "--schema", "keyless_staging") == (0, "")
    own_server.execute("CREATE ROLE tester LOGIN; GRANT keyless_staging_worker TO tester", staging, "admin")
    async with PostgresBroker(own_server.url(staging, "tester"), "keyless_staging") as broker:
        await broker.prepare(lease=LEASE, service="")
    with pytest.raises(BrokerError, match='permission denied for database "shop"'):
        await PostgresBroker(own_server.url("shop", "tester")).open()
    own_server.execute("GRANT CONNECT ON DATABASE shop TO PUBLIC")  # then the roles alone keep them apart
    async with PostgresBroker(own_server.url("shop", "tester")) as broker:
        for call in (broker.prepare(lease=LEASE, service=""), take_n(broker, 1), broker.inspect()):
            with pytest.raises(BrokerError, match="permission denied for schema keyless"):
                await call


@pytest.fixture
async def managed(own_server: PostgresServer) -> PostgresServer:
    """A server of a provider, who keeps the superuser, with a schema in which two requests wait."""
    provide(own_server)
    own_server.execute("CREATE DATABASE shop", user="admin")
    own_server.execute(APART, user="admin")
    assert await prepare(own_server.url("shop", "admin")) == (0, "")
    own_server.execute(f"{ROLES}; GRANT CONNECT ON DATABASE shop TO shop, approvals, backup", "shop", "admin")
    own_server.execute("CREATE TABLE payment (operation_id text)", "shop", "admin")
    own_server.execute("SELECT keyless.add_reader('shop')", "shop", "shop")
    async with PostgresBroker(own_server.url("shop")) as broker:
        await submit(broker, "a", "b")
    return own_server


def provide(server: PostgresServer) -> None:
    """Make what a provider makes, and the login that backs up."""
    dump, program = (server.run(name, "--version").split()[2:] for name in ("pg_dump", "postgres"))
    if dump > program:
        pytest.skip("a dump of a newer version sets what the server does not know")
    server.execute("CREATE ROLE admin LOGIN CREATEROLE CREATEDB")
    server.execute("CREATE ROLE backup LOGIN; GRANT pg_read_all_data TO backup")


def run(command: str, server: PostgresServer, folder: Path) -> None:
    """Run a command of the page at a server, with its files in a folder."""
    program, *arguments = shlex.split(command)
    for number, word in enumerate(arguments):
        if word.endswith(".dump"):
            arguments[number] = f"{folder}/{word}"
        elif (address := re.fullmatch(r"postgresql://(\w+)@db/(\w+)", word)) is not None:
            arguments[number] = server.url(address[2], address[1])
    server.run(program, *arguments)


async def waiting(server: PostgresServer, database: str) -> set[str]:
    """Return what a worker would ask for."""
    async with PostgresBroker(server.url(database, "approvals")) as broker:
        await broker.prepare(lease=LEASE, service="")
        return {operation_of(message) for message in await broker.take(3, 0.3)}


async def test_the_backup_of_the_page_is_restored_without_a_superuser(managed: PostgresServer) -> None:
    async with PostgresBroker(managed.url("shop", "approvals")) as broker:
        await broker.prepare(lease=LEASE, service="")
        decided, asked = await take_n(broker, 2)
        assert await decide(broker, decided)
        await broker.claim(asked)
    folder = managed.new_folder("backup")
    _, backup = re.findall(r"^(pg_dump .*)$", TEXT, re.MULTILINE)
    run(backup, managed, folder)
    restored = PostgresServer()
    try:
        provide(restored)
        restored.execute(MADE_ROLES + ROLES, user="admin")
        (restore,) = re.findall(r"`(pg_restore .*?)`", TEXT)
        run(restore, restored, folder)
        assert await prepare(restored.url("shop", "admin")) == (0, "")
        assert await waiting(restored, "shop") == {operation_of(asked)}
        known = restored.execute(
            "SELECT operation_id, asked IS NOT NULL, outcome FROM keyless.request LEFT JOIN keyless.outcome USING (id)",
            "shop",
        )
        assert sorted(known) == sorted([[operation_of(asked), "t", ""], [operation_of(decided), "f", "approved"]])
        assert restored.execute("SELECT name, owner FROM keyless.reader", "shop") == [["shop", "shop"]]
        restored.execute("CREATE ROLE stranger")
        assert restored.execute("SELECT has_database_privilege('stranger', 'shop', 'CONNECT')") == [["f"]]
    finally:
        restored.close()


async def test_a_copy_of_production_asks_nobody(managed: PostgresServer) -> None:
    folder = managed.new_folder("copy")
    copy, _ = re.findall(r"^(pg_dump .*)$", TEXT, re.MULTILINE)
    run(copy, managed, folder)
    managed.execute("CREATE DATABASE copy", user="admin")
    managed.run("pg_restore", "--dbname", managed.url("copy", "admin"), folder / "copy.dump")
    managed.execute("INSERT INTO payment VALUES ('a')", "copy", "admin")
    managed.execute("DROP SCHEMA keyless CASCADE", "shop", "admin")  # as in a copy that has it
    for database in ("copy", "shop"):
        assert await prepare(managed.url(database, "admin")) == (0, "")
        assert await waiting(managed, database) == set()


async def test_the_schema_moves_to_another_server_by_logical_replication() -> None:
    old, new = PostgresServer(wal_level="logical"), PostgresServer()
    try:
        for server in (old, new):
            provide(server)
            server.execute("CREATE DATABASE shop", user="admin")
        assert await prepare(old.url("shop", "admin")) == (0, "")
        old.execute(ROLES, "shop", "admin")
        new.execute(MADE_ROLES + ROLES, "shop", "admin")
        async with PostgresBroker(old.url("shop")) as broker:
            await submit(broker, "a")
        schema = old.new_folder("schema") / "schema.sql"
        old.run("pg_dump", "--schema-only", "--schema=keyless", "--file", schema, old.url("shop"))
        new.run("psql", "--quiet", "--set=ON_ERROR_STOP=1", "--file", schema, new.url("shop", "admin"))
        old.execute("CREATE PUBLICATION move FOR ALL TABLES", "shop")
        source = f"host={old.folder} dbname=shop user=postgres"
        new.execute(f"CREATE SUBSCRIPTION move CONNECTION '{source}' PUBLICATION move", "shop")
        are_there = "SELECT count(*) = 8 FROM pg_subscription_rel WHERE srsubstate = 'r'"
        await until(lambda: new.execute(are_there, "shop") == [["t"]])
        new.execute("DROP SUBSCRIPTION move", "shop")
        async with PostgresBroker(new.url("shop")) as broker:
            with pytest.raises(UnavailableError, match=re.escape("SELECT setval(pg_get_serial_sequence(")):
                await submit(broker, "b")
            new.execute(SEQUENCE, "shop", "admin")
            await submit(broker, "b")
        assert await waiting(new, "shop") == {"a", "b"}
    finally:
        old.close()
        new.close()


async def test_a_user_is_erased_once_each_reader_has_handled_the_outcomes(
    broker: PostgresBroker, connection: asyncpg.Connection[Any]
) -> None:
    for name in ("handled", "unread"):
        await submit(broker, name)
        (message,) = await take_n(broker, 1)
        assert await broker.decide(message, msgspec.structs.replace(outcome_of(message), user_id="C0FFEE"))
        if name == "handled":
            await (await broker.next_outcome("shop")).mark_handled()
    await submit(broker, "undecided")
    await connection.execute(ERASED)
    known = "SELECT operation_id FROM keyless.request WHERE body <> ''"
    assert await connection.fetch(known) == [("undecided",)]
    known = "SELECT operation_id FROM keyless.request JOIN keyless.outcome USING (id)"
    assert await connection.fetch(known) == [("unread",)]
    assert await broker.submit(new_request("handled"))  # and is still known as the one that it was


async def test_an_installer_that_may_not_make_roles_grants_the_functions(own_server: PostgresServer) -> None:
    database = own_server.new_database()
    own_server.execute("CREATE ROLE app LOGIN; CREATE ROLE shop LOGIN; CREATE ROLE approvals LOGIN")
    status, output = await prepare(own_server.url(database, "app"))
    assert status == 1
    assert "may not change that" in output
    assert "Traceback" not in output
    own_server.execute("CREATE SCHEMA keyless AUTHORIZATION app", database)
    assert await prepare(own_server.url(database, "app")) == (0, "")
    own_server.execute(GRANTS, database, "app")
    async with PostgresBroker(own_server.url(database, "approvals")) as broker:
        await broker.prepare(lease=LEASE, service="")
        await ask_and_read(own_server, database, broker)


async def ask_and_read(server: PostgresServer, database: str, broker: PostgresBroker) -> None:
    """Do, as the login of a shop, what an application does."""
    shop = await asyncpg.connect(server.url(database, "shop"))
    async with shop.transaction():
        await submit_approval(shop, "C0FFEE", operation_id="a")
    (message,) = await take_n(broker, 1)
    assert await decide(broker, message)
    async with asyncio.timeout(PATIENCE), next_outcome(shop, "shop") as event:
        assert event.operation_id == "a"
    await shop.close()


async def test_the_program_of_the_guide_needs_another_broker_and_nothing_else(url: str, tmp_path: Path) -> None:
    code = (HOWTO / "running-workers.md").read_text().partition("```python\n")[2].partition("```")[0]
    for old, new in (
        ("aiokeyless.worker.sqlite import SqliteBroker", "aiokeyless.worker.postgres import PostgresBroker"),
        ('SqliteBroker("keyless.db")', f'PostgresBroker("{url}")'),
    ):
        assert old in code
        code = code.replace(old, new)
    (tmp_path / "program.py").write_text(code)
    async with (
        Sandbox(auto_approve=0.1) as sandbox,
        sandbox.client(max_attempts=1) as client,
        ApprovalWorker(client, url),
    ):
        program = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "error", "program.py"), cwd=tmp_path, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await program.communicate()
    assert (program.returncode, output) == (0, b"approved order-7\n")
