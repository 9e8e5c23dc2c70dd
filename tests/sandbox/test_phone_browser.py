"""The phone in a real browser: what a person sees, clicks and hears of it, and that nothing they are shown runs.

Needs Playwright for Python and Debian's Chromium; skipped where either is missing. The rules of axe-core need npm too,
which fetches it, in this version, into a temporary folder.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import pytest_asyncio
from chromium import chromium
from tenacity import wait_fixed
from waiting import PATIENCE

from aiokeyless.sandbox import Sandbox

playwright_api = pytest.importorskip("playwright.async_api", reason='needs the extra "examples"')

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from playwright.async_api import Browser, ConsoleMessage, Locator, Page, Request

    from aiokeyless import KeylessClient

# One browser for all of them: it takes longer to start than all the tests to run.
pytestmark = [
    pytest.mark.browser,
    pytest.mark.asyncio(loop_scope="module"),
]

expect = playwright_api.expect

AXE = "axe-core@4.14.1"
#: What Chromium says of a sandbox that is gone, and of an answer that is an error.
GONE = ("Failed to load resource", "ERR_INCOMPLETE_CHUNKED_ENCODING")
USER = "C0FFEE"
OTHER = "BADA55"
MARKUP = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script><b>bold</b>"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncGenerator[Browser]:
    async with chromium() as browser:
        yield browser


@pytest.fixture
def sandbox(keyless_sandbox: Sandbox) -> Sandbox:
    """The plugin's, which runs in the loop of these tests."""
    return keyless_sandbox


@pytest_asyncio.fixture(loop_scope="module")
async def client(sandbox: Sandbox) -> AsyncGenerator[KeylessClient]:
    async with sandbox.client() as client:
        yield client


# An approved operation goes after some seconds, in which a busy machine may not find the time to see it.
CONFIRMATIONS_STAY = """
    const realTimeout = setTimeout;
    window.setTimeout = (run, ms, ...rest) => realTimeout(run, ms === 6000 ? 1e9 : ms, ...rest);
"""


