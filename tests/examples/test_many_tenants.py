"""The application of many tenants as its users have it: none notices another, and changes need no restart."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import signal
import sys
import weakref
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Self

import aiohttp
import asyncpg
import pytest
from example_server import ExampleServer
from leaks import armed_timers, tasks_since
from postgres_server import prepare, shared_server
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from waiting import PATIENCE, until

from aiokeyless import ApprovalTicket, AuthenticationError, ClientClosedError
from aiokeyless.sandbox import Sandbox
from aiokeyless.worker import next_outcome, submit_approval
from aiokeyless.worker.postgres import PostgresBroker

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import RequestRecord

EXAMPLE = Path(__file__).parents[2] / "examples" / "many_tenants"
PAGE = EXAMPLE.parents[1] / "docs" / "howto" / "many-tenants.md"
SITE = Path(__file__).parent / "servers" / "tenants_site.py"
sys.path.insert(0, str(EXAMPLE))

import tenant_workers  # noqa: E402  # examples are programs, not a package
import tenants  # noqa: E402

COLUMNS = "name, api_key, base_url"


class Shop:
    """The application, its database, and a service for each tenant."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self._server = shared_server()
        self._database = self._server.new_database()
        self.url = self._server.url(self._database)
        path = os.pathsep.join([str(EXAMPLE), os.environ.get("PYTHONPATH", "")])
        settings |= {"DATABASE_URL": self.url, "PYTHONPATH": path}
        self._stack = AsyncExitStack()
        self._http: aiohttp.ClientSession
        self.site = ExampleServer(SITE, NO_SANDBOX, folder, port="PORT", **settings)  # type: ignore[arg-type]

    @property
    def log(self) -> str:
        return self.site.log.read_text()

    def sql(self, statement: str) -> list[list[str]]:
        return self._server.execute(statement, self._database)

    async def sandbox(self, **options: object) -> Sandbox:
        return await self._stack.enter_async_context(Sandbox(**options))  # type: ignore[arg-type]

    def add(self, name: str, sandbox: Sandbox, api_key: str = "sandbox-key") -> None:
        self.sql(a_row(name, sandbox, api_key))

    async def ask(self, tenant: str, order: str = "order-1", *, method: str = "POST", user: str = "C0FFEE") -> str:
        """Return the state that the application answers, or else the status."""
        headers = {"tenant": tenant, "user": user}
        async with self._http.request(method, f"{self.site.url}/approvals/{order}", headers=headers) as answer:
            return (await answer.json())["state"] if answer.status == 200 else str(answer.status)

    async def state(self, tenant: str, order: str = "order-1", *, user: str = "C0FFEE") -> str:
        return await self.ask(tenant, order, method="GET", user=user)

    async def until(self, answer: str, call: Callable[[str], Awaitable[str]], tenant: str) -> None:
        """Ask again until the application answers this."""

        async def is_so() -> bool:
            return await call(tenant) == answer

        await until(is_so, every=0.1)

    async def __aenter__(self) -> Self:
        self._http = await self._stack.enter_async_context(aiohttp.ClientSession())
        await self._stack.enter_async_context(self.site)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()


class _Nobody:
    url = api_key = ""


NO_SANDBOX = _Nobody()


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncGenerator[Shop]:
    async with Shop(tmp_path) as shop:
        yield shop


@pytest.fixture
async def acme(shop: Shop) -> Sandbox:
    """The service of the one tenant."""
    sandbox = await shop.sandbox()
    shop.add("acme", sandbox)
    await shop.until("asked", shop.ask, "acme")
    return sandbox


