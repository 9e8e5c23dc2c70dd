"""The programs of docs/howto/logging.md and docs/howto/sync.md, each in a process of its own."""

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

from aiokeyless import ApprovalTicket
from aiokeyless.sandbox import Sandbox

if TYPE_CHECKING:
    from types import ModuleType

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


# The browser names a user of its own, who is not asked. Another user learns nothing, and another site starts nothing.
FLASK = """
import flask_app
flask_app.app.secret_key = "key"
def browser_of(user):
    browser = flask_app.app.test_client()
    with browser.session_transaction() as session:
        session["user_id"] = user
    return browser
assert flask_app.app.config["SESSION_COOKIE_SAMESITE"] == "Lax"
browser = browser_of("C0FFEE")
payment = browser.post("/payments", data={"user_id": "BAD"}).json["id"]
[ticket] = flask_app.tickets.values()
assert ticket.user_id == "C0FFEE"
assert browser_of("BAD").get(f"/payments/{payment}").status_code == 404
print(browser.get(f"/payments/{payment}").json["state"])
"""

DJANGO = """
from django.conf import settings
settings.configure(
    ROOT_URLCONF="django_views", ALLOWED_HOSTS=["testserver"], SECRET_KEY="key",
    MIDDLEWARE=["django.contrib.sessions.middleware.SessionMiddleware"],
    SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
)
import django, django.test
django.setup()
browser = django.test.Client()
session = browser.session
session["user_id"] = "C0FFEE"
session.save()
browser.cookies[settings.SESSION_COOKIE_NAME] = session.session_key
for ask in browser.get, browser.head, browser.options:
    assert ask("/pay").status_code == 405 and "ticket" not in browser.session
browser.post("/pay", {"user_id": "BAD"})
assert '"user_id":"C0FFEE"' in browser.session["ticket"]
print(browser.get("/payment").json()["state"])
"""

CELERY = """
import celery_tasks
print(celery_tasks.settle.apply([celery_tasks.ask("C0FFEE")]).get())
"""


each_program = pytest.mark.parametrize(
    ("program", "printed", "by_pin"),
    [
        (FLASK, "approved\n", "refused\n"),
        (DJANGO, "approved\n", "refused\n"),
        (CELERY, "paid\n", "not paid\n"),
        ("import script", "approved\n", "OperationMismatchError"),
    ],
    ids=["flask", "django", "celery", "script"],
)


@each_program
async def test_synchronous_code_waits_in_a_background_loop_and_ends(program: str, printed: str, by_pin: str) -> None:
    assert await output_of(program, "biom") == printed
    output = await output_of(program, "pin")
    assert by_pin in output
    assert "approved\n" not in output


async def output_of(program: str, factor: str) -> str:
    """Run a program beside a service whose users approve by this factor."""
    async with (
        ApprovingSandbox(factor) as sandbox,
        example_process("-c", program, folder=EXAMPLES / "sync", sandbox=sandbox) as process,
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


async def ask_of_flask(module: ModuleType, ticket: ApprovalTicket) -> str:
    module.app.secret_key = "key"
    module.tickets["C0FFEE", "order-1"] = ticket
    browser = module.app.test_client()
    with browser.session_transaction() as session:
        session["user_id"] = "C0FFEE"
    return str((await asyncio.to_thread(browser.get, "/payments/order-1")).json["state"])


async def ask_of_django(module: ModuleType, ticket: ApprovalTicket) -> str:
    request = type("Request", (), {"session": {"ticket": ticket.to_json()}})()
    return str(json.loads((await asyncio.to_thread(module.payment, request)).content)["state"])


async def ask_of_celery(module: ModuleType, ticket: ApprovalTicket) -> str:
    try:
        return str(await asyncio.to_thread(module.settle, ticket.to_json()))
    except Exception as error:  # noqa: BLE001  # what it is called with, here and not by a worker of Celery
        return type(error).__name__


async def ask_of_a_server(module: ModuleType, ticket: ApprovalTicket) -> str:
    module.tickets["order-1"] = ticket
    async with module.KeylessClient() as client:
        return str((await module.state(client, "order-1"))["state"])


@pytest.mark.parametrize(
    ("name", "ask", "unknown", "approved"),
    [
        ("sync/flask_app", ask_of_flask, "unknown", "approved"),
        ("sync/django_views", ask_of_django, "unknown", "approved"),
        ("sync/celery_tasks", ask_of_celery, "ApprovalUnknownError", "paid"),
        ("shutdown/approvals", ask_of_a_server, "unknown", "approved"),
    ],
    ids=["flask", "django", "celery", "servers"],
)
async def test_an_approval_that_an_outage_hides_at_the_deadline_is_found_later(
    name: str, ask: Any, unknown: str, approved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Sandbox() as sandbox, sandbox.client() as client:
        await client.create_operation("C0FFEE", operation_id="order-1", operation_payload="Pay 40 to Alice")
        sandbox.approve("order-1")
        monkeypatch.setenv("KEYLESS_BASE_URL", sandbox.url)
        monkeypatch.setenv("KEYLESS_API_KEY", sandbox.api_key)
        program = imported(EXAMPLES / f"{name}.py", monkeypatch)
        if name == "sync/django_views":
            from django.conf import settings

            if not settings.configured:
                settings.configure()
        ticket = expired("order-1")
        sandbox.fail_next(503, times=None, method="GET")
        assert await ask(program, ticket) == unknown
        sandbox.recover()
        assert await ask(program, ticket) == approved
        if ask is not ask_of_a_server:
            await asyncio.to_thread(program.keyless.close)


def imported(program: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a program of the examples anew."""
    monkeypatch.syspath_prepend(program.parent)
    monkeypatch.delitem(sys.modules, program.stem, raising=False)
    return importlib.import_module(program.stem)


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
