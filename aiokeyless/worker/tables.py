"""What the brokers in SQL databases share: names of requests, limits, and takes that lose nothing if cancelled."""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

from aiokeyless.errors import BrokerError

from .broker import Broker, ExchangeResult, UnavailableError
from .logs import RateLimitedLog
from .messages import Message

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence
    from typing import Any

#: Bytes of one request, at most.
LARGEST_REQUEST: Final = 1 << 20
#: Longest wait for a request, in seconds. Its row is kept for as long.
LONGEST_WAIT: Final = 400 * 24 * 3600.0


class Row(NamedTuple):
    """What names a request.

    After a failover or a restored backup, other requests may get the ids of those that were lost. Their names differ.

    Attributes:
        id: The request's number.
        name: A random number.
    """

    id: int
    name: int


class TableMessage(Message, kw_only=True, eq=False):
    """One delivery of a request in a table.

    Attributes:
        row: The request.
    """

    row: Row


def row_of(message: Message) -> Row:
    """Return which request a broker's message is a delivery of."""
    assert isinstance(message, TableMessage)  # noqa: S101  # the broker made it
    return message.row


def check_service(stored: str, service: str, place: str) -> None:
    """Refuse a worker of another service than that of the first worker: it would ask each user once more.

    Raises:
        BrokerError: It is another one.
    """
    if stored != service:
        raise BrokerError(
            f"{place} belongs to {stored}, and this worker to {service}: name another one, or delete the row of its "
            "table service"
        )


class TableBroker(Broker):
    """A broker in a SQL database."""

    #: Seconds between two turns of the housekeeping.
    _TIDIES_EVERY: ClassVar[float]

    def __init__(self) -> None:
        self.largest_request: int = LARGEST_REQUEST
        self.forgets_claims = False
        self._lease = 0.0
        self._housekeeping: asyncio.Task[None] | None = None
        self._not_cleaned = RateLimitedLog(logging.WARNING, "broker.not_cleaned")
        self._giving_back: set[asyncio.Task[None]] = set()

    def _keep_house(self, lease: float) -> float:
        """Start the housekeeping with the first worker; return the longest wait that the tables allow."""
        self._lease = max(self._lease, lease)
        if self._housekeeping is None:
            self._housekeeping = asyncio.create_task(self._tidy_forever())
        return LONGEST_WAIT

    async def _tidy_forever(self) -> None:
        turn = 0
        while True:
            try:
                await self._tidy(turn)
            except Exception as error:  # noqa: BLE001  # even after a bug, requests need the next turn
                self._not_cleaned.log({"error": f"{type(error).__name__}: {error}"})
            turn += 1
            await asyncio.sleep(self._TIDIES_EVERY)

    @abstractmethod
    async def _tidy(self, turn: int) -> None:
        """Do what a turn of the housekeeping does; turns are numbered from 0."""

    async def _clean(self) -> None:
        after: int | None = 0
        while after is not None:
            after = await self._clean_page(after)

    @abstractmethod
    async def _clean_page(self, after: int) -> int | None:
        """Remove old data from a page of rows. Return the last row of the page, or None at the end."""

    async def _end_tasks(self) -> None:
        if self._housekeeping is not None:
            self._housekeeping.cancel()
            await asyncio.wait({self._housekeeping})
            self._housekeeping = None
        while self._giving_back:
            await asyncio.wait(self._giving_back)

    async def _take_or_give_back(self, taking: Coroutine[Any, Any, Sequence[Message]]) -> Sequence[Message]:
        """Return deliveries. If the caller is cancelled, give them back to the broker."""
        task = asyncio.create_task(taking)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            giving_back = asyncio.create_task(self._give_back(task))
            self._giving_back.add(giving_back)
            giving_back.add_done_callback(self._giving_back.discard)
            raise

    async def _give_back(self, taking: asyncio.Task[Sequence[Message]]) -> None:
        with suppress(UnavailableError, BrokerError):  # then they come again after the lease
            await asyncio.gather(*(self.put_off(message, 0.0, ExchangeResult.NONE) for message in await taking))


def time_of(seconds: float) -> datetime:
    """Return a time that a table has as seconds since 1970."""
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
