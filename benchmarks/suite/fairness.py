"""Good requests among many whose operations always fail: how long until each is asked, and approved.

The service is in memory, the brokers are real.
"""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar, cast

from aiokeyless._rules.quota import RepetitionQuota
from aiokeyless.errors import ConflictError, NotFoundError, ServerError
from aiokeyless.models import Operation, SuccessAnswer
from aiokeyless.worker import ApprovalWorker, submit_approval
from benchmarks.report import Goal, Report, Table
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
_BAD: Final = 200
_APPROVES_AFTER: Final = 4.0  # seconds after the user was asked
_BEFORE: Final = 5.0  # seconds of good requests alone
_ROUND_TRIP: Final = 0.05  # seconds


class PartlyFailing:
    """What a worker needs of a client, its transport and the service; operations called "bad-..." get a 500."""

    request_timeout: Final = 10.0
    base_url: Final = "https://api.keyless.io"
    listeners: tuple[()] = ()

    def __init__(self) -> None:
        self.quota = RepetitionQuota()
        self.created: dict[str, tuple[float, str]] = {}  # when, with its payload
        self.seen: dict[str, float] = {}  # when it was first answered as approved

    def _open(self) -> tuple[PartlyFailing, None]:
        return self, None

    def with_max_attempts(self, _attempts: int) -> PartlyFailing:
        """Return what sends each call once."""
        return self

    def call(self) -> AbstractContextManager[None]:
        """Return the scope of one call."""
        return nullcontext()

    async def fetch(self, request: Request[Any]) -> Any:
        """Send a GET."""
        return await self.send(request)

    async def retry(self, attempt: Callable[[int], Awaitable[T]], _may_repeat: object = None) -> T:
        """Try once."""
        return await attempt(1)

    def take_tokens(self, failure: KeylessError, _omitted: str) -> bool:
        """Take the tokens for a check."""
        return self.quota.take(failure)

    async def send(self, request: Request[Any], *, attempt: int = 1) -> Any:  # noqa: ARG002  # as the transport has it
        """Answer a request."""
        method, path = request.endpoint.method, request.path
        body = json.loads(request.body or b"{}")
        operation_id = path.rpartition("/")[2] if method == "GET" else body["operationId"]
        await asyncio.sleep(_ROUND_TRIP)
        now = asyncio.get_running_loop().time()
        if operation_id.startswith("bad"):
            raise ServerError(status=500, method=method, path=path)
        if method == "POST":
            if operation_id in self.created:
                raise ConflictError(status=409, method=method, path=path)
            self.created[operation_id] = now, body.get("operationPayload", "")
            return SuccessAnswer(success=True)
        if operation_id not in self.created:
            raise NotFoundError(status=404, method=method, path=path)
        created, payload = self.created[operation_id]
        approved = now >= created + _APPROVES_AFTER
        if approved:
            self.seen.setdefault(operation_id, now)
        return Operation(
            id=1,
            timestamp="2026-11-24T12:00:00",
            node_id="node",
            user_id=_USER,
            operation_id=operation_id,
            operation_payload=payload,
            result=approved,
            state="approved" if approved else "pending",
        )


class Lateness(NamedTuple):
    """How late good requests were, in seconds: until they were asked, and from their approval until it was seen."""

    asked: list[float]
    approved: list[float]
    missing: int

    def p95(self) -> tuple[float, float]:
        """Return how late 95 % of them were asked, and of the approvals seen, at most."""
        asked, approved = (sorted(values)[int(len(values) * 0.95)] for values in (self.asked, self.approved))
        return asked, approved


async def measure(broker: Broker, *, bad: int, rate: float, seconds: float) -> Lateness:
    """Submit good requests at a rate a second, and bad ones, all at once, after the first few; return how late."""
    loop, keyless = asyncio.get_running_loop(), PartlyFailing()
    submitted: dict[str, float] = {}
    async with ApprovalWorker(cast("KeylessClient", keyless), broker):
        began = loop.time()
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, began + number / rate - loop.time()))
            if number == int(_BEFORE * rate):
                names = [f"bad-{other}" for other in range(bad)]
                await asyncio.gather(
                    *(submit_approval(broker, _USER, operation_id=name, expires_in=600) for name in names)
                )
            submitted[f"good-{number}"] = loop.time()
            await submit_approval(broker, _USER, operation_id=f"good-{number}", expires_in=120)
        with suppress(TimeoutError):
            async with asyncio.timeout(15):
                while len(keyless.seen) < len(submitted):  # noqa: ASYNC110  # it is on a clock that moves, too
                    await asyncio.sleep(0.1)
    created = {name: at for name, (at, _) in keyless.created.items()}
    return Lateness(
        asked=[created[name] - at for name, at in submitted.items() if name in created],
        approved=[at - created[name] - _APPROVES_AFTER for name, at in keyless.seen.items()],
        missing=len(submitted.keys() - keyless.seen.keys()),
    )


def run(bench: Bench) -> Report:
    """Measure at each broker, at each rate of good requests."""
    logging.getLogger("aiokeyless.worker").setLevel(logging.CRITICAL)
    report = Report(f"fairness: good requests among {_BAD} that always fail")
    columns = ["broker", "good requests a second", "until asked, p95 s", "until the approval is seen", "never"]
    report.tables.append(table := Table("seconds late", columns))
    seconds = bench.pick(full=60.0, quick=10.0, smoke=7.0)
    for storage in STORAGES:
        for rate in bench.pick(full=(1.0, 2.0, 10.0), quick=(10.0,), smoke=(10.0,)):
            bench.progress(f"  {storage.name}, {rate:g} a second")
            found = asyncio.run(_measure(storage, rate, seconds))
            asked, approved = found.p95()
            name = f"{storage.name}, {rate:g}/s"
            table.rows.append([storage.name, f"{rate:g}", f"{asked:.2f}", f"{approved:.2f}", str(found.missing)])
            report.raw[name] = {**found._asdict()}
            report.goals.append(Goal(f"{name}: asked, p95", 2.0, asked, " s"))
            report.goals.append(Goal(f"{name}: approved, p95", 3.0, approved, " s"))
    return report


async def _measure(storage: type[Storage], rate: float, seconds: float) -> Lateness:
    async with storage() as stored, stored.broker() as broker:
        return await measure(broker, bad=_BAD, rate=rate, seconds=seconds)
