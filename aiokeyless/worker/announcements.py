"""The calls of a worker's `on_created`, which tells the phone of an operation. They run beside the deliveries."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
from typing import TYPE_CHECKING, Final

from .logs import log

if TYPE_CHECKING:
    from collections.abc import Callable

    from .messages import ApprovalRequest

#: Seconds for a call, with the time that it waits for room. A push that is later helps nobody.
CALL_WITHIN: Final = 10.0


class Announcements:
    """Calls a function for each operation that is there now. No delivery waits for it, and none fails because of it."""

    def __init__(self, on_created: Callable[[ApprovalRequest], object] | None, *, at_once: int) -> None:
        self._on_created = on_created
        self._room = asyncio.Semaphore(at_once)
        self._context = contextvars.copy_context()  # deliveries have one without traces
        self.calls: set[asyncio.Task[None]] = set()  # that have not ended

    def add(self, request: ApprovalRequest) -> None:
        """Call the function, as soon as there is room."""
        if self._on_created is not None:
            # Not by the loop's task factory: an eager one would call the function in the delivery.
            call = asyncio.Task(self._call(self._on_created, request), context=self._context.copy())
            self.calls.add(call)
            call.add_done_callback(self.calls.discard)

    async def drain(self) -> None:
        """Wait for the calls, for as long as they may take."""
        if self.calls:
            await asyncio.wait(self.calls, timeout=CALL_WITHIN)

    async def _call(self, on_created: Callable[[ApprovalRequest], object], request: ApprovalRequest) -> None:
        task = asyncio.current_task()
        try:
            async with asyncio.timeout(CALL_WITHIN), self._room:
                result = on_created(request)
                if inspect.isawaitable(result):
                    await result
        except (Exception, asyncio.CancelledError):  # of the application: the request goes on without
            if task is not None and task.cancelling():  # the worker has ended
                raise
            log(logging.ERROR, "on_created.failed", {"operation_id": request.operation_id}, exc_info=True)
