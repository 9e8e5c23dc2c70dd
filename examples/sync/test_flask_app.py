"""Tests of `flask_app.py`."""

from pathlib import Path

import flask_app
import pytest
from flask.testing import FlaskClient

from aiokeyless.sandbox import Sandbox
from aiokeyless.sync import KeylessClient

PAYMENT = "/payments/order-7"


@pytest.fixture
def browser(keyless_client: KeylessClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FlaskClient:
    """Return a browser whose user has logged in."""
    monkeypatch.setattr(flask_app, "keyless", keyless_client)
    flask_app.app.config.update(PAYMENTS_DB=str(tmp_path / "payments.sqlite3"), SECRET_KEY="of the tests")
    browser = flask_app.app.test_client()
    with browser.session_transaction() as session:
        session["user_id"] = "C0FFEE"
    with flask_app.record() as db:
        for order in range(4, 8):
            db.execute("INSERT INTO orders VALUES (?, 'C0FFEE', 'Pay 40 to Alice')", (f"order-{order}",))
    return browser


def test_an_approval_pays_once(
    browser: FlaskClient, keyless_sandbox: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    browser.post(PAYMENT)
    keyless_sandbox.approve(*keyless_sandbox.operations)
    assert [browser.get(PAYMENT).json for _ in range(2)] == [{"state": "approved"}] * 2
    assert capsys.readouterr().out.count("'order-7': pay\n") == 1


def test_a_pin_pays_nothing(browser: FlaskClient, keyless_sandbox: Sandbox, capsys: pytest.CaptureFixture[str]) -> None:
    browser.post(PAYMENT)
    keyless_sandbox.approve(*keyless_sandbox.operations, auth_type="pin")
    assert browser.get(PAYMENT).json == {"state": "refused"}
    assert ": pay" not in capsys.readouterr().out


def test_an_approval_after_the_timeout_pays_nothing(
    browser: FlaskClient,
    keyless_sandbox: Sandbox,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flask_app, "EXPIRES_IN", 2.0)
    browser.post(PAYMENT)
    assert browser.get(PAYMENT).json == {"state": "timed out"}
    keyless_sandbox.approve(*keyless_sandbox.operations)
    assert browser.get(PAYMENT).json == {"state": "timed out"}
    assert ": pay" not in capsys.readouterr().out


def test_an_approval_of_another_text_than_the_orders_pays_nothing(
    browser: FlaskClient, keyless_sandbox: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    browser.post(PAYMENT)
    with flask_app.record() as db:
        db.execute("UPDATE orders SET text = 'Pay 4000 to Mallory'")
    assert browser.post(PAYMENT).status_code == 409
    keyless_sandbox.approve(*keyless_sandbox.operations)
    assert browser.get(PAYMENT).json == {"state": "refused"}
    assert ": pay" not in capsys.readouterr().out


def test_a_phone_shows_three_questions_at_most(browser: FlaskClient, keyless_sandbox: Sandbox) -> None:
    assert [browser.post(f"/payments/order-{order}").status_code for order in range(4, 8)] == [200, 200, 200, 429]
    assert len(keyless_sandbox.operations) == 3
