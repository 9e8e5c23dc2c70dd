"""A real broker: a nats-server with JetStream, which can be killed and started again where it was."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

PROGRAM: Final = Path(sysconfig.get_path("scripts"), "nats-server")
PATIENCE: Final = 20.0


async def until(condition: Callable[[], bool | Awaitable[bool]], patience: float = PATIENCE) -> None:
    """Wait for something that a program outside this loop does."""
    deadline = time.monotonic() + patience
    while True:
        met = condition()
        if met if isinstance(met, bool) else await met:
            return
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


class NatsServer:
    """One server on a free port of its own, and on the same one when it is started again.

    Args:
        folder: Where its files are: what was stored survives it.
        options: More of the command line's; ``-c FILE`` for users and their permissions.
        jetstream: Whether JetStream is on.
    """

    def __init__(self, folder: Path, *options: str, jetstream: bool = True) -> None:
        self._folder = folder
        self._options = [*options, *(["-js", "-sd", str(folder / "store")] if jetstream else [])]
        self._port = -1
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        ports = self._folder / "ports"
        ports.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(  # noqa: ASYNC220  # it begins at once, and outlives a loop
            [PROGRAM, "-a", "127.0.0.1", "-p", str(self._port), "--ports_file_dir", ports, *self._options],
            stderr=subprocess.DEVNULL,
        )
        file = ports / f"nats-server_{self._process.pid}.ports"
        await until(lambda: _port_in(file) is not None)
        self._port = _port_in(file) or -1

    def kill(self) -> None:
        """End it at once, as a power cut does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """Have it say nothing, and keep its connections, until `resume`."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait()


def _port_in(file: Path) -> int | None:
    """Return the port; None while the server is not ready for clients."""
    try:
        return int(json.loads(file.read_text())["nats"][0].rpartition(":")[2])
    except (FileNotFoundError, json.JSONDecodeError):  # not there yet, or half written
        return None
