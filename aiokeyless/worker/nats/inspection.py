"""The state of a fleet, by few requests to JetStream: for the stream of requests, its consumer, and the readers'.

The broker answers them from memory, but for the oldest outcome that a reader has not handled. What becomes of the other
streams, a worker notices when it stores an outcome or a claim.
"""

from __future__ import annotations

from datetime import datetime  # msgspec reads the annotations
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec
import nats.js.errors

from aiokeyless.events import Inspection
from aiokeyless.worker.broker import MOST_UNREAD, UnavailableError

from .failures import broker_errors
from .streams import request

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nats.js import JetStreamContext

    from aiokeyless.worker.clock import BrokerClock

    from .fleet import Fleet

#: A stream with less room than this, in bytes, counts as full. Many messages are larger.
_ROOM: Final = 4 << 10


class _Limits(msgspec.Struct):
    max_msgs: int = -1
    max_bytes: int = -1


class _Content(msgspec.Struct):
    messages: int
    bytes: int
    first_ts: datetime


class _Stream(msgspec.Struct):
    ts: datetime
    config: _Limits
    state: _Content


class _Consumer(msgspec.Struct):
    num_pending: int
    paused: bool = False


class _Floor(msgspec.Struct):
    stream_seq: int


class _Place(msgspec.Struct):
    name: str
    config: dict[str, object]
    num_pending: int
    num_ack_pending: int
    ack_floor: _Floor


class _Places(msgspec.Struct):
    total: int = 0
    consumers: list[_Place] = []


class _Message(msgspec.Struct):
    time: datetime


class _Kept(msgspec.Struct):
    message: _Message


_Info = TypeVar("_Info", _Stream, _Consumer, _Places, _Kept)


async def inspect(stream: JetStreamContext, fleet: Fleet, clock: BrokerClock) -> Inspection:
    """Return the state of a fleet, and measure the broker's clock.

    Raises:
        UnavailableError: The broker does not answer, or not as expected.
    """

    async def ask(subject: str, kind: type[_Info], **asked: object) -> _Info | None:
        with broker_errors():
            try:
                return msgspec.convert(await request(stream, subject, **asked), kind)
            except nats.js.errors.NotFoundError:
                return None
            except (msgspec.ValidationError, ValueError, LookupError) as error:
                raise UnavailableError(f"what {subject} answers cannot be read: {error}") from None

    asked_at = clock.now()
    requests = await ask(f"STREAM.INFO.{fleet.requests}", _Stream)
    if requests is None:
        return Inspection(clock_ahead=clock.ahead, problems=(f"the stream {fleet.requests} is gone",))
    clock.compare(requests.ts, asked_at=asked_at)
    consumer = await ask(f"CONSUMER.INFO.{fleet.requests}.{fleet.consumer}", _Consumer)
    unread: dict[str, int] = {}
    ages: dict[str, float] = {}
    seen, total = 0, 1
    while seen < total:  # an answer has 256 at most
        page = await ask(f"CONSUMER.LIST.{fleet.outcomes}", _Places, offset=seen) or _Places()
        seen, total = seen + len(page.consumers), page.total if page.consumers else 0
        for place in page.consumers:
            if "durable_name" not in place.config:  # no reader, but an operator's look
                continue
            unread[place.name] = min(place.num_pending + place.num_ack_pending, MOST_UNREAD)
            ages[place.name] = 0.0
            if unread[place.name]:
                after = place.ack_floor.stream_seq + 1
                oldest = await ask(f"STREAM.MSG.GET.{fleet.outcomes}", _Kept, seq=after, next_by_subj=">")
                if oldest is not None:  # it was not removed just now
                    ages[place.name] = max(0.0, (requests.ts - oldest.message.time).total_seconds())
    waiting = requests.state.messages
    return Inspection(
        waiting=waiting,
        backlog=0 if consumer is None else consumer.num_pending,
        oldest_age=(requests.ts - requests.state.first_ts).total_seconds() if waiting else 0.0,
        unread=unread,
        oldest_unread_age=ages,
        clock_ahead=clock.ahead,
        problems=tuple(_problems(fleet, requests, consumer)),
    )


def _problems(fleet: Fleet, requests: _Stream, consumer: _Consumer | None) -> Iterator[str]:
    limits, content = requests.config, requests.state
    if 0 < limits.max_msgs <= content.messages:
        yield f"the stream {fleet.requests} is full: it has {content.messages} messages of at most {limits.max_msgs}"
    elif 0 < limits.max_bytes < content.bytes + _ROOM:
        yield f"the stream {fleet.requests} is full: it has {content.bytes} bytes of at most {limits.max_bytes}"
    if consumer is None:
        yield f"the consumer {fleet.consumer} is gone"
    elif consumer.paused:
        yield f"the consumer {fleet.consumer} is paused"
