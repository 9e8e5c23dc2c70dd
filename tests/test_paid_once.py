"""examples/paid_once.py: one tap pays one order once, whatever goes wrong."""

from __future__ import annotations

import asyncio
import random
import re
import sqlite3
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from waiting import until

if TYPE_CHECKING:
    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox

pytestmark = pytest.mark.looptime

SHOP = (Path(__file__).parents[1] / "examples" / "paid_once.py").read_text()

Pay = Callable[[str], Coroutine[None, None, bool]]

FAULTS: dict[str, Callable[[Sandbox, bool], None]] = {
    "dropped": lambda sandbox, stored: sandbox.drop_next(stored=stored, method="POST"),
    "503": lambda sandbox, stored: sandbox.fail_next(503, stored=stored, method="POST"),
    "408": lambda sandbox, stored: sandbox.fail_next(408, stored=stored, method="POST"),
    "a page": lambda sandbox, stored: sandbox.fail_next(200, stored=stored, method="POST", body=b"<html>"),
    "nothing wrong": lambda _sandbox, _stored: None,
}
faults = pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())


@asynccontextmanager
async def shop(sandbox: Sandbox, folder: Path) -> AsyncGenerator[Pay]:
    """Run the shop on the record in this folder, as one process of it would."""
    names: dict[str, Any] = {"__name__": "shop"}
    exec(SHOP.rpartition("asyncio.run(")[0], names)  # noqa: S102  # without its last line, which runs it
    with closing(sqlite3.connect(folder / "orders.sqlite3", isolation_level=None)) as record:
        record.execute(re.findall(r'"(CREATE TABLE.*?)"', SHOP)[0])
        async with sandbox.client(request_timeout=2) as client:
            yield lambda order: names["pay"](client, record, order)


async def approve_when_asked(sandbox: Sandbox, order: str = "order-1") -> None:
    await until(lambda: order in sandbox.operations)
    sandbox.approve(order)


@faults
@pytest.mark.parametrize("stored", [False, True], ids=["lost", "stored"])
async def test_one_tap_pays_one_order_once(
    sandbox: Sandbox, tmp_path: Path, fault: Callable[[Sandbox, bool], None], *, stored: bool
) -> None:
    tap = asyncio.create_task(approve_when_asked(sandbox))
    paid = []
    for _process in range(2):
        async with shop(sandbox, tmp_path) as pay:
            for _call in range(2):
                fault(sandbox, stored)
                paid.append(await pay("order-1"))
                sandbox.recover()
    await tap
    assert paid == [True, False, False, False]
    assert len(sandbox.operations) == 1


@faults
async def test_approval_that_came_while_the_process_was_down_pays_once(
    sandbox: Sandbox, tmp_path: Path, fault: Callable[[Sandbox, bool], None]
) -> None:
    async with shop(sandbox, tmp_path) as pay:
        killed = asyncio.create_task(pay("order-1"))
        await asyncio.sleep(1)
        killed.cancel()
        await asyncio.gather(killed, return_exceptions=True)
    sandbox.approve("order-1")
    async with shop(sandbox, tmp_path) as pay:
        fault(sandbox, False)  # noqa: FBT003
        assert await pay("order-1")
        sandbox.requests.clear()
        assert not await pay("order-1")
        assert not sandbox.requests  # where the record says paid, there is nothing to ask


async def test_slow_answer_pays_once(sandbox: Sandbox, tmp_path: Path) -> None:
    async with shop(sandbox, tmp_path) as pay:
        sandbox.latency = 60
        call = asyncio.create_task(pay("order-1"))
        await approve_when_asked(sandbox)
        sandbox.latency = 0
        assert await call
        assert not await pay("order-1")


async def test_an_approval_after_the_timeout_pays_nothing(
    sandbox: Sandbox, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with shop(sandbox, tmp_path) as pay:
        assert not await pay("order-1")
        assert capsys.readouterr().out.startswith("not paid after ")
        sandbox.approve("order-1")
        assert not await pay("order-1")
    async with shop(sandbox, tmp_path) as pay:
        assert not await pay("order-1")
    assert len(sandbox.operations) == 1


async def test_an_approval_that_an_outage_hides_at_the_deadline_pays_at_the_next_call(
    sandbox: Sandbox, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with shop(sandbox, tmp_path) as pay:
        call = asyncio.create_task(pay("order-1"))
        await until(lambda: "order-1" in sandbox.operations)
        sandbox.fail_next(503, None, method="GET")
        sandbox.approve("order-1")
        assert not await call
        assert capsys.readouterr().out.startswith("not known yet: ")
        sandbox.recover()
        assert await pay("order-1")


async def test_a_pin_pays_nothing_now_or_later(sandbox: Sandbox, tmp_path: Path) -> None:
    async with shop(sandbox, tmp_path) as pay:
        call = asyncio.create_task(pay("order-1"))
        await until(lambda: "order-1" in sandbox.operations)
        sandbox.approve("order-1", auth_type="pin")
        assert not await call
        assert not await pay("order-1")


@pytest.mark.parametrize("approved", [False, True], ids=["pending", "approved"])
async def test_operation_of_other_content_under_the_orders_id_pays_nothing(
    sandbox: Sandbox, client: KeylessClient, tmp_path: Path, *, approved: bool
) -> None:
    await client.create_operation("0123456789ABCDEF", operation_id="order-1", operation_payload="Pay 4000 to Mallory")
    if approved:
        sandbox.approve("order-1")
    async with shop(sandbox, tmp_path) as pay:
        assert not await pay("order-1")


async def test_unreachable_keyless_pays_nothing_and_the_next_call_continues(
    sandbox: Sandbox, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with shop(sandbox, tmp_path) as pay:
        sandbox.fail_next(503, None)
        assert not await pay("order-1")
        assert capsys.readouterr().out.startswith("not known yet: POST ")
        sandbox.recover()
        tap = asyncio.create_task(approve_when_asked(sandbox))
        assert await pay("order-1")
        await tap


@pytest.mark.parametrize("seed", range(20))
async def test_any_calls_under_any_faults_pay_once(sandbox: Sandbox, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311  # of faults, not of secrets
    paid = 0
    tap: asyncio.Task[None] | None = None
    for _process in range(3):
        async with shop(sandbox, tmp_path) as pay:
            for fault in chance.choices(list(FAULTS.values()), k=4):
                fault(sandbox, chance.random() < 0.5)
            calls = [asyncio.create_task(pay("order-1")) for _ in range(3)]
            await asyncio.sleep(chance.uniform(0, 3))
            if tap is None:
                tap = asyncio.create_task(approve_when_asked(sandbox))
            if chance.random() < 0.5:
                calls[0].cancel()
            paid += (await asyncio.gather(*calls, return_exceptions=True)).count(True)
    assert tap is not None
    await tap
    assert paid == 1
    assert len(sandbox.operations) == 1
