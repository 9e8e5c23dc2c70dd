"""The login example as its users have it: a real server in a process of its own, a sandbox, and a real browser."""

from __future__ import annotations

import asyncio
import re
import signal
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Self

import aiohttp
import pytest
import pytest_asyncio
from chromium import chromium, lose_answers
from example_process import example_process
from example_server import ExampleServer
from fastapi import HTTPException, Response
from waiting import until

from aiokeyless import ApprovalTimeoutError, KeylessClient, PendingOperation
from aiokeyless.sandbox import Sandbox

EXAMPLE = Path(__file__).parents[2] / "examples" / "login"
sys.path.insert(0, str(EXAMPLE))

import login as site  # noqa: E402  # from the folder of the example
import phones  # noqa: E402

sys.path.remove(str(EXAMPLE))

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from playwright.async_api import Browser as Chromium

pytestmark = pytest.mark.asyncio(loop_scope="module")

ALICE = "A11CE0"
Record = sqlite3.Connection


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the record and of the log."""
    folder = tmp_path_factory.mktemp("login")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOGIN_DB", str(folder / "login.sqlite3"))
        yield folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service() -> AsyncGenerator[Sandbox]:
    async with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(service: Sandbox) -> Sandbox:
    """The service, as if nothing had been asked."""
    service.recover()
    service.latency = 0
    for operation_id in list(service.operations):
        service.forget(operation_id)
    service.requests.clear()
    return service


@pytest.fixture
def record(folder: Path) -> Iterator[Record]:
    """The record of the site, which is empty."""
    assert folder.exists()
    with closing(phones.open_record()) as record:
        for [table] in record.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            record.execute(f"DELETE FROM {table}")  # noqa: S608  # of the program
        yield record


async def link(sandbox: Sandbox, record: Record, account: str, user: str, **approval: str) -> str:
    """Link an account to a user whose phone authenticates under the offered id; return the linked user."""
    operation_id = phones.offer(record, account)
    sandbox.approve(operation_id, user_id=user, **approval)
    async with sandbox.client() as client:
        return await phones.link(client, record, operation_id)


class Server(ExampleServer):
    """The login."""

    def __init__(self, sandbox: Sandbox, folder: Path, **settings: str) -> None:
        self.sandbox = sandbox
        super().__init__(EXAMPLE / "login.py", sandbox, folder, port="LOGIN_PORT", **settings)


class Browser:
    """A browser without a screen: the requests that the page makes, the cookies that it keeps, and its user's phone."""

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
            assert answer.status != 200 or answer.headers["Cache-Control"] == "no-store"
            return str((await answer.json())["state"]) if answer.status == 200 else answer.status

    def approve(self, **options: str) -> None:
        self._server.sandbox.approve(self.login, **options)

    async def log_out(self) -> int:
        async with self._session.post(f"{self._server.url}/logout") as answer:
            return answer.status

    async def who(self) -> str | None:
        async with self._session.get(f"{self._server.url}/me") as answer:
            email: str | None = (await answer.json()).get("email")
            assert email is None or answer.headers["Cache-Control"] == "no-store"
            return email


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(service: Sandbox, folder: Path) -> AsyncGenerator[Server]:
    async with Server(service, folder) as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hasty(service: Sandbox, folder: Path) -> AsyncGenerator[Server]:
    """One whose users have hardly any time."""
    async with Server(service, folder, LOGIN_EXPIRES_IN="0.5") as server:
        yield server


@pytest.fixture
def server(running: Server, sandbox: Sandbox, record: Record) -> Server:
    """One in whose record Alice has a phone and Bob has none."""
    assert not sandbox.operations
    record.execute("INSERT INTO users VALUES ('account-1', ?, NULL)", (ALICE,))
    return running


async def browser(server: Server) -> AsyncGenerator[Browser]:
    async with Browser(server) as browser:
        yield browser


alice, bob, mallory = (pytest_asyncio.fixture(browser, loop_scope="module") for _ in range(3))


