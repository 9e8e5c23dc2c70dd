"""`PostgresBroker`: the schema as a broker for workers, and for applications without their own connection."""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

import asyncpg
import msgspec

from aiokeyless.errors import ConfigurationError
from aiokeyless.events import Inspection
from aiokeyless.models import Secret
from aiokeyless.worker.batches import Batches
from aiokeyless.worker.broker import (
    MOST_UNREAD,
    Claim,
    ExchangeResult,
    NewRequest,
    OutcomeDelivery,
    UnavailableError,
    UnreadOutcome,
    public_errors,
    without_frames,
)
from aiokeyless.worker.clock import BrokerClock
from aiokeyless.worker.logs import log
from aiokeyless.worker.messages import ApprovalEvent, Message
from aiokeyless.worker.tables import Chore, Row, TableBroker, check_service, message_of, row_of, time_of

from .adapters.asyncpg import ERRORS, Adapter
from .failures import broker_errors
from .floors import Floor
from .migrations import prepare
from .names import SCHEMA, check_schema, in_schema
from .transactions import store_request, take_outcome

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    from .adapters.asyncpg import Connection

    Pool: TypeAlias = asyncpg.Pool[Any]
else:
    Pool = asyncpg.Pool  # no generic class at run time

T = TypeVar("T")

#: The beginning of a URL that names a driver, as SQLAlchemy's do.
_SQLALCHEMYS: Final = re.compile(r"^(\w+)\+\w+(?=:)")
_CONNECTIONS: Final = 20  # at most; half of them for outcomes in progress
_IDLE_FOR: Final = 30.0  # seconds, at most: a network forgets idle connections, some after minutes
_ANSWER_WITHIN: Final = 10.0  # seconds
_CLOSES_WITHIN: Final = 5.0  # seconds until what is still asked of the database is cut
_ENDS_WITHIN: Final = 1.0  # seconds until a cancellation is repeated
_TIDIES_WITHIN: Final = 120.0  # seconds: after a crash, one statement restores all waiting requests
#: Errors after which a transaction is retried. Nothing of it was done, and the next attempt may succeed.
_PASSING: Final = (asyncpg.DeadlockDetectedError, asyncpg.LockNotAvailableError, asyncpg.SerializationError)
_ATTEMPTS: Final = 5  # of a transaction that conflicts with another
#: Errors of a server that stores nothing: it is read-only, or a standby.
_READ_ONLY: Final = (asyncpg.ReadOnlySQLTransactionError, asyncpg.FeatureNotSupportedError)
_EXPIRES_EVERY: Final = 5.0  # seconds
_ACQUIRES_AGAIN: Final = 0.1  # seconds, if the server has too many connections
_TAKES_EVERY: Final = 0.1  # seconds between two takes, if the last one got all due requests
_TAKES_AGAIN: Final = 0.02  # seconds between two takes, if there were more
_RESTORES_EVERY: Final = 10.0  # seconds
_WELCOMES_EVERY: Final = 1.0  # seconds
_CLEANS_EVERY: Final = 3600.0  # seconds
#: The housekeeping's own limits, in place of those that an administrator sets for all sessions. A function could not
#: set them, since the server reads them when its statement begins.
_LIMITS: Final = f"""
    SET LOCAL statement_timeout = '{_TIDIES_WITHIN:g}s';
    SET LOCAL idle_in_transaction_session_timeout = '30s';
    SELECT pg_catalog.set_config('transaction_timeout', '0', true) -- which PostgreSQL has from 17 on
    WHERE pg_catalog.current_setting('transaction_timeout', true) IS NOT NULL
"""  # noqa: S608  # a number of our own
_ADVICE: Final = "who is between can read requests and forge approvals: add sslmode=verify-full to the URL"
_TABLES: Final = ("request", "waiting", "outcome", "unread", "reader", "service")


