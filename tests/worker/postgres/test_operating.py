"""docs/howto/operating-postgres.md, tried as it is written, on a server that the worker does not own; and the guide."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
from pathlib import Path

import asyncpg
import pytest
from postgres_server import PostgresServer
from waiting import PATIENCE

from aiokeyless.errors import BrokerError
from aiokeyless.sandbox import Sandbox
from aiokeyless.worker import ApprovalWorker, next_outcome, submit_approval
from aiokeyless.worker.postgres import PostgresBroker
from worker.conformance.brokers import LEASE, decide, operation_of, submit, take_n

HOWTO = Path(__file__).parents[3] / "docs" / "howto"
PAGE = HOWTO / "operating-postgres.md"
APART, ROLES, TEAM, GRANTS, REMOVED_READER, REMOVED = re.findall(
    r"^```sql\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE
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
    own_server.execute("SELECT keyless.add_reader('old')", database)
    own_server.execute(REMOVED_READER, database, "admin")
    assert own_server.execute("SELECT name FROM keyless.reader", database) == [["shop"]]
    own_server.execute(REMOVED, database, "admin")


@pytest.mark.parametrize("in_url", [True, False])
async def test_the_worker_of_another_environment_reads_and_approves_nothing(
    own_server: PostgresServer, in_url: bool
) -> None:
    own_server.execute("CREATE DATABASE shop")
    staging = own_server.new_database()
    own_server.execute(f"CREATE ROLE admin LOGIN CREATEROLE; GRANT CREATE ON DATABASE shop, {staging} TO admin")
    own_server.execute(APART)
    assert await prepare(own_server.url("shop", "admin")) == (0, "")
    named = (f"{own_server.url(staging, 'admin')}&schema=keyless_staging",)
    assert await prepare(*(named if in_url else (named[0].partition("&")[0], "--schema", "keyless_staging"))) == (0, "")
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


async def test_the_backup_of_the_page_is_made_and_restored(own_server: PostgresServer) -> None:
    own_server.execute("CREATE DATABASE shop")
    own_server.execute("CREATE ROLE admin LOGIN CREATEROLE PASSWORD 'secret'; GRANT CREATE ON DATABASE shop TO admin")
    own_server.execute("CREATE ROLE backup LOGIN; GRANT pg_read_all_data TO backup")
    assert await prepare(own_server.url("shop", "admin")) == (0, "")
    own_server.execute(ROLES, "shop", "admin")
    own_server.execute("CREATE TABLE payment (operation_id text); SELECT keyless.add_reader('shop')", "shop")
    async with PostgresBroker(own_server.url("shop")) as broker:
        await submit(broker, "a", "b")
    folder = own_server.new_folder("backup")
    for command in re.findall(r"^(pg_dump.*)$", PAGE.read_text(), re.MULTILINE):
        program, *arguments = shlex.split(command, comments=True)
        arguments = [f"{folder}/{word}" if word.endswith((".sql", ".dump")) else word for word in arguments]
        where = {"db": str(own_server.folder), "postgresql://backup@db/shop": own_server.url("shop", "backup")}
        own_server.run(program, *(where.get(word, word) for word in arguments))
    restored = PostgresServer()
    try:
        restored.run("psql", "--quiet", "--file", folder / "roles.sql", restored.url("postgres"))
        restored.execute("CREATE DATABASE shop")
        restored.run("pg_restore", "--dbname", restored.url("shop"), folder / "shop.dump")
        assert await prepare(restored.url("shop", "admin")) == (0, "")
        async with PostgresBroker(restored.url("shop", "approvals")) as broker:
            await broker.prepare(lease=LEASE, service="")
            assert {operation_of(message) for message in await take_n(broker, 2)} == {"a", "b"}
    finally:
        restored.close()


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
