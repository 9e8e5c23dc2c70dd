"""What a command shows on stderr while it waits for an answer: a line at a terminal, nothing to a program."""

from __future__ import annotations

import io
import re
import sys
from typing import TYPE_CHECKING

import pytest

from aiokeyless.cli.app import app
from aiokeyless.errors import ServerError

from .terminal import Terminal

if TYPE_CHECKING:
    from aiokeyless.sandbox import Sandbox

pytestmark = pytest.mark.looptime


async def stderr_of(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, *arguments: str) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    await app.run_async(arguments)
    return stream.getvalue()


@pytest.mark.parametrize("command", [("pending", "C0FFEE"), ("users", "find", "ann"), ("create", "C0FFEE")], ids=str)
async def test_a_person_sees_whose_answer_is_awaited_and_since_when(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, command: tuple[str, ...]
) -> None:
    service.latency = 3.5
    shown = await stderr_of(monkeypatch, Terminal(), *command)
    seconds = re.findall(rf"Waiting for an answer of {service.url}: (\d+) s", shown)
    assert list(dict.fromkeys(seconds)) == ["1", "2", "3"]
    assert "\x1b[2K" in shown.rpartition("Waiting")[2], "the line is gone"


async def test_the_line_goes_before_an_error_is_printed(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    service.latency = 3
    service.fail_next(503, times=None)
    stream = Terminal()
    with pytest.raises(ServerError):
        await stderr_of(monkeypatch, stream, "get", "a")
    assert "Waiting" in stream.getvalue()
    assert stream.getvalue().endswith("\x1b[2K")


async def test_a_quick_answer_shows_nothing(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    service.latency = 0.9
    assert await stderr_of(monkeypatch, Terminal(), "pending", "C0FFEE") == ""


@pytest.mark.parametrize(("stream", "options"), [(io.StringIO(), ()), (Terminal(), ("--json",))], ids=["pipe", "json"])
async def test_a_program_sees_nothing(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, stream: io.StringIO, options: tuple[str, ...]
) -> None:
    service.latency = 5
    assert await stderr_of(monkeypatch, stream, "pending", "C0FFEE", *options) == ""