@asynccontextmanager
async def opened(browser: Browser, url: str, complaints: tuple[str, ...] = (), **options: Any) -> AsyncGenerator[Page]:
    """Open a page and see to it that nothing is wrong with it, but for the complaints that belong to the test."""
    wrong: list[str] = []

    def on_console(message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"} and not any(each in message.text for each in complaints):
            wrong.append(message.text)

    def on_request(request: Request) -> None:
        if not request.url.startswith((url.partition("?")[0], "data:")):
            wrong.append(f"asked for {request.url}")

    async with await browser.new_context(reduced_motion="reduce", **options) as context:
        context.set_default_timeout(60_000)
        await context.add_init_script(CONFIRMATIONS_STAY)
        page = await context.new_page()
        page.on("console", on_console)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", on_request)
        await page.goto(url)
        await expect(page.get_by_text("Live", exact=True)).to_be_visible()
        yield page
    assert wrong == []


@pytest_asyncio.fixture(loop_scope="module")
async def page(browser: Browser, sandbox: Sandbox) -> AsyncGenerator[Page]:
    async with opened(browser, f"{sandbox.url}/", complaints=("409 (Conflict)",)) as page:
        yield page


def phone(page: Page, user: str = USER) -> Locator:
    return page.get_by_role("region", name=user, exact=True)


def button(where: Page | Locator, how: str = "face") -> Locator:
    return where.get_by_role("button", name=f"Approve with {how}", exact=True)


# Approving


async def test_operation_appears_by_itself_and_a_click_ends_the_wait(client: KeylessClient, page: Page) -> None:
    ticket = await client.create_operation(USER, operation_payload="Pay 40 EUR", external_user_id="ann@example.com")
    waiting = asyncio.create_task(client.wait_for_approval(ticket, schedule=wait_fixed(0.1)))
    await expect(phone(page).get_by_text("Pay 40 EUR")).to_be_visible()
    for text in ("ann@example.com", ticket.operation_id, re.compile(r"^\d\d:\d\d:\d\d$")):
        await expect(phone(page).get_by_text(text)).to_be_visible()
    await expect(page).to_have_title("(1) Keyless sandbox")
    await button(page).click()
    operation = await asyncio.wait_for(waiting, PATIENCE)
    assert operation.auth_type == "biom"
    await expect(phone(page).get_by_text("Approved with face")).to_be_visible()
    await expect(button(page)).to_have_count(0)


async def test_confirmation_goes_and_the_phone_is_quiet(client: KeylessClient, sandbox: Sandbox, page: Page) -> None:
    await page.clock.install()
    await page.reload()
    await client.create_operation(USER, operation_id="a")
    await expect(button(page)).to_be_visible()
    sandbox.approve("a")  # another finger than the one on this page
    await expect(phone(page).get_by_text("Approved with face")).to_be_visible()
    await page.clock.run_for(7000)
    await expect(phone(page).get_by_text("Approved with face")).to_have_count(0)
    await expect(phone(page).get_by_text("Nothing to approve")).to_be_visible()


async def test_forgotten_operation_is_not_confirmed(client: KeylessClient, sandbox: Sandbox, page: Page) -> None:
    await client.create_operation(USER, operation_id="a")
    await expect(button(page)).to_be_visible()
    sandbox.forget("a")
    await expect(phone(page).get_by_text("Nothing to approve")).to_be_visible()
    assert await phone(page).get_by_role("listitem").count() == 0


async def test_keyboard_alone_approves_one_and_stays_there(client: KeylessClient, sandbox: Sandbox, page: Page) -> None:
    for operation_id in "ab":
        await client.create_operation(USER, operation_id=operation_id, operation_payload=f"Pay for {operation_id}")
    await expect(button(page)).to_have_count(2)
    pin = button(page, "PIN").first
    for _ in range(10):
        if await pin.evaluate("button => button === document.activeElement"):
            break
        await page.keyboard.press("Tab")
    await expect(pin).to_be_focused()
    await page.keyboard.press("Enter")
    await page.keyboard.press("Enter")
    done = phone(page).get_by_role("listitem").first
    await expect(done).to_contain_text("Approved with PIN")
    await expect(done).to_be_focused()
    await page.keyboard.press("Enter")
    await page.keyboard.press("Tab")
    await expect(button(page)).to_be_focused()
    assert [each.is_approved for each in sandbox.operations.values()] == [False, True]


# Who sees what


async def test_two_users_do_not_see_each_others(client: KeylessClient, sandbox: Sandbox, browser: Browser) -> None:
    async with (
        opened(browser, f"{sandbox.url}/?user={USER}") as anns,
        opened(browser, f"{sandbox.url}/?user={OTHER.lower()}") as bobs,
    ):
        await client.create_operation(USER, operation_payload="For Ann")
        await client.create_operation(OTHER, operation_payload="For Bob")
        for page, own, others in ((anns, "For Ann", "For Bob"), (bobs, "For Bob", "For Ann")):
            await expect(page.get_by_text(own, exact=True)).to_be_visible()
            await expect(page.get_by_text(others)).to_have_count(0)
            await expect(button(page)).to_have_count(1)
        await bobs.get_by_role("link", name="All phones").click()
        for text in ("For Ann", "For Bob"):
            await expect(bobs.get_by_text(text, exact=True)).to_be_visible()


async def test_markup_is_shown_as_text_and_nothing_runs(client: KeylessClient, page: Page) -> None:
    operation_id = MARKUP.replace("/", "")  # which the client sends in no id
    await client.create_operation(
        USER, operation_id=operation_id, operation_payload=MARKUP, external_user_id=MARKUP + "/external"
    )
    for text in (MARKUP, operation_id, MARKUP + "/external"):
        await expect(phone(page).get_by_text(text, exact=True)).to_be_visible()
    assert await page.locator("main img, main script, .phone b").count() == 0
    await expect(page).to_have_title("(1) Keyless sandbox")


async def test_a_user_that_is_not_an_id_gets_an_error(sandbox: Sandbox, browser: Browser) -> None:
    async with await browser.new_page() as page:
        await page.goto(f"{sandbox.url}/?user=<img src=x>")
        await expect(page.get_by_role("alert")).to_contain_text("“<IMG SRC=X>” is not a user id")


async def test_page_without_javascript_says_that_it_needs_it(sandbox: Sandbox, browser: Browser) -> None:
    async with await browser.new_context(java_script_enabled=False) as context:
        page = await context.new_page()
        await page.goto(f"{sandbox.url}/")
        await expect(page.locator("noscript p")).to_be_visible()
        assert "This page needs JavaScript" in await page.locator("noscript p").inner_text()
        await expect(page.get_by_text("Connecting")).to_have_count(0)


async def test_empty_page_says_what_to_do(sandbox: Sandbox, client: KeylessClient, page: Page) -> None:
    await expect(page.get_by_text(f"export KEYLESS_BASE_URL={sandbox.url}")).to_be_visible()
    await expect(page.get_by_text("aiokeyless create C0FFEE")).to_be_visible()
    await client.create_operation(USER)
    await expect(phone(page)).to_be_visible()
    await expect(page.get_by_text("aiokeyless create")).to_be_hidden()


# The service as a whole


async def test_page_lets_the_api_fail_in_two_ways(sandbox: Sandbox, page: Page) -> None:
    async with aiohttp.ClientSession(sandbox.url, headers={"X-Api-Key": sandbox.api_key}) as http:

        async def status() -> int | None:
            try:
                async with http.get(f"/v2/users/{USER}/operations/pending") as response:
                    return response.status
            except aiohttp.ClientError:
                return None

        faults = page.get_by_role("group", name="The API")
        await faults.get_by_role("radio", name="answers 503").check()
        await expect(page.get_by_text("The API fails")).to_be_visible()
        assert await status() == 503
        await expect(page.get_by_role("row").filter(has_text="503")).to_contain_text("GET /v2/users/C0FFEE/operations")
        await faults.get_by_role("radio", name="drops").check()
        async with asyncio.timeout(PATIENCE):
            while await status() == 503:
                pass
        await expect(page.get_by_role("row").filter(has_text="no answer").first).to_be_visible()
        await faults.get_by_role("radio", name="works").check()
        await expect(page.get_by_text("The API fails")).to_be_hidden()
        assert await status() == 200
        sandbox.fail_next(times=None)
        await expect(faults.get_by_role("radio", name="answers 503")).to_be_checked()
        sandbox.recover()
        await expect(faults.get_by_role("radio", name="works")).to_be_checked()


async def test_test_operation_is_sent_from_the_page(sandbox: Sandbox, browser: Browser) -> None:
    async with opened(browser, f"{sandbox.url}/", complaints=GONE) as page:
        form = page.get_by_role("region", name="Send a test operation")
        await form.get_by_label("User id").fill("Alice")
        await form.get_by_role("button").click()
        await expect(form.locator("input:invalid")).to_be_focused()
        await form.get_by_label("User id").fill(f" {OTHER.lower()} ")
        await form.get_by_label("Text").fill("Pay 5")
        await form.get_by_role("button").click()
        await expect(phone(page, OTHER).get_by_text("Pay 5")).to_be_visible()
        assert [each.operation_payload for each in sandbox.operations.values()] == ["Pay 5"]


async def test_the_page_says_it_is_gone_and_returns(client: KeylessClient, sandbox: Sandbox, browser: Browser) -> None:
    await client.create_operation(USER, operation_payload="Still there")
    async with opened(browser, f"{sandbox.url}/", complaints=GONE) as page:
        await expect(button(page)).to_be_visible()
        await sandbox.aclose()
        await expect(page.get_by_text("The sandbox has ended, or cannot be reached")).to_be_visible()
        await expect(page.get_by_role("radio", name="works")).to_be_disabled()
        await button(page).click()
        problem = phone(page).get_by_role("alert").filter(has_text="The sandbox is not reachable")
        await expect(problem).to_be_visible()
        await sandbox.start()
        await expect(page.get_by_text("Live", exact=True)).to_be_visible()
        await expect(page.get_by_text("The sandbox has ended, or cannot be reached")).to_be_hidden()
        await expect(problem).to_be_hidden()
        await button(page).click()
        await expect(phone(page).get_by_text("Approved with face")).to_be_visible()


async def test_page_that_nobody_sees_closes_its_connection(client: KeylessClient, sandbox: Sandbox, page: Page) -> None:
    hide = """hidden => {
        Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    await page.evaluate(hide, arg=True)
    async with asyncio.timeout(PATIENCE):
        while sandbox._phones._streams:  # noqa: ASYNC110  # nothing tells when they are gone
            await asyncio.sleep(0.01)
    await client.create_operation(USER)
    assert await button(page).count() == 0
    await page.evaluate(hide, arg=False)
    await expect(button(page)).to_be_visible()


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])  # another site; another origin of the same site
async def test_foreign_page_has_no_power(client: KeylessClient, sandbox: Sandbox, browser: Browser, name: str) -> None:
    await client.create_operation(USER, operation_id="a")
    bodies = {
        "page/approve": {"operationId": "a", "authType": "biom"},
        "approve": {"operationId": "a"},
    }
    async with Sandbox() as evil, await browser.new_page() as page:
        evil.fail_next(200, times=None, body=b"<title>You have won</title>", content_type="text/html")
        await page.goto(f"{evil.url.replace('127.0.0.1', name)}/evil")
        outcomes = await page.evaluate(
            """async ([sandbox, bodies]) => {
                const json = {"Content-Type": "application/json"};
                const key = {"X-Api-Key": "sandbox-key"};
                const tries = [
                    {headers: json}, {headers: {...json, ...key}}, {headers: {...json, ...key}, mode: "no-cors"},
                    {headers: key}, {mode: "no-cors"}, {},
                ];
                const outcome = (answer) => answer.then((each) => each.type, () => "refused");
                const post = (path, options) => fetch(
                    `${sandbox}/sandbox/${path}`, {method: "POST", body: JSON.stringify(bodies[path]), ...options});
                const outcomes = Object.keys(bodies).flatMap(
                    (path) => tries.map((options) => outcome(post(path, options))));
                outcomes.push(outcome(fetch(`${sandbox}/sandbox/list`, {headers: key})));
                const source = new EventSource(`${sandbox}/sandbox/page/events`);
                outcomes.push(new Promise((told) => {
                    source.onmessage = () => told("followed");
                    source.onerror = () => told("refused");
                }));
                return await Promise.all(outcomes);
            }""",
            [sandbox.url, bodies],
        )
        assert outcomes == ["refused"] * 14
        await page.evaluate(
            """(url) => {
                const make = (tag, properties) => Object.assign(document.createElement(tag), properties);
                const form = make("form", {action: url, method: "POST", enctype: "text/plain"});
                form.append(make("input", {name: '{"operationId": "a", "x": "', value: '"}'}));
                document.body.append(form);
                form.submit();
            }""",
            f"{sandbox.url}/sandbox/approve",
        )
        await expect(page.get_by_text("no web page may request this")).to_be_visible()
    assert not sandbox.operations["a"].is_approved


# Refusing, and the history


async def test_buttons_fail_attempts_until_it_is_locked(client: KeylessClient, sandbox: Sandbox, page: Page) -> None:
    for operation_id in "ab":
        await client.create_operation(USER, operation_id=operation_id, operation_payload=f"Pay for {operation_id}")
    await expect(button(page)).to_have_count(2)  # the second one's arrival moves the first one's buttons
    card = phone(page).get_by_role("listitem").filter(has_text="Pay for a")
    history = page.get_by_role("region", name="History").get_by_role("listitem")
    await card.get_by_role("button", name="Cancel").click()
    await expect(card).to_contain_text("The user left the scan (30003). The operation stays pending.")
    await expect(history.first).to_contain_text("The user left the scan (30003)Pay for aC0FFEE, ")
    for number in range(5):
        await card.get_by_role("button", name="Face does not match").click()
        await expect(history).to_have_count(number + 2)
    await expect(card).to_contain_text("The face did not match (30004).")
    await expect(phone(page).get_by_text("Locked out until")).to_be_visible()
    await button(card).click()
    await expect(card.get_by_role("alert")).to_contain_text("is locked out for")
    assert not any(each.is_approved for each in sandbox.operations.values())
    assert [each.error_code for each in sandbox.authentications] == [30003, *[30004] * 5, 30007]
    await phone(page).get_by_role("button", name="Unlock").click()
    await expect(phone(page).get_by_text("Locked out until")).to_be_hidden()
    await expect(phone(page).get_by_role("heading", name=USER)).to_be_focused()
    await button(card).click()
    await expect(card).to_contain_text("Approved with face")


# Its appearance, and how it reads


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The script of axe-core, fetched by npm."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed, so axe-core cannot be fetched")
    folder = tmp_path_factory.mktemp("axe")
    options = ("--no-save", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error")
    subprocess.run([npm, "install", "--prefix", str(folder), *options, AXE], check=True, timeout=300)
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text()


# Rules of WCAG 2.2, levels A and AA, and what axe-core calls best practices; and that nothing is wider than the page.
AXE_RUN = """async () => {
    const tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"];
    const {violations} = await axe.run({runOnly: tags, resultTypes: ["violations"]});
    const found = violations.map((each) => [each.id, each.help, ...each.nodes.map((node) => node.html.slice(0, 200))]);
    if (document.documentElement.scrollWidth > innerWidth) found.push(["wider than the page"]);
    return found;
}"""


async def check_accessibility(page: Page, state: str) -> None:
    """Check a page in both colour schemes at five widths."""
    wrong = []
    for scheme in ("light", "dark"):
        await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        for width in (320, 390, 768, 1440, 1920):
            await page.set_viewport_size({"width": width, "height": 900})
            wrong += [(state, scheme, width, each) for each in await page.evaluate(AXE_RUN)]
    assert wrong == []


async def test_axe_core_finds_nothing_in_any_state(
    client: KeylessClient, sandbox: Sandbox, browser: Browser, axe: str
) -> None:
    """One page goes through all states: loading it, and axe-core with it, takes longer than checking it."""
    async with opened(browser, f"{sandbox.url}/", complaints=GONE, bypass_csp=True) as page:
        await page.evaluate(axe)
        await check_accessibility(page, "empty")

        await client.create_operation(USER, operation_id="a", operation_payload="Pay to Alice", external_user_id="x")
        await client.create_operation(USER, operation_id="b", operation_payload="Lorem ipsum. " * 300)
        await client.create_operation(USER, operation_id="c")
        await expect(button(page)).to_have_count(3)
        sandbox.approve("c")
        await expect(phone(page).get_by_text("Approved with face")).to_be_visible()
        await check_accessibility(page, "one phone: a long text, an approval")

        for _ in range(5):
            sandbox.fail_authentication("a")
        await expect(phone(page).get_by_text("Locked out until")).to_be_visible()
        await button(page).last.click()
        await expect(page.get_by_role("alert")).to_contain_text("is locked out for")
        await check_accessibility(page, "locked, and an error")

        await page.get_by_text("Enroll a user").click()
        await check_accessibility(page, "the form to enroll")
        await client.delete_user(USER)
        await expect(phone(page).get_by_text("This phone was removed")).to_be_visible()
        await check_accessibility(page, "a phone that was removed")

        for number in range(12):
            await client.create_operation(f"AB0{number % 6}", operation_payload=f"Payment {number}")
        await client.create_operation("F" * 64, operation_id="i" * 100, operation_payload="9" * 200)
        await expect(phone(page, "F" * 64)).to_be_visible()  # the last one: each moves what a click is aimed at
        await page.get_by_role("radio", name="answers 503").check()
        await expect(page.get_by_text("The API fails")).to_be_visible()
        await check_accessibility(page, "many phones, and an API that fails")

        await sandbox.aclose()
        await expect(page.get_by_text("The sandbox has ended")).to_be_visible()
        await check_accessibility(page, "ended")


async def test_axe_core_finds_nothing_if_there_is_only_an_error(sandbox: Sandbox, browser: Browser, axe: str) -> None:
    async with await browser.new_context(bypass_csp=True) as context:
        page = await context.new_page()
        await page.goto(f"{sandbox.url}/?user=nobody")
        await expect(page.get_by_role("alert")).to_be_visible()
        await page.evaluate(axe)
        await check_accessibility(page, "error")


async def test_a_user_who_lost_the_phone_is_enrolled_again(sandbox: Sandbox, client: KeylessClient, page: Page) -> None:
    await page.get_by_text("Enroll a user").click()
    await page.locator("#enroll-user").fill(USER.lower())
    await page.get_by_label("External id").fill("ann")
    await page.locator("#enroll").get_by_role("button").click()
    await expect(phone(page).get_by_text("known as ann")).to_be_visible()
    await client.create_operation(USER, operation_id="a", operation_payload="Pay 40 EUR")
    [device] = await client.get_devices(USER)
    await client.delete_device(USER, device.public_signing_key)
    await expect(phone(page).get_by_text("This phone was removed")).to_be_visible()
    await button(page).click()
    await expect(phone(page).get_by_role("alert")).to_contain_text("has no device")
    await page.locator("#enroll").get_by_role("button").click()
    await expect(phone(page).get_by_text("This phone was removed")).to_be_hidden()
    await button(page).click()
    await expect(phone(page).get_by_text("Approved with face")).to_be_visible()
    assert sandbox.operations["a"].is_approved


async def test_page_reads_as_what_it_is(client: KeylessClient, page: Page) -> None:
    await client.create_operation(USER, operation_payload="Pay 40 EUR", external_user_id="ann")
    await expect(button(page)).to_have_accessible_description("Pay 40 EUR")
    await expect(page.get_by_role("status").filter(has_text=f"Approval requested of {USER}: Pay 40 EUR")).to_have_count(
        1
    )
    await expect(page.get_by_role("table", name="API requests")).to_be_visible()
    await expect(page.get_by_role("heading", level=1)).to_have_text("Keyless sandbox")
    await expect(phone(page)).to_match_aria_snapshot(
        """
        - heading "C0FFEE" [level=2]
        - link "Open alone the phone of C0FFEE"
        - list "C0FFEE":
          - listitem:
            - paragraph:
              - strong: Approval requested
            - paragraph: Pay 40 EUR
            - term: External id
            - definition: ann
            - term: Operation
            - definition: /.+/
            - button "Approve with face"
            - button "Approve with PIN"
            - button "Face does not match"
            - button "Cancel"
        """
    )
