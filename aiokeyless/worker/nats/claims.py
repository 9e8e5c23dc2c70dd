"""Claims in a stream of their own: the last message of an operation id's subject names the request that holds it.

A user with permission to make a stream can have the broker write any message there. So workers with event keys sign
their claims. To them, a claim without a valid signature is another request's.
"""

from __future__ import annotations

import logging
from hashlib import sha256
from typing import TYPE_CHECKING, Final

import nats.js.errors

from aiokeyless.worker.broker import Claim
from aiokeyless.worker.logs import RateLimitedLog

from .event_keys import CLAIM, SIGNATURE
from .failures import broker_errors

if TYPE_CHECKING:
    from nats.js import JetStreamContext

    from .event_keys import EventKeys
    from .fleet import Fleet

_EXPECTED: Final = "Nats-Expected-Last-Subject-Sequence"
#: The broker's codes: another message is the last of the subject, or is just being stored. A cluster answers 10164 if
#: its leader finds the first case in transit.
_WRONG_LAST_SEQUENCE: Final = frozenset({10071, 10164})
_NO_MESSAGE: Final = 10037  # not for a missing stream, which is a 404 as well
_RELEASED: Final = b""
_STORED_WITHIN: Final = 5.0  # seconds
#: Seconds for an answer about a claim. It comes from memory, or never, if the stream has no leader.
READ_WITHIN: Final = 1.0


class NatsClaims:
    """The claims of all workers on operation ids, read with the timeout of `stream`. Without keys, each is believed."""

    def __init__(self, stream: JetStreamContext, fleet: Fleet, keys: EventKeys | None) -> None:
        self._stream = stream
        self._fleet = fleet
        self._keys = keys
        self._unsigned = RateLimitedLog(logging.ERROR, "claim.unsigned")

    async def claim(self, operation_id: str, request: str) -> tuple[Claim, int]:
        """See `Broker`. Also return the number of this claim, by which alone it is released; 0 if it is another's."""
        expected, claim = 0, Claim.NEW
        # If this request holds the id already, store the claim again. That changes the number.
        while (number := await self._put(operation_id, request.encode(), expected)) is None:
            expected, holder = await self._last(operation_id)
            if holder not in {_RELEASED, request.encode()}:
                return Claim.ANOTHERS, 0
            claim = Claim.NEW if holder == _RELEASED else Claim.HELD
        return claim, number

    async def holds(self, operation_id: str, request: str) -> bool:
        """See `Broker`."""
        _, holder = await self._last(operation_id)
        return holder == request.encode()

    async def is_free(self, operation_id: str) -> bool:
        """Return whether no request holds an operation id."""
        _, holder = await self._last(operation_id)
        return holder == _RELEASED

    async def unclaim(self, operation_id: str, number: int) -> bool:
        """See `Broker`."""
        return await self._put(operation_id, _RELEASED, number) is not None

    async def _put(self, operation_id: str, holder: bytes, expected: int) -> int | None:
        """Store the holder of the id. Return the claim's number, or None if the holder had changed before."""
        subject, headers = self._subject(operation_id), {_EXPECTED: str(expected)}
        if self._keys is not None:
            headers[SIGNATURE] = self._keys.sign(_signed_data(subject, holder), fleet=self._fleet.name, kind=CLAIM)
        with broker_errors():
            try:
                stored = await self._stream.publish(
                    subject, holder, _STORED_WITHIN, stream=self._fleet.claims, headers=headers
                )
            except nats.js.errors.APIError as error:
                if error.err_code not in _WRONG_LAST_SEQUENCE:
                    raise
                return None
        return stored.seq

    async def _last(self, operation_id: str) -> tuple[int, bytes | None]:
        """Return the last claim's number, and the request that holds the id; None if no worker wrote the claim."""
        subject = self._subject(operation_id)
        with broker_errors():
            try:
                message = await self._stream.get_last_msg(self._fleet.claims, subject)
            except nats.js.errors.NotFoundError as error:
                if error.err_code != _NO_MESSAGE:
                    raise
                return 0, _RELEASED
        sequence, holder = message.seq or 0, message.data or _RELEASED
        data, signature = _signed_data(subject, holder), (message.headers or {}).get(SIGNATURE)
        if self._keys is None or self._keys.verify(data, signature, fleet=self._fleet.name, kind=CLAIM):
            return sequence, holder
        self._unsigned.log({"sequence": sequence})
        return sequence, None

    def _subject(self, operation_id: str) -> str:
        return self._fleet.claim_subject(sha256(operation_id.encode()).hexdigest())


def _signed_data(subject: str, holder: bytes) -> bytes:
    """Return the signed data of a claim: the operation, by its subject, and the request."""
    return subject.encode() + b"\0" + holder
