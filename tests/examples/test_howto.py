"""The programs of docs/howto/logging.md, resuming.md and sync.md, most in a process of their own."""

from __future__ import annotations

import asyncio
import importlib
import json
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from example_process import example_process
from factors import ApprovingSandbox
from waiting import PATIENCE

from aiokeyless import ApprovalTicket, ApprovalUnknownError
from aiokeyless.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from types import ModuleType

    from aiokeyless import KeylessClient

EXAMPLES = Path(__file__).parents[2] / "examples"
PAGES = Path(__file__).parents[2] / "docs" / "howto"

WAITS = [f"op-{number}" for number in range(8)]


async def lines_of_an_outage(program: str) -> list[str]:
    """Run a program that waits, first through an outage, and return what it printed."""
    async with Sandbox() as sandbox, sandbox.client() as client:
        for operation_id in WAITS:
            await client.create_operation("C0FFEE", operation_id=operation_id)
        sandbox.fail_next(503, times=None, method="GET")
        async with (
            example_process(program, *WAITS, folder=EXAMPLES / "logs", sandbox=sandbox) as process,
            asyncio.timeout(PATIENCE),
        ):
            assert process.stdout is not None
            first = (await process.stdout.readline()).decode()
            sandbox.recover()
            for operation_id in WAITS:
                sandbox.approve(operation_id)
            output, _ = await process.communicate()
        assert process.returncode == 0, first + output.decode()
        return [first, *output.decode().splitlines()]


async def test_dict_config_shows_an_outage() -> None:
    first, *others = await lines_of_an_outage("dict_config.py")
    assert " WARNING aiokeyless: " in first
    assert sorted(line for line in others if line.startswith("op-")) == [f"{name} approved" for name in WAITS]


async def test_structlog_shows_an_outage_as_json_beside_the_applications_lines() -> None:
    first, *others = (json.loads(line) for line in await lines_of_an_outage("structlog_lines.py"))
    assert (first["level"], first["logger"]) == ("warning", "aiokeyless")
    approved = [line["operation_id"] for line in others if line["logger"] == "shop" and line["approved"]]
    assert sorted(approved) == WAITS


CELERY = """
import celery_tasks
print(celery_tasks.settle.apply([celery_tasks.ask("C0FFEE")]).get(), flush=True)
"""


each_program = pytest.mark.parametrize(
    ("program", "printed", "by_pin"),
    [(CELERY, "paid\n", "not paid\n"), ("import script", "approved\n", "OperationMismatchError")],
    ids=["celery", "script"],
)


@each_program
async def test_synchronous_code_waits_in_a_background_loop_and_ends(
    program: str, printed: str, by_pin: str, tmp_path: Path
) -> None:
    assert (await output_of(program, "biom", tmp_path)).endswith(printed)
    output = await output_of(program, "pin", tmp_path)
    assert by_pin in output
    assert "approved\n" not in output
    assert "pay, " not in output


async def output_of(program: str, factor: str, folder: Path) -> str:
    """Run a program beside a service whose users approve by this factor."""
    record = {"PAYMENTS_DB": str(folder / "payments.sqlite3")}
    async with (
        ApprovingSandbox(factor) as sandbox,
        example_process("-c", program, folder=EXAMPLES / "sync", sandbox=sandbox, **record) as process,
        asyncio.timeout(PATIENCE),
    ):
        output, _ = await process.communicate()
    assert factor == "pin" or process.returncode == 0, output.decode()
    return output.decode()


# -- an approval in the last moment, of which the service tells only later


def expired(operation_id: str, payload: str = "Pay 40 to Alice") -> ApprovalTicket:
    """Return the ticket of an operation whose time is up: a wait for it is one final poll."""
    return ApprovalTicket.for_operation(
        operation_id, user_id="C0FFEE", operation_payload=payload, expires_in=0.001, require_auth_type="biom"
    )


@pytest.fixture
async def celery_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sandbox: Sandbox) -> AsyncGenerator[ModuleType]:
    """The program for Celery, imported anew."""
    monkeypatch.setenv("PAYMENTS_DB", str(tmp_path / "payments.sqlite3"))
    monkeypatch.setenv("KEYLESS_BASE_URL", sandbox.url)
    monkeypatch.setenv("KEYLESS_API_KEY", sandbox.api_key)
    monkeypatch.syspath_prepend(EXAMPLES / "sync")
    monkeypatch.delitem(sys.modules, "celery_tasks", raising=False)
    program = importlib.import_module("celery_tasks")
    yield program
    await asyncio.to_thread(program.keyless.close)


