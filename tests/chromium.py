"""Debian's Chromium, driven by Playwright, for the tests that need a real browser."""

from __future__ import annotations

import os
import shutil
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from playwright.async_api import Browser, Page, Route

CHROMIUM = shutil.which("chromium")
#: It must not call home, and must not ask questions when it starts for the first time.
FLAGS = [
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@asynccontextmanager
async def chromium() -> AsyncGenerator[Browser]:
    """Run a browser; skip the test where Playwright or Chromium is missing."""
    api = pytest.importorskip("playwright.async_api", reason='needs the extra "examples"')
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    api.expect.set_options(timeout=PATIENCE * 1000)  # a patience for a busy machine; nothing takes that long
    flags = [*FLAGS, "--no-sandbox"] if os.geteuid() == 0 else FLAGS  # root cannot have Chromium's own sandbox
    async with api.async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=flags, timeout=PATIENCE * 1000)
        yield browser
        await browser.close()


async def lose_answers(page: Page, url: str) -> None:
    """Let a page get no answer from these addresses, then a proxy's 502, and then one that never comes."""
    faults = ["lost", "502", "silent"]

    async def answer(route: Route) -> None:
        fault = faults.pop(0) if faults else None
        if fault == "lost":
            await route.abort()
        elif fault == "502":
            await route.fulfill(status=502, body="<h1>Bad gateway</h1>")
        elif fault is None:
            await route.continue_()

    await page.route(url, answer)
