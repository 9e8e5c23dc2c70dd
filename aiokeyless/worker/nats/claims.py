"""Claims in a stream of their own: the last message of an operation id's subject names the request that holds it."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Final

import nats.js.errors

from aiokeyless.worker.engine import Claim, Claims, Taken

from .failures import engine_errors

if TYPE_CHECKING:
    from nats.js import JetStreamContext

    from .fleet import Fleet

_EXPECTED: Final = "Nats-Expected-Last-Subject-Sequence"
#: The broker's codes: another message is the last of the subject, or another one is just being stored. A cluster says
#: 10164 where its leader found the first on the way.
_WRONG_LAST_SEQUENCE: Final = frozenset({10071, 10164})
_NO_MESSAGE: Final = 10037  # and not that there is no stream, of which a broker says 404 too
_RELEASED: Final = b""


class NatsClaims(Claims):
    """The claims of all workers on operation ids.

    Args:
        stream: The broker's JetStream.
        fleet: The fleet of the workers.
    """

    def __init__(self, stream: JetStreamContext, fleet: Fleet) -> None:
        self._stream = stream
        self._fleet = fleet

    async def take(self, operation_id: str, request: str) -> Taken:
        """See `Claims`."""
        expected, claim = 0, Claim.NEW
        # Stored again where this request holds it already: that changes the sequence, which is the token.
        while (sequence := await self._put(operation_id, request.encode(), expected)) is None:
            expected, holder = await self._last(operation_id)
            if holder not in {_RELEASED, request.encode()}:
                return Taken(Claim.ANOTHERS, expected)
            claim = Claim.NEW if holder == _RELEASED else Claim.HELD
        return Taken(claim, sequence)

    async def is_held(self, operation_id: str, request: str) -> bool:
        """See `Claims`."""
        _, holder = await self._last(operation_id)
        return holder == request.encode()

    async def release(self, operation_id: str, request: str, token: int) -> bool:  # noqa: ARG002  # the token is its
        """See `Claims`."""
        return await self._put(operation_id, _RELEASED, token) is not None

    async def _put(self, operation_id: str, holder: bytes, expected: int) -> int | None:
        """Store who holds the id; return the sequence, or None where the holder had changed before."""
        headers = {_EXPECTED: str(expected)}
        with engine_errors():
            try:
                stored = await self._stream.publish(
                    self._subject(operation_id), holder, stream=self._fleet.claims, headers=headers
                )
            except nats.js.errors.APIError as error:
                if error.err_code not in _WRONG_LAST_SEQUENCE:
                    raise
                return None
        return stored.seq

    async def _last(self, operation_id: str) -> tuple[int, bytes]:
        with engine_errors():
            try:
                message = await self._stream.get_last_msg(self._fleet.claims, self._subject(operation_id))
            except nats.js.errors.NotFoundError as error:
                if error.err_code != _NO_MESSAGE:
                    raise
                return 0, _RELEASED
        return message.seq or 0, message.data or _RELEASED

    def _subject(self, operation_id: str) -> str:
        return self._fleet.claim_subject(sha256(operation_id.encode()).hexdigest())
