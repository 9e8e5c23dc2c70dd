"""What the brokers in SQL databases share: names of requests, limits, and takes that lose nothing if cancelled."""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, NamedTuple

from aiokeyless.errors import BrokerError

from .broker import Broker, ExchangeResult, UnavailableError
from .logs import RateLimitedLog
from .messages import Message

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
    from typing import Any

#: Bytes of one request, at most.
LARGEST_REQUEST: Final = 1 << 20
#: Longest wait for a request, in seconds. Its row is kept for as long.
LONGEST_WAIT: Final = 400 * 24 * 3600.0
_TRIES_AGAIN: Final = 5.0  # seconds until a chore that failed is repeated
_FAILS_FOR: Final = 60.0  # seconds after which that is a problem


class Row(NamedTuple):
    """What names a request.

    After a failover or a restored backup, other requests may get the ids of those that were lost. Their names differ.
    """

    id: int
    name: int  # at random


class TableMessage(Message, kw_only=True, eq=False):
    """One delivery of a request in a table."""

    row: Row


def message_of(columns: Iterable[Any]) -> TableMessage:
    """Return the delivery of these columns. A database may return further ones."""
    id_, name, body, traceparent, stored_at, number, failures, *_ = columns
    return TableMessage(
        row=Row(id_, name),
        body=body,
        stored_at=time_of(stored_at),
        number=number,
        is_untried=number == 1,
        failures=failures,
        traceparent=traceparent,
    )


def row_of(message: Message) -> Row:
    """Return which request a broker's message is a delivery of."""
    assert isinstance(message, TableMessage)  # noqa: S101  # the broker made it
    return message.row


def check_service(stored: str, service: str, place: str) -> None:
    """Refuse a worker of another service than that of the first worker: it would ask each user once more."""
    if stored != service:
        raise BrokerError(
            f"{place} belongs to {stored}, and this worker to {service}: name another one, or delete the row of its "
            "table service"
        )


class Chore(NamedTuple):
    """A step of the housekeeping, which no other one holds up."""

    name: str  # for the log and `/readyz`
    every: float  # seconds between two runs
    run: Callable[[], Awaitable[object]]


class TableBroker(Broker):
    """A broker in a SQL database."""

    def __init__(self) -> None:
        self.largest_request: int = LARGEST_REQUEST
        self.forgets_claims = False
        self._lease = 0.0
        self._housekeeping: list[asyncio.Task[None]] = []
        self._failing: dict[str, tuple[float, Exception]] = {}  # since when a chore has failed, and the last error
        self._giving_back: set[asyncio.Task[None]] = set()

    def _keep_house(self, lease: float) -> float:
        """Start the housekeeping with the first worker; return the longest wait that the tables allow."""
        self._lease = max(self._lease, lease)
        if not self._housekeeping:
            self._housekeeping = [asyncio.create_task(self._repeat(chore)) for chore in self._chores()]
        return LONGEST_WAIT

    async def _repeat(self, chore: Chore) -> None:
        not_cleaned = RateLimitedLog(logging.WARNING, "broker.not_cleaned")
        while True:
            began, pause = asyncio.get_running_loop().time(), chore.every
            try:
                await chore.run()
                self._failing.pop(chore.name, None)
            except Exception as error:  # noqa: BLE001  # even after a bug, requests need the next run
                not_cleaned.log({"chore": chore.name, "error": f"{type(error).__name__}: {error}"})
                since, _ = self._failing.get(chore.name, (began, error))
                self._failing[chore.name] = since, error
                pause = min(pause, _TRIES_AGAIN)
            await asyncio.sleep(pause)

    @abstractmethod
    def _chores(self) -> Iterable[Chore]:
        """Return the housekeeping."""

    def _failing_chores(self) -> Iterator[str]:
        """Return the problems of the housekeeping."""
        now = asyncio.get_running_loop().time()
        for name, (since, error) in self._failing.items():
            if now - since >= _FAILS_FOR:
                yield f"{name} has failed for {now - since:.0f} s: {error}"

    async def _clean(self) -> None:
        after: int | None = 0
        while after is not None:
            after = await self._clean_page(after)

    @abstractmethod
    async def _clean_page(self, after: int) -> int | None:
        """Remove old data from a page of rows. Return the last row of the page, or None at the end."""

    async def _end_tasks(self) -> None:
        for task in self._housekeeping:
            task.cancel()
        if self._housekeeping:
            await asyncio.wait(self._housekeeping)
        self._housekeeping, self._failing = [], {}
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
