"""The phone in a real browser: what a person sees, clicks and hears of it, and that nothing they are shown runs.

Needs Playwright for Python and Debian's Chromium; skipped where either is missing.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import pytest_asyncio
from tenacity import wait_fixed

from aiokeyless.sandbox import Sandbox

playwright_api = pytest.importorskip("playwright.async_api", reason="Playwright is not installed")

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from playwright.async_api import Browser, ConsoleMessage, Locator, Page, Request

    from aiokeyless import KeylessClient

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]

# One browser for all of them: it takes longer to start than all the tests to run.
pytestmark = [
    pytest.mark.browser,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]

expect = playwright_api.expect
USER = "C0FFEE"
OTHER = "BADA55"
MARKUP = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script><b>bold</b>"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncGenerator[Browser]:
    flags = [*FLAGS, "--no-sandbox"] if os.geteuid() == 0 else FLAGS  # root cannot have Chromium's own sandbox
    async with playwright_api.async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        await browser.close()


@pytest.fixture
def sandbox(keyless_sandbox: Sandbox) -> Sandbox:
    """The plugin's, which runs in the loop of these tests."""
    return keyless_sandbox


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

    async with await browser.new_context(**options) as context:
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
    async with opened(browser, f"{sandbox.url}/") as page:
        yield page


def phone(page: Page, user: str = USER) -> Locator:
    return page.get_by_role("region", name=user, exact=True)


def button(where: Page | Locator, how: str = "face") -> Locator:
    return where.get_by_role("button", name=f"Approve with {how}", exact=True)


# Approving


async def test_operation_appears_within_a_second_and_a_click_ends_the_wait(client: KeylessClient, page: Page) -> None:
    ticket = await client.create_operation(USER, operation_payload="Pay 40 EUR", external_user_id="ann@example.com")
    waiting = asyncio.create_task(client.wait_for_approval(ticket, schedule=wait_fixed(0.1)))
    await expect(phone(page).get_by_text("Pay 40 EUR")).to_be_visible(timeout=1000)
    for text in ("ann@example.com", ticket.operation_id, "just now"):
        await expect(phone(page).get_by_text(text)).to_be_visible()
    await expect(page).to_have_title("(1) Keyless sandbox")
    await button(page).click()
    operation = await asyncio.wait_for(waiting, 10)
    assert operation.auth_type == "biom"
    await expect(phone(page).get_by_text("Approved with face")).to_be_visible()
    await expect(button(page)).to_have_count(0)


async def test_pin_is_approved_as_pin(client: KeylessClient, sandbox: Sandbox, page: Page) -> None:
    await client.create_operation(USER, operation_id="a")
    await button(page, "PIN").click()
    await expect(phone(page).get_by_text("Approved with PIN")).to_be_visible()
    assert sandbox.operations["a"].auth_type == "pin"


async def test_double_click_approves_one_operation(client: KeylessClient, sandbox: Sandbox, page: Page) -> None:
    for operation_id in "abc":
        await client.create_operation(USER, operation_id=operation_id)
    await expect(button(page)).to_have_count(3)
    await button(page).first.dblclick()
    await expect(phone(page).get_by_text("Approved with face")).to_be_visible()
    await expect(button(page)).to_have_count(2)
    assert [each.is_approved for each in sandbox.operations.values()] == [False, False, True]


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


async def test_operation_that_is_forgotten_goes_without_a_confirmation(
    client: KeylessClient, sandbox: Sandbox, page: Page
) -> None:
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
            await expect(page.get_by_role("button")).to_have_count(2)
        await bobs.get_by_role("link", name="All phones").click()
        for text in ("For Ann", "For Bob"):
            await expect(bobs.get_by_text(text, exact=True)).to_be_visible()


async def test_link_opens_a_phone_alone(client: KeylessClient, page: Page) -> None:
    for user in (USER, OTHER):
        await client.create_operation(user)
    await phone(page).get_by_role("link", name="Open alone").click()
    await expect(phone(page)).to_be_visible()
    await expect(phone(page, OTHER)).to_have_count(0)


async def test_markup_is_shown_as_text_and_nothing_runs(client: KeylessClient, page: Page) -> None:
    await client.create_operation(
        USER, operation_id=MARKUP + "/id", operation_payload=MARKUP, external_user_id=MARKUP + "/external"
    )
    for text in (MARKUP, MARKUP + "/id", MARKUP + "/external"):
        await expect(phone(page).get_by_text(text, exact=True)).to_be_visible()
    assert await page.locator("main img, main script, main b:not(td b)").count() == 0
    await expect(page).to_have_title("(1) Keyless sandbox")


async def test_a_user_that_is_not_an_id_gets_an_error(sandbox: Sandbox, browser: Browser) -> None:
    async with await browser.new_page() as page:
        await page.goto(f"{sandbox.url}/?user=<img src=x>")
        await expect(page.get_by_role("alert")).to_contain_text("“<IMG SRC=X>” is not a user id")


async def test_empty_page_says_what_to_do(sandbox: Sandbox, client: KeylessClient, page: Page) -> None:
    await expect(page.get_by_text(f"export KEYLESS_BASE_URL={sandbox.url}")).to_be_visible()
    await expect(page.get_by_text("aiokeyless create C0FFEE")).to_be_visible()
    await client.create_operation(USER)
    await expect(phone(page)).to_be_visible()
    await expect(page.get_by_text("aiokeyless create")).to_be_hidden()


# The service as a whole


