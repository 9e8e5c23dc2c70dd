"""Tests of `django_app.py`, whose lifespan Django's test client does not run: the client is replaced."""

from pathlib import Path

import approvals
import django_app
import pytest
from django.test import AsyncClient

from aiokeyless import KeylessClient
from aiokeyless.sandbox import Sandbox

APPROVAL = "/approvals/order-7"
pytestmark = pytest.mark.asyncio


@pytest.fixture
def browser(keyless_client: KeylessClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncClient:
    monkeypatch.setattr(django_app, "keyless", lambda: keyless_client)
    monkeypatch.setenv("APPROVALS_DB", str(tmp_path / "approvals.sqlite3"))
    with approvals.record() as db:
        for order in range(4, 8):
            db.execute("INSERT INTO orders VALUES (?, ?, 'Pay 40 to Alice')", (f"order-{order}", approvals.USER))
    return AsyncClient(headers={"host": "127.0.0.1"})


async def test_an_approval_pays_once(
    browser: AsyncClient, keyless_sandbox: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    await browser.post(APPROVAL)
    keyless_sandbox.approve(*keyless_sandbox.operations)
    assert [(await browser.get(APPROVAL)).json() for _ in range(2)] == [{"state": "approved"}] * 2
    assert capsys.readouterr().out.count("'order-7': pay\n") == 1


async def test_a_pin_pays_nothing(
    browser: AsyncClient, keyless_sandbox: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    await browser.post(APPROVAL)
    keyless_sandbox.approve(*keyless_sandbox.operations, auth_type="pin")
    assert (await browser.get(APPROVAL)).json() == {"state": "refused"}
    assert ": pay" not in capsys.readouterr().out


async def test_an_approval_after_the_timeout_pays_nothing(
    browser: AsyncClient, keyless_sandbox: Sandbox, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(approvals, "EXPIRES_IN", 2.0)
    await browser.post(APPROVAL)
    assert (await browser.get(APPROVAL)).json() == {"state": "timed out"}
    keyless_sandbox.approve(*keyless_sandbox.operations)
    assert (await browser.get(APPROVAL)).json() == {"state": "timed out"}
    assert ": pay" not in capsys.readouterr().out


async def test_an_approval_of_another_text_than_the_orders_pays_nothing(
    browser: AsyncClient, keyless_sandbox: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    await browser.post(APPROVAL)
    with approvals.record() as db:
        db.execute("UPDATE orders SET text = 'Pay 4000 to Mallory'")
    assert (await browser.post(APPROVAL)).status_code == 409
    keyless_sandbox.approve(*keyless_sandbox.operations)
    assert (await browser.get(APPROVAL)).json() == {"state": "refused"}
    assert ": pay" not in capsys.readouterr().out


async def test_a_phone_shows_three_questions_at_most(browser: AsyncClient, keyless_sandbox: Sandbox) -> None:
    answers = [await browser.post(f"/approvals/order-{order}") for order in range(4, 8)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert len(keyless_sandbox.operations) == 3
