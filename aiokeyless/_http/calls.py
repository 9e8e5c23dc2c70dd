"""`Calls`: what is under way on one transport, so that `aclose` and deadlines can end it.

To end a call means to cancel its task. As with ``asyncio.timeout``, a cancellation by the caller, even at the same
instant, stays a cancellation.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Self

from aiokeyless.errors import ClientClosedError, ConfigurationError

if TYPE_CHECKING:
    from types import TracebackType


class Calls(dict["Call", float]):
    """The calls under way, each with its deadline on the loop's clock or infinity.

    All exchanges may take equally long, so their deadlines are added in order, and one timer is enough for all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.are_closed: bool = False
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, call: Call, deadline: float) -> None:
        """Add a call; no earlier one has a later deadline, unless it has none."""
        self[call] = deadline
        if self._timer is None and deadline < math.inf:
            self._timer = self._loop.call_at(deadline, self._expire)

    def remove(self, call: Call) -> None:
        """Remove a call that ends."""
        del self[call]
        if self._timer is not None and not self:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        """End all calls with `ClientClosedError`."""
        self.are_closed = True
        for call in tuple(self):
            call.end(
                ClientClosedError(
                    "the client was closed while this call was under way; the request may have taken effect"
                )
            )

    def _expire(self) -> None:
        self._timer = None
        now = self._loop.time()
        for call, deadline in tuple(self.items()):
            if deadline <= now:
                call.end(TimeoutError())
            elif deadline < math.inf:
                self._timer = self._loop.call_at(deadline, self._expire)
                break


class Call:
    """One call of a client's method, or one exchange: ``with Call(calls, deadline):``.

    At the deadline it ends with `TimeoutError`.
    """

    __slots__ = ("_calls", "_cancelling", "_deadline", "_error", "_task")

    def __init__(self, calls: Calls, deadline: float = math.inf) -> None:
        task = asyncio.current_task()
        if task is None:
            raise ConfigurationError("a client's methods must be awaited in a task, such as one run by asyncio.run()")
        self._task = task
        self._calls = calls
        self._deadline = deadline
        self._error: Exception | None = None

    def end(self, error: Exception) -> None:
        """Cancel the task; this cancellation becomes the error. Harmless if it is ending already."""
        if self._error is None:
            self._error = error
            self._task.cancel()

    def __enter__(self) -> Self:
        self._cancelling = self._task.cancelling()
        self._calls.add(self, self._deadline)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._calls.remove(self)
        if self._error is None:
            return
        if self._task.uncancel() <= self._cancelling and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise self._error from None
