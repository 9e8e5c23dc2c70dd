"""Claims: which request an operation id belongs to, as the broker stores it.

That an operation of the right content exists does not say who asked for it: an earlier request may have, and its
approval must not count a second time. The number of a delivery does not say it either: a broker that is killed forgets
deliveries of the last moment, a consumer that is made again all of them, and a request may be published twice. So a
request takes its operation id before it creates the operation, and only where nothing was there; and only what holds
the id believes an approval.
"""

from __future__ import annotations

from enum import Enum, auto
from hashlib import sha256
from typing import TYPE_CHECKING, Final

import nats.js.errors

from .streams import CLAIMS, claim_subject

if TYPE_CHECKING:
    from nats.js import JetStreamContext

    from .messages import Delivery

_EXPECTED: Final = "Nats-Expected-Last-Subject-Sequence"
_WRONG_LAST_SEQUENCE: Final = 10071  # the broker's code: something else is the last message of the subject
_RELEASED: Final = b""


class Claim(Enum):
    """Whose an operation id is."""

    NEW = auto()
    """Ours, since just now."""
    HELD = auto()
    """Ours already, by an earlier delivery of this request or of the same one."""
    ANOTHERS = auto()
    """A different request's."""


class Claims:
    """The claims of all workers on operation ids.

    Args:
        stream: The broker's JetStream.
    """

    def __init__(self, stream: JetStreamContext) -> None:
        self._stream = stream

    async def take(self, delivery: Delivery) -> Claim:
        """Take the id of a delivery's operation, unless it is taken."""
        expected = 0
        while not await self._put(delivery, delivery.name.encode(), expected):
            expected, holder = await self._last(delivery)
            if holder != _RELEASED:
                return Claim.HELD if holder == delivery.name.encode() else Claim.ANOTHERS
        return Claim.NEW

    async def is_held(self, delivery: Delivery) -> bool:
        """Return whether the id belongs to this request."""
        _, holder = await self._last(delivery)
        return holder == delivery.name.encode()

    async def release(self, delivery: Delivery) -> None:
        """Give the id back, where this request holds it."""
        sequence, holder = await self._last(delivery)
        if holder == delivery.name.encode():
            await self._put(delivery, _RELEASED, sequence)

    async def _put(self, delivery: Delivery, holder: bytes, expected: int) -> bool:
        """Store who holds the id; return False where the holder had changed before."""
        headers = {_EXPECTED: str(expected)}
        try:
            await self._stream.publish(_subject(delivery), holder, stream=CLAIMS, headers=headers)
        except nats.js.errors.APIError as error:
            if error.err_code != _WRONG_LAST_SEQUENCE:
                raise
            return False
        return True

    async def _last(self, delivery: Delivery) -> tuple[int, bytes]:
        try:
            message = await self._stream.get_last_msg(CLAIMS, _subject(delivery))
        except nats.js.errors.NotFoundError:
            return 0, _RELEASED
        return message.seq or 0, message.data or _RELEASED


def _subject(delivery: Delivery) -> str:
    return claim_subject(sha256(delivery.ticket.operation_id.encode()).hexdigest())
