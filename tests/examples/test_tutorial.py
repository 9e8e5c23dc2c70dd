"""The tutorial, followed from an empty folder as it is written: its files, its commands, its clicks."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from chromium import chromium, lose_answers
from example_process import output_of, serving

if TYPE_CHECKING:
    from playwright.async_api import Browser

    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox

ROOT = Path(__file__).parents[2]
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
FENCE = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
INSTALL, SERVE, LOG_IN, TEST = (block["text"] for block in FENCE.finditer(TUTORIAL) if block["language"] == "sh")
SITE, SITE_TESTS = (block["text"] for block in FENCE.finditer(TUTORIAL) if block["language"] == "python")
# The commands must not see how these tests were started; the first python3 on the path is the one that runs them.
ENVIRONMENT = {
    **{
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("COV", "KEYLESS_", "PYTEST_", "PYTHON"))
    },
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONUNBUFFERED": "1",
}

#: What a browser does when a suspended page is shown again.
SHOWN = "document.dispatchEvent(new Event('visibilitychange'))"

pytestmark = pytest.mark.browser


def log_in_at(phone: str) -> str:
    """Return the command for the site, with the sandbox where it is: the port as written may be taken."""
    return LOG_IN.strip().replace("http://127.0.0.1:3223", phone)


async def log_in(browser: Browser, site: str, phone: str) -> None:
    """Do what section 3 says: log in, then once more, through an outage."""
    from playwright.async_api import expect  # chromium() skips where it is missing

    page, other = await browser.new_page(), await browser.new_page()
    await page.goto(site)
    await other.goto(phone)
    button = page.get_by_role("button", name="Log in with your face")
    status, face = page.get_by_role("status"), other.get_by_role("button", name="Approve with face")
    await button.click()
    await face.click()
    await expect(status).to_have_text("logged in")
    await button.click()
    await expect(status).to_have_text("Approve on your phone.")
    await other.get_by_role("radio", name="answers 503").check()
    await face.click()
    await expect(other.get_by_role("row").filter(has_text="503").first).to_be_visible()
    await expect(status).to_have_text("Approve on your phone.")
    await other.get_by_role("radio", name="works").check()
    await expect(status).to_have_text("logged in")
    await button.click()
    await expect(status).to_have_text("Approve on your phone.")
    await lose_answers(page, "**/login")  # from the second one on: the first is asked for already
    await page.evaluate(SHOWN)
    await face.click()
    async with asyncio.timeout(45):  # what a suspended page may take
        while await status.text_content() != "logged in":
            await page.evaluate(SHOWN)
            await asyncio.sleep(1)


async def test_a_pin_logs_nobody_in(sandbox: Sandbox, client: KeylessClient) -> None:
    names: dict[str, Any] = {}
    exec(SITE, names)  # noqa: S102  # our own page
    app = names["make_app"]()
    app.state.client = client
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://site") as browser:
        await browser.post("/login")
        sandbox.approve(*sandbox.operations, auth_type="pin")
        answers = [(await browser.get("/login")).json() for _ in range(2)]
    assert answers == [{"state": "refused"}] * 2


async def test_tutorial_works_as_written(tmp_path: Path) -> None:
    checkout = tmp_path / "aiokeyless"
    checkout.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    shutil.copytree(ROOT / "aiokeyless", checkout / "aiokeyless", ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path / "login"
    (tmp_path / "pytest.ini").touch()  # nox has its temporary folders in the checkout, whose options the reader has not
    await output_of(INSTALL, folder=tmp_path, environment=ENVIRONMENT)
    patient = SITE.replace("expires_in: float = 60", "expires_in: float = 600")  # for a busy machine
    assert patient != SITE
    kept = patient.replace("flush=True", 'file=open("pushes", "a"), flush=True')  # the server's output is not read
    assert kept != patient
    (folder / "login.py").write_text(kept)
    (folder / "test_login.py").write_text(SITE_TESTS)
    async with (
        chromium() as browser,
        serving(f"{SERVE.strip()} --port 0", folder=folder, environment=ENVIRONMENT) as phone,
        serving(f"{log_in_at(phone)} --port 0", folder=folder, environment=ENVIRONMENT) as site,
    ):
        await log_in(browser, site, phone)
    assert (folder / "pushes").read_text().count("push to C0FFEE: ") == 3
    assert "5 passed" in await output_of(TEST, folder=folder, environment=ENVIRONMENT)
