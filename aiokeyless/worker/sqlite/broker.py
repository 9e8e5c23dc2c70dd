"""`SqliteBroker`: the file as a broker for workers and applications, and the thread that does all its work."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from aiokeyless.errors import ConfigurationError, ConflictError
from aiokeyless.events import Inspection
from aiokeyless.worker.batches import Batches
from aiokeyless.worker.broker import Claim, ExchangeResult, NewRequest, OutcomeDelivery, UnreadOutcome, public_errors
from aiokeyless.worker.messages import ApprovalEvent, Message
from aiokeyless.worker.tables import Chore, TableBroker, check_service, row_of

from .schema import MEMORY
from .store import PutOff, Store, StoreCall, Unread

T = TypeVar("T")

_CHECKS_EVERY: Final = 0.1  # seconds between two checks for changes by other processes
_TAKES_EVERY: Final = 0.02  # seconds between two takes, which gather due requests
_REPAIRS_EVERY: Final = 10.0  # seconds
_CLEANS_EVERY: Final = 3600.0  # seconds
_SHORTEST: Final = 0.001  # seconds: a shorter timer may fire before the clock moves
_RESOLUTION: Final = 1e-6  # seconds by which a timer may be early


class SqliteBroker(TableBroker):
    """A broker in a SQLite file, for the workers and applications of one machine.

    The file is the broker's own. If it is missing, the broker makes it, for this user alone. Several processes share
    it, and one object serves all workers and applications of an event loop.

    Args:
        path: The file; or ``":memory:"``, for tests. Then the object itself is the broker, its clock is the event
            loop's, which a test may move, and nothing survives `aclose`.

    Example:
        >>> async with SqliteBroker("keyless.db") as broker:
        ...     await submit_approval(broker, "C0FFEE", operation_id="payment-7")
        ...     async with next_outcome(broker, "shop") as event:
        ...         print(event.outcome)
    """

    def __init__(self, path: Path | str) -> None:
        super().__init__()
        self._path = ""
        self._path = os.fspath(path)
        if not self._path:
            raise ConfigurationError("broker must name a file, such as sqlite:keyless.db", argument="broker")
        self.system = "sqlite"
        self.destination: str = self._path
        self._is_open = False
        self._store: Store
        self._clock: Callable[[], datetime]
        self._thread: ThreadPoolExecutor | None = None  # none for a broker in memory
        self._batches: Batches[StoreCall | PutOff, Any] = Batches(self._execute)
        self._due = _Changes()  # of requests
        self._decided = _Changes()  # of outcomes
        self._take_from = 0.0

    def __repr__(self) -> str:
        return f"<SqliteBroker {self._path}>"

    async def open(self) -> None:
        if self._is_open:
            raise ConfigurationError("the broker is open already")
        loop = asyncio.get_running_loop()
        if self._path == MEMORY:
            origin = datetime.now(UTC) - timedelta(seconds=loop.time())
            self._clock = lambda: origin + timedelta(seconds=loop.time() + _RESOLUTION)
        else:
            self._clock = lambda: datetime.now(UTC)
            self._thread = ThreadPoolExecutor(1, "aiokeyless-sqlite")
        try:
            known = self.request_version
            with public_errors():
                self._store = await self._run(lambda: Store(self._path, lambda: self._clock().timestamp(), known))
            self._is_open = True
        finally:
            if not self._is_open and self._thread is not None:
                self._thread.shutdown(wait=False)

    async def aclose(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        self._due.notify()
        self._decided.notify()
        await self._end_tasks()
        await self._batches.aclose()
        await self._run(self._store.close)
        if self._thread is not None:
            self._thread.shutdown(wait=False)

    def now(self) -> datetime:
        return self._clock()

    # -- for applications

    async def submit(self, new: NewRequest) -> bool:
        is_duplicate = await self._do(lambda store: store.submit(new), lasting=True)
        if is_duplicate is None:
            raise ConflictError(
                f"operation_id {new.request.operation_id!r} belongs to a different request: choose a new one"
            )
        self._due.notify()
        return is_duplicate

    async def next_outcome(self, reader: str) -> OutcomeDelivery:
        while True:
            changed = self._decided.next
            due = await self._read(lambda store: store.next_unread(reader))
            now = self._clock().timestamp()
            if due is not None and due <= now:
                unread = await self._do(lambda store: store.take_unread(reader))
                if unread is not None:
                    return _Outcome(unread, self._do, self._decided)
            else:
                await self._wait_for(changed, None if due is None else due - now)

    # -- for workers

    async def prepare(self, *, lease: float, service: str) -> float:
        self._check_open()
        if service:
            with public_errors():
                stored = await self._do(lambda store: store.serve(service))
            check_service(stored, service, self._path)
        return self._keep_house(lease)

    async def take(self, up_to: int, within: float, *, untried: int | None = None) -> Sequence[Message]:
        loop = asyncio.get_running_loop()
        until = loop.time() + within
        while True:
            changed = self._due.next
            if self._thread is not None and (pause := self._take_from - loop.time()) > 0:
                await asyncio.sleep(pause)
            due = await self._read(Store.next_due)
            now = self._clock().timestamp()
            left = until - loop.time()
            if due is not None and due <= now:
                self._take_from = loop.time() + _TAKES_EVERY
                messages = await self._take_or_give_back(
                    self._do(lambda store: store.take(up_to, self._lease, untried=untried))
                )
                if messages:
                    return messages
                due = None  # another worker was faster
            if left <= 0:
                return ()
            await self._wait_for(changed, left if due is None else min(left, due - now))

    async def take_overdue(self, up_to: int, grace: float) -> Sequence[Message]:
        return await self._take_or_give_back(self._do(lambda store: store.take_overdue(up_to, self._lease, grace)))

    async def put_off(self, message: Message, delay: float, result: ExchangeResult) -> None:
        await self._batches.call(PutOff(row_of(message), message.number, delay, result))
        self._due.notify()

    async def decide(self, message: Message, event: ApprovalEvent) -> bool:
        data = msgspec.json.encode(event)
        is_stored = await self._do(lambda store: store.decide(row_of(message), event.outcome.value, data), lasting=True)
        self._decided.notify()
        return is_stored

    async def claim(self, message: Message) -> Claim:
        return await self._do(lambda store: store.claim(row_of(message), message.number), lasting=True)

    async def has_claim(self, message: Message) -> bool:
        return await self._do(lambda store: store.was_asked(row_of(message)))

    async def unclaim(self, message: Message) -> bool:
        return await self._do(lambda store: store.unclaim(row_of(message), message.number), lasting=True)

    async def inspect(self) -> Inspection:
        inspection = await self._read(Store.inspect)
        return msgspec.structs.replace(inspection, problems=tuple(self._failing_chores()))

    async def list_unread(self, up_to: int) -> Sequence[UnreadOutcome]:
        return await self._read(lambda store: store.list_unread(up_to))

    # -- the thread

    def _check_open(self) -> None:
        if not self._is_open:
            raise ConfigurationError("the broker is not open: use it in 'async with SqliteBroker(...) as broker'")

    async def _run(self, do: Callable[[], T]) -> T:
        """Do something in the file's thread; a file in memory has none."""
        if self._thread is None:
            return do()
        return await asyncio.get_running_loop().run_in_executor(self._thread, do)

    async def _execute(self, calls: list[StoreCall | PutOff]) -> list[Any]:
        return await self._run(lambda: self._store.execute(calls))

    async def _read(self, do: Callable[[Store], T]) -> T:
        """Read something from the file, in no transaction."""
        self._check_open()
        return await self._run(lambda: do(self._store))

    async def _do(self, do: Callable[[Store], T], *, lasting: bool = False) -> T:
        """Do something with the file, in one transaction with the other calls of this turn."""
        self._check_open()
        result: T = await self._batches.call(StoreCall(do, lasting))
        return result

    async def _wait_for(self, changed: asyncio.Event, most: float | None) -> None:
        """Wait for a change by this process, or until the next check for changes by others."""
        if self._thread is not None:
            most = _CHECKS_EVERY if most is None else min(most, _CHECKS_EVERY)
        if most is not None:
            most = max(most, _SHORTEST)
        with suppress(TimeoutError):
            async with asyncio.timeout(most):
                await changed.wait()

    def _chores(self) -> tuple[Chore, ...]:
        return (
            Chore("correcting due times", _REPAIRS_EVERY, self._repair),
            Chore("removing old rows", _CLEANS_EVERY, self._clean),
        )

    # Each in a transaction of its own, so that a chore that fails is no failure of another one, or of a delivery.

    async def _repair(self) -> None:
        await self._execute([StoreCall(lambda store: store.repair(self._lease))])
        self._due.notify()
        self._decided.notify()

    async def _clean_page(self, after: int) -> int | None:
        last: int | None
        [last] = await self._execute([StoreCall(lambda store: store.clean(after))])
        return last


class _Changes:
    """Wakes the tasks that wait for a change by this process."""

    def __init__(self) -> None:
        self.next = asyncio.Event()

    def notify(self) -> None:
        """Wake the tasks that wait now, and none that come later."""
        self.next.set()
        self.next = asyncio.Event()


class _Outcome(OutcomeDelivery):
    __slots__ = ("_decided", "_do", "_unread")

    def __init__(self, unread: Unread, do: Callable[..., Awaitable[Any]], decided: _Changes) -> None:
        self._unread = unread
        self._do = do
        self._decided = decided
        self.data = unread.data
        self.place = f"request-{unread.row.id}"

    async def mark_handled(self) -> None:
        await self._do(lambda store: store.forget_unread(self._unread), lasting=True)

    async def put_off(self, delay: float | None = None) -> None:
        await self._do(lambda store: store.put_off_unread(self._unread, delay))
        self._decided.notify()
