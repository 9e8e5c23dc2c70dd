"""Tests of `fastapi_app.py`: its client, made in the lifespan, finds the sandbox by `keyless_environment`."""

from collections.abc import Iterator
from pathlib import Path

import approvals
import pytest
from fastapi.testclient import TestClient
from fastapi_app import app

from aiokeyless.sandbox import Sandbox

APPROVAL = "/approvals/order-7"


@pytest.fixture
def browser(keyless_environment: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[TestClient]:
    """Run the application, and return a browser."""
    monkeypatch.setenv("APPROVALS_DB", str(tmp_path / "approvals.sqlite3"))
    with approvals.record() as db:
        for order in range(4, 8):
            db.execute("INSERT INTO orders VALUES (?, ?, 'Pay 40 to Alice')", (f"order-{order}", approvals.USER))
    with TestClient(app) as browser:
        yield browser


def test_an_approval_pays_once(
    browser: TestClient, keyless_sandbox: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    browser.post(APPROVAL)
    keyless_sandbox.approve(*keyless_sandbox.operations)
    assert [browser.get(APPROVAL).json() for _ in range(2)] == [{"state": "approved"}] * 2
    assert capsys.readouterr().out.count("'order-7': pay\n") == 1


def test_a_pin_pays_nothing(browser: TestClient, keyless_sandbox: Sandbox, capsys: pytest.CaptureFixture[str]) -> None:
    browser.post(APPROVAL)
    keyless_sandbox.approve(*keyless_sandbox.operations, auth_type="pin")
    assert browser.get(APPROVAL).json() == {"state": "refused"}
    assert ": pay" not in capsys.readouterr().out


def test_an_approval_after_the_timeout_pays_nothing(
    browser: TestClient, keyless_sandbox: Sandbox, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(approvals, "EXPIRES_IN", 2.0)
    browser.post(APPROVAL)
    assert browser.get(APPROVAL).json() == {"state": "timed out"}
    keyless_sandbox.approve(*keyless_sandbox.operations)
    assert browser.get(APPROVAL).json() == {"state": "timed out"}
    assert ": pay" not in capsys.readouterr().out


def test_an_approval_of_another_text_than_the_orders_pays_nothing(
    browser: TestClient, keyless_sandbox: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    browser.post(APPROVAL)
    with approvals.record() as db:
        db.execute("UPDATE orders SET text = 'Pay 4000 to Mallory'")
    assert browser.post(APPROVAL).status_code == 409
    keyless_sandbox.approve(*keyless_sandbox.operations)
    assert browser.get(APPROVAL).json() == {"state": "refused"}
    assert ": pay" not in capsys.readouterr().out


def test_a_phone_shows_three_questions_at_most(browser: TestClient, keyless_sandbox: Sandbox) -> None:
    assert [browser.post(f"/approvals/order-{order}").status_code for order in range(4, 8)] == [200, 200, 200, 429]
    assert len(keyless_sandbox.operations) == 3
