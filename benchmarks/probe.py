"""How long an event loop is blocked.

The *block* is the time between two checks of the loop's sockets: from the return of one ``select`` to the call of the
next. No other work waits longer than that. It is measured in the selector, which sees every iteration and is public in
asyncio. Two cross-checks: a heartbeat every millisecond, and the longest single callback. Blocks are also measured in
CPU time of the loop's thread, which other programs on a shared machine cannot lengthen. The pauses of the garbage
collector are counted separately: they grow with the size of the whole process.
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
    """The measured values, in seconds."""

    block: float  # longest, CPU of the loop's thread, without garbage collection
    wall_block: float  # longest, wall clock, without garbage collection
    callback: float  # longest single one, CPU, without garbage collection
    late: float  # longest lateness of the heartbeat, wall clock, everything included
    late_p99: float
    collection: float  # longest pause of the garbage collector, wall clock


class _Clocks(NamedTuple):
    wall: float
    cpu: float


class _Selector(selectors.DefaultSelector):
    def __init__(self, on_wake: Callable[[], None], on_sleep: Callable[[], None]) -> None:
        super().__init__()
        self._on_wake = on_wake
        self._on_sleep = on_sleep

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._on_sleep()
        ready = super().select(timeout)
        self._on_wake()
        return ready


class Probe:
    """Measures the blocks of the event loop that it runs, which is asyncio's own."""

    def __init__(self) -> None:
        self._on = False
        self._since = _Clocks(0.0, 0.0)
        self._collecting_since = _Clocks(0.0, 0.0)
        self._collected = _Clocks(0.0, 0.0)  # in total
        self._collected_before = _Clocks(0.0, 0.0)  # at the start of this iteration of the loop
        self._block = self._wall_block = self._callback = self._collection = 0.0
        self._late: list[float] = []

    def run(self, main: Coroutine[None, None, None]) -> None:
        """Run a coroutine as ``asyncio.run`` does, in a loop that can be measured."""
        with asyncio.Runner(
            loop_factory=lambda: asyncio.SelectorEventLoop(_Selector(self._on_wake, self._on_sleep))
        ) as runner:
            runner.run(main)

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure from this iteration of the loop until the end of the ``with`` block."""
        loop = asyncio.get_running_loop()
        gc.callbacks.append(self._collector)
        original = asyncio.Handle._run  # noqa: SLF001  # asyncio has no public hook
        asyncio.Handle._run = self._timed(original)  # type: ignore[method-assign, assignment]  # noqa: SLF001
        self._on_wake()
        self._on = True
        beat = loop.call_later(_BEAT, self._beat, loop, loop.time() + _BEAT)
        try:
            yield
        finally:
            self._on_sleep()
            self._on = False
            beat.cancel()
            asyncio.Handle._run = original  # type: ignore[method-assign]  # noqa: SLF001
            gc.callbacks.remove(self._collector)

    def blocks(self) -> Blocks:
        """Return the measured values."""
        late = self._late
        p99 = statistics.quantiles(late, n=100, method="inclusive")[-1]
        return Blocks(self._block, self._wall_block, self._callback, max(late), p99, self._collection)

    def _on_wake(self) -> None:
        self._since = _Clocks(time.perf_counter(), time.thread_time())
        self._collected_before = self._collected

    def _on_sleep(self) -> None:
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
                cpu = time.thread_time() - before - (self._collected.cpu - collected)
                self._callback = max(self._callback, cpu)

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
