"""Claims in a stream of their own: the last message of an operation id's subject names the request that holds it.

A user with permission to make a stream can have the broker write any message there. So workers with event keys sign
their claims. To them, a claim without a valid signature is another request's. Workers without keys do not sign, and
neither do those of earlier versions. But keys and upgrades reach the workers of a fleet one after the other. So workers
believe unsigned claims that were stored before a certain moment: a day after the first worker that signs has started.
If that worker makes the stream, every claim must be signed. The metadata of the stream holds the moment, signed.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

import msgspec
import nats.js.errors

from aiokeyless.errors import BrokerError
from aiokeyless.worker.broker import Claim, Claimed, UnavailableError
from aiokeyless.worker.logs import RateLimitedLog, log

from .event_keys import CLAIM, CLAIMS_SIGNED_FROM, SIGNATURE
from .failures import broker_errors

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.js import JetStreamContext
    from nats.js.api import RawStreamMsg

    from .event_keys import EventKeys
    from .fleet import Fleet

#: The key, in the stream's metadata, of the moment from which claims must be signed.
SIGNED_FROM: Final = "aiokeyless-claims-signed-from"
_UPGRADED_WITHIN: Final = timedelta(days=1)  # the time for upgrading all workers of a fleet
_ALWAYS: Final = datetime(1970, 1, 1, tzinfo=UTC)
_EXPECTED: Final = "Nats-Expected-Last-Subject-Sequence"
#: The broker's codes: another message is the last of the subject, or is just being stored. A cluster answers 10164 if
#: its leader finds the first case in transit.
_WRONG_LAST_SEQUENCE: Final = frozenset({10071, 10164})
_NO_MESSAGE: Final = 10037  # not for a missing stream, which is a 404 as well
_RELEASED: Final = b""


class NatsClaims:
    """The claims of all workers on operation ids. Workers without keys believe every claim."""

    def __init__(
        self,
        stream: JetStreamContext,
        fleet: Fleet,
        *,
        keys: EventKeys | None = None,
        signed_from: datetime = _ALWAYS,
    ) -> None:
        self._stream = stream
        self._fleet = fleet
        self._keys = keys
        self._signed_from = signed_from
        self._unsigned = RateLimitedLog(logging.ERROR, "claim.unsigned")

    async def claim(self, operation_id: str, request: str) -> Claimed:
        """See `Broker`."""
        expected, claim = 0, Claim.NEW
        # If this request holds the id already, store the claim again. That changes the sequence, which is the token.
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
        """Store the holder of the id. Return the sequence, or None if the holder had changed before."""
        subject, headers = self._subject(operation_id), {_EXPECTED: str(expected)}
        if self._keys is not None:
            headers[SIGNATURE] = self._keys.sign(_signed_data(subject, holder), fleet=self._fleet.name, kind=CLAIM)
        with broker_errors():
            try:
                stored = await self._stream.publish(subject, holder, stream=self._fleet.claims, headers=headers)
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
        if not self._is_believed(message, _signed_data(subject, holder)):
            self._unsigned.log({"sequence": sequence})
            return sequence, None
        return sequence, holder

    def _is_believed(self, message: RawStreamMsg, signed: bytes) -> bool:
        if self._keys is None or (message.time is not None and message.time < self._signed_from):
            return True
        signature = (message.headers or {}).get(SIGNATURE)
        return self._keys.verify(signed, signature, fleet=self._fleet.name, kind=CLAIM)

    def _subject(self, operation_id: str) -> str:
        return self._fleet.claim_subject(sha256(operation_id.encode()).hexdigest())


def _signed_data(subject: str, holder: bytes) -> bytes:
    """Return the signed data of a claim: the operation, by its subject, and the request."""
    return subject.encode() + b"\0" + holder


def mark(keys: EventKeys | None, fleet: Fleet, signed_from: datetime = _ALWAYS) -> dict[str, str]:
    """Return the metadata that say from when on claims must be signed; none if there are no keys.

    The default is for a stream that a worker with keys makes.
    """
    if keys is None:
        return {}
    moment = signed_from.isoformat()
    return {SIGNED_FROM: f"{moment} {keys.sign(moment.encode(), fleet=fleet.name, kind=CLAIMS_SIGNED_FROM)}"}


async def claims_signed_from(
    connection: Client, fleet: Fleet, keys: EventKeys, *, now: datetime, within: float
) -> datetime:
    """Return from when on claims must be signed. Mark the stream with it, unless one of these keys has signed it.

    Raises:
        BrokerError: The stream cannot be marked.
    """
    told = await _request(connection, f"{fleet.api_prefix}.STREAM.INFO.{fleet.claims}", b"", within)
    config = told["config"]
    metadata = config.get("metadata") or {}
    signed_from = _read_mark(metadata.get(SIGNED_FROM, ""), fleet, keys) or now + _UPGRADED_WITHIN
    marked = {**metadata, **mark(keys, fleet, signed_from)}  # signed by the present first key
    if marked != metadata:
        subject = f"{fleet.api_prefix}.STREAM.UPDATE.{fleet.claims}"
        # Sent back as received: nats-py drops settings that it does not know.
        await _request(connection, subject, msgspec.json.encode({**config, "metadata": marked}), within)
    if signed_from > now:
        log(logging.WARNING, "claims.unsigned_believed", {"until": signed_from.isoformat(timespec="seconds")})
    return signed_from


def _read_mark(text: str, fleet: Fleet, keys: EventKeys) -> datetime | None:
    moment, _, signature = text.partition(" ")
    if not keys.verify(moment.encode(), signature, fleet=fleet.name, kind=CLAIMS_SIGNED_FROM):
        return None
    return datetime.fromisoformat(moment)


async def _request(connection: Client, subject: str, body: bytes, within: float) -> dict[str, Any]:
    """Call JetStream's API, and return its answer."""
    try:
        with broker_errors():
            answer = await connection.request(subject, body, timeout=within)
    except UnavailableError as error:
        reason = str(error)
    else:
        told: dict[str, Any] = msgspec.json.decode(answer.data)
        if "error" not in told:
            return told
        reason = told["error"]["description"]
    raise BrokerError(
        f"the stream of claims cannot be marked as signed ({reason}): may this user publish to {subject}?"
    )
