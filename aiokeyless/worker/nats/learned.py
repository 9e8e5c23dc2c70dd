"""What the schedules of a fleet have learned, in a key-value bucket: under the name of the fleet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import nats.js.errors

from aiokeyless.worker.engine import EngineError, Learned

from .failures import engine_errors

if TYPE_CHECKING:
    from nats.js import JetStreamContext
    from nats.js.kv import KeyValue


async def read(stream: JetStreamContext, bucket: str, fleet: str) -> Learned:
    """See `Engine.read_learned`."""
    with engine_errors():
        try:
            entry = await (await _bucket(stream, bucket)).get(fleet)
        except nats.js.errors.KeyNotFoundError as error:  # with what marks a key that was deleted
            return Learned(None, 0 if error.entry is None else error.entry.revision or 0)
    return Learned(entry.value or b"", entry.revision or 0)


async def write(stream: JetStreamContext, bucket: str, fleet: str, state: bytes, revision: int) -> bool:
    """See `Engine.write_learned`."""
    with engine_errors():
        try:
            await (await _bucket(stream, bucket)).update(fleet, state, last=revision)
        except nats.js.errors.KeyWrongLastSequenceError:
            return False
    return True


async def _bucket(stream: JetStreamContext, bucket: str) -> KeyValue:
    try:
        return await stream.key_value(bucket)
    except nats.js.errors.BucketNotFoundError:
        raise EngineError("there is no such bucket; nats kv add makes one") from None
