"""The broker's clock: requests are stored by it, so deadlines are kept by it, whatever a worker's machine shows."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

import msgspec

from aiokeyless.worker.cancellation import raise_lost_cancellation
from aiokeyless.worker.engine import EngineError
from aiokeyless.worker.logs import log

from .failures import engine_errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from nats.aio.client import Client

_EVERY: Final = 60.0  # seconds between two measurements
_NOTICEABLE: Final = 1.0  # seconds by which a clock may differ without a warning


class _Answer(msgspec.Struct):
    ts: datetime


def _local() -> datetime:
    return datetime.now(UTC)


class BrokerClock:
    """The time of the broker, as measured by its answers.

    Args:
        local: The clock of this machine.
    """

    def __init__(self, local: Callable[[], datetime] = _local) -> None:
        self._local = local
        self._ahead = timedelta()  # how far the broker's clock is ahead of this machine's
        self._told = 0.0  # seconds of it that were logged last

    def now(self) -> datetime:
        """Return the time by the broker's clock."""
        return self._local() + self._ahead

    @property
    def ahead(self) -> float:
        """Seconds by which it is ahead of this machine's, as far as is known."""
        return self._ahead.total_seconds()

    async def measure(self, connection: Client, subject: str, within: float) -> None:
        """Compare the clocks; where the broker does not tell its time, what was measured before stays.

        Args:
            connection: The broker.
            subject: A request to JetStream's API whose answer tells the time.
            within: Seconds within which it must answer.
        """
        asked_at = self._local()
        with suppress(EngineError, msgspec.DecodeError), engine_errors():
            answer = await connection.request(subject, b"", timeout=within)
            answered_at = self._local()
            told = msgspec.json.decode(answer.data, type=_Answer).ts
            margin = (answered_at - asked_at) / 2  # told at some time in between
            if abs((ahead := told - (asked_at + margin)) - self._ahead) <= margin:
                return  # a slow answer, and no reason to move deadlines by as much
            self._ahead = ahead
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
