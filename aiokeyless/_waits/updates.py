"""Passes updates of one wait from its polls to its caller. A caller that is slower than the polls gets the newest."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Self

    from aiokeyless.reports import ApprovalUpdate


class NewestUpdate:
    """Yields the newest update sent since the last one, until it is closed and none is left."""

    def __init__(self) -> None:
        self._newest: ApprovalUpdate | None = None
        self._is_closed = False
        self._changed = asyncio.Event()

    def send_nowait(self, item: ApprovalUpdate, /) -> None:
        """Replace the update that was not taken yet."""
        self._newest = item
        self._changed.set()

    def close(self) -> None:
        """End the iteration, after the last update."""
        self._is_closed = True
        self._changed.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ApprovalUpdate:
        while self._newest is None:
            if self._is_closed:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        newest, self._newest = self._newest, None
        return newest
