"""Good requests among many whose operations are created and then fail: how long until each is asked, and approved.

The service is in memory, the brokers are real.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar, cast

from aiokeyless._rules.quota import RepetitionQuota
from aiokeyless.errors import ConflictStatusError, NotFoundError, RateLimitError, RequestTimeoutError, ServerError
from aiokeyless.models import SuccessAnswer
from aiokeyless.worker import ApprovalWorker, submit_approval
from benchmarks.report import Goal, Report, Table
from benchmarks.simulation import operation
from benchmarks.storages import STORAGES, Storage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiokeyless import KeylessClient
    from aiokeyless._http.protocol import Request
    from aiokeyless.errors import KeylessError
    from aiokeyless.worker import Broker
    from benchmarks.bench import Bench

T = TypeVar("T")

_USER: Final = "C0FFEE"
_APPROVES_AFTER: Final = 4.0  # seconds after the user was asked
_RATE: Final = 10.0  # good requests a second
_ROUND_TRIP: Final = 0.05  # seconds
_ENDS_AFTER: Final = 15.0  # seconds after the last good request


class Weather(NamedTuple):
    """What becomes of bad requests.

    Attributes:
        name: How the table names it.
        failure: What a poll of theirs is answered with; None if it hangs.
        bad: How many there are.
        arrive_within: Seconds in which they arrive.
        are_created: Whether their operations are created first.
        goal: The most seconds until 95 % of the good ones are asked, and until their approvals are seen; None if good
            ones are late by the rules.
    """

    name: str
    failure: Callable[[str, str], KeylessError] | None
    bad: int = 200
    arrive_within: float = 6.0
    are_created: bool = True
    goal: tuple[float, float] | None = (2.0, 3.0)


def _error(method: str, path: str) -> ServerError:
    return ServerError(status=500, method=method, path=path)


def _busy(method: str, path: str) -> ServerError:
    return ServerError(status=503, method=method, path=path, retry_after=5.0)


def _refused(method: str, path: str) -> RateLimitError:
    return RateLimitError(status=429, method=method, path=path)


WEATHERS: Final = (
    Weather("500", _error),
    Weather("500, at once", _error, arrive_within=0.0),
    Weather("500 to their create", _error, are_created=False),
    Weather("2 000 of 500", _error, bad=2000, goal=(6.0, 8.0)),
    Weather("hang", None, goal=(5.0, 6.0)),
    Weather("503 with Retry-After", _busy),
    Weather("429", _refused, goal=None),
)


class _PartlyFailing:
    """What a worker needs of a client, its transport and the service; operations called "bad-..." fail."""

    request_timeout: Final = 10.0
    max_connections: Final = math.inf
    base_url: Final = "https://api.keyless.io"
    listeners: tuple[()] = ()
    name = None

    def __init__(self, weather: Weather) -> None:
        self._weather = weather
        self.quota = RepetitionQuota()
        self.created: dict[str, tuple[float, str]] = {}  # when, with its payload
        self.seen: dict[str, float] = {}  # when it was first answered as approved

    def _open(self) -> _PartlyFailing:
        self.transport = self
        return self

    def with_max_attempts(self, _attempts: int) -> _PartlyFailing:
        return self

    def call(self) -> AbstractContextManager[None]:
        return nullcontext()

    async def fetch(self, request: Request[Any], **_options: Any) -> Any:
        return await self.send(request)

    async def retry(self, attempt: Callable[[int], Awaitable[T]], _may_repeat: object = None, **_options: object) -> T:
        return await attempt(1)

    def take_tokens(self, failure: KeylessError, _omitted: str) -> bool:
        return self.quota.take(failure)

    async def send(self, request: Request[Any], *, attempt: int = 1) -> Any:  # noqa: ARG002  # as the transport has it
        method, path = request.endpoint.method, request.path
        body = json.loads(request.body or b"{}")
        operation_id = path.rpartition("/")[2] if method == "GET" else body["operationId"]
        await asyncio.sleep(_ROUND_TRIP)
        now = asyncio.get_running_loop().time()
        if operation_id.startswith("bad") and (operation_id in self.created or not self._weather.are_created):
            if self._weather.failure is not None:
                raise self._weather.failure(method, path)
            await asyncio.sleep(self.request_timeout - _ROUND_TRIP)
            raise RequestTimeoutError("no answer", method=method, path=path)
        if method == "POST":
            if operation_id in self.created:
                raise ConflictStatusError(status=409, method=method, path=path)
            self.created[operation_id] = now, body.get("operationPayload", "")
            return SuccessAnswer(success=True)
        if operation_id not in self.created:
            raise NotFoundError(status=404, method=method, path=path)
        created, payload = self.created[operation_id]
        approved = now >= created + _APPROVES_AFTER
        if approved:
            self.seen.setdefault(operation_id, now)
        return operation(operation_id, is_approved=approved, user_id=_USER, payload=payload)


class Lateness(NamedTuple):
    """How late good requests were, in seconds: until they were asked, and from their approval until it was seen."""

    asked: list[float]
    approved: list[float]
    submitted: int

    def p95(self) -> tuple[float, float]:
        """Return how late 95 % of them were asked and seen as approved, at most; infinity if more than 5 % never."""
        asked, approved = (_p95(values, self.submitted) for values in (self.asked, self.approved))
        return asked, approved


def _p95(values: list[float], count: int) -> float:
    return sorted([*values, *[math.inf] * (count - len(values))])[int(count * 0.95)]


async def measure(
    broker: Broker, weather: Weather, *, before: int = 60, after: int = 140, quiet: float = 6.0
) -> Lateness:
    """Submit ten good requests a second, with a break for the bad ones; return how late the good ones were.

    Args:
        broker: The broker.
        weather: What becomes of the bad ones.
        before: Good requests before the bad ones. Most are approved in the break, so few good answers come then.
        after: Good requests after the break.
        quiet: Seconds of the break.
    """
    loop, keyless = asyncio.get_running_loop(), _PartlyFailing(weather)
    submitted: dict[str, float] = {}
    began = loop.time()

    async def submit(name: str, at: float, expires_in: float) -> None:
        await asyncio.sleep(began + at - loop.time())
        if name.startswith("good"):
            submitted[name] = loop.time()
        await submit_approval(broker, _USER, operation_id=name, expires_in=expires_in)

    gap = weather.arrive_within / weather.bad
    times = [number / _RATE + quiet * (number >= before) for number in range(before + after)]
    async with ApprovalWorker(cast("KeylessClient", keyless), broker):
        await asyncio.gather(
            *(submit(f"good-{number}", at, 120.0) for number, at in enumerate(times)),
            *(submit(f"bad-{number}", before / _RATE + number * gap, 600.0) for number in range(weather.bad)),
        )
        with suppress(TimeoutError):
            async with asyncio.timeout(_ENDS_AFTER):
                while len(keyless.seen) < len(submitted):  # noqa: ASYNC110  # it is on a clock that moves, too
                    await asyncio.sleep(0.1)
    return Lateness(
        asked=[keyless.created[name][0] - at for name, at in submitted.items() if name in keyless.created],
        approved=[at - keyless.created[name][0] - _APPROVES_AFTER for name, at in keyless.seen.items()],
        submitted=len(submitted),
    )


def run(bench: Bench) -> Report:
    """Measure at each broker, in each weather."""
    logging.getLogger("aiokeyless.worker").setLevel(logging.CRITICAL)
    report = Report("fairness: good requests among bad ones")
    columns = ["bad ones", "broker", "asked", "approved", "until asked, p95 s", "until the approval is seen, p95 s"]
    report.tables.append(table := Table(f"{_RATE:g} good requests a second, and bad ones in a break of six", columns))
    after = bench.pick(full=140, smoke=10)
    for weather in bench.pick(full=WEATHERS, smoke=WEATHERS[:1]):
        for storage in STORAGES:
            bench.progress(f"  {weather.name}, {storage.name}")
            found = asyncio.run(_measure(storage, weather, after))
            asked, approved = found.p95()
            counts = (f"{len(values)} of {found.submitted}" for values in (found.asked, found.approved))
            table.rows.append([weather.name, storage.name, *counts, f"{asked:.2f}", f"{approved:.2f}"])
            report.raw[name := f"{storage.name}, {weather.name}"] = {**found._asdict()}
            if weather.goal is not None:
                report.goals.append(Goal(f"{name}: asked, p95", weather.goal[0], asked, " s"))
                report.goals.append(Goal(f"{name}: approved, p95", weather.goal[1], approved, " s"))
    return report


async def _measure(storage: type[Storage], weather: Weather, after: int) -> Lateness:
    async with storage() as stored, stored.broker() as broker:
        return await measure(broker, weather, after=after)
