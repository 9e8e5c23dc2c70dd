"""Shutting down: closes clients as soon as the process is told to stop.

Web servers close an application only after they have waited for its open requests. A request that waits for an approval
ends with its client. So the client must be closed first, when the signal arrives.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from types import FrameType
from typing import Final, Protocol, TypeAlias

_Handler: TypeAlias = Callable[[int, FrameType | None], object] | int

__all__ = ["Closable", "close_on_signals"]

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
#: Seconds after which a stack is closed again, as clients may be entered while the server still stops.
_AGAIN: Final = 0.05


class Closable(Protocol):
    """Anything with `aclose`: a client, an `AsyncExitStack`, your own class. Closing it again must do no harm."""

    async def aclose(self) -> object:
        """Close it."""


@asynccontextmanager
async def close_on_signals(*clients: Closable) -> AsyncGenerator[None, None]:
    """Close clients when the process receives SIGTERM or SIGINT, or at the end of the block, whichever comes first.

    Each wait and each call under way then ends with `ClientClosedError`. The handler that was installed before gets the
    signal too, at once, so that a server begins to stop. If that handler is the default action, which ends the process,
    it gets the signal after the clients are closed. A second signal is passed on at once.

    Enter the block in the startup of the application, such as its ASGI lifespan: a handler that is installed later
    takes the place of this one. Signals that are ignored stay ignored. Python allows handlers only in the main thread.
    In another one, such as in Starlette's test client, the clients are closed at the end of the block only.

    Args:
        clients: What to close, all of this event loop: clients, or an `AsyncExitStack` into which they are entered
            later. One that is entered after the signal is closed at once.

    Raises:
        ConfigurationError: A client belongs to another event loop; raised at the end of the block.

    Example:
        >>> @asynccontextmanager
        ... async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        ...     async with close_on_signals(client):
        ...         yield

    Source: ``docs/howto/shutdown.md``, for each framework.
    """
    loop = asyncio.get_running_loop()
    closed: asyncio.Future[None] = loop.create_future()  # what was there at the signal
    has_ended = asyncio.Event()

    async def close() -> None:
        failures: list[BaseException] = []
        is_last = False
        while not is_last:
            is_last = has_ended.is_set()
            ends = await asyncio.gather(*(client.aclose() for client in clients), return_exceptions=True)
            failures = failures or [end for end in ends if isinstance(end, BaseException)]
            if not closed.done():
                closed.set_result(None)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(has_ended.wait(), _AGAIN)
        if failures:
            raise failures[0]

    start = functools.cache(lambda: loop.create_task(close()))
    in_main_thread = threading.current_thread() is threading.main_thread()
    handlers = [_Handling(number, start, closed) for number in _SIGNALS if in_main_thread and _is_handled(number)]
    try:
        yield
    finally:
        has_ended.set()
        try:
            await asyncio.shield(start())
        finally:
            for handler in handlers:
                handler.remove()


def _is_handled(number: signal.Signals) -> bool:
    """Return whether a signal has an effect that can be passed on; None: its handler is not Python's."""
    return signal.getsignal(number) not in {signal.SIG_IGN, None}


class _Handling:
    """The handler of one signal while the block is open. It starts closing, which happens once, until `closed`."""

    def __init__(self, number: signal.Signals, start: Callable[[], object], closed: asyncio.Future[None]) -> None:
        self._number = number
        self._start_closing = start
        self._closed = closed
        self._is_first = True
        # Not loop.add_signal_handler, which keeps one handler only: aiohttp's and hypercorn's live there, and are still
        # called. This takes the place of handlers such as uvicorn's, and calls them.
        self._previous: _Handler = signal.signal(number, self)  # type: ignore[assignment]  # not None: _is_handled

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal; runs in the main thread, between any two instructions."""
        is_first, self._is_first = self._is_first, False
        if is_first:
            self._closed.get_loop().call_soon_threadsafe(self._start)
        if callable(self._previous):
            self._previous(number, frame)
        elif not is_first:
            self._end_process()

    def _start(self) -> None:
        self._start_closing()
        if not callable(self._previous):
            self._closed.add_done_callback(lambda _: self._end_process())

    def _end_process(self) -> None:
        self.remove()
        signal.raise_signal(self._number)

    def remove(self) -> None:
        """Install the previous handler, unless another one has taken the place of this one."""
        installed: object = signal.getsignal(self._number)
        if installed is self:
            signal.signal(self._number, self._previous)
