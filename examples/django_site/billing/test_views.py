"""Tests of the views, with pytest-django."""

from typing import Any

import pytest
from django.test import Client

from aiokeyless.sandbox import Sandbox
from aiokeyless.sync import KeylessClient
from billing import views

PAYMENT = "/payments/order-7"
pytestmark = pytest.mark.django_db


@pytest.fixture
def browser(client: Client, keyless_client: KeylessClient, monkeypatch: pytest.MonkeyPatch) -> Client:
    """Return a browser whose user has logged in."""
    monkeypatch.setattr(views, "keyless", keyless_client)
    session = client.session
    session["user_id"] = "C0FFEE"
    session.save()
    return client


def state(browser: Client) -> str:
    """Ask as the page does."""
    answer: Any = browser.get(PAYMENT)
    return str(answer.json()["state"])


def test_an_approval_pays_once(browser: Client, keyless_sandbox: Sandbox, capsys: pytest.CaptureFixture[str]) -> None:
    browser.post(f"{PAYMENT}/pay")
    keyless_sandbox.approve(*keyless_sandbox.operations)
    assert [state(browser) for _ in range(2)] == ["approved"] * 2
    assert capsys.readouterr().out == "order-7: pay\n"


def test_a_pin_pays_nothing(browser: Client, keyless_sandbox: Sandbox, capsys: pytest.CaptureFixture[str]) -> None:
    browser.post(f"{PAYMENT}/pay")
    keyless_sandbox.approve(*keyless_sandbox.operations, auth_type="pin")
    assert state(browser) == "refused"
    assert capsys.readouterr().out == ""


def test_an_approval_after_the_timeout_pays_nothing(
    browser: Client, keyless_sandbox: Sandbox, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "EXPIRES_IN", 2.0)
    browser.post(f"{PAYMENT}/pay")
    assert state(browser) == "timed out"
    keyless_sandbox.approve(*keyless_sandbox.operations)
    assert state(browser) == "timed out"
    assert capsys.readouterr().out == ""