class PostgresBroker(TableBroker):
    """A broker in a schema of a PostgreSQL database, which may be that of the application.

    An application with its own connection needs no broker object: see `PostgresConnection`.

    Args:
        database: A URL such as ``postgresql://user@host/database``, or SQLAlchemy's; or an asyncpg pool, which
            stays yours.
        schema: The schema. A worker makes or migrates it, if its login has the rights. Default: ``keyless``.

    Raises:
        ConfigurationError: An argument is wrong.

    Example:
        >>> async with PostgresBroker("postgresql://localhost/shop") as broker:
        ...     await submit_approval(broker, "C0FFEE", operation_id="payment-7")
    """

    def __init__(self, database: str | Pool, schema: str = SCHEMA) -> None:
        super().__init__()
        self.system = "postgresql"
        self._schema = schema
        self._database = Secret(database) if isinstance(database, str) else database
        del database  # before anything is raised: error reporters print local variables
        self.destination: str = check_schema(schema)
        if not isinstance(self._database, Secret | asyncpg.Pool):
            raise ConfigurationError(
                f"broker must be a URL or an asyncpg pool, not {type(self._database).__name__}", argument="broker"
            )
        self._pool: Pool | None = None  # None while it is not open
        self._outcomes: asyncio.Semaphore  # connections for outcomes in progress
        self._calls: asyncio.Semaphore  # connections for all other calls, which wait for one without a limit
        self._long_calls: asyncio.Semaphore  # those of the housekeeping, which leaves one of them to the others
        self._closed_by = math.inf  # of the loop's clock: nothing is asked of the database for longer
        self._cuts: set[Callable[[], None]] = set()  # of what is asked of it now
        self._expires_from = -math.inf  # of the loop's clock
        self._clock = BrokerClock()
        self._take_from = 0.0  # of the loop's clock
        self._floor = Floor()  # of takes
        self._floors: defaultdict[tuple[str, str], Floor] = defaultdict(Floor)  # of readers
        self._put_offs = Batches(self._put_off)
        self._decisions = Batches(self._decide)
        self._claims = Batches(self._claim)
        self._held = Batches(self._fetch_asked)

    def __repr__(self) -> str:
        return f"<PostgresBroker, schema {self._schema!r}>"

    async def open(self) -> None:
        if self._pool is not None:
            raise ConfigurationError("the broker is open already")
        database = self._database
        pool = database if isinstance(database, asyncpg.Pool) else await without_frames(self._connect(database))
        half = max(1, pool.get_max_size() // 2)
        self._outcomes, self._calls = asyncio.Semaphore(half), asyncio.Semaphore(half)
        self._long_calls = asyncio.Semaphore(max(1, half - 1))
        self._pool, self._closed_by = pool, math.inf

    async def _connect(self, url: Secret) -> Pool:
        try:
            with public_errors("the database cannot be reached: "), broker_errors(self._schema, ERRORS):
                # No cache of prepared statements, and each statement in a transaction: so a pooler such as pgbouncer
                # may use any of its connections for the next one. No minimum of open connections: a pool with one logs
                # a traceback whenever the database is away.
                pool = await asyncpg.create_pool(
                    _SQLALCHEMYS.sub(r"\1", url.reveal()),
                    min_size=0,
                    max_size=_CONNECTIONS,
                    max_inactive_connection_lifetime=_IDLE_FOR,
                    statement_cache_size=0,
                    timeout=_ANSWER_WITHIN,
                    reset=_reset_nothing,
                    server_settings={"application_name": "aiokeyless"},
                )
                connection = await self._acquire(pool)  # checks that the database lets this user in
                _warn_of_plaintext(connection)
                await _release(pool, connection)
                return pool
        except ValueError:  # its text may quote a part of the password
            raise ConfigurationError(
                "broker must be the URL of a database; in its password, write %2F for a /, %3F for a ? and %23 for a #",
                argument="broker",
            ) from None

    async def aclose(self) -> None:
        if self._pool is None:
            return
        loop = asyncio.get_running_loop()
        self._closed_by = loop.time() + _CLOSES_WITHIN
        cutting = loop.call_at(self._closed_by, self._cut_all)
        try:
            await self._end_tasks()
            for batches in (self._put_offs, self._decisions, self._claims, self._held):
                await batches.aclose()
        finally:
            cutting.cancel()
        pool, self._pool = self._pool, None
        if pool is not self._database:
            pool.terminate()  # calls that wait for an outcome or hold one fail

    def now(self) -> datetime:
        return self._clock.now()

    async def empty_for_tests(self) -> None:
        """Remove all rows, if there is a schema. For tests alone: nothing asks back."""
        if await self._fetch("SELECT FROM pg_catalog.pg_namespace WHERE nspname = $1", self._schema):
            await self._fetch("TRUNCATE " + ", ".join(f"{{0}}.{name}" for name in _TABLES))

    # -- for applications

    async def submit(self, new: NewRequest) -> bool:
        return await self._in_transaction(lambda connection: store_request(Adapter(connection, self._schema), new))

    async def next_outcome(self, reader: str) -> OutcomeDelivery:
        """See `ApplicationSide`. The outcome is in a transaction until the body ends; the body itself is in none."""
        while True:
            driver, outcome = await self._acquire_driver(), None
            try:
                outcome = await take_outcome(driver, reader)
            finally:
                if outcome is None:
                    await driver.release()
            if outcome is not None:
                return outcome
            await driver.pause()

    async def _acquire_driver(self) -> _PooledDriver:
        pool = self._open_pool()
        await self._outcomes.acquire()
        try:
            with broker_errors(self._schema, ERRORS):
                connection = await self._acquire(pool)
        except BaseException:  # after a cancellation, too, the place is free again
            self._outcomes.release()
            raise
        driver = _PooledDriver(pool, connection, self._schema, self._outcomes, partial(self._expire, pool))
        driver.floors = self._floors
        return driver

    # -- for workers

    async def prepare(self, *, lease: float, service: str) -> float:
        with public_errors(f"the schema {self._schema!r} cannot be prepared: "):
            await self._in_transaction(lambda connection: prepare(connection, self._schema), patience=_TIDIES_WITHIN)
            await self._tidy("SELECT {}.restore()")
            if service:
                ((stored,),) = await self._fetch("SELECT {}.serve($1)", service)
                check_service(stored, service, f"the schema {self._schema!r}")
            await self._measure_time()
        return self._keep_house(lease)

    async def take(self, up_to: int, within: float, *, untried: int | None = None) -> Sequence[Message]:
        loop = asyncio.get_running_loop()
        until = loop.time() + within
        while True:
            pause = self._take_from - loop.time()
            if loop.time() + pause > until:
                await asyncio.sleep(until - loop.time())
                return ()
            await asyncio.sleep(pause)
            began = loop.time()
            messages = await self._take_or_give_back(self._take(up_to, untried))
            self._take_from = began + (_TAKES_AGAIN if len(messages) >= up_to else _TAKES_EVERY)
            if messages:
                return messages

    async def _take(self, up_to: int, untried: int | None) -> list[Message]:
        began = self.now().timestamp()
        with self._floor.search() as search:
            asked = up_to, self._lease, search.floor, untried, self.request_version
            rows = await self._fetch("SELECT * FROM {}.take($1, $2, $3, $4, $5)", *asked)
            if untried is None:
                search.oldest = min(began, rows[-1]["due_at"]) if len(rows) >= up_to else began
        return [message_of(row) for row in rows]

    async def take_overdue(self, up_to: int, grace: float) -> Sequence[Message]:
        return await self._take_or_give_back(self._take_overdue(up_to, grace))

    async def _take_overdue(self, up_to: int, grace: float) -> list[Message]:
        asked = up_to, self._lease, grace, self.request_version
        rows = await self._fetch("SELECT * FROM {}.take_overdue($1, $2, $3, $4)", *asked)
        return [message_of(row) for row in rows]

    async def put_off(self, message: Message, delay: float, result: ExchangeResult) -> None:
        await self._put_offs.call((*row_of(message), message.number, delay, result))

    async def _put_off(self, calls: list[tuple[Any, ...]]) -> list[None]:
        await self._fetch("SELECT {}.put_off($1, $2, $3, $4, $5)", *zip(*calls, strict=True))
        return [None] * len(calls)

    async def decide(self, message: Message, event: ApprovalEvent) -> bool:
        body = msgspec.json.encode(event).decode()
        return await self._decisions.call((*row_of(message), event.outcome.value, body))

    async def _decide(self, calls: list[tuple[Any, ...]]) -> list[bool]:
        decided = await self._fetch_rows("SELECT id, name FROM {}.decide($1, $2, $3, $4)", calls)
        # Of two decisions on one request, the first counts.
        return [decided.pop(Row(id_, name), None) is not None for id_, name, *_ in calls]

    async def claim(self, message: Message) -> Claim:
        return await self._claims.call((*row_of(message), message.number))

    async def _claim(self, calls: list[tuple[Any, ...]]) -> list[Claim]:
        began = self._clock.elapsed()
        claimed = await self._fetch_rows("SELECT id, name, was_asked, moment FROM {}.claim($1, $2, $3)", calls)
        if claimed:  # the users are asked next: not after the deadline, although this machine was paused unnoticed
            moment = max(found["moment"] for found in claimed.values())
            self._clock.compare(time_of(moment), began=began)
        claims = {row: Claim.HELD if found["was_asked"] else Claim.NEW for row, found in claimed.items()}
        return [claims.get(Row(id_, name), Claim.ANOTHERS) for id_, name, _ in calls]

    async def has_claim(self, message: Message) -> bool:
        return await self._held.call(row_of(message))

    async def _fetch_asked(self, rows: list[Row]) -> list[bool]:
        asked = await self._fetch_rows("SELECT id, name FROM {}.were_asked($1, $2)", rows)
        return [row in asked for row in rows]

    async def _fetch_rows(self, query: str, calls: Sequence[tuple[Any, ...]]) -> dict[Row, asyncpg.Record]:
        """Call a function for many requests; return what it says of each."""
        found = await self._fetch(query, *zip(*calls, strict=True))
        return {Row(record["id"], record["name"]): record for record in found}

    async def unclaim(self, message: Message) -> bool:
        rows = await self._fetch("SELECT {}.unclaim($1, $2, $3)", *row_of(message), message.number)
        is_free: bool = rows[0][0]
        return is_free

    async def inspect(self) -> Inspection:
        ((waiting, backlog, oldest_age, is_standby),) = await self._fetch("SELECT * FROM {}.inspect()")
        await self._measure_time()
        problems = ["the database is a standby, which stores nothing"] if is_standby else []
        unread: list[asyncpg.Record] = []
        try:
            unread = await self._fetch("SELECT * FROM {}.count_unread($1)", MOST_UNREAD)
        # Many readers may take it past an administrator's limit, which must not hide the rest.
        except UnavailableError as error:
            problems.append(f"unread outcomes cannot be counted: {error}")
        return Inspection(
            waiting=waiting,
            backlog=backlog,
            oldest_age=oldest_age,
            unread={reader: count for reader, count, _ in unread},
            oldest_unread_age={reader: age for reader, _, age in unread},
            clock_ahead=round(self._clock.ahead, 3),
            problems=(*problems, *self._failing_chores()),
        )

    async def list_unread(self, up_to: int) -> Sequence[UnreadOutcome]:
        found = await self._fetch("SELECT * FROM {}.list_unread($1, $2)", MOST_UNREAD, up_to)
        return [UnreadOutcome(*row) for row in found]

    # -- the database

    def _open_pool(self) -> Pool:
        if self._pool is None:
            raise ConfigurationError("the broker is not open: use it in 'async with PostgresBroker(...) as broker'")
        return self._pool

    async def _fetch(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        """Call a function of the schema in a transaction of its own."""
        called = in_schema(self._schema, query)
        return await self._in_transaction(lambda connection: connection.fetch(called, *arguments))

    async def _in_transaction(self, do: Callable[[Connection], Awaitable[T]], patience: float = _ANSWER_WITHIN) -> T:
        """Do something in a transaction of its own. Retry it if it conflicts with another one."""
        pool, loop = self._open_pool(), asyncio.get_running_loop()
        attempt = 1
        while True:
            with broker_errors(self._schema, ERRORS):
                async with self._calls:
                    connection = await self._acquire(pool)
                    with self._limit(patience, partial(_cut, connection)) as giving_up:
                        try:
                            return await _transact(connection, do)
                        except _PASSING:
                            if attempt == _ATTEMPTS:
                                raise
                        except ERRORS as error:
                            await self._expire(pool, error)
                            if loop.time() < giving_up.when():
                                raise
                            raise TimeoutError(f"no answer within {patience:g} s") from None
                        finally:
                            await _release(pool, connection)
            attempt += 1

    async def _expire(self, pool: Pool, error: Exception) -> None:
        """If the server stores nothing, replace all connections: after a failover, its name may be another's."""
        now = asyncio.get_running_loop().time()
        if isinstance(error, _READ_ONLY) and pool is not self._database and now >= self._expires_from:
            self._expires_from = now + _EXPIRES_EVERY
            await pool.expire_connections()

    async def _acquire(self, pool: Pool) -> PoolConnectionProxy[Any]:
        loop, refusal = asyncio.get_running_loop(), ""

        def cut() -> None:
            with suppress(RuntimeError):  # it is cut already
                first.reschedule(0.0)
                last.reschedule(loop.time() + _ENDS_WITHIN)

        try:
            # If the pool's own setup is cancelled, asyncpg waits for the server again; a second cancellation ends that.
            async with asyncio.timeout(None) as last, asyncio.timeout(None) as first:
                with self._limit(_ANSWER_WITHIN, cut):
                    while True:
                        try:
                            return await without_frames(pool.acquire())
                        except asyncpg.TooManyConnectionsError as error:  # until a client or this pool lets one go
                            refusal = f": {error}"
                            await asyncio.sleep(_ACQUIRES_AGAIN)
        except TimeoutError:  # nothing was asked, so nothing was refused
            raise ConnectionError(f"no connection to the database within {_ANSWER_WITHIN:g} s{refusal}") from None

    @contextmanager
    def _limit(self, patience: float, cut: Callable[[], None]) -> Iterator[asyncio.TimerHandle]:
        """Cut what takes longer than its patience, or than the broker takes to close."""
        loop = asyncio.get_running_loop()
        giving_up = loop.call_at(min(loop.time() + patience, self._closed_by), cut)
        self._cuts.add(cut)
        try:
            yield giving_up
        finally:
            giving_up.cancel()
            self._cuts.discard(cut)

    def _cut_all(self) -> None:
        for cut in self._cuts:
            cut()

    async def _measure_time(self) -> None:
        began = self._clock.elapsed()
        # Qualified: the database's owner may set the search path of all its sessions.
        rows = await self._fetch("SELECT extract(epoch FROM pg_catalog.clock_timestamp())::double precision")
        self._clock.compare(time_of(rows[0][0]), began=began)

    def _chores(self) -> tuple[Chore, ...]:
        return (
            Chore("restoring waiting requests", _RESTORES_EVERY, partial(self._tidy, "SELECT {}.restore()")),
            Chore("making new readers ready", _WELCOMES_EVERY, partial(self._tidy, "SELECT {}.welcome_readers()")),
            Chore("removing old rows", _CLEANS_EVERY, self._clean),
        )

    async def _tidy(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        """Call a function of the housekeeping, within limits of its own."""
        called = in_schema(self._schema, query)

        async def call(connection: Connection) -> list[asyncpg.Record]:
            await connection.execute(_LIMITS)
            return await connection.fetch(called, *arguments)

        async with self._long_calls:
            return await self._in_transaction(call, _TIDIES_WITHIN)

    async def _clean_page(self, after: int) -> int | None:
        ((last,),) = await self._tidy("SELECT {}.clean($1)", after)
        return None if last is None else int(last)


class _PooledDriver(Adapter):
    """A connection of the pool, for one outcome of an application without its own connection."""

    def __init__(
        self,
        pool: Pool,
        connection: PoolConnectionProxy[Any],
        schema: str,
        slots: asyncio.Semaphore,
        on_error: Callable[[Exception], Awaitable[None]],
    ) -> None:
        super().__init__(connection, schema)
        self._pool = pool
        self._pooled = connection
        self._slots = slots
        self._on_error = on_error

    async def execute(self, statement: str, *arguments: object) -> tuple[Any, ...] | None:
        try:
            return await super().execute(statement, *arguments)
        except ERRORS as error:
            await self._on_error(error)
            raise

    async def release(self) -> None:
        self._slots.release()
        await _release(self._pool, self._pooled)


async def _transact(connection: PoolConnectionProxy[Any], do: Callable[[Connection], Awaitable[T]]) -> T:
    failure: Exception | asyncio.CancelledError | None = None
    try:
        # Not the database's default: a function must see what was committed while it waited for a lock.
        async with connection.transaction(isolation="read_committed"):
            try:
                return await do(connection)
            except (Exception, asyncio.CancelledError) as error:
                failure = error
                raise
    except ERRORS as error:  # of a rollback, perhaps: a cancellation stays one, even if the connection is lost
        raise (failure or error) from None


async def _release(pool: Pool, connection: PoolConnectionProxy[Any]) -> None:
    """Give a connection back. If that fails, the pool ends it; what it was used for is done, failed or cancelled."""
    with suppress(*ERRORS):
        await pool.release(connection)


def _cut(connection: PoolConnectionProxy[Any]) -> None:
    with suppress(asyncpg.InterfaceError):  # it was released just now
        connection.terminate()


def _warn_of_plaintext(connection: Any) -> None:
    """Log a warning if a connection to another machine has no TLS."""
    transport = connection._transport  # noqa: SLF001  # asyncpg says it nowhere else
    match transport.get_extra_info("peername"), transport.get_extra_info("ssl_object"):
        case (str(host), *_), None if not ip_address(host).is_loopback:
            log(logging.WARNING, "broker.plaintext", {"host": host, "advice": _ADVICE})


async def _reset_nothing(_connection: asyncpg.Connection[Any]) -> None:
    """Do not reset a connection. All its settings ended with its transaction."""
