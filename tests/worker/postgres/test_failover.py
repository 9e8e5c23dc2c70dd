"""A real standby that follows by streaming, and takes over."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

import asyncpg
import pytest
from postgres_server import PostgresServer
from waiting import PATIENCE, until

from aiokeyless.errors import BrokerError
from aiokeyless.sandbox import Sandbox
from aiokeyless.worker import ApprovalWorker, Outcome, next_outcome, submit_approval
from aiokeyless.worker.broker import Claim, ExchangeResult, UnavailableError
from aiokeyless.worker.messages import FailureReason
from aiokeyless.worker.postgres import PostgresBroker
from aiokeyless.worker.postgres import broker as module
from aiokeyless.worker.tables import row_of
from worker.conformance.brokers import LEASE, decide, operation_of, submit, take_n

from .shop import decide_all

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

pytestmark = pytest.mark.slow


_LOST = 40  # a sequence logs a record for 32 values, so a standby knows of some that were not given out


@pytest.fixture
def primary(own_server: PostgresServer) -> PostgresServer:
    return own_server


@contextmanager
def standby_of(primary: PostgresServer) -> Iterator[PostgresServer]:
    server = PostgresServer(primary)
    try:
        yield server
    finally:
        server.close()


async def caught_up(primary: PostgresServer, standby: PostgresServer) -> None:
    """Wait until the standby has everything that is committed."""
    ((position,),) = primary.execute("SELECT pg_current_wal_lsn()")
    await until(lambda: standby.execute(f"SELECT pg_last_wal_replay_lsn() >= '{position}'") == [["t"]])


def both(primary: PostgresServer, standby: PostgresServer, database: str) -> str:
    """Return the URL of whichever takes writes."""
    hosts = f"{primary.folder},{standby.folder}"
    return f"postgresql://postgres@/{database}?host={hosts}&port=5432,5432&target_session_attrs=read-write"


async def test_an_asynchronous_standby_takes_over_and_no_approval_counts_by_mistake(
    primary: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RESTORES_EVERY", 1)
    database = primary.new_database()
    async with PostgresBroker(primary.url(database)) as broker:
        await broker.prepare(lease=LEASE, service="")
    async with Sandbox() as sandbox, sandbox.client() as client:

        async def ask(operation_id: str) -> None:
            connection = await asyncpg.connect(primary.url(database))
            async with connection.transaction():
                await submit_approval(connection, "C0FFEE", operation_id=operation_id, expires_in=600)
            await connection.close()

        def are_asked(*operation_ids: str) -> Callable[[], bool]:
            return lambda: {*operation_ids} <= sandbox.operations.keys()

        with standby_of(primary) as standby:
            url = both(primary, standby, database)
            async with ApprovalWorker(client, url):
                await ask("kept")
                await until(are_asked("kept"))
            await ask("claim-lost")
            await caught_up(primary, standby)
            standby.stop()  # what is committed from now on is lost
            async with ApprovalWorker(client, url) as worker:
                await ask("lost")
                await until(are_asked("claim-lost", "lost"))
                primary.kill()
                for operation_id in ("kept", "claim-lost", "lost"):
                    sandbox.approve(operation_id)
                await until(lambda: bool(worker.statistics.problems))
                standby.start()
                standby.promote()
                outcomes = await read(standby.url(database), 2)
                await until(lambda: worker.statistics.is_ready)
    assert outcomes["kept"] == (Outcome.APPROVED, None)
    assert outcomes["claim-lost"] == (Outcome.FAILED, FailureReason.ALREADY_APPROVED)


async def test_a_delivery_that_a_failover_overtook_decides_no_other_request_of_its_id(
    primary: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RESTORES_EVERY", 1)
    database = primary.new_database()
    async with PostgresBroker(primary.url(database)) as broker:
        await broker.prepare(lease=LEASE, service="")
        await decide_all(broker, "first")  # so that the standby knows a value of the sequence
    with standby_of(primary) as standby:
        await caught_up(primary, standby)
        standby.stop()  # what is committed from now on is lost
        async with PostgresBroker(both(primary, standby, database)) as broker:
            await broker.prepare(lease=LEASE, service="")
            await submit(broker, *(f"pay-1-eur-{number}" for number in range(_LOST)))
            lost = await take_n(broker, _LOST)
            primary.kill()
            standby.start()
            standby.promote()
            await until(lambda: standby.execute("SELECT pg_is_in_recovery()") == [["f"]])
            await retried(lambda: submit(broker, "pay-1000000-eur-0"))
            await submit(broker, *(f"pay-1000000-eur-{number}" for number in range(1, _LOST)))
            theirs = {row_of(message).id: message for message in await take_n(broker, _LOST)}
            again = [message for message in lost if row_of(message).id in theirs]
            assert again  # ids did come again

            for message in again:
                await broker.put_off(message, 0.0, ExchangeResult.FAILED)
            assert await broker.take(_LOST, 0.5) == ()
            for message in again:
                assert not await broker.has_claim(message)
                other = theirs[row_of(message).id]
                claims = await asyncio.gather(broker.claim(message), broker.claim(other))
                assert [*claims] == [Claim.ANOTHERS, Claim.NEW]
                assert [await broker.has_claim(message), await broker.has_claim(other)] == [False, True]
                assert not await broker.unclaim(message)
                stored = await asyncio.gather(decide(broker, message), decide(broker, other, Outcome.EXPIRED))
                assert list(stored) == [False, True]
        outcomes = standby.execute("SELECT outcome, count(*) FROM keyless.outcome GROUP BY 1 ORDER BY 1", database)
    assert outcomes == [["approved", "1"], ["expired", str(len(again))]]


async def retried(call: Callable[[], Awaitable[None]]) -> None:
    """Call until the broker answers."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                return await call()
            except UnavailableError:
                await asyncio.sleep(0.1)


async def read(url: str, count: int) -> dict[str | None, tuple[Outcome, str | None]]:
    outcomes = {}
    connection = await asyncpg.connect(url)
    async with asyncio.timeout(PATIENCE):
        for _ in range(count):
            async with next_outcome(connection, "shop") as event:
                outcomes[event.operation_id] = (event.outcome, event.reason)
    await connection.close()
    return outcomes


async def test_a_worker_that_is_led_to_a_standby_waits_and_says_so(primary: PostgresServer) -> None:
    database = primary.new_database()
    async with PostgresBroker(primary.url(database)) as broker:
        await broker.prepare(lease=LEASE, service="")
        await submit(broker, "a")
    with standby_of(primary) as standby:
        await caught_up(primary, standby)
        async with PostgresBroker(standby.url(database)) as broker:
            with pytest.raises(BrokerError, match="during recovery"):
                await broker.prepare(lease=LEASE, service="")
            assert (await broker.inspect()).problems == ("the database is a standby, which stores nothing",)
            with pytest.raises(UnavailableError):
                await broker.take(1, PATIENCE)
            with pytest.raises(UnavailableError):
                await broker.next_outcome("shop")
            standby.promote()
            await broker.prepare(lease=LEASE, service="")
            assert [operation_of(message) for message in await take_n(broker, 1)] == ["a"]
