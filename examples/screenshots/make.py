"""Make the README's screenshots: the sandbox's phone, and the checkout.

``python examples/screenshots/make.py`` (extra ``dev``, and a Chromium on the path).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from playwright.async_api import Browser, Page, async_playwright, expect
from tenacity import AsyncRetrying, stop_after_delay, wait_fixed

from aiokeyless.sandbox import Sandbox

if TYPE_CHECKING:
    from aiokeyless import KeylessClient

HERE = Path(__file__).parent
SHOP = HERE.parent / "checkout" / "shop.py"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


async def phone(browser: Browser) -> None:
    """Take a screenshot of the phones of two users, their history and the journal."""
    async with Sandbox() as sandbox, sandbox.client() as client:
        page = await browser.new_page(viewport={"width": 1320, "height": 880}, reduced_motion="reduce")
        await fill(client)
        sandbox.fail_authentication("txn-20261124-001")
        sandbox.approve("login-88", auth_type="pin")
        await page.goto(sandbox.url)
        await expect(page.get_by_text("Pay 40 EUR to Alice", exact=True).first).to_be_visible(timeout=60_000)
        await page.screenshot(path=HERE / "phone.png")


async def fill(client: KeylessClient) -> None:
    """Ask two users for approvals, and poll."""
    await client.create_operation("C0FFEE", operation_id="login-88", operation_payload="Log in from Firefox on Linux")
    await client.create_operation("C0FFEE", operation_id="order-7741", operation_payload="Pay 40 EUR to Alice")
    await client.create_operation(
        "BADA55",
        operation_id="txn-20261124-001",
        operation_payload="Approve wire transfer of $500 to account 1234",
        external_user_id="bob@example.com",
    )
    for operation_id in ("order-7741", "txn-20261124-001", "order-7741"):
        await client.get_operation(operation_id)


async def checkout(browser: Browser) -> None:
    """Take a screenshot of the shop while it waits for the phone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with Sandbox() as sandbox:
        environment = os.environ | {"KEYLESS_BASE_URL": sandbox.url, "KEYLESS_API_KEY": sandbox.api_key}
        environment |= {"CHECKOUT_PORT": str(port), "CHECKOUT_DB": str(Path(tempfile.mkdtemp()) / "shop.sqlite3")}
        shop = await asyncio.create_subprocess_exec(sys.executable, SHOP, env=environment)
        try:
            page = await browser.new_page(viewport={"width": 1440, "height": 720}, reduced_motion="reduce")
            await open_when_it_answers(page, f"http://127.0.0.1:{port}")
            await page.get_by_role("button", name="Pay").click()
            await expect(page.locator('[data-state="waiting"]')).to_be_visible(timeout=60_000)
            await page.screenshot(path=HERE / "checkout.png")
        finally:
            shop.terminate()
            await shop.wait()


async def open_when_it_answers(page: Page, url: str) -> None:
    """Open a page of a server that is still starting."""
    async for attempt in AsyncRetrying(stop=stop_after_delay(60), wait=wait_fixed(0.1), reraise=True):
        with attempt:
            await page.goto(url)


async def main() -> None:
    """Make both screenshots."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        await phone(browser)
        await checkout(browser)
        await browser.close()


if __name__ == "__main__":
    asyncio.run(main())
