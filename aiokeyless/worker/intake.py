"""Deliveries pulled from the broker in batches: as many as there is room for, each handed on the moment it comes.

nats-py's own ``fetch`` waits for a batch to fill up, a second late for the first one in it; so a pull is sent here as
what it is, a message to the consumer, and what comes is handed on by the subscription.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from .streams import CONSUMER, REQUESTS

if TYPE_CHECKING:
    from collections.abc import Callable

    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

#: Seconds for which a pull waits at the consumer: it is asked again then, whatever became of it.
EXPIRES: Final = 5.0
_LATE: Final = 2.0  # seconds after which the end of a pull is not to be expected any more
_SUBJECT: Final = f"$JS.API.CONSUMER.MSG.NEXT.{REQUESTS}.{CONSUMER}"


class Intake:
    """The pulls of one worker.

    Args:
        connection: The broker.
        deliver: Takes a delivery; it must not block.
        ended: Told that a pull has ended, so that there may be reason to ask again.
        now: The clock, in seconds.
    """

    def __init__(
        self,
        connection: Client,
        *,
        deliver: Callable[[Msg], None],
        ended: Callable[[], None],
        now: Callable[[], float],
    ) -> None:
        self._connection = connection
        self._deliver = deliver
        self._ended = ended
        self._now = now
        self._inbox = connection.new_inbox()
        self._subscription: Subscription | None = None
        self._asked_for = 0
        self._asked_at = 0.0

    @property
    def expected(self) -> int:
        """Deliveries that were asked for and have not come."""
        if self._now() - self._asked_at > EXPIRES + _LATE:
            self._asked_for = 0  # the word that the pull had expired was lost, with a connection or a broker's leader
        return self._asked_for

    async def open(self) -> None:
        """Get ready to be delivered to."""
        self._subscription = await self._connection.subscribe(self._inbox, cb=self._arrived)

    async def ask(self, batch: int) -> None:
        """Ask for so many more."""
        pull = {"batch": batch, "expires": int(EXPIRES * 1e9)}
        self._asked_for = self.expected + batch
        self._asked_at = self._now()
        await self._connection.publish(_SUBJECT, json.dumps(pull).encode(), reply=self._inbox)

    def forget(self) -> None:
        """Expect nothing any more: the broker that was asked is gone."""
        self._asked_for = 0

    async def close(self) -> None:
        """Ask for nothing any more; what is on its way here is still handed on."""
        if self._subscription is not None:
            await self._subscription.drain()  # type: ignore[no-untyped-call]  # nats-py has no types here

    async def _arrived(self, message: Msg) -> None:
        if message.reply:
            self._asked_for = max(0, self._asked_for - 1)
            self._deliver(message)
            return
        # No delivery, but the end of a pull: expired, or the broker could not keep it.
        unused = (message.headers or {}).get("Nats-Pending-Messages", "")
        self._asked_for = max(0, self._asked_for - int(unused)) if unused.isdigit() else 0
        self._ended()
