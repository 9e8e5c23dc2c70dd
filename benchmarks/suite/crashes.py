"""Orders and payments in PostgreSQL while everything is killed: each committed order is paid once, and no other.

Orders are placed through proxies that cut COMMITs, before the server gets them or after it has answered. Workers and
readers are killed with SIGKILL and started again; the server is stopped at once, as by a power cut, and started again.
A payment has no unique key: one that is made twice would be counted twice.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import asyncpg

from aiokeyless import KeylessClient
from aiokeyless.sandbox import Sandbox
from aiokeyless.worker import ApprovalWorker, BrokerError, Outcome, next_outcome, submit_approval
from aiokeyless.worker.postgres import PostgresBroker
from aiokeyless.worker.postgres.connection import ERRORS
from benchmarks.approval_times import seeded_random
from benchmarks.cutting_proxy import CuttingProxy
from benchmarks.postgres import PostgresServer, is_installed
from benchmarks.programs import Program, keep_running
from benchmarks.report import CannotMeasureError, Goal, Report, Table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random
    from typing import NoReturn

    from benchmarks.bench import Bench

#: It needs PostgreSQL, and takes two minutes.
ONLY_BY_NAME: Final = True

_USER: Final = "C0FFEE"
_WORKERS: Final = 2
_READERS: Final = 3
_APPROVED_AFTER: Final = 0.5  # seconds
_REQUEST_TIMEOUT: Final = 1.0  # seconds; so what a killed worker had in hand is due again after 13 s
_SETTLED_WITHIN: Final = 240.0  # seconds
_ERRORS: Final = (BrokerError, *ERRORS)


class Sizes(NamedTuple):
    """How much happens, and in how many seconds."""

    orders: int
    rolled_back: int
    kills: int
    stops: int
    seconds: float


def run(bench: Bench) -> Report:
    """Place orders, kill everything, count payments."""
    if not is_installed():
        raise CannotMeasureError("PostgreSQL is not installed")
    sizes = bench.pick(full=Sizes(400, 100, 60, 4, 90.0), quick=Sizes(40, 10, 8, 1, 15.0), smoke=Sizes(8, 2, 2, 1, 4.0))
    server = PostgresServer(fsync="on")
    try:
        raw = asyncio.run(_crash(bench, server, sizes))
    finally:
        server.close()
    lost = sizes.orders - sizes.rolled_back - raw["orders that were paid"]
    report = Report("crashes: orders and payments in PostgreSQL, while everything is killed", raw=raw)
    report.tables.append(_table(raw))
    report.goals += [
        Goal("committed orders that were not paid", 0, lost, required=True),
        Goal("payments beyond one for each", 0, raw["payments"] - raw["orders that were paid"], required=True),
        Goal("users asked about an order that was rolled back", 0, raw["rolled back, and asked"], required=True),
    ]
    return report


def page(raw: dict[str, Any]) -> str:
    """Write the table that docs/explanation/limits.md includes."""
    return _table(raw).markdown() + "\n"


def _table(raw: dict[str, Any]) -> Table:
    return Table("each order is paid once", ["what", "how often"], [[what, str(count)] for what, count in raw.items()])


# -- what is killed


def _work(url: str, base_url: str, api_key: str) -> None:
    """Run a worker; it ends if the database is away when it starts."""

    async def work() -> None:
        async with KeylessClient(api_key, base_url=base_url, request_timeout=_REQUEST_TIMEOUT) as client:
            await ApprovalWorker(client, url).run()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(BrokerError):
        asyncio.run(work())


def _read(url: str) -> None:
    """Make a payment of each outcome that is an approval, in the outcome's transaction."""

    async def read() -> None:
        connection = await asyncpg.connect(url)
        try:
            while True:
                async with next_outcome(connection, "shop") as event:
                    await connection.execute(
                        "INSERT INTO payment VALUES ($1, $2)", event.operation_id, event.outcome is Outcome.APPROVED
                    )
        finally:
            connection.terminate()

    async def keep_reading() -> NoReturn:
        while True:
            with suppress(*_ERRORS):
                await read()
            await asyncio.sleep(0.2)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(keep_reading())


# -- the application that orders


async def _place(url: str, order_id: str, *, rolls_back: bool) -> None:
    """Store an order with the request for its approval, again until it is known to be stored; or roll both back."""
    while True:
        with suppress(*_ERRORS):
            connection = await asyncpg.connect(url)
            try:
                transaction = connection.transaction()
                await transaction.start()
                await connection.execute("INSERT INTO orders VALUES ($1) ON CONFLICT DO NOTHING", order_id)
                await submit_approval(connection, _USER, operation_id=order_id, expires_in=600)
                await (transaction.rollback() if rolls_back else transaction.commit())
            finally:
                connection.terminate()
            return
        await asyncio.sleep(0.2)


