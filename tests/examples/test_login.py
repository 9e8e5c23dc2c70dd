"""The login example as its users have it: a real server in a process of its own, a sandbox, and a real browser."""

from __future__ import annotations

import asyncio
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Self

import aiohttp
import pytest
from chromium import chromium
from example_server import ExampleServer
from waiting import until

if TYPE_CHECKING:
    from aiokeyless.sandbox import Sandbox


ALICE = "A11CE0"
LOGIN = Path(__file__).parents[2] / "examples" / "login" / "login.py"


@pytest.fixture
def sandbox(keyless_sandbox: Sandbox) -> Sandbox:
    """A sandbox in which Alice is enrolled; Bob is not."""
    keyless_sandbox.enroll(ALICE, external_user_id="account-1")
    return keyless_sandbox


class Server(ExampleServer):
    """The login, with its database."""

    def __init__(self, sandbox: Sandbox, folder: Path, **settings: str) -> None:
        settings["LOGIN_DB"] = str(folder / "login.sqlite3")
        super().__init__(LOGIN, sandbox, folder, port="LOGIN_PORT", **settings)


class Browser:
    """A browser without a screen: the requests that the page makes, and the cookies that it keeps."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._session = aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True))
        self.login = ""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def start(self, email: str = "alice@example.com") -> int:
        async with self._session.post(f"{self._server.url}/login", json={"email": email}) as answer:
            if answer.status == 200:
                self.login = (await answer.json())["id"]
            return answer.status

    async def follow(self, login: str = "", wait: float = 25) -> str | int:
        """Return the state, or the status where there is none."""
        url = f"{self._server.url}/login/{login or self.login}"
        async with self._session.get(url, params={"wait": str(wait)}) as answer:
            return str((await answer.json())["state"]) if answer.status == 200 else answer.status

    async def who(self) -> str | None:
        async with self._session.get(f"{self._server.url}/me") as answer:
            email: str | None = (await answer.json()).get("email")
            return email


async def test_approval_logs_in_the_browser_that_asked_and_no_other(sandbox: Sandbox, tmp_path: Path) -> None:
    async with Server(sandbox, tmp_path) as server, Browser(server) as alice, Browser(server) as mallory:
        assert await alice.start() == 200
        assert await alice.who() is None
        held = asyncio.create_task(alice.follow())
        sandbox.approve(alice.login)
        assert await mallory.follow(alice.login) == 404
        assert await held == "approved"
        assert await alice.who() == "alice@example.com"
        assert await mallory.who() is None


async def test_a_pin_logs_nobody_in(sandbox: Sandbox, tmp_path: Path) -> None:
    async with Server(sandbox, tmp_path) as server, Browser(server) as alice:
        await alice.start()
        sandbox.approve(alice.login, auth_type="pin")
        assert await alice.follow() == "refused"
        assert await alice.who() is None


async def test_one_approval_counts_once_however_often_it_is_asked_about(sandbox: Sandbox, tmp_path: Path) -> None:
    async with Server(sandbox, tmp_path) as server, Browser(server) as alice:
        await alice.start()
        tabs = [asyncio.create_task(alice.follow()) for _ in range(5)]
        sandbox.approve(alice.login)
        assert await asyncio.gather(*tabs) == ["approved"] * 5
        assert await alice.follow() == "approved"
        assert await alice.who() == "alice@example.com"
        assert (tmp_path / "log").read_text().count(f"login {alice.login}: approved") == 1


async def test_lost_answer_does_not_lose_the_login(sandbox: Sandbox, tmp_path: Path) -> None:
    async with Server(sandbox, tmp_path) as server, Browser(server) as alice:
        await alice.start()
        lost = asyncio.create_task(alice.follow())
        await until(lambda: any(request.path.endswith(alice.login) for request in sandbox.requests))
        lost.cancel()  # as when the page is reloaded
        sandbox.approve(alice.login)
        assert await alice.follow() == "approved"
        assert await alice.who() == "alice@example.com"


async def test_login_survives_a_server_that_is_killed(sandbox: Sandbox, tmp_path: Path) -> None:
    server = Server(sandbox, tmp_path)
    async with Browser(server) as alice:
        async with server:
            await alice.start()
            assert await alice.follow(wait=0.1) == "pending"
        sandbox.approve(alice.login)
        async with server:
            assert await alice.follow() == "approved"
            assert await alice.who() == "alice@example.com"


async def test_server_that_is_stopped_answers_the_open_poll_with_pending(sandbox: Sandbox, tmp_path: Path) -> None:
    async with Server(sandbox, tmp_path) as server, Browser(server) as alice:
        await alice.start()
        held = asyncio.create_task(alice.follow(wait=55))
        await until(lambda: any(request.path.endswith(alice.login) for request in sandbox.requests))
        async with asyncio.timeout(45):  # less than the poll would last
            await server.end(signal.SIGTERM)
        assert await held == "pending"


async def test_approval_after_the_end_logs_nobody_in(sandbox: Sandbox, tmp_path: Path) -> None:
    async with Server(sandbox, tmp_path, LOGIN_EXPIRES_IN="0.5") as server, Browser(server) as alice:
        await alice.start()
        assert await alice.follow() == "timed_out"
        sandbox.approve(alice.login)
        assert await alice.follow() == "timed_out"
        assert await alice.who() is None


async def test_approval_that_is_found_only_after_the_end_logs_nobody_in(sandbox: Sandbox, tmp_path: Path) -> None:
    async with Server(sandbox, tmp_path, LOGIN_EXPIRES_IN="0.01") as server, Browser(server) as alice:
        await alice.start()
        await asyncio.sleep(0.05)  # the time of the login, which is another process's
        sandbox.approve(alice.login)
        assert await alice.follow() == "timed_out"
        assert await alice.who() is None


async def test_answer_about_another_user_is_refused(sandbox: Sandbox, tmp_path: Path) -> None:
    async with Server(sandbox, tmp_path) as server, Browser(server) as alice:
        await alice.start()
        sandbox.tamper(alice.login, user_id="BAD", state="approved", result=True)
        assert await alice.follow() == "refused"
        sandbox.tamper(alice.login)
        sandbox.approve(alice.login)
        assert await alice.follow() == "refused"
        assert await alice.who() is None


async def test_outage_is_told_and_nobody_is_logged_in(sandbox: Sandbox, tmp_path: Path) -> None:
    async with Server(sandbox, tmp_path) as server, Browser(server) as alice:
        sandbox.fail_next(401, times=None)
        assert await alice.start() == 503
        sandbox.recover()
        await alice.start()
        sandbox.fail_next(401, times=None)
        assert await alice.follow() == 503
        sandbox.recover()
        sandbox.approve(alice.login)
        assert await alice.follow() == "approved"


async def test_user_is_found_by_the_account_and_stays_that_of_its_first_login(sandbox: Sandbox, tmp_path: Path) -> None:
    async with Server(sandbox, tmp_path) as server, Browser(server) as browser, sandbox.client() as client:
        assert await browser.start("bob@example.com") == 409
        assert await browser.start() == 200
        assert sandbox.operations[browser.login].user_id == ALICE
        mallory = sandbox.enroll("BAD", external_user_id="ACCOUNT-1").user_id
        assert await browser.start() == 409, "there are two now"
        await client.delete_external_user("account-1")
        assert await client.get_user("account-1") == (await client.find_users("ACCOUNT-1"))[0]
        assert await browser.start() == 409, "the account had another user before"
        assert not [each for each in sandbox.operations.values() if each.user_id == mallory]


async def test_bad_input_is_refused(sandbox: Sandbox, tmp_path: Path) -> None:
    async with Server(sandbox, tmp_path) as server, Browser(server) as alice:
        assert await alice.start("nobody@example.com") == 404
        assert not sandbox.operations
        assert await alice.start("ALICE@example.com") == 200
        for wait in (0, -1, 56, float("nan")):
            assert await alice.follow(wait=wait) == 422
        assert await alice.follow("unknown") == 404


async def test_a_phone_is_asked_once_at_a_time_and_few_times_in_ten_minutes(sandbox: Sandbox, tmp_path: Path) -> None:
    async with Server(sandbox, tmp_path) as server, Browser(server) as alice, Browser(server) as mallory:
        assert await alice.start() == 200
        assert await mallory.start() == 409
        first = alice.login
        assert (await alice.start(), alice.login) == (200, first), "the browser that asked goes on with its login"
        assert len(sandbox.operations) == 1
        sandbox.approve(first)
        assert await alice.follow() == "approved"
        for _ in range(4):
            assert await alice.start() == 200, "the phone shows nothing"
            sandbox.approve(alice.login)
            assert await alice.follow() == "approved"
        assert await alice.start() == 429
        assert len(sandbox.operations) == 5


async def test_a_login_that_has_ended_keeps_nobody_from_asking_though_the_phone_shows_it(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    async with Server(sandbox, tmp_path, LOGIN_EXPIRES_IN="0.3") as server, Browser(server) as alice:
        await alice.start()
        assert await alice.follow() == "timed_out"
        async with Browser(server) as another:
            assert await another.start() == 200


@pytest.mark.browser
async def test_page_logs_in_and_shows_the_number_of_the_phone(sandbox: Sandbox, tmp_path: Path) -> None:
    async with Server(sandbox, tmp_path) as server, chromium() as browser:
        from playwright.async_api import expect  # chromium() skips where it is missing

        page = await browser.new_page()
        await page.goto(server.url)
        await page.get_by_role("button", name="Log in with your face").click()
        await expect(page.locator("#number")).to_have_text(re.compile("[0-9]{3}"))
        [operation] = sandbox.operations.values()
        assert operation.operation_payload is not None
        assert operation.operation_payload.endswith(f"Number {await page.locator('#number').text_content()}")
        await expect(page.locator("#left")).to_have_text(re.compile(r"[012]:[0-5]\d left\."))
        await page.reload()  # the page goes on with the same login
        await expect(page.locator("#number")).to_be_visible()
        await page.get_by_role("button", name="Cancel").click()
        await expect(page.get_by_role("status")).to_contain_text("Cancelled.")
        await page.get_by_role("button", name="Log in with your face").click()  # the phone still shows the same one
        await expect(page.locator("#number")).to_be_visible()
        sandbox.approve(operation.operation_id)
        await expect(page.get_by_role("status")).to_have_text("You are logged in as alice@example.com.")
        assert len(sandbox.operations) == 1
        async with await browser.new_context(java_script_enabled=False) as context:
            plain = await context.new_page()
            await plain.goto(server.url)
            await expect(plain.locator("noscript p")).to_be_visible()
