"""The recipes of docs/howto/shutdown.md: real servers with an open long poll, and a real SIGTERM."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import aiohttp
import pytest
from example_process import ADDRESS, add_orders, example_process, printed, stopped
from factors import ApprovingSandbox
from flask import Flask
from flask.sessions import SecureCookieSessionInterface
from waiting import until

from aiokeyless.sandbox import Sandbox

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "guarded_bot"))

from bot_api import TOKEN, BotApiServer  # examples are programs, not a package

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "shutdown"
PAGES = [ROOT / "docs" / "howto" / page for page in ("shutdown.md", "with-django.md", "with-fastapi.md")]

SECRET_KEY = "of the sessions"
AT_ONCE = 20.0  # seconds for an answer that would take 25 if the wait went on; it takes less than one


UVICORN = ("-m", "uvicorn", "--port", "0")
HYPERCORN = ("-m", "hypercorn", "--workers", "0", "--bind", "127.0.0.1:0")
#: The arguments for Python.
RECIPES = {
    "FastAPI": (*UVICORN, "fastapi_app:app"),
    "aiohttp.web": ("aiohttp_app.py",),
    "Litestar": (*UVICORN, "litestar_app:app"),
    "Quart": (*HYPERCORN, "quart_app:app"),
    "Django": (*UVICORN, "django_app:application"),
}


async def until_polled(sandbox: Sandbox) -> None:
    await until(lambda: any(request.method == "GET" for request in sandbox.requests))


@pytest.mark.parametrize("name", RECIPES)
async def test_an_open_long_poll_does_not_keep_a_server_from_stopping(name: str, tmp_path: Path) -> None:
    environment = {"PORT": "0", "APPROVALS_DB": add_orders(tmp_path / "approvals.sqlite3", "order-1")}
    async with (
        Sandbox() as sandbox,
        aiohttp.ClientSession() as http,
        example_process(*RECIPES[name], folder=FOLDER, sandbox=sandbox, **environment) as process,
    ):
        approval = f"{(await printed(process, f'unning on {ADDRESS}'))[1]}/approvals/order-1"
        async with http.get(approval) as response:
            assert await response.json() == {"state": "not asked"}  # a link asks nobody
        async with http.post(approval) as response:
            assert await response.json() == {"state": "asked"}
        assert not any(request.method == "GET" for request in sandbox.requests)
        answer = asyncio.create_task(http.get(approval))
        await until_polled(sandbox)
        stopping = asyncio.create_task(stopped(process))
        async with asyncio.timeout(AT_ONCE), await answer as response:
            assert await response.json() == {"state": "pending"}  # and not a connection that was cut off
        output = await stopping
    assert process.returncode in {0, -signal.SIGTERM}, output
    assert "Traceback" not in output


def session_of(user_id: str) -> str:
    """Return the cookie of a user who is logged in to the Flask program."""
    app = Flask(__name__)
    app.secret_key = SECRET_KEY
    serializer = SecureCookieSessionInterface().get_signing_serializer(app)
    assert serializer is not None
    return str(serializer.dumps({"user_id": user_id}))


@pytest.mark.parametrize("end", ["SIGTERM", "--max-requests"])
async def test_an_open_long_poll_does_not_keep_a_worker_of_gunicorn_from_ending(end: str, tmp_path: Path) -> None:
    database = add_orders(tmp_path / "payments.sqlite3", "order-1")
    environment = {"FLASK_SECRET_KEY": SECRET_KEY, "FLASK_PAYMENTS_DB": database}
    command = ("-m", "gunicorn", "-c", "gunicorn_conf.py", "-w", "1", "-b", "127.0.0.1:0", "--max-requests", "3")
    async with (
        Sandbox() as sandbox,
        aiohttp.ClientSession(headers={"Cookie": f"session={session_of('C0FFEE')}"}) as http,
        example_process(
            *command, "flask_app:app", folder=FOLDER.parent / "sync", sandbox=sandbox, **environment
        ) as process,
    ):
        payments = f"{(await printed(process, ADDRESS))[1]}/payments"
        async with http.post(f"{payments}/order-1") as response:
            assert response.status == 200
        answer = asyncio.create_task(http.get(f"{payments}/order-1"))
        await until_polled(sandbox)
        async with asyncio.timeout(AT_ONCE):
            if end == "SIGTERM":
                output = await stopped(process)
                assert process.returncode == 0, output
            else:
                async with http.get(f"{payments}/nobody") as response:  # the third request
                    assert response.status == 404
            async with await answer as response:
                assert await response.json() == {"state": "pending"}


async def test_two_hundred_pages_of_one_customer_hold_no_other_up(tmp_path: Path) -> None:
    database = add_orders(tmp_path / "payments.sqlite3", "order-1")
    add_orders(tmp_path / "payments.sqlite3", "order-2", user="BEEF")
    environment = {"FLASK_SECRET_KEY": SECRET_KEY, "FLASK_PAYMENTS_DB": database}
    command = ("-m", "gunicorn", "-c", "gunicorn_conf.py", "-b", "127.0.0.1:0", "flask_app:app")
    async with (
        Sandbox() as sandbox,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
        example_process(*command, folder=FOLDER.parent / "sync", sandbox=sandbox, **environment) as process,
    ):
        payments = f"{(await printed(process, ADDRESS))[1]}/payments"
        greedy, other = ({"Cookie": f"session={session_of(user)}"} for user in ("C0FFEE", "BEEF"))
        async with http.post(f"{payments}/order-1", headers=greedy) as response:
            assert response.status == 200
        pages = [asyncio.ensure_future(http.get(f"{payments}/order-1", headers=greedy)) for _ in range(200)]
        await until_polled(sandbox)
        async with asyncio.timeout(5), http.post(f"{payments}/order-2", headers=other) as response:  # 0.1 s if idle
            assert response.status == 200
        await until(lambda: sum(page.done() for page in pages) == 198)
        assert {page.result().status for page in pages if page.done()} == {429}
        await stopped(process)
        await asyncio.gather(*pages)


async def test_a_lifespan_entered_twice_has_a_client_each_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("APPROVALS_DB", add_orders(tmp_path / "approvals.sqlite3", "order-0", "order-1"))
    async with ApprovingSandbox("biom") as sandbox:
        monkeypatch.setenv("KEYLESS_BASE_URL", sandbox.url)
        monkeypatch.setenv("KEYLESS_API_KEY", sandbox.api_key)
        monkeypatch.syspath_prepend(FOLDER)
        from approvals import USER, ask, state
        from fastapi_app import app, lifespan

        for number in range(2):
            async with lifespan(app) as serving:
                client = serving["client"]
                await ask(client, USER, f"order-{number}")
                assert await state(client, USER, f"order-{number}") == ({"state": "approved"}, 200)


async def test_a_pin_is_no_approval_for_a_bot_and_a_bot_that_waits_stops_and_says_so() -> None:
    async with (
        Sandbox() as sandbox,
        BotApiServer() as telegram,
        example_process(
            "aiogram_bot.py", folder=FOLDER, sandbox=sandbox, BOT_TOKEN=TOKEN, BOT_API_URL=telegram.url
        ) as bot,
    ):
        await telegram.say(7, "Pay 40 to Alice")
        await until(lambda: len(sandbox.operations) == 1)
        sandbox.approve(*sandbox.operations, auth_type="pin")
        await telegram.read(7, "Not approved: nothing is paid.")
        await telegram.say(7, "Pay 50 to Bob")
        await until(lambda: len(sandbox.operations) == 2 and sandbox.requests[-1].method == "GET")
        output = await stopped(bot)
        await telegram.read(7, "The bot was stopped: nothing is paid.")
    assert bot.returncode == 0, output
    assert "Traceback" not in output


def test_each_program_and_each_test_is_on_a_page() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [program.name for program in FOLDER.glob("*.py") if f"examples/shutdown/{program.name}" not in pages] == []
