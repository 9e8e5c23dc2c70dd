"""Good requests among many whose operations always fail: how long until each is asked, and approved."""

from __future__ import annotations

import asyncio
import json
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from aiokeyless.errors import NotFoundError, ServerError
from aiokeyless.models import Operation, SuccessAnswer
from aiokeyless.worker import ApprovalWorker, submit_approval

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiokeyless import KeylessClient
    from aiokeyless._http.protocol import Request
    from aiokeyless.worker import Broker

USER: Final = "C0FFEE"
APPROVES_AFTER: Final = 4.0  # seconds after the user was asked
_BEFORE: Final = 5.0  # seconds of good requests alone
ROUND_TRIP: Final = 0.05  # seconds


class Keyless:
    """What a worker needs of a client and its transport; all requests about an operation called "bad-..." get a 500."""

    request_timeout: Final = 10.0
    base_url: Final = "https://api.keyless.io"
    listeners: tuple[()] = ()

    def __init__(self) -> None:
        self.asked_at: dict[str, float] = {}
        self.seen_at: dict[str, float] = {}
        self.requests = 0

    def _open(self) -> tuple[Keyless, None]:
        return self, None

    # -- its transport

    def with_max_attempts(self, _attempts: int) -> Keyless:
        return self

    def call(self) -> AbstractContextManager[None]:
        return nullcontext()

    async def fetch(self, request: Request[Any]) -> Any:
        return await self.send(request)

    async def retry(self, attempt: Callable[[int], Awaitable[bool]], _may_repeat: object) -> bool:
        return await attempt(1)

    async def send(self, request: Request[Any], *, attempt: int = 1) -> Any:
        if request.endpoint.method == "GET":
            return await self._get(request.path)
        operation_id = json.loads(request.body or b"{}")["operationId"]
        await self._exchange("POST", request.path, operation_id)
        self.asked_at.setdefault(operation_id, self._now())
        return SuccessAnswer(success=True)

    # -- the service

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def _get(self, path: str) -> Operation:
        operation_id = path.rpartition("/")[2]
        await self._exchange("GET", path, operation_id)
        if operation_id not in self.asked_at:
            raise NotFoundError(status=404, method="GET", path=path)
        approved = self._now() >= self.asked_at[operation_id] + APPROVES_AFTER
        if approved:
            self.seen_at.setdefault(operation_id, self._now())
        return Operation(
            id=1,
            timestamp="2026-11-24T12:00:00",
            node_id="node",
            user_id=USER,
            operation_id=operation_id,
            result=approved,
            state="approved" if approved else "pending",
        )

    async def _exchange(self, method: str, path: str, operation_id: str) -> None:
        self.requests += 1
        await asyncio.sleep(ROUND_TRIP)
        if operation_id.startswith("bad"):
            raise ServerError(status=500, method=method, path=path)


class Lateness(NamedTuple):
    """How late good requests were, in seconds: until they were asked, and from their approval until it was seen."""

    asked: list[float]
    approved: list[float]
    missing: int
    requests: int

    def asked_p95(self) -> float:
        return _p95(self.asked)

    def approved_p95(self) -> float:
        return _p95(self.approved)


def _p95(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.95)]


async def measure(broker: Broker, *, bad: int, rate: float, seconds: float) -> Lateness:
    """Submit good requests at a rate a second, and bad ones, all at once, after the first few; return how late."""
    loop, keyless = asyncio.get_running_loop(), Keyless()
    submitted: dict[str, float] = {}
    async with ApprovalWorker(cast("KeylessClient", keyless), broker):
        began = loop.time()
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, began + number / rate - loop.time()))
            if number == int(_BEFORE * rate):
                await asyncio.gather(
                    *(
                        submit_approval(broker, USER, operation_id=f"bad-{other}", expires_in=600)
                        for other in range(bad)
                    )
                )
            submitted[f"good-{number}"] = loop.time()
            await submit_approval(broker, USER, operation_id=f"good-{number}", expires_in=120)
        await asyncio.sleep(15)
    return Lateness(
        asked=[keyless.asked_at[name] - at for name, at in submitted.items() if name in keyless.asked_at],
        approved=[at - keyless.asked_at[name] - APPROVES_AFTER for name, at in keyless.seen_at.items()],
        missing=len(submitted.keys() - keyless.seen_at.keys()),
        requests=keyless.requests,
    )
