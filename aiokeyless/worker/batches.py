"""Batches of the calls of one turn of the event loop, which can then share a transaction."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

#: Most calls in one batch, since others wait for it.
LARGEST: Final = 500

CallT = TypeVar("CallT")
ResultT = TypeVar("ResultT")


class Batches(Generic[CallT, ResultT]):
    """Gathers calls, and executes them in batches, one batch at a time.

    While a batch is executed, the next calls gather. If a caller is cancelled, its call is executed all the same, and
    the other calls are not affected. If `execute` raises, all callers of the batch get the error.
    """

    def __init__(self, execute: Callable[[list[CallT]], Awaitable[Sequence[ResultT]]]) -> None:
        self._execute = execute
        self._pending: list[tuple[CallT, asyncio.Future[ResultT]]] = []
        self._running: asyncio.Task[None] | None = None

    async def call(self, call: CallT) -> ResultT:
        """Have a call executed with others, and return its result."""
        future: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        self._pending.append((call, future))
        self._start()
        return await future

    async def aclose(self) -> None:
        """Wait until all calls have their results."""
        while self._running is not None:
            await asyncio.wait({self._running})
            await asyncio.sleep(0)  # its callback comes in the next turn

    def _start(self) -> None:
        if self._running is None and self._pending:
            # Not by the loop's task factory: an eager one would run it before the other calls of this turn arrive.
            self._running = asyncio.Task(self._run(), loop=asyncio.get_running_loop())
            self._running.add_done_callback(self._on_end)

    def _on_end(self, _running: asyncio.Task[None]) -> None:
        """Go on after the task was cancelled, perhaps before its first step.

        At its end, `asyncio.run` cancels all tasks. Those that clean up, such as a reader that puts an outcome off,
        still get their results.
        """
        self._running = None
        self._start()

    async def _run(self) -> None:
        while self._pending:
            batch, self._pending = self._pending[:LARGEST], self._pending[LARGEST:]
            await self._settle(batch)

    async def _settle(self, batch: list[tuple[CallT, asyncio.Future[ResultT]]]) -> None:
        try:
            results = await self._execute([call for call, _ in batch])
        except Exception as error:  # noqa: BLE001  # each caller gets it
            for _, future in batch:
                if not future.done():  # its caller was not cancelled
                    future.set_exception(error)
        except BaseException:  # a cancellation: no caller must wait forever
            for _, future in batch:
                future.cancel()
            raise
        else:
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)
