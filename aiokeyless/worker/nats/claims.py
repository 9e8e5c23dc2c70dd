"""Claims in a stream of their own: the last message of an operation id's subject names the request that holds it.

A user who may make a stream can have the broker write any message there. So workers with event keys sign their claims,
and to them a claim without a valid signature is another's.
"""

from __future__ import annotations

import logging
from hashlib import sha256
from typing import TYPE_CHECKING, Final

import nats.js.errors

from aiokeyless.worker.broker import Claim, Claimed
from aiokeyless.worker.logs import Seldom

from .event_keys import CLAIM, SIGNATURE
from .failures import broker_errors

if TYPE_CHECKING:
    from nats.js import JetStreamContext
    from nats.js.api import RawStreamMsg

    from .event_keys import EventKeys
    from .fleet import Fleet

_EXPECTED: Final = "Nats-Expected-Last-Subject-Sequence"
#: The broker's codes: another message is the last of the subject, or another one is just being stored. A cluster says
#: 10164 where its leader found the first on the way.
_WRONG_LAST_SEQUENCE: Final = frozenset({10071, 10164})
_NO_MESSAGE: Final = 10037  # and not that there is no stream, of which a broker says 404 too
_RELEASED: Final = b""


class NatsClaims:
    """The claims of all workers on operation ids.

    Args:
        stream: The broker's JetStream.
        fleet: The fleet of the workers.
        keys: What claims are signed with; None for workers without keys, which believe every claim.
    """

    def __init__(self, stream: JetStreamContext, fleet: Fleet, keys: EventKeys | None) -> None:
        self._stream = stream
        self._fleet = fleet
        self._keys = keys
        self._unsigned = Seldom(logging.ERROR, "claim.unsigned")

    async def claim(self, operation_id: str, request: str) -> Claimed:
        """See `Broker`."""
        expected, claim = 0, Claim.NEW
        # Stored again where this request holds it already: that changes the sequence, which is the token.
        while (sequence := await self._put(operation_id, request.encode(), expected)) is None:
            expected, holder = await self._last(operation_id)
            if holder not in {_RELEASED, request.encode()}:
                return Claimed(Claim.ANOTHERS, expected)
            claim = Claim.NEW if holder == _RELEASED else Claim.HELD
        return Claimed(claim, sequence)

    async def holds(self, operation_id: str, request: str) -> bool:
        """See `Broker`."""
        _, holder = await self._last(operation_id)
        return holder == request.encode()

    async def unclaim(self, operation_id: str, token: int) -> bool:
        """See `Broker`."""
        return await self._put(operation_id, _RELEASED, token) is not None

    async def _put(self, operation_id: str, holder: bytes, expected: int) -> int | None:
        """Store who holds the id; return the sequence, or None where the holder had changed before."""
        subject, headers = self._subject(operation_id), {_EXPECTED: str(expected)}
        if self._keys is not None:
            headers[SIGNATURE] = self._keys.sign(_signed(subject, holder), fleet=self._fleet.name, kind=CLAIM)
        with broker_errors():
            try:
                stored = await self._stream.publish(subject, holder, stream=self._fleet.claims, headers=headers)
            except nats.js.errors.APIError as error:
                if error.err_code not in _WRONG_LAST_SEQUENCE:
                    raise
                return None
        return stored.seq

    async def _last(self, operation_id: str) -> tuple[int, bytes | None]:
        """Return the last claim's number, and the request that holds the id; None where no worker wrote the claim."""
        subject = self._subject(operation_id)
        with broker_errors():
            try:
                message = await self._stream.get_last_msg(self._fleet.claims, subject)
            except nats.js.errors.NotFoundError as error:
                if error.err_code != _NO_MESSAGE:
                    raise
                return 0, _RELEASED
        sequence, holder = message.seq or 0, message.data or _RELEASED
        if not self._is_believed(message, _signed(subject, holder)):
            self._unsigned.log({"sequence": sequence})
            return sequence, None
        return sequence, holder

    def _is_believed(self, message: RawStreamMsg, signed: bytes) -> bool:
        if self._keys is None:
            return True
        signature = (message.headers or {}).get(SIGNATURE)
        return self._keys.are_of(signed, signature, fleet=self._fleet.name, kind=CLAIM)

    def _subject(self, operation_id: str) -> str:
        return self._fleet.claim_subject(sha256(operation_id.encode()).hexdigest())


def _signed(subject: str, holder: bytes) -> bytes:
    """Return what the signature of a claim is of: the operation, by its subject, and the request."""
    return subject.encode() + b"\0" + holder
