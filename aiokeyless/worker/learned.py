"""What a worker's schedule has learned, kept outside of it, so that a restart does not forget it.

In a file it is one worker's own, and replaced as a whole or not at all. In a bucket of the broker the fleet shares it:
each worker adds what it has observed to what the others have, as if one schedule had observed it all.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import tempfile
from abc import ABC, abstractmethod
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from aiokeyless._rules.backoff import error_delay
from aiokeyless.errors import BrokerError, ConfigurationError, KeylessError
from aiokeyless.schedule import restore, wait_adaptive

from .engine import EngineError, RefusedError
from .logs import log

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from .engine import Engine, Learned

_EVERY: Final = 60.0  # seconds between two saves
_LARGEST: Final = 64 << 10  # bytes: a state has about two thousand
_SCHEME: Final = "kv://"
_BUCKET: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
_ATTEMPTS: Final = 5  # to write what no other worker has written meanwhile
_MOST_FRESH: Final = 10_000  # observations that are kept while they cannot be written


def keeper(learned: Path | str) -> Keeper:
    """Return what keeps a schedule: in the bucket of ``kv://BUCKET``, else in a file.

    Raises:
        ConfigurationError: The bucket cannot be named so, or the file cannot be read, or holds something else.
    """
    if isinstance(learned, str) and learned.startswith(_SCHEME):
        return LearnedBucket(learned.removeprefix(_SCHEME))
    return LearnedFile(learned)


class Keeper(ABC):
    """Keeps what one schedule has learned.

    Attributes:
        schedule: The schedule.
    """

    schedule: wait_adaptive

    @asynccontextmanager
    async def keeping(self, engine: Engine) -> AsyncGenerator[None]:
        """Save at once, every minute, and at the end.

        A save that fails later costs no approval: it is logged, and tried again.

        Args:
            engine: The broker, which is connected.

        Raises:
            KeylessError: The first save has failed.
        """
        await self._save(engine)
        ending = asyncio.Event()
        saving = asyncio.create_task(self._save_until(ending, engine))
        try:
            yield
        finally:
            ending.set()  # and no cancellation: the thread of a save that is under way would overwrite the last one
            await asyncio.wait([saving])

    async def _save_until(self, ending: asyncio.Event, engine: Engine) -> None:
        is_last = False
        while not is_last:
            with suppress(TimeoutError):
                async with asyncio.timeout(_EVERY):
                    await ending.wait()
            is_last = ending.is_set()
            try:
                await self._save(engine)
            except KeylessError as error:
                log(logging.WARNING, "learned.not_saved", {"error": str(error)})
            except Exception as error:  # noqa: BLE001  # logged whole: a bug costs one save, and not all later ones
                log(logging.ERROR, "learned.not_saved", {"error": f"{type(error).__name__}: {error}"}, exc_info=True)

    @abstractmethod
    async def _save(self, engine: Engine) -> None:
        """Save what was learned.

        Raises:
            KeylessError: It was not saved.
        """


class LearnedFile(Keeper):
    """A file that keeps what one worker's schedule has learned.

    Args:
        path: The file, which need not exist yet; its folder must.

    Raises:
        ConfigurationError: The file cannot be read, or holds something else: it is not overwritten then.
    """

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path).resolve()  # where it is a link, the link stays
        self._saved = ""
        try:
            with self._path.open("rb") as file:
                self.schedule: wait_adaptive = wait_adaptive.from_json(file.read(_LARGEST))
        except FileNotFoundError:
            self.schedule = wait_adaptive()
        except OSError as error:
            raise _unusable(f"what was learned cannot be read from {self._path}: {error.strerror}") from None
        except ConfigurationError as error:
            raise _unusable(
                f"{self._path} holds something else: {_reason(error)}; move it away to start anew"
            ) from None

    async def _save(self, engine: Engine) -> None:  # noqa: ARG002  # it needs no broker
        state = self.schedule.to_json()
        if state == self._saved:
            return
        try:
            await asyncio.to_thread(_replace, self._path, state)
        except OSError as error:
            raise _unusable(f"what is learned cannot be saved to {self._path}: {error.strerror}") from None
        self._saved = state


class _Unanswered(NamedTuple):
    """A write of which it is unknown whether it was stored.

    Attributes:
        revision: Of the state that it was to replace.
        observations: How many it added.
    """

    revision: int
    observations: int


class LearnedBucket(Keeper):
    """A bucket of the broker in which a fleet shares what its schedules have learned.

    What a worker has observed is counted once. It may be lost where the answer to its write is: if another worker wrote
    in its place before it is read again. That is a minute of one worker.

    Args:
        bucket: Its name.

    Raises:
        ConfigurationError: No bucket has such a name.
    """

    def __init__(self, bucket: str) -> None:
        if not _BUCKET.fullmatch(bucket):
            raise _unusable(f"{_SCHEME} must name a bucket: 1 to 128 letters, digits, '-' and '_', not {bucket!r:.80}")
        self._bucket = bucket
        self._recording = _Recording()
        self._unanswered: _Unanswered | None = None
        self.schedule: wait_adaptive = self._recording

    async def _save(self, engine: Engine) -> None:
        try:
            for attempt in range(1, _ATTEMPTS + 1):
                if await self._merge(engine):
                    return
                if attempt < _ATTEMPTS:
                    # At random: the workers of a fleet that were started together save at the same moments.
                    await asyncio.sleep(error_delay(attempt))
        except EngineError as error:
            raise BrokerError(f"what the fleet learns cannot be kept in the bucket {self._bucket}: {error}") from None
        raise BrokerError(f"what the fleet learns was not kept in the bucket {self._bucket}: others kept writing")

    async def _merge(self, engine: Engine) -> bool:
        """Add what this worker has observed to what the fleet has learned; False where another worker was faster."""
        kept = await engine.read_learned(self._bucket)
        self._settle(kept)
        fleets = wait_adaptive()
        try:
            if kept.state is not None:
                restore(fleets, kept.state)
        except ConfigurationError as error:
            raise _unusable(
                f"the bucket {self._bucket} holds something else under {engine.fleet_name}: {_reason(error)}; delete "
                "that key to start anew"
            ) from None
        fresh = [*self._recording.fresh]
        for after, until in fresh:
            fleets.observe(after, until)
        state = fleets.to_json()
        if fresh and not await self._write(engine, state, _Unanswered(kept.revision, len(fresh))):
            return False
        del self._recording.fresh[: len(fresh)]
        self._recording.adopt(state)
        return True

    async def _write(self, engine: Engine, state: str, write: _Unanswered) -> bool:
        self._unanswered = write
        try:
            is_written = await engine.write_learned(self._bucket, state.encode(), write.revision)
        except RefusedError:
            self._unanswered = None
            raise
        self._unanswered = None
        return is_written

    def _settle(self, kept: Learned) -> None:
        """Count no observation twice: where a state was written since, the write that got no answer is taken for it."""
        if self._unanswered is not None and self._unanswered.revision != kept.revision:
            del self._recording.fresh[: self._unanswered.observations]
        self._unanswered = None


class _Recording(wait_adaptive):
    """A schedule that remembers what it has observed until that is written."""

    def __init__(self) -> None:
        super().__init__()
        self.fresh: list[tuple[float, float | None]] = []

    def observe(self, after: float, until: float | None) -> None:
        super().observe(after, until)
        if len(self.fresh) < _MOST_FRESH:
            self.fresh.append((after, until))

    def adopt(self, state: str) -> None:
        """Go on from what the fleet has learned, and from what was observed while that was written."""
        restore(self, state)
        for after, until in self.fresh:
            super().observe(after, until)


def _unusable(message: str) -> ConfigurationError:
    return ConfigurationError(message, argument="learned")


def _reason(error: ConfigurationError) -> str:
    """Return what is wrong with a state, without the advice for who passed it."""
    return str(error).partition(";")[0]


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
