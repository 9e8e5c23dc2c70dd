"""The state of a fleet, by few requests to JetStream: for its streams, the workers' consumer, and the readers'."""

from __future__ import annotations

from datetime import datetime  # msgspec reads the annotations
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec
import nats.js.errors

from aiokeyless.events import Inspection
from aiokeyless.worker.broker import MOST_UNREAD, UnavailableError

from .failures import broker_errors
from .streams import (
    ACK_WAIT,
    Config,
    StreamSettings,
    check_service,
    describe_wrong,
    find_window,
    request,
    wanted_consumer,
    wanted_streams,
)

if TYPE_CHECKING:
    from nats.js import JetStreamContext

    from aiokeyless.worker.clock import BrokerClock

    from .fleet import Fleet

#: A stream with less room than this, in bytes, counts as full. Many messages are larger.
_ROOM: Final = 4 << 10


class _Content(msgspec.Struct):
    messages: int
    bytes: int
    first_ts: datetime


class _Stream(msgspec.Struct):
    ts: datetime
    config: Config
    state: _Content

    @property
    def trouble(self) -> str:
        most, most_bytes = self.config.get("max_msgs", 0), self.config.get("max_bytes", 0)
        if 0 < most <= self.state.messages:
            return f"is full: it has {self.state.messages} messages of at most {most}"
        if 0 < most_bytes < self.state.bytes + _ROOM:
            return f"is full: it has {self.state.bytes} bytes of at most {most_bytes}"
        return ""


class _Floor(msgspec.Struct):
    stream_seq: int


class _Consumer(msgspec.Struct):
    name: str
    config: Config
    num_pending: int
    num_ack_pending: int
    ack_floor: _Floor
    paused: bool = False

    @property
    def trouble(self) -> str:
        return "is paused" if self.paused else ""

    @property
    def unread(self) -> int:
        return min(self.num_pending + self.num_ack_pending, MOST_UNREAD)

    @property
    def is_foreign(self) -> bool:
        """Whether it belongs to another client than `next_outcome`, which may have settings of its own."""
        return not self.config.keys().isdisjoint({"deliver_subject", "filter_subject", "filter_subjects"})


class _Consumers(msgspec.Struct):
    total: int = 0
    consumers: list[_Consumer] = []


class _Message(msgspec.Struct):
    time: datetime


class _Kept(msgspec.Struct):
    message: _Message


_Info = TypeVar("_Info", _Stream, _Consumer, _Consumers, _Kept)


async def inspect(
    stream: JetStreamContext,
    fleet: Fleet,
    clock: BrokerClock,
    *,
    settings: StreamSettings | None = None,
    ack_wait: float = ACK_WAIT,
    service: str = "",
) -> Inspection:
    """Return the state of a fleet, and measure the broker's clock.

    Without `settings`, what the operator chose is not known, and without `service`, which service the worker asks.

    Raises:
        BrokerError: The fleet asks another service.
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

    began = clock.elapsed()
    requests = await ask(f"STREAM.INFO.{fleet.requests}", _Stream)
    if requests is None:
        return Inspection(clock_ahead=clock.ahead, problems=(f"the stream {fleet.requests} is gone",))
    clock.compare(requests.ts, began=began)
    if service:
        check_service(fleet, requests.config, service)
    outcomes = await ask(f"STREAM.INFO.{fleet.outcomes}", _Stream)
    claims = await ask(f"STREAM.INFO.{fleet.claims}", _Stream)
    consumer = await ask(f"CONSUMER.INFO.{fleet.requests}.{fleet.consumer}", _Consumer)
    readers: list[_Consumer] = []
    total = 1
    while len(readers) < total:  # an answer has 256 at most
        page = await ask(f"CONSUMER.LIST.{fleet.outcomes}", _Consumers, offset=len(readers)) or _Consumers()
        readers += page.consumers
        total = page.total if page.consumers else 0
    readers = [reader for reader in readers if "durable_name" in reader.config]  # else an operator looks with it
    ages = dict.fromkeys((reader.name for reader in readers), 0.0)
    for reader in readers:
        if reader.unread:
            after = reader.ack_floor.stream_seq + 1
            oldest = await ask(f"STREAM.MSG.GET.{fleet.outcomes}", _Kept, seq=after, next_by_subj=">")
            if oldest is not None:  # it was not removed just now
                ages[reader.name] = max(0.0, (requests.ts - oldest.message.time).total_seconds())

    window = find_window(*(stream.config for stream in (requests, outcomes) if stream is not None))
    settings = settings or StreamSettings(duplicate_window=find_window((claims or requests).config))
    tables = wanted_streams(fleet, settings, max(window, settings.duplicate_window))
    wanted = wanted_consumer(ack_wait)
    streams = {fleet.requests: requests, fleet.outcomes: outcomes, fleet.claims: claims}
    consumers = {fleet.consumer: consumer, **{reader.name: reader for reader in readers if not reader.is_foreign}}
    problems = (
        *(_describe(f"the stream {name}", found, tables[name]) for name, found in streams.items()),
        *(_describe(f"the consumer {name}", found, wanted) for name, found in consumers.items()),
    )
    waiting = requests.state.messages
    return Inspection(
        waiting=waiting,
        backlog=0 if consumer is None else consumer.num_pending,
        oldest_age=(requests.ts - requests.state.first_ts).total_seconds() if waiting else 0.0,
        unread={reader.name: reader.unread for reader in readers},
        oldest_unread_age=ages,
        clock_ahead=clock.ahead,
        problems=tuple(filter(None, problems)),
    )


def _describe(what: str, found: _Stream | _Consumer | None, wanted: Config) -> str:
    """Return what is wrong, in words; empty if nothing is."""
    if found is None:
        return f"{what} is gone"
    return f"{what} {found.trouble}" if found.trouble else describe_wrong(what, found.config, wanted)