async def settled(program: ModuleType, ticket: ApprovalTicket) -> str:
    """Run the task, here and not in a worker of Celery."""
    try:
        return str(await asyncio.to_thread(program.settle, ticket.to_json()))
    except ApprovalUnknownError:
        return "run again later"


async def test_an_approval_that_an_outage_hides_at_the_deadline_is_found_later(
    celery_tasks: ModuleType, sandbox: Sandbox, client: KeylessClient
) -> None:
    await client.create_operation("C0FFEE", operation_id="order-1", operation_payload="Pay 40 to Alice")
    sandbox.approve("order-1")
    sandbox.fail_next(503, times=None, method="GET")
    assert await settled(celery_tasks, expired("order-1")) == "run again later"
    sandbox.recover()
    assert await settled(celery_tasks, expired("order-1")) == "paid"


async def test_a_task_that_is_delivered_again_decides_nothing_anew(
    celery_tasks: ModuleType, sandbox: Sandbox, client: KeylessClient, capsys: pytest.CaptureFixture[str]
) -> None:
    for operation_id in ("late", "paid"):
        await client.create_operation("C0FFEE", operation_id=operation_id, operation_payload="Pay 40 to Alice")
    sandbox.approve("paid")
    before = [await settled(celery_tasks, expired(operation_id)) for operation_id in ("late", "paid")]
    sandbox.approve("late")
    after = [await settled(celery_tasks, expired(operation_id)) for operation_id in ("late", "paid")]
    assert before == after == ["not paid", "paid"]
    assert {*capsys.readouterr().out.splitlines()} == {"pay, with the idempotency key paid"}


def program_of(page: str, number: int = 0) -> str:
    """Return a program of a page of docs/howto."""
    return (PAGES / page).read_text().split("```python\n")[number + 1].partition("```")[0]


async def test_a_program_that_resumes_is_not_ended_by_an_expired_ticket(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "requests.sqlite3", isolation_level=None)) as record:
        record.execute("CREATE TABLE requests (id TEXT PRIMARY KEY, ticket TEXT)")
        async with ApprovingSandbox("biom") as sandbox, sandbox.client() as client:
            await client.create_operation("C0FFEE", operation_id="late", operation_payload="Pay 1")
            tickets = {"late": expired("late", "Pay 1"), "expired": expired("expired")}
            with pytest.MonkeyPatch.context() as silent:
                silent.setattr(sandbox, "_auto_approve", None)
                await client.create_operation("C0FFEE", operation_id="expired", operation_payload="Pay 40 to Alice")
            for operation_id, ticket in tickets.items():
                record.execute("INSERT INTO requests VALUES (?, ?)", (operation_id, ticket.to_json()))
            for _start in range(2):
                async with example_process(
                    "-c", program_of("resuming.md", 1), folder=tmp_path, sandbox=sandbox
                ) as process:
                    output, _ = await process.communicate()
                assert process.returncode == 0, output.decode()
                assert "approved: Pay 40 to Alice" in output.decode()
            assert record.execute("SELECT id FROM requests").fetchall() == []


async def test_two_processes_that_resume_at_once_report_an_approval_once(
    sandbox: Sandbox, client: KeylessClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {}
    exec(program_of("resuming.md", 1).rpartition("asyncio.run(")[0], names)  # noqa: S102  # without its last line
    with closing(sqlite3.connect(tmp_path / "requests.sqlite3", isolation_level=None)) as record:
        record.execute("CREATE TABLE requests (id TEXT PRIMARY KEY, ticket TEXT)")
        await names["ask"](client, record)
        sandbox.approve(*sandbox.operations)
        await asyncio.gather(*[names["resume"](client, record) for _ in range(2)])
    assert capsys.readouterr().out == "approved: Pay 40 to Alice\n"


async def test_a_wait_that_fails_does_not_end_the_others_of_its_program(tmp_path: Path) -> None:
    asked = 0

    def approve(operation: Any) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            sandbox.forget(operation.operation_id)
        else:
            asyncio.get_running_loop().call_later(2, sandbox.approve, operation.operation_id)

    async with (
        Sandbox(auto_approve=approve) as sandbox,
        example_process("-c", program_of("resuming.md"), folder=tmp_path, sandbox=sandbox) as process,
    ):
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    assert ": not paid, NotFoundError" in output.decode()
    assert ": pay\n" in output.decode()
