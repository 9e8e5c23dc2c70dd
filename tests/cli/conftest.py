"""A plain environment, a sandbox that its variables name, and a command that fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aiokeyless.cli import run

if TYPE_CHECKING:
    from aiokeyless.sandbox import Sandbox

    from .terminal import Fail


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox) -> Sandbox:
    """The sandbox of the test's loop, named by the environment."""
    monkeypatch.setenv("KEYLESS_BASE_URL", sandbox.url)
    monkeypatch.setenv("KEYLESS_API_KEY", sandbox.api_key)
    return sandbox


@pytest.fixture
def fail(capsys: pytest.CaptureFixture[str]) -> Fail:
    """Runs a command that fails, and returns the one line that it prints."""

    def run_and_fail(*arguments: str, code: int = 1) -> str:
        assert run(arguments) == code
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith("aiokeyless: ")
        return err.removeprefix("aiokeyless: ").removesuffix("\n")

    return run_and_fail