async def test_approval_logs_in_the_browser_that_asked_and_no_other(
    server: Server, alice: Browser, mallory: Browser
) -> None:
    assert await alice.start() == 200
    assert f"push to the phone of {ALICE}: {alice.login}\n" in server.log.read_text()
    assert await alice.who() is None
    held = asyncio.create_task(alice.follow())
    alice.approve()
    assert await mallory.follow(alice.login) == 404
    assert await held == "approved"
    assert await alice.who() == "alice@example.com"
    assert await mallory.who() is None


async def log_in(browser: Browser) -> None:
    await browser.start()
    browser.approve()
    assert await browser.follow() == "approved"
    assert await browser.who() == "alice@example.com"


async def test_a_session_ends_after_twelve_hours(record: Record, alice: Browser) -> None:
    await log_in(alice)
    record.execute("UPDATE logins SET asked = asked - 12 * 3600 + 60")
    assert await alice.who() == "alice@example.com"
    record.execute("UPDATE logins SET asked = asked - 60")
    assert await alice.who() is None


async def test_logging_out_ends_this_browsers_session_for_good_and_no_other(server: Server, alice: Browser) -> None:
    async with Browser(server) as phone:
        await log_in(alice)
        await log_in(phone)
        assert await alice.log_out() == 204
        assert await alice.who() is None, "the cookie is there still"
        assert await alice.follow() == "logged_out"
        assert await alice.who() is None, "an approval logs in once"
        assert await phone.who() == "alice@example.com"


async def test_logging_out_leaves_a_login_that_is_not_decided(alice: Browser) -> None:
    await alice.start()
    assert await alice.log_out() == 204
    alice.approve()
    assert await alice.follow() == "approved"


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_the_cookie_is_secure_behind_a_proxy_that_speaks_tls(server: Server, scheme: str) -> None:
    async with aiohttp.ClientSession() as http:
        body, headers = {"email": "alice@example.com"}, {"X-Forwarded-Proto": scheme}
        async with http.post(f"{server.url}/login", json=body, headers=headers) as answer:
            cookie = answer.cookies["browser"]
    assert (cookie["httponly"], cookie["samesite"], cookie["secure"] is True) == (True, "lax", scheme == "https")


async def test_a_pin_logs_nobody_in(alice: Browser) -> None:
    await alice.start()
    alice.approve(auth_type="pin")
    assert await alice.follow() == "refused"
    assert await alice.who() is None


async def test_one_approval_counts_once_however_often_it_is_asked_about(server: Server, alice: Browser) -> None:
    await alice.start()
    tabs = [asyncio.create_task(alice.follow()) for _ in range(5)]
    alice.approve()
    assert await asyncio.gather(*tabs) == ["approved"] * 5
    assert await alice.follow() == "approved"
    assert await alice.who() == "alice@example.com"
    assert server.log.read_text().count(f"login {alice.login}: approved") == 1


async def test_lost_answer_does_not_lose_the_login(sandbox: Sandbox, alice: Browser) -> None:
    await alice.start()
    lost = asyncio.create_task(alice.follow())
    await until(lambda: any(request.path.endswith(alice.login) for request in sandbox.requests))
    lost.cancel()  # as when the page is reloaded
    alice.approve()
    assert await alice.follow() == "approved"
    assert await alice.who() == "alice@example.com"


async def test_login_survives_a_server_that_is_killed(server: Server, alice: Browser) -> None:
    await alice.start()
    assert await alice.follow(wait=0.1) == "pending"
    await server.end(signal.SIGKILL)
    alice.approve()
    await server.start()
    assert await alice.follow() == "approved"
    assert await alice.who() == "alice@example.com"


async def test_server_that_is_stopped_answers_the_open_poll_with_pending(server: Server, alice: Browser) -> None:
    await alice.start()
    held = asyncio.create_task(alice.follow(wait=55))
    await until(lambda: any(request.path.endswith(alice.login) for request in server.sandbox.requests))
    async with asyncio.timeout(45):  # less than the poll would last
        await server.end(signal.SIGTERM)
    assert await held == "pending"
    await server.start()


@pytest.mark.usefixtures("server")
async def test_approval_after_the_end_logs_nobody_in(hasty: Server) -> None:
    async with Browser(hasty) as alice:
        await alice.start()
        assert await alice.follow() == "timed_out"
        alice.approve()
        assert await alice.follow() == "timed_out"
        assert await alice.who() is None


