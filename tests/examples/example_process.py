"""Programs of the examples, and commands of the pages, in processes of their own."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

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
    assert process.stdout is not None
    printed = ""
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", printed)):
            line = (await process.stdout.readline()).decode()
            assert line, f"it ended: {printed}"
            printed += line
        yield found[0]
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
