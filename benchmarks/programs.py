"""Other processes: how they begin, how some are started again, as a supervisor does, and what else disturbs a run.

The tests use it too, so this module needs only the standard library.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from unittest.mock import patch

from .report import CannotMeasureError

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess
    from typing import Any, NoReturn


def spawn(target: Callable[..., None], *arguments: object) -> SpawnProcess:
    """Run a module-level function in a fresh process, which its parent ends, and not Ctrl-C."""
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(target, arguments), daemon=True)
    process.start()
    return process


def _run(target: Callable[..., None], arguments: tuple[object, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    target(*arguments)


def _end_with_parent() -> None:
    """End at once if the parent does: one that was killed could not end this process."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def spawn_server(target: Callable[..., None], *arguments: object) -> tuple[SpawnProcess, Connection]:
    """Run it with a connection as its last argument; return the other end, to receive what it sends when ready."""
    here, there = multiprocessing.Pipe()
    process = spawn(target, *arguments, there)
    there.close()
    return process, here


class Program:
    """A process that is started again whenever it has ended; ``environment`` adds to the variables of this one."""

    def __init__(self, target: Callable[..., None], *arguments: object, **environment: str) -> None:
        self._target = target
        self._arguments = arguments
        self._environment = environment
        self._process: SpawnProcess | None = None
        self.starts = 0
        """How often it was started."""

    @property
    def pid(self) -> int | None:
        """The process's id, while it runs."""
        return self._process.pid if self._process is not None and self._process.is_alive() else None

    def keep_running(self) -> None:
        """Start it, unless it runs."""
        if self.pid is None:
            with patch.dict(os.environ, self._environment):
                self._process = spawn(self._target, *self._arguments)
            self.starts += 1

    def kill(self) -> bool:
        """Kill it, and return whether it ran."""
        if self._process is None or not self._process.is_alive():
            return False
        self._process.kill()
        self._process.join()
        return True


async def keep_running(programs: Sequence[Program]) -> NoReturn:
    """Start each program, and again whenever it has ended."""
    while True:
        for program in programs:
            program.keep_running()
        await asyncio.sleep(0.2)


async def repeat(every: float, source: random.Random, do: Callable[[], Awaitable[None]]) -> NoReturn:
    """Do something about every so many seconds."""
    while True:
        await asyncio.sleep(every * source.uniform(0.75, 1.25))
        await do()


async def until(is_so: Callable[[], bool | Awaitable[bool]], *, within: float, every: float = 0.01) -> None:
    """Wait until something is so, if no event tells it.

    Raises:
        CannotMeasureError: It is not so within that many seconds.
    """
    deadline = time.monotonic() + within
    while not (so if isinstance(so := is_so(), bool) else await so):
        if time.monotonic() > deadline:
            raise CannotMeasureError(f"it took more than {within:g} s")
        await asyncio.sleep(every)


async def wholly(disturbance: Coroutine[Any, Any, None]) -> None:
    """Do something to its end, even if the run ends meanwhile: nothing settles while a server is away."""
    task = asyncio.create_task(disturbance)
    try:
        await asyncio.shield(task)
    finally:
        await task


@asynccontextmanager
async def meanwhile(*coroutines: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run these until the end of the block; raise what one of them raised."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.result()
