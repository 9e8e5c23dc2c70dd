"""A terminal, a pipe, and a command that runs in the test's own loop and prints to them."""

from __future__ import annotations

import asyncio
import io
import json
import re
import sys
from typing import TYPE_CHECKING, Any

from aiokeyless.cli.app import app

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

ESCAPE = "\x1b"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Pipe(io.StringIO):
    """A stdout whose text a test can await."""

    async def until(self, pattern: str) -> re.Match[str]:
        while not (match := re.search(pattern, self.getvalue())):  # noqa: ASYNC110  # a stream has no event for it
            await asyncio.sleep(0.01)
        return match


async def output_of(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, *arguments: str) -> str:
    """Return what a command that exits with 0 writes to this stdout."""
    monkeypatch.setattr(sys, "stdout", stream)
    assert await app.run_async(arguments) is None
    return stream.getvalue()


def later(seconds: float, what: Callable[..., object], *arguments: object) -> None:
    asyncio.get_running_loop().call_later(seconds, what, *arguments)


def lines_of_json(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]
