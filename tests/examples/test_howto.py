"""The programs of docs/howto/logging.md and docs/howto/sync.md, each in a process of its own."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from example_process import example_process
from factors import ApprovingSandbox
from waiting import PATIENCE

from aiokeyless.sandbox import Sandbox

EXAMPLES = Path(__file__).parents[2] / "examples"

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


FLASK = """
import flask_app
with flask_app.app.test_client() as browser:
    payment = browser.post("/payments", data={"user_id": "C0FFEE"}).json["id"]
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
browser.post("/pay", {"user_id": "C0FFEE"})
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
