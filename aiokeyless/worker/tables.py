"""What the brokers in SQL databases share: limits of their tables, and takes that lose nothing if cancelled."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from aiokeyless.errors import BrokerError

from .broker import Broker, Exchange, Terms, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from typing import Any

    from .broker import Message

#: Bytes of one request, at most.
LARGEST_REQUEST: Final = 1 << 20
#: Longest wait for a request, in seconds. Its row is kept for as long.
LONGEST_WAIT: Final = 400 * 24 * 3600.0
#: Most calls in one transaction, since others wait for it.
LARGEST_BATCH: Final = 500


class TableBroker(Broker):
    """A broker in a SQL database."""

    def __init__(self) -> None:
        self.largest_request: int = LARGEST_REQUEST
        self._lease = 0.0
        self._housekeeping: asyncio.Task[None] | None = None
        self._handing_back: set[asyncio.Task[None]] = set()

    def _prepared(self, lease: float, keep_house: Callable[[], Coroutine[Any, Any, None]]) -> Terms:
        """Start the housekeeping with the first worker; return what the tables allow."""
        self._lease = max(self._lease, lease)
        if self._housekeeping is None:
            self._housekeeping = asyncio.create_task(keep_house())
        return Terms(LONGEST_WAIT, LARGEST_REQUEST)

    async def _end_tasks(self) -> None:
        if self._housekeeping is not None:
            self._housekeeping.cancel()
            await asyncio.wait({self._housekeeping})
            self._housekeeping = None
        while self._handing_back:
            await asyncio.wait(self._handing_back)

    async def _taken(self, taking: Coroutine[Any, Any, Sequence[Message]]) -> Sequence[Message]:
        """Return deliveries. If the caller is cancelled, give them back to the broker."""
        task = asyncio.create_task(taking)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            handing_back = asyncio.create_task(self._hand_back(task))
            self._handing_back.add(handing_back)
            handing_back.add_done_callback(self._handing_back.discard)
            raise

    async def _hand_back(self, taking: asyncio.Task[Sequence[Message]]) -> None:
        with suppress(UnavailableError, BrokerError):  # then they come again after the lease
            await asyncio.gather(*(self.put_off(message, 0.0, Exchange.NONE) for message in await taking))


def time_of(seconds: float) -> datetime:
    """Return a time that a table has as seconds since 1970."""
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