async def test_of_twenty_tenants_those_that_fail_are_noticed_by_no_other_and_recover_without_a_restart(
    shop: Shop,
) -> None:
    def refuse(record: RequestRecord) -> None:
        if record.status == 200:
            limited.fail_next(status=429, retry_after=1, times=3)

    limited = await shop.sandbox(on_request=refuse, auto_approve=0.5)
    good = {f"tenant-{number}": await shop.sandbox(auto_approve=0.5) for number in range(17)}
    down, other_key = await shop.sandbox(auto_approve=0.5), await shop.sandbox(auto_approve=0.5, api_key="new")
    for name, sandbox in {**good, "limited": limited, "down": down, "other-key": other_key}.items():
        shop.add(name, sandbox)
    await down.aclose()
    for name in good:
        await shop.until("asked", shop.ask, name)
    failing = [asyncio.create_task(shop.until("asked", shop.ask, name)) for name in ("down", "other-key", "limited")]
    assert await asyncio.gather(*map(shop.state, good)) == ["approved"] * len(good)
    assert all(len(sandbox.operations) == 1 for sandbox in good.values())
    await until(lambda: "name='down'" in shop.log and "name='other-key'" in shop.log)
    assert (failing[0].done(), failing[1].done()) == (False, False)
    assert "name='tenant-" not in shop.log
    await down.start()
    shop.sql("UPDATE tenants SET api_key = 'new' WHERE name = 'other-key'")
    await asyncio.gather(*failing)
    for name in ("down", "other-key", "limited"):
        await shop.until("approved", shop.state, name)


async def test_tenants_are_added_suspended_moved_and_deleted_while_the_application_runs(
    shop: Shop, acme: Sandbox
) -> None:
    waiting = asyncio.create_task(shop.state("acme"))
    await until(lambda: any(request.method == "GET" for request in acme.requests))
    shop.sql("UPDATE tenants SET state = 'draining'")
    await shop.until("403", shop.ask, "acme")
    [operation] = acme.operations
    acme.approve(operation)
    assert await waiting == "approved"  # what was asked goes on
    elsewhere = await shop.sandbox()
    shop.sql(f"UPDATE tenants SET state = 'active', base_url = '{elsewhere.url}'")  # noqa: S608

    async def asks_elsewhere() -> bool:
        await shop.ask("acme", "order-2")
        return bool(elsewhere.operations)

    await until(asks_elsewhere, every=0.1)
    assert await shop.state("acme") == "approved"
    waiting = asyncio.create_task(shop.state("acme", "order-2"))
    await until(lambda: any(request.method == "GET" for request in elsewhere.requests))
    shop.sql("UPDATE tenants SET state = 'suspended'")
    assert await waiting == "pending"
    assert await shop.ask("acme", "order-3") == "403"
    shop.sql("DELETE FROM approvals WHERE tenant = 'acme'; DELETE FROM tenants WHERE name = 'acme'")
    assert await shop.state("acme") == "404"


async def test_a_tenant_that_cannot_be_made_stops_no_other(shop: Shop, acme: Sandbox) -> None:
    shop.sql("INSERT INTO tenants (name, api_key, region) VALUES ('odd', 'key', 'mars')")
    await until(lambda: "tenant odd: region" in shop.log)
    assert await shop.ask("odd") == "403"
    shop.sql("ALTER TABLE tenants RENAME TO gone")  # which shows that it is read
    await until(lambda: shop.log.count("tenants are not read") > 1)
    shop.sql("ALTER TABLE gone RENAME TO tenants")
    assert shop.log.count("tenant odd:") == 1
    shop.sql("UPDATE tenants SET region = 'us' WHERE name = 'odd'; ALTER TABLE tenants RENAME TO away")
    await until(lambda: "tenants are not read" in shop.log)
    assert await shop.ask("acme") == "asked"
    shop.sql("ALTER TABLE away RENAME TO tenants")
    assert "sandbox-key" not in shop.log
    assert acme.operations


async def test_open_waits_of_all_tenants_end_at_a_signal_and_the_next_process_goes_on(shop: Shop) -> None:
    sandboxes = {f"tenant-{number}": await shop.sandbox() for number in range(3)}
    for name, sandbox in sandboxes.items():
        shop.add(name, sandbox)
    for name in sandboxes:
        await shop.until("asked", shop.ask, name)
    waits = [asyncio.create_task(shop.state(name)) for name in sandboxes]
    await until(lambda: all(any(r.method == "GET" for r in sandbox.requests) for sandbox in sandboxes.values()))
    await shop.site.end(signal.SIGTERM)
    assert await asyncio.gather(*waits) == ["pending"] * 3
    assert "Traceback" not in shop.log
    for sandbox in sandboxes.values():
        sandbox.approve(*sandbox.operations)
    await shop.site.start()
    assert await asyncio.gather(*map(shop.state, sandboxes)) == ["approved"] * 3


