"""The broker's clock: requests are stored by it, so deadlines are kept by it, whatever a worker's machine shows."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

import msgspec

from aiokeyless.worker.broker import UnavailableError
from aiokeyless.worker.cancellation import raise_lost_cancellation
from aiokeyless.worker.logs import log

from .failures import broker_errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from nats.aio.client import Client

_EVERY: Final = 60.0  # seconds between two measurements
_NOTICEABLE: Final = 1.0  # seconds by which a clock may differ without a warning


class _Answer(msgspec.Struct):
    ts: datetime


def _wall() -> datetime:
    return datetime.now(UTC)


class BrokerClock:
    """The time of the broker, as measured by its answers.

    Between two measurements only a monotonic clock counts. A step of this machine's wall clock moves no deadline.

    Args:
        wall: The wall clock of this machine, which gives the time until the first measurement.
        monotonic: A clock in seconds that is never set.
    """

    def __init__(self, wall: Callable[[], datetime] = _wall, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._started_at = monotonic()
        self._origin = wall()  # the time of the broker at `_started_at`
        self._told = 0.0  # seconds between the clocks that were logged last

    def now(self) -> datetime:
        """Return the time by the broker's clock."""
        return self._origin + timedelta(seconds=self._monotonic() - self._started_at)

    @property
    def ahead(self) -> float:
        """Seconds by which it is ahead of this machine's wall clock, as far as is known."""
        return (self.now() - self._wall()).total_seconds()

    async def measure(self, connection: Client, subject: str, within: float) -> None:
        """Compare the clocks; where the broker does not tell its time, what was measured before stays.

        Args:
            connection: The broker.
            subject: A request to JetStream's API whose answer tells the time.
            within: Seconds within which it must answer.
        """
        asked_at = self.now()
        with suppress(UnavailableError, msgspec.DecodeError), broker_errors():
            answer = await connection.request(subject, b"", timeout=within)
            answered_at = self.now()
            told = msgspec.json.decode(answer.data, type=_Answer).ts
            margin = (answered_at - asked_at) / 2  # told at some time in between
            if abs(error := told - (asked_at + margin)) > margin:  # else a slow answer is no reason to move deadlines
                self._origin += error
            self._tell(self.ahead)

    def _tell(self, ahead: float) -> None:
        """Log a difference once, and again when it has changed noticeably, or has gone."""
        if abs(ahead - self._told) > _NOTICEABLE:
            self._told = ahead
            level = logging.WARNING if abs(ahead) > _NOTICEABLE else logging.INFO
            log(level, "worker.clock_differs", {"broker_ahead_by": round(ahead, 3)})

    async def keep(self, connection: Client, subject: str, within: float) -> None:
        """Measure again and again, without end."""
        while True:
            await asyncio.sleep(_EVERY)
            await self.measure(connection, subject, within)
            raise_lost_cancellation()
