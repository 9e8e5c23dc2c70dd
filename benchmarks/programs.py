"""Processes that a benchmark kills, and that are started again, as a supervisor does."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.context import SpawnProcess
    from typing import NoReturn


class Program:
    """A process that is started again whenever it has ended.

    Args:
        target: What it runs, a function of a module.
        arguments: Of the function.
        environment: Variables that it has beyond those of this process.
    """

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
            self._process = multiprocessing.get_context("spawn").Process(
                target=self._target, args=self._arguments, daemon=True
            )
            with environment(**self._environment):
                self._process.start()
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


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Let processes that are started meanwhile have these variables, too."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]