# -- the run


async def _crash(bench: Bench, server: PostgresServer, sizes: Sizes) -> dict[str, Any]:
    database = server.new_database()
    url = server.url(database)
    async with PostgresBroker(url) as broker:
        await broker.prepare(lease=1.0, service="")
    server.execute(
        "CREATE TABLE orders (id text PRIMARY KEY); CREATE TABLE payment (order_id text, is_approved boolean);"
        "SELECT keyless.add_reader('shop')",
        database,
    )
    happened: Counter[str] = Counter()
    async with AsyncExitStack() as stack:
        sandbox = await stack.enter_async_context(Sandbox(auto_approve=_APPROVED_AFTER))
        proxies = {
            (of, cut_after): await stack.enter_async_context(CuttingProxy(server, cut_after=cut_after))
            for of in ("orders", "outcomes")
            for cut_after in (False, True)
        }
        urls = [proxies["orders", cut_after].url(database) for cut_after in (False, True)]
        workers = [Program(_work, url, sandbox.url, sandbox.api_key) for _ in range(_WORKERS)]
        readers = [Program(_read, proxies["outcomes", place % 2 == 1].url(database)) for place in range(_READERS)]
        programs = [*workers, *readers]
        keeping = asyncio.create_task(keep_running(programs))
        try:
            await asyncio.gather(
                _order(bench, urls, sizes),
                _kill(workers, readers, happened, sizes),
                _stop(server, happened, sizes),
                *(_cut(proxy, sizes) for proxy in proxies.values()),
            )
            bench.progress("  crashes: all orders are placed, and nothing is killed any more")
            await _until_settled(server, database, sizes.orders - sizes.rolled_back)
        finally:
            keeping.cancel()
            for program in programs:
                program.kill()
        rolled_back = {_order_id(number) for number in range(sizes.rolled_back)}
        asked = sandbox.operations.keys()
        paid = Counter(row[0] for row in server.execute("SELECT order_id FROM payment WHERE is_approved", database))
        return {
            "orders committed": int(server.execute("SELECT count(*) FROM orders", database)[0][0]),
            "orders rolled back": sizes.rolled_back,
            **happened,
            **{_cuts(*of): proxy.cuts for of, proxy in proxies.items()},
            "operations at Keyless": len(asked),
            "rolled back, and asked": len(asked & rolled_back),
            "payments": paid.total(),
            "orders that were paid": len(paid),
        }


def _order_id(number: int) -> str:
    return f"order-{number}"


async def _order(bench: Bench, urls: Sequence[str], sizes: Sizes) -> None:
    numbers = list(range(sizes.orders))
    seeded_random(1).shuffle(numbers)

    async def place(place: int, number: int) -> None:
        await asyncio.sleep(sizes.seconds * place / len(numbers))
        await _place(urls[place % 2], _order_id(number), rolls_back=number < sizes.rolled_back)

    bench.progress(f"  crashes: {sizes.orders} orders in {sizes.seconds:g} s")
    await asyncio.gather(*(place(*each) for each in enumerate(numbers)))


async def _kill(workers: Sequence[Program], readers: Sequence[Program], happened: Counter[str], sizes: Sizes) -> None:
    source: Random = seeded_random(2)
    for number in range(sizes.kills):
        of, what = (workers, "workers killed") if number % 2 else (readers, "readers killed")
        await asyncio.sleep(sizes.seconds / sizes.kills)
        while not await asyncio.to_thread(source.choice(of).kill):  # noqa: ASYNC110  # it is just about to be started
            await asyncio.sleep(0.1)
        happened[what] += 1


async def _stop(server: PostgresServer, happened: Counter[str], sizes: Sizes) -> None:
    for _ in range(sizes.stops):
        await asyncio.sleep(sizes.seconds / (sizes.stops + 1))
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        happened["immediate stops of the server"] += 1


async def _cut(proxy: CuttingProxy, sizes: Sizes) -> None:
    cuts = max(1, sizes.kills // 2)
    for _ in range(cuts):
        await asyncio.sleep(sizes.seconds / cuts)
        proxy.arm()


def _cuts(of: str, cut_after: bool) -> str:  # it is half of a key
    return f"COMMITs of {of} cut {'after the server had done' if cut_after else 'before the server got'} them"


async def _until_settled(server: PostgresServer, database: str, orders: int) -> None:
    """Wait until each order has an outcome that was handled; what is handled twice is counted then."""
    question = "SELECT count(*) = {} AND NOT EXISTS (SELECT FROM keyless.unread) FROM keyless.outcome"
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _SETTLED_WITHIN
    while await asyncio.to_thread(server.execute, question.format(orders), database) != [["t"]]:
        if loop.time() > deadline:
            return  # the goals say what is missing
        await asyncio.sleep(0.2)
