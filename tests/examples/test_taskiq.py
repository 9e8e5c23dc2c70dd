"""The task of taskiq, run by taskiq: in pieces, in an outage, and without an approval that counts."""

from __future__ import annotations

import asyncio
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from types import ModuleType

    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox

pytestmark = pytest.mark.looptime


@pytest.fixture
async def program(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncGenerator[ModuleType]:
    monkeypatch.setenv("PAYMENTS_DB", str(tmp_path / "payments.sqlite3"))
    monkeypatch.setenv("KEYLESS_BASE_URL", sandbox.url)
    monkeypatch.setenv("KEYLESS_API_KEY", sandbox.api_key)
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    monkeypatch.delitem(sys.modules, "taskiq_tasks", raising=False)
    program = importlib.import_module("taskiq_tasks")
    await program.broker.startup()
    yield program
    await program.broker.shutdown()


async def settled(program: ModuleType, ticket: str) -> str:
    task = await program.settle.kiq(ticket)
    result = await task.wait_result(timeout=300)
    assert not result.is_err
    return str(result.return_value)


@pytest.mark.parametrize(("factor", "outcome"), [("biom", "paid"), ("pin", "not paid"), (None, "not paid")])
async def test_a_task_waits_in_pieces_until_its_ticket_is_decided(
    factor: str | None, outcome: str, program: ModuleType, client: KeylessClient, sandbox: Sandbox
) -> None:
    ticket = await client.create_operation("C0FFEE", operation_payload="Pay 40", require_auth_type="biom")
    if factor is not None:
        asyncio.get_running_loop().call_later(60, lambda: sandbox.approve(ticket.operation_id, auth_type=factor))
    before = asyncio.get_running_loop().time()
    assert await settled(program, ticket.to_json()) == outcome
    assert asyncio.get_running_loop().time() - before == pytest.approx(60 if factor else 120, abs=3)


async def test_a_task_that_is_delivered_again_decides_nothing_anew(
    program: ModuleType, client: KeylessClient, sandbox: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    late, paid = [
        (await client.create_operation("C0FFEE", operation_payload="Pay 40", require_auth_type="biom"))
        for _ in range(2)
    ]
    sandbox.approve(paid.operation_id)
    before = [await settled(program, ticket.to_json()) for ticket in (late, paid)]
    sandbox.approve(late.operation_id)  # after the timeout
    assert [await settled(program, ticket.to_json()) for ticket in (late, paid)] == before == ["not paid", "paid"]
    assert {*capsys.readouterr().out.splitlines()} == {f"pay, with the idempotency key {paid.operation_id}"}


async def test_a_task_is_run_until_an_outage_ends(program: ModuleType, client: KeylessClient, sandbox: Sandbox) -> None:
    ticket = await client.create_operation("C0FFEE", expires_in=5, require_auth_type="biom")
    sandbox.approve(ticket.operation_id)
    sandbox.fail_next(503, times=None, method="GET")
    settling = asyncio.create_task(settled(program, ticket.to_json()))
    await asyncio.sleep(60)
    sandbox.recover()
    assert await settling == "paid"
