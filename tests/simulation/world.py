"""The world that a story happens in: an event loop whose clock jumps to the next event, wall clocks, and one seed.

Nothing here waits in real time, reads a real clock or draws a number that the seed does not determine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import uuid
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta, tzinfo
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

import aiokeyless._http.protocol
import aiokeyless._waits.poller
import aiokeyless.client
import aiokeyless.ticket
from aiokeyless import ApprovalTicket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

#: Turns of the loop in one instant: more means that something runs in circles.
MOST_TURNS: Final = 20_000
#: Seconds after which a story must have ended by itself.
LONGEST: Final = 86_400.0
#: What the wall clocks show when a story begins.
EPOCH: Final = datetime(2026, 11, 27, tzinfo=UTC)

#: What is added to the wall clock of the process that runs, by the time; nothing outside of a process.
wall_clock_error: ContextVar[Callable[[float], float]] = ContextVar("wall_clock_error", default=lambda _: 0.0)


class StuckError(Exception):
    """Time cannot go on: nothing is scheduled, or something runs in circles."""


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop that does no I/O: where another one would wait, this one moves its clock."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._turns = 0
        self._selector: VirtualLoop = self  # asyncio asks its selector to wait for the next event
        self.problems: list[str] = []
        """What was reported to the loop's exception handler."""
        self.set_exception_handler(lambda _, context: self.problems.append(_describe(context)))

    def time(self) -> float:
        return self._now

    def select(self, timeout: float | None) -> Sequence[Any]:
        """Let time pass until the next timer."""
        if timeout is None:
            raise StuckError("every task waits for something that never happens")
        self._turns = 0 if timeout > 0 else self._turns + 1
        if self._turns > MOST_TURNS:
            self._turns = 0
            raise StuckError(f"{MOST_TURNS} turns of the loop without a moment passing")
        self._now += timeout
        return ()

    def stand_still(self, until: float) -> None:
        """Run no callback until a time."""
        self._now = max(self._now, until)

    def armed_timers(self) -> list[str]:
        """Return the timers that would still fire."""
        scheduled: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]  # asyncio's own
        return [repr(handle) for handle in scheduled if not handle.cancelled()]

    def _process_events(self, event_list: Sequence[Any]) -> None:
        """Do nothing: there are no sockets."""

    def _write_to_self(self) -> None:
        """Do nothing: there are no other threads."""


def _describe(context: dict[str, Any]) -> str:
    return f"{context['message']}: {context.get('exception')!r}"


class _AnyDatetime(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, datetime)


class _VirtualDatetime(datetime, metaclass=_AnyDatetime):
    """What the library takes for ``datetime``: its ``now`` is the wall clock of the process that asks."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]  # a plain one, as msgspec needs
        return wall_clock().astimezone(tz)


def wall_clock() -> datetime:
    """Return what the wall clock of the running process shows."""
    now = asyncio.get_running_loop().time()
    return EPOCH + timedelta(seconds=now + wall_clock_error.get()(now))


@contextlib.contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Make the library's clocks, random numbers and ids depend on the loop and on the seed alone; it logs nothing."""
    ApprovalTicket.from_json(
        ApprovalTicket.for_operation("x", user_id="AB").to_json()
    )  # msgspec resolves types on first use
    modules = (aiokeyless.client, aiokeyless.ticket, aiokeyless._waits.poller)
    state, logger = random.getstate(), logging.getLogger("aiokeyless")
    with contextlib.ExitStack() as patches:
        patches.callback(random.setstate, state)
        patches.callback(logger.setLevel, logger.level)
        random.seed(seed)
        logger.setLevel(logging.CRITICAL)
        for module in modules:
            patches.enter_context(mock.patch.object(module, "datetime", _VirtualDatetime))
        clock = SimpleNamespace(time=lambda: wall_clock().timestamp())
        patches.enter_context(mock.patch.object(aiokeyless._http.protocol, "time", clock))
        ids = SimpleNamespace(uuid4=lambda: uuid.UUID(int=random.getrandbits(128), version=4))
        patches.enter_context(mock.patch.object(aiokeyless.client, "uuid", ids))
        yield
