"""Tests of the views, with pytest-django."""

from typing import Any

import pytest
from django.test import Client

from aiokeyless.sandbox import Sandbox
from aiokeyless.sync import KeylessClient
from billing import views
from billing.models import Customer, Order

PAYMENT = "/payments/order-7"
pytestmark = pytest.mark.django_db


@pytest.fixture
def browser(client: Client, keyless_client: KeylessClient, monkeypatch: pytest.MonkeyPatch) -> Client:
    """Return a browser whose user has logged in."""
    monkeypatch.setattr(views, "keyless", keyless_client)
    customer = Customer.objects.create(user_id="C0FFEE")
    for number in range(4, 8):
        Order.objects.create(number=f"order-{number}", customer=customer, text="Pay 40 to Alice")
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
    assert capsys.readouterr().out.count("'order-7': pay\n") == 1


def test_a_pin_pays_nothing(browser: Client, keyless_sandbox: Sandbox, capsys: pytest.CaptureFixture[str]) -> None:
    browser.post(f"{PAYMENT}/pay")
    keyless_sandbox.approve(*keyless_sandbox.operations, auth_type="pin")
    assert state(browser) == "refused"
    assert ": pay" not in capsys.readouterr().out


def test_an_approval_after_the_timeout_pays_nothing(
    browser: Client, keyless_sandbox: Sandbox, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "EXPIRES_IN", 2.0)
    browser.post(f"{PAYMENT}/pay")
    assert state(browser) == "timed out"
    keyless_sandbox.approve(*keyless_sandbox.operations)
    assert state(browser) == "timed out"
    assert ": pay" not in capsys.readouterr().out


def test_an_approval_of_another_text_than_the_orders_pays_nothing(
    browser: Client, keyless_sandbox: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    browser.post(f"{PAYMENT}/pay")
    Order.objects.update(text="Pay 4000 to Mallory")
    assert browser.post(f"{PAYMENT}/pay").status_code == 409
    keyless_sandbox.approve(*keyless_sandbox.operations)
    assert state(browser) == "refused"
    assert ": pay" not in capsys.readouterr().out


def test_a_phone_shows_three_questions_at_most(browser: Client, keyless_sandbox: Sandbox) -> None:
    answers = [browser.post(f"/payments/order-{number}/pay") for number in range(4, 8)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert len(keyless_sandbox.operations) == 3