async def test_a_pin_is_refused_for_good(shop: Shop, acme: Sandbox) -> None:
    acme.approve(*acme.operations, auth_type="pin")
    assert [await shop.state("acme") for _ in range(2)] == ["refused"] * 2


async def test_an_order_is_of_the_user_and_of_the_tenant_that_asked(shop: Shop, acme: Sandbox) -> None:
    shop.add("other", acme)
    assert await shop.state("acme", user="BABE") == "404"
    assert await shop.state("other") == "404"
    await shop.until("asked", shop.ask, "other")
    assert len(acme.operations) == 2  # an operation of its own, though order, user and service are the same


async def test_an_order_that_is_asked_about_twice_at_once_is_one_operation(shop: Shop, acme: Sandbox) -> None:
    assert await asyncio.gather(*(shop.ask("acme", "order-2") for _ in range(5))) == ["asked"] * 5
    _, operation = acme.operations
    acme.approve(operation)
    assert await asyncio.gather(*(shop.state("acme", "order-2") for _ in range(3))) == ["approved"] * 3


async def test_an_approval_after_the_timeout_counts_for_nothing(tmp_path: Path) -> None:
    async with Shop(tmp_path, EXPIRES_IN="1") as shop:
        sandbox = await shop.sandbox()
        shop.add("acme", sandbox)
        await shop.until("asked", shop.ask, "acme")
        assert await shop.state("acme") == "timed out"
        sandbox.approve(*sandbox.operations)
        assert await shop.state("acme") == "timed out"


async def test_an_approval_that_is_found_long_after_the_end_counts_for_nothing(shop: Shop, acme: Sandbox) -> None:
    acme.approve(*acme.operations)
    past = "'2026-01-01T00:00:00+00:00'"
    shop.sql(f"UPDATE approvals SET ticket = jsonb_set(ticket::jsonb, '{{expires_at}}', to_jsonb({past}::text))")  # noqa: S608
    assert [await shop.state("acme") for _ in range(2)] == ["timed out"] * 2


async def test_an_order_writes_no_lines_of_a_log(shop: Shop) -> None:
    down = await shop.sandbox()
    shop.add("acme", down)
    await shop.until("asked", shop.ask, "acme")
    await down.aclose()
    assert await shop.ask("acme", "1%0Aforged") == "not asked"
    await until(lambda: r"'1\nforged' of" in shop.log)
    assert "\nforged" not in shop.log


async def test_a_phone_is_notified_once(shop: Shop, acme: Sandbox) -> None:
    acme.fail_next(status=400)
    assert await shop.ask("acme", "order-2") == "not asked"
    assert shop.sql("SELECT state FROM approvals WHERE order_id = 'order-2'") == [["asking"]]
    assert [await shop.ask("acme", "order-2") for _ in range(3)] == ["asked"] * 3
    assert await asyncio.gather(*(shop.ask("acme", "order-3") for _ in range(5))) == ["asked"] * 5
    await until(lambda: shop.log.count("push to C0FFEE") >= 3)
    assert shop.log.count("push to C0FFEE") == len(acme.operations) == 3