@pytest.mark.usefixtures("server")
async def test_approval_found_after_the_end_logs_nobody_in(hasty: Server) -> None:
    async with Browser(hasty) as alice:
        await alice.start()
        await asyncio.sleep(0.6)  # the time of the login, which is another process's
        alice.approve()
        assert await alice.follow() == "timed_out"
        assert await alice.who() is None


async def test_answer_about_another_user_is_refused(sandbox: Sandbox, alice: Browser) -> None:
    await alice.start()
    sandbox.tamper(alice.login, user_id="BAD", state="approved", result=True)
    assert await alice.follow() == "refused"
    sandbox.tamper(alice.login)
    alice.approve()
    assert await alice.follow() == "refused"
    assert await alice.who() is None


async def test_outage_is_told_and_nobody_is_logged_in(sandbox: Sandbox, alice: Browser) -> None:
    sandbox.fail_next(401, times=None)
    assert await alice.start() == 503
    sandbox.recover()
    await alice.start()
    sandbox.fail_next(401, times=None)
    assert await alice.follow() == 503
    sandbox.recover()
    alice.approve()
    assert await alice.follow() == "approved"


async def test_a_create_that_an_outage_interrupts_leaves_the_login_to_its_own_browser(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, alice: Browser, mallory: Browser
) -> None:
    with monkeypatch.context() as outage:
        # From the list of pending operations on: the create takes effect, and nothing is answered.
        outage.setattr(sandbox, "_on_request", lambda _record: sandbox.fail_next(503, times=None, stored=True))
        assert await alice.start() == 503
    [asked] = sandbox.operations
    sandbox.recover()
    assert await mallory.start() == 409
    assert (await alice.start(), alice.login) == (200, asked)
    assert list(sandbox.operations) == [asked]
    sandbox.approve(asked)
    assert await alice.follow() == "approved"


async def test_a_create_that_the_end_of_the_server_interrupts_goes_on_at_the_next_one(
    sandbox: Sandbox, server: Server, monkeypatch: pytest.MonkeyPatch, alice: Browser
) -> None:
    with monkeypatch.context() as slow:
        # From the list of pending operations on: only the create hangs.
        slow.setattr(sandbox, "_on_request", lambda _record: setattr(sandbox, "latency", 600))
        interrupted = asyncio.create_task(alice.start())
        await until(lambda: len(sandbox.operations) == 1)
    await server.end(signal.SIGTERM)
    assert await interrupted == 503
    sandbox.latency = 0
    await server.start()
    assert await alice.start() == 200
    assert list(sandbox.operations) == [alice.login]
    alice.approve()
    assert await alice.follow() == "approved"


# -- linking


async def test_an_account_without_a_phone_asks_nobody(sandbox: Sandbox, bob: Browser) -> None:
    assert await bob.start("bob@example.com") == 409
    assert not sandbox.operations


async def test_an_account_belongs_to_who_used_the_offered_id(sandbox: Sandbox, record: Record, bob: Browser) -> None:
    assert await link(sandbox, record, "account-2", "B0B") == "B0B"
    assert await bob.start("bob@example.com") == 200
    assert sandbox.operations[bob.login].user_id == "B0B"


async def test_an_attacker_who_sends_a_victims_ids_takes_over_nothing(
    sandbox: Sandbox, record: Record, alice: Browser
) -> None:
    await alice.start()  # the victim
    alice.approve()
    sent = [ALICE, "account-1", alice.login, "", "a-random-id"]
    sandbox.approve("a-random-id", user_id=ALICE, external_user_id="account-2")  # which the attacker's app made up
    phones.offer(record, "account-2")  # the attacker's own, which no phone has used
    async with sandbox.client() as client:
        for operation_id in sent:
            with pytest.raises(PermissionError):
                await phones.link(client, record, operation_id)
    assert record.execute("SELECT account, user_id FROM users").fetchall() == [("account-1", ALICE)]


