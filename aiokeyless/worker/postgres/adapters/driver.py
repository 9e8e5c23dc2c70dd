"""What requests and outcomes need of a connection, whatever its driver."""

from __future__ import annotations

import asyncio
import inspect
import re
import socket
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar, Final
from weakref import WeakKeyDictionary

from aiokeyless.worker.broker import UnavailableError
from aiokeyless.worker.postgres.floors import Floor
from aiokeyless.worker.postgres.names import READS_EVERY

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

#: A parameter of a statement of ours.
PARAMETER: Final = re.compile(r"\$(\d)")
_IDLE: Final = 0  # libpq's PQTRANS_IDLE
_FLOORS: Final[WeakKeyDictionary[object, defaultdict[tuple[str, str], Floor]]] = WeakKeyDictionary()


class Driver(ABC):
    """A connection or a session of an application, and what its driver does with it.

    If it `blocks`, it is for `aiokeyless.sync`. Then its coroutines await nothing: each ends at its first step, in the
    caller's thread.
    """

    errors: tuple[type[Exception], ...]  # that it raises
    answers_within: ClassVar[float] = 30.0  # seconds in which an outcome begins or ends, unless it blocks
    ends_within: ClassVar[float] = 5.0  # the same, for the end of a transaction that is not committed
    example: ClassVar[str]  # how an application begins a transaction
    savepoint: ClassVar[str]  # what an application uses for statements that may fail

    def __init__(self, raw: Any, schema: str, *, blocks: bool, owner: object = None) -> None:
        self.raw: Any = raw  # the driver's own connection; None if there is none yet
        self.schema = schema
        self.blocks = blocks
        # From when each reader looks for outcomes, by schema and reader.
        self.floors: defaultdict[tuple[str, str], Floor] = _floors_of(raw if owner is None else owner)

    @abstractmethod
    async def execute(self, statement: str, *arguments: object) -> tuple[Any, ...] | None:
        """Execute a statement of the schema, and return its first row, if it has rows."""

    @abstractmethod
    async def begin(self) -> None:
        """Begin a transaction: READ COMMITTED, because it must see a commit for which it has waited."""

    @abstractmethod
    async def commit(self) -> None:
        """Commit the transaction that was begun."""

    @abstractmethod
    async def roll_back(self) -> None:
        """Roll back the transaction that was begun, if there is one."""

    def is_in_transaction(self) -> bool:
        """Return whether a transaction has begun. A lost connection is in none, and says so at its next use."""
        return self.is_open() and not self.is_lost()

    async def joins_transaction(self) -> bool:
        """Return whether the next statement is in a transaction that the application must commit."""
        if not self.is_open():
            await self.execute("SELECT 1")  # most drivers begin at the first statement, if they do
        return self.is_open()

    def is_open(self) -> bool:
        """Return whether the driver's own connection is in a transaction."""
        if self.raw is None:
            return False
        if hasattr(self.raw, "is_in_transaction"):
            return bool(self.raw.is_in_transaction())
        return bool(self.raw.info.transaction_status != _IDLE)

    def is_lost(self) -> bool:
        """Return whether the driver's own connection has ended, or there is none yet."""
        if self.raw is None:
            return True
        return bool(self.raw.is_closed() if hasattr(self.raw, "is_closed") else self.raw.closed)

    async def flush(self) -> None:  # noqa: B027  # only a session has something to send
        """Send what the application has not sent yet, before the transaction is checked."""

    async def release(self) -> None:  # noqa: B027  # an application keeps its connection
        """Do what is to be done once an outcome is handled or put off."""

    async def execute_alone(self, statement: str, *arguments: object) -> None:
        """Execute a statement in a transaction of its own."""
        await self.begin()
        try:
            await self.execute(statement, *arguments)
        except BaseException:  # after a cancellation, too, no transaction may stay open
            await self.roll_back()
            raise
        await self.commit()

    async def pause(self) -> None:
        """Wait before the next poll for an outcome."""
        if self.blocks:
            time.sleep(READS_EVERY)  # noqa: ASYNC251  # see `blocks`
        else:
            await asyncio.sleep(READS_EVERY)

    async def complete(self, step: Coroutine[Any, Any, None]) -> None:
        """Do a step to its end, even if the caller is cancelled, so that no connection stays in a transaction."""
        if self.blocks:
            await step
            return
        task = asyncio.ensure_future(step)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # retrieves a late error
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            with self.limit(self.ends_within):
                while not task.done():
                    with suppress(asyncio.CancelledError):  # anyio's scopes cancel each await
                        await asyncio.wait({task})
            raise

    @contextmanager
    def limit(self, within: float) -> Iterator[None]:
        """Cut a connection that takes longer, perhaps because its host is gone. The server ends the transaction."""
        if self.blocks:
            yield
            return
        loop = asyncio.get_running_loop()
        errors: tuple[type[Exception], ...] = (*self.errors, UnavailableError)
        giving_up = loop.call_later(within, self._cut)
        try:
            yield
        except errors:
            if loop.time() < giving_up.when():
                raise
            raise UnavailableError(f"no answer within {within:g} s") from None
        finally:
            giving_up.cancel()

    def _cut(self) -> None:
        if hasattr(self.raw, "terminate"):
            self.raw.terminate()
        elif not self.is_lost():
            lost = socket.socket(fileno=self.raw.fileno())
            try:
                lost.shutdown(socket.SHUT_RDWR)
            finally:
                lost.detach()  # the driver closes it


async def result_of(returned: Any) -> Any:
    """Return what a driver's method has returned, or what that is awaited for."""
    return await returned if inspect.isawaitable(returned) else returned


def _floors_of(owner: object) -> defaultdict[tuple[str, str], Floor]:
    """Return the floors of a connection, which an application passes anew for each outcome."""
    try:
        return _FLOORS.setdefault(owner, defaultdict(Floor))
    except TypeError:  # a pool of asyncpg has a new object for each use of a connection
        return defaultdict(Floor)
