"""Programs of the examples, and commands of the pages, in processes of their own."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sqlite3
import sys
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING

from waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping
    from pathlib import Path

    from aiokeyless.sandbox import Sandbox


@asynccontextmanager
async def example_process(
    *command: str, folder: Path, sandbox: Sandbox, **environment: str
) -> AsyncGenerator[asyncio.subprocess.Process]:
    """Run Python with these arguments, its output in one pipe; kill it where it still runs at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        cwd=folder,
        env={
            **os.environ,
            "KEYLESS_BASE_URL": sandbox.url,
            "KEYLESS_API_KEY": sandbox.api_key,
            "PYTHONUNBUFFERED": "1",
            **environment,
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


#: Where a server says that it listens.
ADDRESS = r"(http://127\.0\.0\.1:[1-9]\d*)"


async def printed(process: asyncio.subprocess.Process, pattern: str) -> re.Match[str]:
    """Read what a process prints, up to the first line that completes the pattern."""
    assert process.stdout is not None
    output = ""
    async with asyncio.timeout(PATIENCE):
        while (found := re.search(pattern, output)) is None:
            line = (await process.stdout.readline()).decode()
            assert line, f"it ended: {output}"
            output += line
    return found


async def stopped(process: asyncio.subprocess.Process) -> str:
    """Send SIGTERM, and return what the process printed since it was read."""
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(PATIENCE):
        output, _ = await process.communicate()
    return output.decode()


@asynccontextmanager
async def serving(command: str, *, folder: Path, environment: Mapping[str, str]) -> AsyncGenerator[str]:
    """Run a shell command that serves until it is stopped, and give the URL that it prints."""
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", f"exec env {command.strip()}"),
        cwd=folder,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield (await printed(process, ADDRESS))[1]
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


async def output_of(commands: str, *, folder: Path, environment: Mapping[str, str]) -> str:
    """Run lines of a shell block to their end, and return what they printed."""
    shell = await asyncio.create_subprocess_exec(
        *("bash", "-ec", commands),
        cwd=folder,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await shell.communicate()
    assert shell.returncode == 0, output.decode()
    return output.decode()


def add_orders(path: Path, *orders: str, user: str = "C0FFEE") -> str:
    """Store orders as the site of an example has them, before it starts; return the path."""
    with closing(sqlite3.connect(path, isolation_level=None)) as record:
        record.execute("CREATE TABLE IF NOT EXISTS orders (id PRIMARY KEY, user_id, text)")
        for order in orders:
            record.execute("INSERT INTO orders VALUES (?, ?, 'Pay 40 to Alice')", (order, user))
    return str(path)