@pytest.fixture
async def database(monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[str]:
    """The tables of the application in this process; its URL."""
    server = shared_server()
    url = server.url(server.new_database())
    engine = create_async_engine(url.replace("postgresql:", "postgresql+asyncpg:", 1))
    async with engine.begin() as connection:
        await connection.run_sync(tenants.Table.metadata.create_all)
    monkeypatch.setattr(tenants, "sessions", async_sessionmaker(engine, expire_on_commit=False))
    monkeypatch.setattr(tenants, "READS_EVERY", 0.05)
    monkeypatch.setattr(tenant_workers, "DATABASE_URL", url)
    monkeypatch.setattr(tenant_workers, "AGAIN", 0.1)
    yield url
    await engine.dispose()


async def execute(statement: str) -> None:
    async with tenants.sessions.begin() as session:
        await session.execute(text(statement))


def a_row(name: str, sandbox: Sandbox, api_key: str = "sandbox-key") -> str:
    return f"INSERT INTO tenants ({COLUMNS}) VALUES ('{name}', '{api_key}', '{sandbox.url}')"  # noqa: S608


async def come_and_go(registry: tenants.Registry[KeylessClient], sandbox: Sandbox, leave: str) -> None:
    """Have a hundred tenants that wait, until a statement takes them away."""
    names = [f"tenant-{number}" for number in range(100)]
    rows = ", ".join(f"('{name}', 'sandbox-key', '{sandbox.url}')" for name in names)
    await execute(f"INSERT INTO tenants ({COLUMNS}) VALUES {rows}")  # noqa: S608
    await until(lambda: None not in map(registry.get, names))
    clients = [client for client in map(registry.get, names) if client is not None]
    waits = [asyncio.create_task(client.wait_for_approval("order", if_missing="wait")) for client in clients]
    await until(lambda: all(client.statistics.waiting for client in clients))
    await execute(leave)
    assert {*map(type, await asyncio.gather(*waits, return_exceptions=True))} == {ClientClosedError}
    await execute("DELETE FROM tenants")
    await until(lambda: {*map(registry.get, names)} == {None})


@pytest.mark.usefixtures("database")
async def test_nothing_is_left_of_a_thousand_tenants_that_came_and_went(sandbox: Sandbox) -> None:
    made: list[weakref.ref[KeylessClient]] = []

    def make(tenant: tenants.Tenant) -> KeylessClient:
        client = tenants.make_client(tenant)
        made.append(weakref.ref(client))
        return client

    before = asyncio.all_tasks()
    async with tenants.Registry(make) as registry:
        for leave in ("DELETE FROM tenants", "UPDATE tenants SET state = 'suspended'") * 5:
            await come_and_go(registry, sandbox, leave)
        gc.collect()
        assert [client() for client in made] == [None] * 1000
    await until(lambda: not tasks_since(before))
    assert not armed_timers()


@pytest.mark.usefixtures("database")
async def test_the_place_that_a_tenant_left_never_gets_its_new_key(sandbox: Sandbox) -> None:
    made: list[tenants.Tenant] = []

    def make(tenant: tenants.Tenant) -> KeylessClient:
        made.append(tenant)
        return tenants.make_client(tenant)

    await execute(a_row("acme", sandbox, "first"))
    async with tenants.Registry(make):
        await execute("UPDATE tenants SET api_key = 'second'")
        await until(lambda: made[0].api_key == "second")
        await execute("UPDATE tenants SET api_key = 'third', base_url = NULL")
        await until(lambda: len(made) == 2)
        assert [tenant.api_key for tenant in made] == ["second", "third"]


@pytest.mark.usefixtures("database")
async def test_the_clients_go_on_while_the_database_restarts_and_then_follow_it(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = 0

    def fail() -> NoReturn:
        nonlocal failures
        failures += 1
        raise asyncpg.CannotConnectNowError  # which SQLAlchemy does not translate

    await execute(a_row("acme", sandbox, "old"))
    async with tenants.Registry(tenants.make_client) as registry:
        client = registry.get("acme")
        assert client is not None
        with monkeypatch.context() as patch:
            patch.setattr(tenants, "sessions", fail)
            await until(lambda: failures > 1)
            with pytest.raises(AuthenticationError):
                await client.create_operation("C0FFEE")
        await execute("UPDATE tenants SET api_key = 'sandbox-key'")

        async def is_accepted() -> bool:
            try:
                return bool(await client.create_operation("C0FFEE"))
            except AuthenticationError:
                return False

        await until(is_accepted)
        assert registry.get("acme") is client


async def test_each_tenant_has_a_worker_that_starts_again_and_stops_no_other(
    database: str, sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    sandbox.auto_approve = 0
    async with Sandbox(auto_approve=0, api_key="new") as other_key:
        await execute(a_row("acme", sandbox))
        await execute(a_row("other_key", other_key))
        for schema in ("keyless_acme", "keyless_other_key"):
            await prepare(database, schema)
        running = asyncio.create_task(tenant_workers.main())
        await until(lambda: "keyless_other_key: GET" in caplog.text, every=0.1)
        await outcome(database, "keyless_acme")
        await execute("UPDATE tenants SET api_key = 'new' WHERE name = 'other_key'")
        await outcome(database, "keyless_other_key")
        await execute("UPDATE tenants SET state = 'suspended' WHERE name = 'acme'")
        await outcome(database, "keyless_other_key", "order-2")
        signal.raise_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE):
            await running


async def test_a_worker_that_is_closed_twice_finishes_its_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, draining, drained = asyncio.Event(), asyncio.Event(), asyncio.Event()
    done: list[bool] = []

    class Worker:
        async def __aenter__(self) -> None:
            entered.set()

        async def __aexit__(self, *_: object) -> None:
            draining.set()
            await drained.wait()
            done.append(True)

    monkeypatch.setattr(tenant_workers, "PostgresBroker", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(tenant_workers, "ApprovalWorker", lambda *_: Worker())
    tenant = tenants.Tenant(name="acme", api_key="key", region="eu", base_url=None, state="active")
    supervisor = tenant_workers.Supervisor(tenant, None)  # type: ignore[arg-type]  # nobody uses the pool
    await entered.wait()
    closing = [asyncio.create_task(supervisor.aclose())]
    await draining.wait()
    closing.append(asyncio.create_task(supervisor.aclose()))
    for _ in range(5):
        await asyncio.sleep(0)
    drained.set()
    await asyncio.gather(*closing)
    assert done == [True]


async def outcome(database: str, schema: str, order: str = "order-1") -> None:
    """Submit a request in a tenant's schema, and wait until its worker has decided it."""

    async with asyncio.timeout(PATIENCE), PostgresBroker(database, schema) as broker:
        await submit_approval(broker, "C0FFEE", operation_id=order)
        async with next_outcome(broker, "shop") as event:
            assert (event.operation_id, event.outcome) == (order, "approved")


async def test_the_pages_queries_find_what_is_left_and_its_statements_leave_nothing(database: str) -> None:
    await prepare(database, "keyless_gone")
    ticket = ApprovalTicket.for_operation("id-1", user_id="C0FFEE", require_auth_type="biom")
    await execute("INSERT INTO tenants (name, api_key) VALUES ('gone', 'key')")
    async with tenants.sessions.begin() as session:
        session.add(tenants.Approval(tenant="gone", order_id="order-1", user_id="C0FFEE", ticket=ticket.to_json()))
    async with PostgresBroker(database, "keyless_gone") as broker:
        await submit_approval(broker, "C0FFEE", operation_id="id-2")
    drain, still_open, waiting, delete, forgotten = (
        block.replace("acme", "gone") for block in re.findall(r"```sql\n(.*?)```", PAGE.read_text(), re.DOTALL)
    )

    def run(statement: str) -> list[list[str]]:
        return shared_server().execute(statement, database.partition("@/")[2].partition("?")[0])

    run(drain)
    assert run("SELECT state FROM tenants") == [["draining"]]
    assert run(still_open) == [["order-1"]]
    assert run(waiting) == [["1"], ["0"]]
    everything = ["approval order-1", *(f"role keyless_gone_{name}" for name in ("asker", "owner", "reader", "worker"))]
    assert sorted(run(forgotten)) == [[each] for each in (*everything, "schema keyless_gone")]
    run(delete)
    assert run(forgotten) == []
    assert run("SELECT * FROM tenants") == []