async def test_switch_loses_the_connection_and_gives_it_back(sandbox: Sandbox, page: Page) -> None:
    async with aiohttp.ClientSession(sandbox.url, headers={"X-Api-Key": sandbox.api_key}) as http:

        async def status() -> int:
            async with http.get(f"/v2/users/{USER}/operations/pending") as response:
                return response.status

        switch = page.get_by_role("switch", name="Lose connection")
        notice = page.get_by_text("every request to the API is answered 503")
        await switch.check()
        await expect(notice).to_be_visible()
        assert await status() == 503
        await expect(page.get_by_role("row").filter(has_text="503")).to_contain_text("GET /v2/users/C0FFEE/operations")
        await switch.press("Space")
        await expect(notice).to_be_hidden()
        assert await status() == 200


async def test_the_page_shows_that_the_sandbox_is_gone_and_reconnects(
    client: KeylessClient, sandbox: Sandbox, browser: Browser
) -> None:
    await client.create_operation(USER, operation_payload="Still there")
    async with opened(browser, f"{sandbox.url}/", complaints=("Failed to load resource",)) as page:
        await expect(button(page)).to_be_visible()
        await sandbox.aclose()
        await expect(page.get_by_text("The sandbox is not reachable")).to_be_visible()
        await expect(page.get_by_role("switch")).to_be_disabled()
        await button(page).click()
        await expect(page.get_by_role("alert").filter(has_text="not reachable")).to_be_visible()
        await sandbox.start()
        await expect(page.get_by_text("Live", exact=True)).to_be_visible()
        await button(page).click()
        await expect(phone(page).get_by_text("Approved with face")).to_be_visible()


async def test_page_that_nobody_sees_gives_its_connection_back(
    client: KeylessClient, sandbox: Sandbox, page: Page
) -> None:
    hide = """hidden => {
        Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    await page.evaluate(hide, arg=True)
    for _ in range(500):
        if not sandbox._phones._readers:
            break
        await asyncio.sleep(0.01)
    assert not sandbox._phones._readers
    await client.create_operation(USER)
    assert await button(page).count() == 0
    await page.evaluate(hide, arg=False)
    await expect(button(page)).to_be_visible()


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])  # another site; another origin of the same site
async def test_foreign_page_approves_nothing(
    client: KeylessClient, sandbox: Sandbox, browser: Browser, name: str
) -> None:
    await client.create_operation(USER, operation_id="a")
    body = {"user": USER, "key": sandbox._phones._key(sandbox.operations["a"]), "authType": "biom"}
    async with Sandbox() as evil, await browser.new_page() as page:
        evil.fail_next(200, times=None, body=b"<title>You have won</title>", content_type="text/html")
        await page.goto(f"{evil.url.replace('127.0.0.1', name)}/evil")
        outcomes = await page.evaluate(
            """async ([sandbox, body]) => {
                const json = {"Content-Type": "application/json"};
                const tries = [{headers: json}, {headers: json, mode: "no-cors"}, {mode: "no-cors"}, {}];
                const send = (options) => fetch(`${sandbox}/sandbox/approve`, {method: "POST", body, ...options});
                const outcomes = tries.map((options) => send(options).then((each) => each.type, () => "refused"));
                const source = new EventSource(`${sandbox}/sandbox/events`);
                outcomes.push(new Promise((told) => {
                    source.onmessage = () => told("followed");
                    source.onerror = () => told("refused");
                }));
                return await Promise.all(outcomes);
            }""",
            [sandbox.url, json.dumps(body)],
        )
    assert outcomes == ["refused"] * 5
    assert not sandbox.operations["a"].is_approved


# Its appearance, and how it reads


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_page_fits_and_can_be_read(
    client: KeylessClient, sandbox: Sandbox, browser: Browser, scheme: str
) -> None:
    await client.create_operation(
        USER, operation_id="i" * 100, operation_payload="Pay " + "9" * 200, external_user_id="e" * 100
    )
    for user in (OTHER, "F" * 64):
        await client.create_operation(user, operation_payload="Pay")
    async with opened(browser, f"{sandbox.url}/", color_scheme=scheme) as page:
        await expect(button(page)).to_have_count(3)
        await page.get_by_role("switch").check()
        await button(page).last.click()
        await expect(page.get_by_text("Approved with face", exact=True)).to_be_visible()
        for width in (320, 390, 1440):
            await page.set_viewport_size({"width": width, "height": 900})
            await page.evaluate("Promise.all(document.getAnimations().map(each => each.finished))")
            assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert await page.evaluate(CONTRASTS) == []


# Texts of less contrast with what is behind them than WCAG 2 asks for (AA: 4.5).
CONTRASTS = """() => {
    const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = (colour) => {
        const [r, g, b] = parts(colour).map((each) => each / 255)
            .map((each) => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (element) => {
        const colour = getComputedStyle(element).backgroundColor;
        return parts(colour)[3] === 0 ? behind(element.parentElement) : colour;
    };
    const poor = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
        const lights = [light(getComputedStyle(element).color), light(behind(element))].sort((a, b) => b - a);
        const contrast = (lights[0] + 0.05) / (lights[1] + 0.05);
        if (contrast < 4.5) poor.push([walker.currentNode.data, contrast]);
    }
    return poor;
}"""


async def test_page_reads_as_what_it_is(client: KeylessClient, page: Page) -> None:
    await client.create_operation(USER, operation_payload="Pay 40 EUR", external_user_id="ann")
    await expect(button(page)).to_have_accessible_description("Pay 40 EUR")
    await expect(page.get_by_role("status").filter(has_text=f"Approval requested of {USER}: Pay 40 EUR")).to_have_count(
        1
    )
    await expect(page.get_by_role("table", name="API requests")).to_be_visible()
    await expect(page.get_by_role("heading", level=1)).to_have_text("Keyless sandbox")
    await expect(page.get_by_role("switch", name="Lose connection")).to_have_accessible_description(
        "API answers 503 to everyone"
    )
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
        """
    )