async def test_what_the_app_says_of_account_and_payload_links_nothing_else(sandbox: Sandbox, record: Record) -> None:
    words = {"external_user_id": "account-1", "operation_payload": "account-1"}
    assert await link(sandbox, record, "account-2", "BAD", **words) == "BAD"
    assert record.execute("SELECT account, user_id FROM users").fetchall() == [("account-2", "BAD")]


async def test_a_user_is_linked_to_one_account(sandbox: Sandbox, record: Record) -> None:
    await link(sandbox, record, "account-1", ALICE)
    with pytest.raises(sqlite3.IntegrityError):
        await link(sandbox, record, "account-2", ALICE.lower())


async def test_an_offer_links_once_and_not_after_its_time(
    sandbox: Sandbox, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sandbox.client() as client:
        used = phones.offer(record, "account-2")
        sandbox.approve(used, user_id="B0B")
        twice = await asyncio.gather(*(phones.link(client, record, used) for _ in range(2)), return_exceptions=True)
        assert {type(each) for each in twice} == {str, PermissionError}
        monkeypatch.setattr(phones, "OFFER", 2.0)
        late = phones.offer(record, "account-2")
        with pytest.raises(ApprovalTimeoutError):
            await phones.link(client, record, late)
        sandbox.approve(late, user_id="BAD")
        with pytest.raises(PermissionError):
            await phones.link(client, record, late)
    assert record.execute("SELECT user_id FROM users").fetchall() == [("B0B",)]


async def test_after_enrolling_again_the_new_user_logs_in_and_the_old_one_does_not(
    sandbox: Sandbox, record: Record, mallory: Browser, alice: Browser
) -> None:
    await mallory.start()
    stolen = mallory.login
    assert await link(sandbox, record, "account-1", "A11CE1") == "A11CE1"
    sandbox.approve(stolen)
    assert await mallory.follow() == "pending"
    assert await mallory.who() is None
    assert await alice.start() == 200
    alice.approve()
    assert await alice.follow() == "approved"
    assert sandbox.operations[alice.login].user_id == "A11CE1"


async def test_an_account_linked_again_ends_its_sessions(sandbox: Sandbox, record: Record, mallory: Browser) -> None:
    await log_in(mallory)
    await link(sandbox, record, "account-1", "A11CE1")
    assert await mallory.who() is None


async def test_a_user_who_moved_to_another_account_approves_no_login_of_the_first(
    sandbox: Sandbox, record: Record, mallory: Browser
) -> None:
    await mallory.start()
    await link(sandbox, record, "account-1", "A11CE1")
    await link(sandbox, record, "account-2", ALICE)
    mallory.approve()
    assert await mallory.follow() == "pending"
    assert await mallory.who() is None


async def test_the_phone_is_known_if_it_is_the_users_only_device(sandbox: Sandbox, record: Record) -> None:
    phone = sandbox.enroll("B0B1").public_signing_key
    await link(sandbox, record, "account-2", "B0B1")
    assert record.execute("SELECT phone FROM users").fetchall() == [(phone,)]
    sandbox.enroll("B0B1")  # a backup, perhaps
    await link(sandbox, record, "account-2", "B0B1")
    assert record.execute("SELECT phone FROM users").fetchall() == [(None,)]


@pytest.mark.usefixtures("record")
async def test_the_program_links_an_account(sandbox: Sandbox) -> None:
    async with example_process("phones.py", "bob@example.com", folder=EXAMPLE, sandbox=sandbox) as process:
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        sandbox.approve(line.split()[-1], user_id="B0B")
        output, _ = await process.communicate()
    assert output.decode() == "bob@example.com is user B0B\n"


async def test_bad_input_is_refused(sandbox: Sandbox, alice: Browser) -> None:
    assert await alice.start("nobody@example.com") == 404
    assert not sandbox.operations
    assert await alice.start("ALICE@example.com") == 200
    for wait in (0, -1, 56, float("nan")):
        assert await alice.follow(wait=wait) == 422
    assert await alice.follow("unknown") == 404


async def test_a_phone_is_asked_once_at_a_time_and_seldom(sandbox: Sandbox, alice: Browser, mallory: Browser) -> None:
    assert await alice.start() == 200
    assert await mallory.start() == 409
    first = alice.login
    assert (await alice.start(), alice.login) == (200, first), "the browser that asked goes on with its login"
    assert len(sandbox.operations) == 1
    sandbox.approve(first)
    assert await alice.follow() == "approved"
    for _ in range(4):
        assert await alice.start() == 200, "the phone shows nothing"
        alice.approve()
        assert await alice.follow() == "approved"
    assert await alice.start() == 429
    assert len(sandbox.operations) == 5


class SlowList(KeylessClient):
    """A client whose list of pending operations is on its way for as long as a test wants."""

    arrived: asyncio.Event

    async def get_pending_operations(self, user_id: str) -> list[PendingOperation]:
        pending = await super().get_pending_operations(user_id)
        await self.arrived.wait()
        return pending


async def test_a_slow_list_of_pending_operations_brings_no_second_prompt(
    sandbox: Sandbox, record: Record, monkeypatch: pytest.MonkeyPatch, alice: Browser
) -> None:
    monkeypatch.setattr(site, "UNLISTED", 0.05)
    async with SlowList(sandbox.api_key, base_url=sandbox.url) as slow:
        slow.arrived = asyncio.Event()
        second = asyncio.create_task(site.start(slow, record, Response(), "alice@example.com", secure=False))
        await until(lambda: any(request.path.endswith("/pending") for request in sandbox.requests))
        assert await alice.start() == 200
        await asyncio.sleep(0.2)  # the phone's prompt is older than UNLISTED when the list arrives
        slow.arrived.set()
        with pytest.raises(HTTPException, match="409"):
            await second
    assert list(sandbox.operations) == [alice.login]


@pytest.mark.usefixtures("server")
async def test_a_prompt_that_is_being_created_brings_no_second_one(
    sandbox: Sandbox, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "UNLISTED", 0.0)
    async with sandbox.client() as client:
        new = site.Prompt("first", "browser", "417", 0.0)
        site.reserve(record, new, ALICE, "alice@example.com", set(), listed_at=0.0)
        with pytest.raises(HTTPException, match="409"):
            await site.start(client, record, Response(), "alice@example.com", secure=False)
    assert not sandbox.operations


@pytest.mark.usefixtures("server")
async def test_a_login_that_has_ended_keeps_nobody_from_asking_though_the_phone_shows_it(hasty: Server) -> None:
    async with Browser(hasty) as alice, Browser(hasty) as another:
        await alice.start()
        assert await alice.follow() == "timed_out"
        await until(lambda: starts(another))


async def starts(browser: Browser) -> bool:
    return await browser.start() == 200


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chrome() -> AsyncGenerator[Chromium]:
    async with chromium() as browser:
        yield browser


@pytest.mark.browser
async def test_page_logs_in_and_shows_the_number_of_the_phone(
    server: Server, sandbox: Sandbox, chrome: Chromium
) -> None:
    from playwright.async_api import expect  # chromium() skips where it is missing

    async with await chrome.new_page() as page:
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
        await page.reload()
        await page.get_by_role("button", name="Log out").click()
        await expect(page.get_by_role("status")).to_have_text("You are logged out.")
        await page.reload()
        await expect(page.get_by_role("button", name="Log in with your face")).to_be_visible()
        async with await chrome.new_context(java_script_enabled=False) as context:
            plain = await context.new_page()
            await plain.goto(server.url)
            await expect(plain.locator("noscript p")).to_be_visible()


@pytest.mark.browser
async def test_page_asks_again_after_a_lost_answer_a_502_and_none(
    server: Server, sandbox: Sandbox, chrome: Chromium
) -> None:
    from playwright.async_api import expect  # chromium() skips where it is missing

    async with await chrome.new_page() as page:
        await lose_answers(page, "**/login/*")
        await page.goto(server.url)
        await page.get_by_role("button", name="Log in with your face").click()
        await expect(page.locator("#number")).to_be_visible()
        sandbox.approve(*sandbox.operations)
        began = time.monotonic()
        await expect(page.get_by_role("status")).to_have_text("You are logged in as alice@example.com.")
        assert 30 < time.monotonic() - began < 45  # and at once if the page was hidden meanwhile: the other two pages
