"""A model of the service, and the session that takes a client's requests to it without a network.

The session stands where aiohttp's is: all of the library runs, and what it sends and reads are the protocol's bytes.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import warnings
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import unquote

import aiohttp
from multidict import CIMultiDict, CIMultiDictProxy

from aiokeyless._http.transport import _ConnectionLostError, _Response

from .faults import FailOver, Fate, Request
from .history import Exchange

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from yarl import URL

    from .faults import Fault
    from .history import History
    from .people import Person

#: Requests in one story: more means that something polls without end.
MOST_REQUESTS: Final = 60_000
#: Seconds for which a connection is kept that nobody uses, as aiohttp does.
KEPT: Final = 15.0
#: The body of the answer to a create that succeeds.
CREATED: Final = b'{"success": true}'


class TooManyRequestsError(Exception):
    """A client polls without end."""


@dataclass(slots=True)
class Stored:
    """An operation as the service has it."""

    operation_id: str
    user_id: str
    payload: str | None
    external_user_id: str | None
    created_at: float
    approved_at: float = math.inf
    created_by: int = 0
    """The number of the request that created it; 0: the phone."""

    def to_json(self, at: float) -> dict[str, Any]:
        """Return what a GET says about it at a time."""
        approved = self.approved_at <= at
        answer: dict[str, Any] = {
            "id": 7,
            "timestamp": "2026-11-27T00:00:00.25",
            "nodeId": "node",
            "userId": self.user_id,
            "apiKey": "secret",
            "operationId": self.operation_id,
            "result": approved,
            "state": "approved" if approved else "pending",
        }
        if self.payload is not None:
            answer["operationPayload"] = self.payload
        if self.external_user_id is not None:
            answer["externalUserId"] = self.external_user_id
        return answer


class Service:
    """The service: it stores operations, knows when each user will approve, and answers as its faults let it.

    Args:
        seed: Of the latencies and of what the faults draw.
        faults: What goes wrong, and when.
        people: Who approves what, by the payload.
        history: Where requests are recorded.
    """

    def __init__(self, seed: int, faults: Sequence[Fault], people: dict[str, Person], history: History) -> None:
        self._faults = faults
        self._people = people
        self._random = random.Random(f"{seed} service")  # noqa: S311
        self._bodies: dict[tuple[str, bool], bytes] = {}  # by operation id and whether it is approved
        self.history = history
        self.operations = history.operations

    def store(self, operation: Stored) -> None:
        """Store an operation; its user begins to think about it."""
        person = self._people.get(operation.payload or "")
        if person is not None:
            operation.approved_at = operation.created_at + person.approves_after
        self.operations[operation.operation_id] = operation

    def store_by_phone(
        self, operation_id: str, user_id: str, payload: str, now: float, external_user_id: str | None = None
    ) -> None:
        """Store an operation that the phone starts: it exists from its approval on."""
        approved_at = now + self._people[payload].approves_after
        if approved_at < math.inf:
            operation = Stored(operation_id, user_id, payload, external_user_id, approved_at, approved_at)
            self.operations[operation_id] = operation

    def receive(
        self,
        client: str,
        method: str,
        operation_id: str,
        now: float,
        *,
        is_poll: bool,
        user_id: str = "",
        body: bytes = b"",
        key_until: float = math.inf,
        made_at: float = math.inf,
    ) -> tuple[Exchange, Request]:
        """Record a request that is sent now."""
        history = self.history
        if len(history.exchanges) > MOST_REQUESTS:
            raise TooManyRequestsError
        exchange = Exchange(
            number=history.next_number(),
            client=client,
            method=method,
            operation_id=operation_id,
            is_poll=is_poll,
            sent_at=now,
        )
        history.exchanges.append(exchange)
        stored = self.operations.get(operation_id)
        payload = "" if stored is None else stored.payload or ""
        return exchange, Request(now, method, operation_id, user_id, body, payload, key_until, made_at)

    def refuse(self, client: str, operation_id: str, now: float) -> Exchange:
        """Record a poll that is not sent, since there is no key for it."""
        exchange, _ = self.receive(client, "GET", operation_id, now, is_poll=True)
        exchange.ended_at, exchange.had_no_key = now, True
        return exchange

    def has_lost(self, made_at: float, now: float) -> bool:
        """Return whether a connection that was made at a time, and kept since, is dead."""
        return any(isinstance(fault, FailOver) and fault.has_lost(made_at, now) for fault in self._faults)

    def fate(self, request: Request) -> Fate:
        """Return what becomes of a request: the first fault that applies decides."""
        for fault in self._faults:
            fate = fault.fate(request, self._random)
            if fate is not None:
                return fate
        return Fate(self._random.uniform(0.02, 0.2))

    def answer(self, request: Request, fate: Fate, number: int) -> tuple[int, bytes]:
        """Process a request at half of its latency, and return status and body of the answer."""
        at = request.at + min(fate.latency, 0.2) / 2
        status, body = 500, b"{}"
        if at >= request.key_until:
            return 401, body
        if request.method == "GET":
            status, body = self._get(request, fate, at)
        elif fate.is_processed:
            status, body = self._post(request, at, number)
            if fate.is_repeated:
                status, body = self._post(request, at, number)
        return (status, body) if fate.status is None else (fate.status, fate.body)

    def _get(self, request: Request, fate: Fate, at: float) -> tuple[int, bytes]:
        stored, at = self.operations.get(request.operation_id), min(at, fate.as_of)
        if stored is None or stored.created_at > at:
            return 404, b'{"message": "no such operation"}'
        if fate.lie is not None:
            return 200, fate.lie(stored.to_json(at), list(self.operations.values()), at)
        key = request.operation_id, stored.approved_at <= at
        if key not in self._bodies:
            self._bodies[key] = json.dumps(stored.to_json(at)).encode()
        return 200, self._bodies[key]

    def _post(self, request: Request, at: float, number: int) -> tuple[int, bytes]:
        if request.operation_id in self.operations:
            return 409, b'{"message": "the operation exists"}'
        said = json.loads(request.body)
        self.store(
            Stored(
                request.operation_id,
                request.user_id,
                said.get("operationPayload"),
                said.get("externalUserId"),
                created_at=at,
                created_by=number,
            )
        )
        return 200, CREATED


@dataclass(eq=False)
class Connection:
    """A connection, its transport and its protocol, as far as the library knows them.

    Attributes:
        made_at: When it was made.
        idle_since: When it was used last.
        should_close: Whether it is not to be used again.
    """

    made_at: float
    idle_since: float = math.inf
    should_close: bool = False
    _meter: object = None

    @property
    def protocol(self) -> Connection:
        return self

    @property
    def transport(self) -> Connection:
        return self

    def get_extra_info(self, name: str) -> None:
        """There is no socket."""

    def get_protocol(self) -> object:
        return self._meter

    def set_protocol(self, meter: object) -> None:
        self._meter = meter

    def close(self) -> None:
        self.should_close = True

    force_close = close


class Connections:
    """The connections that a client keeps."""

    def __init__(self) -> None:
        self._kept: list[Connection] = []

    def take(self, now: float) -> Connection:
        """Return the one that was used last, or a new one."""
        while self._kept:
            connection = self._kept.pop()
            if not connection.should_close and now - connection.idle_since < KEPT:
                return connection
        return Connection(now)

    def keep(self, connection: Connection, now: float) -> None:
        """Keep one that nobody uses now."""
        connection.idle_since = now
        self._kept.append(connection)


class _Start(aiohttp.ClientResponse):
    """What the library's response starts with: here, the answer is there already."""

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        return self


