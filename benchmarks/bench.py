"""The tools of a benchmark: its size, fresh processes, progress messages, the order of sides."""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from .report import CannotMeasureError
from .server import pin, split_cores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Bench:
    """One run of the benchmarks.

    Attributes:
        is_smoke: Whether so little is measured that it only shows that everything runs.
        minutes: How long a soak takes.
        uvloop: Whether the soak's client runs on uvloop.
    """

    is_smoke: bool
    minutes: float
    uvloop: bool

    def pick(self, *, full: T, smoke: T) -> T:
        """Return the one or the other."""
        return smoke if self.is_smoke else full

    def progress(self, text: str) -> None:
        """Show progress on stderr."""
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    def in_fresh_process(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a module-level function in a fresh interpreter, on the core of the clients.

        Raises:
            CannotMeasureError: The function raised it, or its process died, for example out of memory.
        """
        clients, _ = split_cores()
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn, initializer=pin, initargs=(clients,)) as pool:
            try:
                return pool.submit(function, *args, **kwargs).result()
            except BrokenProcessPool as error:
                raise CannotMeasureError("the measuring process died") from error
            except KeyboardInterrupt:  # else the pool waits until it has measured
                for process in multiprocessing.active_children():
                    process.terminate()
                raise


def order(variants: list[T], round_number: int) -> list[T]:
    """Return the order of a round: alternately forwards and backwards, so that no variant always comes first."""
    return variants if round_number % 2 == 0 else variants[::-1]


async def cancel(held: Iterable[object]) -> None:
    """Cancel the tasks among these objects, and wait for their end; exceptions are ignored."""
    tasks = [task for task in held if isinstance(task, asyncio.Task)]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
