"""A program of the examples in a process of its own, beside a sandbox."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
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
            "PYTHONDONTWRITEBYTECODE": "1",
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
