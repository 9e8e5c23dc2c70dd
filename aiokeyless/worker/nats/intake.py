"""Deliveries pulled from the broker in batches: as many as there is room for, each handed on the moment it arrives.

nats-py's own ``fetch`` waits for a batch to fill up, a second late for the first one in it; so a pull is sent here
as a plain message to the consumer, and the subscription hands on what arrives.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from aiokeyless.worker.engine import EXPIRES
from aiokeyless.worker.logs import Seldom

from .streams import is_delivery

if TYPE_CHECKING:
    from collections.abc import Callable

    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

    from .fleet import Fleet

_LATE: Final = 2.0  # seconds after which the end of a pull is not to be expected any more
_EXPIRED: Final = "408"  # a pull that was kept for as long as it was asked to


class _Pull:
    """What is left of a pull, and when it has ended whatever was heard of it."""

    __slots__ = ("left", "until")

    def __init__(self, left: int, until: float) -> None:
        self.left = left
        self.until = until


class Intake:
    """The pulls of one worker.

    Args:
        connection: The broker.
        fleet: The fleet of the worker.
        deliver: Takes a delivery; it must not block.
        ended: Told that a pull has ended, so that there may be reason to ask again; and why, where the broker did not
            keep it for as long as it was asked to.
        now: The clock, in seconds.
    """

    def __init__(
        self,
        connection: Client,
        fleet: Fleet,
        *,
        deliver: Callable[[Msg], None],
        ended: Callable[[str | None], None],
        now: Callable[[], float],
    ) -> None:
        self._connection = connection
        self._fleet = fleet
        self._subject = f"{fleet.api_prefix}.CONSUMER.MSG.NEXT.{fleet.requests}.{fleet.consumer}"
        self._deliver = deliver
        self._ended = ended
        self._now = now
        self._inbox = connection.new_inbox()
        self._subscription: Subscription | None = None
        self._pulls: deque[_Pull] = deque()  # the oldest first
        self._moved = asyncio.Event()
        self._foreign = Seldom(logging.WARNING, "broker.foreign_message")

    def expected(self) -> int:
        """Return how many deliveries were asked for and have not come."""
        while self._pulls and (self._pulls[0].until < self._now() or not self._pulls[0].left):
            self._pulls.popleft()  # with a connection or a broker's leader, the word that it has ended may be lost
        return sum(pull.left for pull in self._pulls)

    async def open(self) -> None:
        """Get ready to be delivered to."""
        self._subscription = await self._connection.subscribe(self._inbox, cb=self._arrived)

    async def ask(self, batch: int) -> None:
        """Ask for so many more."""
        self._pulls.append(_Pull(batch, self._now() + EXPIRES + _LATE))
        pull = {"batch": batch, "expires": int(EXPIRES * 1e9)}
        await self._connection.publish(self._subject, json.dumps(pull).encode(), reply=self._inbox)

    def forget(self) -> None:
        """Expect nothing any more: the pulls went with the connection."""
        self._pulls.clear()

    async def close(self) -> None:
        """Wait for the pulls to end, which takes `EXPIRES` at most; what arrives meanwhile is still handed on.

        To end the subscription at once would lose what the broker is just delivering: it does not notice that the
        subscription has ended, and delivers that again only after its ack wait.
        """
        if self._subscription is None:
            return
        while self.expected():
            self._moved.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(EXPIRES + _LATE):
                    await self._moved.wait()
        await self._subscription.drain()  # type: ignore[no-untyped-call]  # nats-py has no types here

    async def _arrived(self, message: Msg) -> None:
        if message.reply and not is_delivery(message.reply, self._fleet.requests, self._fleet.consumer):
            self._foreign.log(
                {"stream": self._fleet.requests}
            )  # published to this inbox by another user, and not delivered by the stream
            return
        self._moved.set()
        if message.reply:
            self._count_off(1)
            self._deliver(message)
            return
        # No delivery, but the end of a pull: the oldest, since all are kept equally long.
        headers = message.headers or {}
        unused = headers.get("Nats-Pending-Messages", "")
        if unused.isdigit():
            self._count_off(int(unused))
        else:
            self._pulls.clear()  # there is no consumer that would keep them
        status, description = headers.get("Status", ""), headers.get("Description", "")
        reason = (
            f"{status} {description}" if description.isprintable() else status
        )  # nats-py finds one where there is none
        self._ended(None if status == _EXPIRED else reason.strip())

    def _count_off(self, count: int) -> None:
        for pull in self._pulls:
            used = min(count, pull.left)
            pull.left -= used
            count -= used
