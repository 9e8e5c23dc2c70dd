"""Waiting in tests, for something that another program, thread or task does."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING, Final

from benchmarks import programs

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE: Final = 180.0  # seconds, against hangs only: what takes one may take minutes on a busy machine

until: Final = partial(programs.until, within=PATIENCE)
"""Waits until a condition holds. A moved clock moves meanwhile."""


async def spin_until(condition: Callable[[], object]) -> None:
    """Let the loop run until the condition holds. A moved clock stands still meanwhile."""
    # Not a number of turns: uvloop makes a thousand of them before a socket has answered.
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        await asyncio.sleep(0)
