"""What goes wrong between a client and the service, and in the service itself.

A fault is data: when it begins and ends, whom it concerns, and what it makes of a request. Where several apply, the
first one in the story decides.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from .service import Stored

    #: Makes a lying answer of the true one, of all operations, and of the time.
    Lie = Callable[[dict[str, Any], list[Stored], float], bytes]


class Request(NamedTuple):
    """A request as the service gets it."""

    at: float
    method: str
    operation_id: str
    user_id: str
    body: bytes
    payload: str
    """Of the operation that it is about; empty where that does not exist yet."""
    key_until: float = math.inf
    """When the service ceases to accept its key."""
    made_at: float = math.inf
    """When its connection was made; infinite: for it."""


@dataclass(slots=True, frozen=True)
class Fate:
    """What becomes of a request.

    Attributes:
        latency: Seconds until the answer begins to arrive; infinite: never.
        status: The status that is answered instead of the true one.
        body: The body of that answer.
        retry_after: Seconds that the answer asks for.
        is_refused: No connection.
        is_processed: Whether it reaches the service, whatever is answered.
        is_repeated: Whether it does so twice; what is answered is the second answer.
        is_lost: The connection breaks before an answer.
        is_forgotten: So does it, but a new one may be better.
        is_truncated: The connection breaks before the end of the answer.
        pieces: In how many pieces the body arrives.
        between_pieces: Seconds between them.
        lie: What the answer says instead of the truth, where it is a success.
        as_of: The time whose truth the answer tells.
        stored_for: Seconds for which a cache had stored the answer.
    """

    latency: float
    status: int | None = None
    body: bytes = b'{"message": "try again later"}'
    retry_after: float | None = None
    is_refused: bool = False
    is_processed: bool = True
    is_repeated: bool = False
    is_lost: bool = False
    is_forgotten: bool = False
    is_truncated: bool = False
    pieces: int = 1
    between_pieces: float = 0.0
    lie: Lie | None = None
    as_of: float = math.inf
    stored_for: float = 0.0


class Fault(Protocol):
    """Something that goes wrong."""

    def fate(self, request: Request, rng: random.Random) -> Fate | None:
        """Return what becomes of a request; None where the fault does not concern it."""


class Failure(NamedTuple):
    """A way to fail."""

    how: Literal["refused", "lost", "lost answer", "hangs", "truncated", "html", "status", "page"]
    status: int = 500
    retry_after: float | None = None
    page: bytes = b""
    seconds: tuple[float, float] = (0.01, 0.2)
    """The shortest and the longest time that it takes."""

    def fate(self, rng: random.Random) -> Fate:  # noqa: PLR0911  # one for each way
        """Return what becomes of a request that fails in this way."""
        latency = rng.uniform(*self.seconds)
        match self.how:
            case "refused":
                return Fate(latency, is_refused=True)
            case "lost":
                return Fate(latency, is_lost=True, is_processed=False)
            case "lost answer":
                return Fate(latency, is_lost=True)
            case "hangs":
                return Fate(math.inf)
            case "truncated":
                return Fate(latency, is_truncated=True)
            case "html":
                return Fate(latency, status=200, body=b"<html>down for maintenance</html>")
            case "page":  # of a gateway, which asks nobody
                return Fate(latency, self.status, self.page, is_processed=False)
            case "status":
                is_processed = self.status != 429 and rng.random() < 0.5
                return Fate(latency, self.status, retry_after=self.retry_after, is_processed=is_processed)


@dataclass(frozen=True)
class Outage:
    """For some time every request fails, or a share of them, or those of one operation."""

    begins: float
    ends: float
    failure: Failure
    share: float = 1.0
    payload: str | None = None
    """Only of the operation with this payload."""
    methods: str = "GET POST"

    def fate(self, request: Request, rng: random.Random) -> Fate | None:
        """Fail."""
        if not self.begins <= request.at < self.ends or request.method not in self.methods:
            return None
        if self.payload not in (None, request.payload):
            return None
        return self.failure.fate(rng) if rng.random() < self.share else None

    @property
    def is_total(self) -> bool:
        """Whether nothing gets through."""
        return self.share == 1.0 and self.payload is None and "GET" in self.methods


@dataclass(frozen=True)
class Flapping:
    """For some time every request fails in the first seconds of each so many."""

    begins: float
    ends: float
    failure: Failure
    down: float
    every: float

    def fate(self, request: Request, rng: random.Random) -> Fate | None:
        """Fail, if it is down."""
        is_down = self.begins <= request.at < self.ends and (request.at - self.begins) % self.every < self.down
        return self.failure.fate(rng) if is_down and request.method == "GET" else None


@dataclass(frozen=True)
class Moved:
    """The service moves to another host: a connection that was made before goes on leading to the old one."""

    begins: float
    ends: float
    """Until when the old host answers."""
    failure: Failure | None
    """None: it answers what was true when the service moved."""
    known_for: float = 0.0
    """Seconds for which new connections lead there too: a cache still has the old address."""

    def fate(self, request: Request, rng: random.Random) -> Fate | None:
        """Answer as the old host."""
        if request.made_at >= self.begins + self.known_for or not self.begins <= request.at < self.ends:
            return None
        return Fate(rng.uniform(0.02, 0.2), as_of=self.begins) if self.failure is None else self.failure.fate(rng)


@dataclass(frozen=True)
class Cache:
    """For some time a cache stores what polls are answered, and goes on saying that."""

    begins: float
    ends: float
    seconds: float
    _stored: dict[str, float] = field(default_factory=dict, repr=False, compare=False)

    def fate(self, request: Request, rng: random.Random) -> Fate | None:
        """Answer what is stored, or store what is true."""
        if request.method != "GET" or not self.begins <= request.at < self.ends:
            return None
        stored_at = self._stored.get(request.operation_id, -math.inf)
        if request.at - stored_at >= self.seconds:
            self._stored[request.operation_id] = stored_at = request.at
        return Fate(rng.uniform(0.02, 0.2), as_of=stored_at, stored_for=request.at - stored_at)


@dataclass(frozen=True)
class Repeats:
    """For some time a gateway sends each create twice, since it takes the first answer for lost."""

    begins: float
    ends: float

    def fate(self, request: Request, rng: random.Random) -> Fate | None:
        """Answer what the service says to the second one."""
        if request.method != "POST" or not self.begins <= request.at < self.ends:
            return None
        return Fate(rng.uniform(0.02, 0.2), is_repeated=True)


@dataclass(frozen=True)
class FailOver:
    """A balancer fails over: a connection that was made before its end is lost at its next use. New ones work."""

    begins: float
    ends: float
    """The same time: once. Later: until then each connection is lost at its second request."""

    def fate(self, request: Request, rng: random.Random) -> Fate | None:
        """Let it through: what gets to the service is answered."""

    def has_lost(self, made_at: float, now: float) -> bool:
        """Return whether a connection that was made at a time, and used then, is dead."""
        return self.begins <= now and made_at < self.ends


def shard(operation_id: str) -> int:
    """Return the number of the shard on which an operation lives."""
    return zlib.crc32(operation_id.encode()) % 3


@dataclass(frozen=True)
class Shard:
    """For some time the requests about one in three operations fail, those that live on one shard of the service."""

    begins: float
    ends: float
    failure: Failure
    number: int

    def fate(self, request: Request, rng: random.Random) -> Fate | None:
        """Fail, if the operation lives there."""
        is_there = shard(request.operation_id) == self.number
        return self.failure.fate(rng) if is_there and self.begins <= request.at < self.ends else None


@dataclass(frozen=True)
class RoundTrips:
    """All answers that are good take so long: a service nearby, or on another continent."""

    shortest: float
    longest: float

    def fate(self, request: Request, rng: random.Random) -> Fate | None:
        """Answer well."""
        return Fate(rng.uniform(self.shortest, self.longest))


@dataclass(frozen=True)
class Slowness:
    """For some time answers are slow, or arrive in drips."""

    begins: float
    ends: float
    longest: float
    pieces: int

    def fate(self, request: Request, rng: random.Random) -> Fate | None:
        """Answer late."""
        if not self.begins <= request.at < self.ends:
            return None
        return Fate(rng.uniform(0.2, self.longest), pieces=self.pieces, between_pieces=rng.uniform(0.0, 0.5))


@dataclass(frozen=True)
class Capacity:
    """For some time the service answers so many requests in a second, one after another, wanted or not."""

    begins: float
    ends: float
    per_second: float
    _free_at: list[float] = field(default_factory=lambda: [0.0], repr=False, compare=False)

    def fate(self, request: Request, rng: random.Random) -> Fate | None:
        """Let it wait for its turn."""
        if not self.begins <= request.at < self.ends:
            return None
        self._free_at[0] = max(self._free_at[0], request.at) + 1.0 / self.per_second
        return Fate(self._free_at[0] - request.at)


@dataclass(frozen=True)
class Standstill:
    """The event loop of all processes stands still, as for a blocking call or a paused container."""

    begins: float
    ends: float

    def fate(self, request: Request, rng: random.Random) -> Fate | None:
        """Let it through: it is the client that does nothing."""


@dataclass(frozen=True)
class RateLimit:
    """For some time a gateway refuses, or sheds, what exceeds so many requests in a second."""

    begins: float
    ends: float
    per_second: int
    retry_after: float | None
    others: int = 0
    """Of these, a neighbour takes so many in every other ten seconds."""
    status: int = 429
    _passed: list[float] = field(default_factory=list, repr=False, compare=False)

    def fate(self, request: Request, rng: random.Random) -> Fate | None:
        """Refuse what is too much."""
        if not self.begins <= request.at < self.ends:
            return None
        self._passed[:] = [at for at in self._passed if 0 <= request.at - at < 1.0]
        others = self.others if (request.at - self.begins) % 20.0 < 10.0 else 0
        if len(self._passed) + others < self.per_second:
            self._passed.append(request.at)
            return None
        return Fate(rng.uniform(0.01, 0.1), self.status, retry_after=self.retry_after, is_processed=False)


@dataclass(frozen=True)
class Lag:
    """For some time a replica does not have operations that are younger than so many seconds."""

    begins: float
    ends: float
    seconds: float
    _created: dict[str, float] = field(default_factory=dict, repr=False, compare=False)

    def fate(self, request: Request, rng: random.Random) -> Fate | None:
        """Say that there is no such operation."""
        if request.method == "POST":
            self._created.setdefault(request.operation_id, request.at)
            return None
        age = request.at - self._created.get(request.operation_id, -math.inf)
        if not self.begins <= request.at < self.ends or age >= self.seconds:
            return None
        return Fate(rng.uniform(0.01, 0.1), status=404, body=b"{}")


@dataclass(frozen=True)
class Lies:
    """From some time on, some answers about one operation are not what was asked for, or contradict themselves."""

    begins: float
    payload: str
    kind: str
    share: float

    def fate(self, request: Request, rng: random.Random) -> Fate | None:
        """Lie."""
        if request.at < self.begins or request.method != "GET" or request.payload != self.payload:
            return None
        return Fate(rng.uniform(0.02, 0.2), lie=LIES[self.kind]) if rng.random() < self.share else None


def _claim(**wrong: object) -> Lie:
    """Claim an approval of something else than what was asked for."""
    approval = {"state": "approved", "result": True}
    return lambda said, _stored, _at: json.dumps(said | approval | wrong).encode()


def _another(said: dict[str, Any], stored: list[Stored], at: float) -> bytes:
    """Answer with another operation, an approved one if there is one."""
    others = [operation for operation in stored if operation.operation_id != said["operationId"]]
    approved = [operation for operation in others if operation.approved_at <= at]
    other = (approved or others)[0].to_json(at) if others else said | {"operationId": "nothing", "state": "approved"}
    return json.dumps(other).encode()


def _twice(said: dict[str, Any], _stored: list[Stored], _at: float) -> bytes:
    """Say it twice, and differently."""
    return b'{"result": false, ' + json.dumps(said | {"state": "approved", "result": True}).encode()[1:]


def _shapeless(said: dict[str, Any], _stored: list[Stored], _at: float) -> bytes:
    return json.dumps(said | {"result": "true"}).encode()


LIES: dict[str, Lie] = {
    "another operation": _another,
    "another id": _claim(operationId="something else"),
    "another user": _claim(userId="FFFF"),
    "another payload": _claim(operationPayload="Pay 1000000 to Mallory"),
    "no payload": _claim(operationPayload=None),
    "another external user": _claim(externalUserId="mallory"),
    "approved, but false": _claim(result=False),
    "pending, but true": _claim(state="pending"),
    "an unknown state": _claim(state="APPROVED"),
    "two results": _twice,
    "another shape": _shapeless,
}
