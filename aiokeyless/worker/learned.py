"""What a worker's schedule has learned, in a file, so that a restart does not forget it.

The file is one line of JSON, as `wait_adaptive.to_json` returns it. It is replaced as a whole, or not at all.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aiokeyless.errors import ConfigurationError
from aiokeyless.schedule import wait_adaptive

from .logs import log

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

_EVERY: Final = 60.0  # seconds between two saves
_LARGEST: Final = 64 << 10  # bytes: a state has about two thousand


class LearnedFile:
    """A file that keeps what one worker's schedule has learned.

    Args:
        path: The file, which need not exist yet; its folder must.
    """

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path).resolve()  # where it is a link, the link stays
        self._saved = ""

    def load(self) -> wait_adaptive:
        """Return a schedule with what was learned, or a new one where there is no file yet.

        Raises:
            ConfigurationError: The file cannot be read, or holds something else: it is never overwritten then.
        """
        try:
            with self._path.open("rb") as file:
                return wait_adaptive.from_json(file.read(_LARGEST))
        except FileNotFoundError:
            return wait_adaptive()
        except OSError as error:
            raise _unusable(f"what was learned cannot be read from {self._path}: {error.strerror}") from None
        except ConfigurationError as error:
            reason = str(error).partition(";")[0]
            raise _unusable(f"{self._path} holds something else: {reason}; move it away to start anew") from None

    @asynccontextmanager
    async def keeping(self, schedule: wait_adaptive) -> AsyncGenerator[None]:
        """Save a schedule at once, every minute, and at the end.

        A save that fails later costs no approval: it is logged, and tried again.

        Raises:
            ConfigurationError: The file cannot be written.
        """
        try:
            await self._save(schedule)
        except OSError as error:
            raise _unusable(f"what is learned cannot be saved to {self._path}: {error.strerror}") from None
        ending = asyncio.Event()
        saving = asyncio.create_task(self._save_until(ending, schedule))
        try:
            yield
        finally:
            ending.set()  # and no cancellation: the thread of a save that is under way would overwrite the last one
            await asyncio.wait([saving])

    async def _save_until(self, ending: asyncio.Event, schedule: wait_adaptive) -> None:
        is_last = False
        while not is_last:
            with suppress(TimeoutError):
                async with asyncio.timeout(_EVERY):
                    await ending.wait()
            is_last = ending.is_set()
            try:
                await self._save(schedule)
            except OSError as error:
                log(logging.WARNING, "learned.not_saved", {"path": str(self._path), "error": error.strerror})

    async def _save(self, schedule: wait_adaptive) -> None:
        state = schedule.to_json()
        if state != self._saved:
            await asyncio.to_thread(_replace, self._path, state)
            self._saved = state


def _unusable(message: str) -> ConfigurationError:
    return ConfigurationError(message, argument="learned")


def _replace(path: Path, text: str) -> None:
    """Write a file beside it, and then rename that: a crash at any moment leaves the old one or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="ascii") as file:  # noqa: PTH123  # it is open already
            file.write(f"{text}\n")
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except OSError:
        Path(name).unlink()
        raise
