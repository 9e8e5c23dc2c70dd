"""A server of the examples in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Self

import aiohttp
from ports import own_port
from waiting import PATIENCE, until

if TYPE_CHECKING:
    from pathlib import Path

    from aiokeyless.sandbox import Sandbox


class ExampleServer:
    """It can be ended and started again, on the same port with the same files.

    Args:
        program: The program of the example.
        sandbox: The service that it asks.
        folder: Where its log is kept.
        port: The environment variable that sets its port.
        settings: Its other environment variables.
    """

    def __init__(self, program: Path, sandbox: Sandbox, folder: Path, *, port: str, **settings: str) -> None:
        number = own_port()
        self.url = f"http://127.0.0.1:{number}"
        self.log = folder / "log"
        self._program = program
        self._environment = os.environ | {
            "KEYLESS_BASE_URL": sandbox.url,
            "KEYLESS_API_KEY": sandbox.api_key,
            port: str(number),
            **settings,
        }
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it, and wait until it answers."""
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-W", "error", str(self._program), env=self._environment, stdout=log, stderr=log
            )
        async with aiohttp.ClientSession() as session:
            await until(lambda: self._serves(session))

    async def _serves(self, session: aiohttp.ClientSession) -> bool:
        assert self._process is not None
        assert self._process.returncode is None, self.log.read_text()
        with contextlib.suppress(aiohttp.ClientError):
            async with session.get(self.url):
                return True
        return False

    async def end(self, number: signal.Signals) -> float:
        """Send a signal, and return how many seconds the end took."""
        process, self._process = self._process, None
        assert process is not None
        began = time.monotonic()
        process.send_signal(number)
        async with asyncio.timeout(PATIENCE):
            await process.wait()
        return time.monotonic() - began

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process is not None:
            await self.end(signal.SIGKILL)
