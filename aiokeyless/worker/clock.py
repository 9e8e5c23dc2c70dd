"""The broker's clock. It stamps requests, so deadlines follow it and not the clock of a worker's machine."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from .logs import log

if TYPE_CHECKING:
    from collections.abc import Callable

_NOTICEABLE: Final = 1.0  # seconds by which a clock may differ without a warning


def _elapsed() -> float:
    """Return the seconds since some moment. If the system can tell, those count in which it was suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class BrokerClock:
    """The time of the broker, as measured by its answers.

    Between two measurements only a monotonic clock counts. A step of this machine's wall clock, which gives the time
    until the first measurement, moves no deadline. If a virtual machine was paused and no clock of it tells, the next
    measurement does.
    """

    def __init__(
        self, wall: Callable[[], datetime] = lambda: datetime.now(UTC), monotonic: Callable[[], float] = _elapsed
    ) -> None:
        self._wall = wall
        self.elapsed = monotonic
        self._origin = wall() - timedelta(seconds=monotonic())  # the time of the broker when `elapsed` said 0
        self._logged = 0.0  # seconds between the clocks that were logged last

    def now(self) -> datetime:
        """Return the time by the broker's clock."""
        return self._origin + timedelta(seconds=self.elapsed())

    @property
    def ahead(self) -> float:
        """Seconds by which the broker's clock, as last measured, is ahead of this machine's wall clock."""
        return (self.now() - self._wall()).total_seconds()

    def compare(self, time: datetime, *, began: float) -> None:
        """Correct the clock by the time in an answer that has just arrived. It was asked when `elapsed` said `began`.

        The broker answered at some time in between. The correction is as small as that allows.
        """
        latest = self.now()
        earliest = latest - timedelta(seconds=self.elapsed() - began)
        self._origin += time - min(max(time, earliest), latest)
        ahead = self.ahead
        if abs(ahead - self._logged) > _NOTICEABLE:  # also when it has gone
            self._logged = ahead
            level = logging.WARNING if abs(ahead) > _NOTICEABLE else logging.INFO
            log(level, "worker.clock_differs", {"broker_ahead_by": round(ahead, 3)})
