"""A terminal, a pipe, and a command that runs in the test's own loop and prints to them."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
from typing import TYPE_CHECKING, Any, TypeAlias

from aiokeyless.cli.app import app

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokeyless import ApprovalTicket
    from aiokeyless.sandbox import Sandbox

ESCAPE = "\x1b"
Fail: TypeAlias = "Callable[..., str]"
"""The fixture `fail`."""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Pipe(io.StringIO):
    """A stdout whose text a test can await."""

    async def until(self, pattern: str) -> re.Match[str]:
        while not (match := re.search(pattern, self.getvalue())):  # noqa: ASYNC110  # a stream has no event for it
            await asyncio.sleep(0.1)
        return match


async def output_of(*arguments: str, stream: io.StringIO | None = None) -> str:
    """Return what a command that exits with 0 writes to a stdout that is a file, or to this one."""
    stdout = stream or io.StringIO()
    with contextlib.redirect_stdout(stdout):
        assert await app.run_async(arguments) is None
    return stdout.getvalue()


async def drawn_by(*arguments: str) -> str:
    """Return what a command that exits with 0 writes to a terminal, without colours and the like."""
    return re.sub(r"\x1b\[[\d;]*m", "", await output_of(*arguments, stream=Terminal()))


async def json_of(*arguments: str) -> Any:
    """Return the one object that a command prints for programs."""
    return json.loads(await output_of(*arguments, "--json"))


async def create(service: Sandbox, operation_id: str = "txn-1", **options: Any) -> ApprovalTicket:
    async with service.client() as client:
        return await client.create_operation("C0FFEE", operation_id=operation_id, **options)


def later(seconds: float, what: Callable[..., object], *arguments: object) -> None:
    asyncio.get_running_loop().call_later(seconds, what, *arguments)


def lines_of_json(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]
