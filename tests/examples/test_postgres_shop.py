"""The shop in PostgreSQL as its users have it, with everything in it killed: each order is paid once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import pytest
from example_server import ExampleServer
from factors import ApprovingSandbox
from postgres_server import PostgresServer, shared_server
from waiting import until

from aiokeyless.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "postgres_shop"
WORKER = ROOT / "tests" / "worker" / "worker_process.py"
ORDERS = 30


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture
async def sandbox() -> AsyncGenerator[Sandbox]:
    async with Sandbox(auto_approve=0.5) as sandbox:
        yield sandbox


class Program:
    """A program that is started again whenever it ends."""

    def __init__(self, *command: str | Path, log: Path, **environment: str) -> None:
        self.log = log
        self._command = command
        self._environment = os.environ | environment
        self._process: asyncio.subprocess.Process | None = None
        self._running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            with self.log.open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, *self._command, env=self._environment, stdout=log, stderr=log
                )
            await self._process.wait()
            await asyncio.sleep(0.2)

    def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def end(self) -> None:
        self._running.cancel()
        self.kill()
        if self._process is not None:
            await self._process.wait()


async def place(session: aiohttp.ClientSession, shop: ExampleServer, number: int) -> None:
    """Place an order, again until the shop has it."""
    order = {"id": f"order-{number}", "user_id": "C0FFEE", "amount": f"{number}.00"}
    while True:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with session.post(f"{shop.url}/orders", json=order, timeout=aiohttp.ClientTimeout(5)) as answer:
                if answer.status == 200:
                    return
        await asyncio.sleep(0.1)


async def test_each_order_is_paid_once_whatever_is_killed(
    server: PostgresServer, sandbox: Sandbox, tmp_path: Path
) -> None:
    database = server.new_database()
    url = server.url(database)
    environment = {"DATABASE_URL": url, "KEYLESS_API_KEY": sandbox.api_key}
    workers = [Program(WORKER, url, sandbox.url, log=tmp_path / f"worker-{n}", **environment) for n in range(2)]
    readers = [Program(EXAMPLE / "settle.py", log=tmp_path / f"reader-{n}", **environment) for n in range(2)]
    shop = ExampleServer(EXAMPLE / "orders.py", sandbox, tmp_path, port="SHOP_PORT", DATABASE_URL=url)

    def count(query: str) -> int:
        try:
            return int(server.execute(query, database)[0][0])
        except RuntimeError:  # it is starting, or the schema is not there yet
            return -1

    try:
        async with shop, aiohttp.ClientSession() as session:
            await until(lambda: count("SELECT count(*) FROM keyless.migration") > 0)
            placing = asyncio.gather(*(place_later(session, shop, number) for number in range(ORDERS)))
            for turn in range(8):
                await asyncio.sleep(0.6)
                random.choice([*workers, *readers]).kill()  # noqa: S311  # nothing secret
                if turn % 6 == 3:
                    server.kill()
                    server.start()
                if turn % 6 == 5:
                    await shop.end(signal.SIGKILL)
                    await shop.start()
            await placing
            await until(lambda: count("SELECT count(*) FROM orders WHERE state = 'paid'") == ORDERS, within=150)
        assert count("SELECT count(*) FROM payments") == ORDERS
        assert count("SELECT count(*) FROM keyless.request") == ORDERS
        assert count("SELECT count(*) FROM keyless.unread") == 0
        assert len(sandbox.operations) == ORDERS
        for reader in readers:  # none tried to pay twice
            assert "about no order that is open" not in reader.log.read_text()
            assert "duplicate key" not in reader.log.read_text()
    finally:
        for program in (*workers, *readers):
            await program.end()


async def test_a_pin_pays_nothing_whoever_submitted_the_request(tmp_path: Path) -> None:
    server = shared_server()
    database = server.new_database()
    url = server.url(database)
    async with ApprovingSandbox("pin") as sandbox:
        environment = {"DATABASE_URL": url, "KEYLESS_API_KEY": sandbox.api_key}
        programs = [
            Program(WORKER, url, sandbox.url, log=tmp_path / "worker", **environment),
            Program(EXAMPLE / "settle.py", log=tmp_path / "reader", **environment),
        ]
        shop = ExampleServer(EXAMPLE / "orders.py", sandbox, tmp_path, port="SHOP_PORT", DATABASE_URL=url)
        try:
            async with shop, aiohttp.ClientSession() as session:
                await place(session, shop, 1)
                assert "push to the phone of C0FFEE: order-1\n" in shop.log.read_text()
                server.execute("INSERT INTO orders VALUES ('order-2', 'C0FFEE', 'Pay', 'asked')", database)
                forged = '{"version": 1, "user_id": "C0FFEE", "operation_id": "order-2", "operation_payload": "Pay"}'
                server.execute(f"SELECT keyless.submit('{forged}')", database)
                await until(lambda: "is no face's" in programs[1].log.read_text(), within=60)
                states, orders = [["not paid"], ["asked"]], "SELECT state FROM orders ORDER BY id"
                await until(lambda: server.execute(orders, database) == states, within=60)
                assert not server.execute("SELECT * FROM payments", database)
        finally:
            for program in programs:
                await program.end()


async def place_later(session: aiohttp.ClientSession, shop: ExampleServer, number: int) -> None:
    await asyncio.sleep(number * 0.12)
    await place(session, shop, number)


async def test_the_shop_answers_503_while_its_database_is_away_and_500_if_it_has_no_schema(
    server: PostgresServer, sandbox: Sandbox, tmp_path: Path
) -> None:
    url = server.url(server.new_database())
    async with (
        ExampleServer(EXAMPLE / "orders.py", sandbox, tmp_path, port="SHOP_PORT", DATABASE_URL=url) as shop,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session,
    ):
        order = {"id": "order-1", "user_id": "C0FFEE", "amount": "1.00"}
        for status in (500, 503, 503):
            async with session.post(f"{shop.url}/orders", json=order) as answer:
                assert answer.status == status
            if status == 500:
                server.kill()
    assert "(the schema 'keyless' is missing" in shop.log.read_text()
