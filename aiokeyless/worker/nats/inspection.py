"""The state of a fleet, by JetStream: one request for each stream, and one for the consumer.

A worker needs permission for these requests anyway, and the broker answers them from memory.
"""

from __future__ import annotations

from datetime import datetime  # noqa: TC003  # msgspec reads the annotations
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import msgspec

from aiokeyless.events import Inspection
from aiokeyless.worker.broker import UnavailableError

from .failures import broker_errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nats.aio.client import Client

    from aiokeyless.worker.clock import BrokerClock

    from .fleet import Fleet

_NOT_FOUND: Final = 404
#: A stream with less room than this, in bytes, counts as full. Many messages are larger.
_ROOM: Final = 4 << 10


class _Failure(msgspec.Struct):
    code: int = 0
    description: str = "it did not say why"


class _Limits(msgspec.Struct):
    max_msgs: int = -1
    max_bytes: int = -1


class _Content(msgspec.Struct):
    messages: int
    bytes: int
    first_ts: datetime


class _Answer(msgspec.Struct):
    error: _Failure | None = None


class _StreamAnswer(msgspec.Struct):
    ts: datetime
    config: _Limits
    state: _Content


class _ConsumerAnswer(msgspec.Struct):
    num_pending: int
    paused: bool = False


_Told = TypeVar("_Told", _StreamAnswer, _ConsumerAnswer)


class Inspector(NamedTuple):
    """An inspection of a fleet.

    Attributes:
        connection: The broker.
        fleet: The fleet.
        clock: The broker's clock, which each inspection measures as well.
        within: Seconds within which an answer must come.
    """

    connection: Client
    fleet: Fleet
    clock: BrokerClock
    within: float

    async def inspect(self) -> Inspection:
        """See `Broker`."""
        fleet = self.fleet
        asked_at = self.clock.now()
        requests = await self._ask(f"STREAM.INFO.{fleet.requests}", _StreamAnswer)
        if requests is not None:
            self.clock.compare(requests.ts, asked_at=asked_at)
        problems = [*_of_stream(fleet.requests, requests)]
        for name in (fleet.outcomes, fleet.claims):
            problems += _of_stream(name, await self._ask(f"STREAM.INFO.{name}", _StreamAnswer))
        if requests is None:
            return Inspection(clock_ahead=self.clock.ahead, problems=tuple(problems))
        consumer = await self._ask(f"CONSUMER.INFO.{fleet.requests}.{fleet.consumer}", _ConsumerAnswer)
        if consumer is None:
            problems.append(f"the consumer {fleet.consumer} is gone")
        elif consumer.paused:
            problems.append(f"the consumer {fleet.consumer} is paused")
        waiting = requests.state.messages
        age = (requests.ts - requests.state.first_ts).total_seconds() if waiting else 0.0
        return Inspection(
            waiting=waiting,
            backlog=0 if consumer is None else consumer.num_pending,
            oldest_age=age,
            clock_ahead=self.clock.ahead,
            problems=tuple(problems),
        )

    async def _ask(self, subject: str, kind: type[_Told]) -> _Told | None:
        """Ask JetStream. Return None if there is no such stream or consumer."""
        with broker_errors():
            answer = await self.connection.request(f"{self.fleet.api_prefix}.{subject}", b"", timeout=self.within)
        try:
            failure = msgspec.json.decode(answer.data, type=_Answer).error
            if failure is None:
                return msgspec.json.decode(answer.data, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UnavailableError(f"what {subject} answers cannot be read: {error}") from None
        if failure.code != _NOT_FOUND:
            raise UnavailableError(failure.description)
        return None


def _of_stream(name: str, told: _StreamAnswer | None) -> Iterator[str]:
    if told is None:
        yield f"the stream {name} is gone"
        return
    limits, content = told.config, told.state
    if 0 < limits.max_msgs <= content.messages:
        yield f"the stream {name} is full: it has {content.messages} messages of at most {limits.max_msgs}"
    elif 0 < limits.max_bytes < content.bytes + _ROOM:
        yield f"the stream {name} is full: it has {content.bytes} bytes of at most {limits.max_bytes}"
