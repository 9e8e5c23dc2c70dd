"""How long an event loop is not there for anybody else.

The *block* is the time between two of the loop's looks at its sockets: from the return of one ``select`` to the call
of the next. Whatever else wants the loop waits at most that long. It is taken from the selector, which misses nothing
and is asyncio's public way in. Two witnesses beside it: a heartbeat every millisecond, and the longest single callback.
Blocks are counted in CPU time of the loop's thread too, which a busy neighbour on a shared machine cannot lengthen.
What the garbage collector took is kept apart: its pauses grow with the size of the process, whoever owns it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import selectors
import statistics
import time
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

_BEAT: Final = 0.001


class Blocks(NamedTuple):
    """What was seen, in seconds."""

    block: float  # longest, CPU of the loop's thread, without garbage collection
    wall_block: float  # longest, by the clock, without garbage collection
    callback: float  # longest single one, CPU, without garbage collection
    late: float  # longest lateness of the heartbeat, by the clock, everything included
    late_p99: float
    collection: float  # longest pause of the garbage collector, by the clock


class _Clocks(NamedTuple):
    wall: float
    cpu: float


class _Selector(selectors.DefaultSelector):
    def __init__(self, woke: Callable[[], None], slept: Callable[[], None]) -> None:
        super().__init__()
        self._woke = woke
        self._sleeps = slept

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._sleeps()
        ready = super().select(timeout)
        self._woke()
        return ready


class Probe:
    """Watches the loop that it runs; asyncio's own loop."""

    def __init__(self) -> None:
        self._on = False
        self._since = _Clocks(0.0, 0.0)
        self._collecting_since = _Clocks(0.0, 0.0)
        self._collected = _Clocks(0.0, 0.0)  # in all
        self._collected_before = _Clocks(0.0, 0.0)  # when the present turn of the loop began
        self._block = self._wall_block = self._callback = self._collection = 0.0
        self._late: list[float] = []

    def run(self, main: Coroutine[None, None, None]) -> None:
        """Run a coroutine as ``asyncio.run`` does, in a loop that can be watched."""
        with asyncio.Runner(
            loop_factory=lambda: asyncio.SelectorEventLoop(_Selector(self._woke, self._sleeps))
        ) as runner:
            runner.run(main)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch, from this turn of the loop on, until the end of the block."""
        loop = asyncio.get_running_loop()
        gc.callbacks.append(self._collector)
        original = asyncio.Handle._run  # noqa: SLF001  # there is no public way
        asyncio.Handle._run = self._timed(original)  # type: ignore[method-assign, assignment]  # noqa: SLF001
        self._woke()
        self._on = True
        beat = loop.call_later(_BEAT, self._beat, loop, loop.time() + _BEAT)
        try:
            yield
        finally:
            self._sleeps()
            self._on = False
            beat.cancel()
            asyncio.Handle._run = original  # type: ignore[method-assign]  # noqa: SLF001
            gc.callbacks.remove(self._collector)

    def blocks(self) -> Blocks:
        """Return what was seen."""
        late = self._late
        p99 = statistics.quantiles(late, n=100, method="inclusive")[-1]
        return Blocks(self._block, self._wall_block, self._callback, max(late), p99, self._collection)

    def _woke(self) -> None:
        self._since = _Clocks(time.perf_counter(), time.thread_time())
        self._collected_before = self._collected

    def _sleeps(self) -> None:
        if self._on:
            collected = self._collected
            wall = time.perf_counter() - self._since.wall - (collected.wall - self._collected_before.wall)
            cpu = time.thread_time() - self._since.cpu - (collected.cpu - self._collected_before.cpu)
            self._wall_block = max(self._wall_block, wall)
            self._block = max(self._block, cpu)

    def _timed(self, run: Callable[[asyncio.Handle], None]) -> Callable[[asyncio.Handle], None]:
        def timed(handle: asyncio.Handle) -> None:
            before, collected = time.thread_time(), self._collected.cpu
            run(handle)
            if self._on:
                spent = time.thread_time() - before - (self._collected.cpu - collected)
                self._callback = max(self._callback, spent)

        return timed

    def _beat(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        if self._on:
            now = loop.time()
            self._late.append(now - due)
            loop.call_later(_BEAT, self._beat, loop, now + _BEAT)

    def _collector(self, phase: str, _info: object) -> None:
        now = _Clocks(time.perf_counter(), time.thread_time())
        if phase == "start":
            self._collecting_since = now
            return
        wall = now.wall - self._collecting_since.wall
        cpu = now.cpu - self._collecting_since.cpu
        self._collected = _Clocks(self._collected.wall + wall, self._collected.cpu + cpu)
        self._collection = max(self._collection, wall)