class _Answer(_Response, _Start):
    """The part of aiohttp's response that the library reads, its content included.

    Args:
        exchange: What it answers.
        fate: How it arrives.
        keep: Called at its end: the connection is free then.
    """

    def __init__(self, exchange: Exchange, fate: Fate, keep: Callable[[], None]) -> None:  # of aiohttp's nothing
        assert exchange.status is not None
        self.status = exchange.status
        headers = {} if exchange.retry_after is None else {"Retry-After": f"{exchange.retry_after:g}"}
        headers |= {"Age": f"{math.floor(fate.stored_for)}"} if fate.stored_for >= 1.0 else {}
        self._headers = CIMultiDictProxy(CIMultiDict(headers))
        self._cache = {}
        self._loop = asyncio.get_running_loop()
        self.content = cast("aiohttp.StreamReader", self)
        self._exchange = exchange
        self._fate = fate
        self._keep = keep
        body, size = exchange.body, -(-len(exchange.body) // fate.pieces) or 1
        self._pieces = [body[start : start + size] for start in range(0, len(body), size)]

    def is_eof(self) -> bool:
        return False  # it arrives piece by piece

    def at_eof(self) -> bool:
        if not self._pieces:
            self._exchange.ended_at = asyncio.get_running_loop().time()
            self._keep()
        return not self._pieces

    async def readany(self) -> bytes:
        try:
            if len(self._pieces) < self._fate.pieces:
                await _pass(self._fate.between_pieces)
            if len(self._pieces) == 1 and self._fate.is_truncated:
                raise aiohttp.ClientPayloadError("not enough data")  # noqa: TRY301  # as the network does
        except BaseException as error:
            _fail(self._exchange, error)
            raise
        return self._pieces.pop(0)

    def close(self) -> None:
        """Drop the connection."""


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # aiohttp advises against subclasses

    class SimulatedSession(aiohttp.ClientSession):
        """A session whose requests go to the model.

        Args:
            service: The model.
            client: The name of the client that it belongs to.
            force_close: Whether no connection is kept.
            accepts_until: Tells until when the service accepts a key.
            is_polling: Tells whether the running task sends a poll.
        """

        def __init__(  # nothing of aiohttp's is set up, nor closed
            self,
            service: Service,
            client: str,
            *,
            force_close: bool = False,
            accepts_until: Callable[[str], float] = lambda _: math.inf,
            is_polling: Callable[[], bool] = lambda: False,  # a worker makes calls
        ) -> None:
            self._service = service
            self._name = client
            self._accepts_until = accepts_until
            self._is_polling = is_polling
            self._force_close = force_close
            self._connections = Connections()
            self.under_way = 0
            """Requests without an end."""

        def __del__(self, _warnings: object = None) -> None:
            """Close nothing."""

        async def close(self) -> None:
            """Close nothing."""

        @property
        def connector(self) -> None:
            """There is none."""

        @property
        def headers(self) -> CIMultiDict[str]:
            return CIMultiDict()

        @property
        def closed(self) -> bool:
            return False

        async def request(  # type: ignore[override]  # aiohttp's returns an awaitable that is a context manager, too
            self,
            method: str,
            url: URL,
            *,
            headers: dict[str, str] | None,
            data: bytes | None = None,
            **_: Any,
        ) -> _Answer:
            now = asyncio.get_running_loop().time()
            connection = self._connections.take(now)
            is_dead = connection.made_at < now and self._service.has_lost(connection.made_at, now)
            if is_dead and method == "GET":  # it gets to nobody, and is no request until it is asked once more
                raise _ConnectionLostError(aiohttp.ServerDisconnectedError())
            parts = url.raw_path.split("/")
            exchange, request = self._service.receive(
                self._name,
                method,
                unquote(parts[3]) if method == "GET" else json.loads(data or b"")["operationId"],
                now,
                is_poll=self._is_polling(),
                user_id=parts[3],
                body=data or b"",
                key_until=self._accepts_until((headers or {}).get("X-Api-Key", "key 0")),
                made_at=connection.made_at,
            )
            exchange.was_dead = is_dead
            self.under_way += 1
            try:
                if is_dead:
                    raise _ConnectionLostError(aiohttp.ServerDisconnectedError())  # noqa: TRY301  # as below
                return await self._send(request, exchange, connection)
            except BaseException as error:
                _fail(exchange, error)
                raise
            finally:
                self.under_way -= 1

        async def _send(self, request: Request, exchange: Exchange, connection: Connection) -> _Answer:
            fate = self._service.fate(request)
            if fate.is_refused:
                await _pass(fate.latency)
                # aiohttp's own, without the key of a connection that there is not
                raise aiohttp.ClientConnectorError(None, OSError(111, "refused"))  # type: ignore[arg-type]
            status, body = self._service.answer(request, fate, exchange.number)
            exchange.was_repeated = fate.is_repeated
            await _pass(fate.latency)
            if fate.is_forgotten:
                raise _ConnectionLostError(aiohttp.ServerDisconnectedError())
            if fate.is_lost:
                raise aiohttp.ServerDisconnectedError
            exchange.status, exchange.body, exchange.retry_after = (status, body, fate.retry_after)
            exchange.stored_for = fate.stored_for
            answer = _Answer(exchange, fate, partial(self._keep, connection))
            await answer.start(cast("aiohttp.connector.Connection", connection))
            return answer

        def _keep(self, connection: Connection) -> None:
            if not self._force_close:
                self._connections.keep(connection, asyncio.get_running_loop().time())


def _fail(exchange: Exchange, error: BaseException) -> None:
    exchange.status = None
    exchange.ended_at = asyncio.get_running_loop().time()
    exchange.was_cut = isinstance(error, asyncio.CancelledError)
    exchange.was_refused = isinstance(error, aiohttp.ClientConnectorError)


async def _pass(seconds: float) -> None:
    """Let time pass; the client gives up by itself."""
    await (asyncio.sleep(seconds) if seconds < math.inf else asyncio.get_running_loop().create_future())
