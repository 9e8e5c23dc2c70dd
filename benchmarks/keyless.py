"""Keyless as a worker meets it, without HTTP: a client, its transport and the service in one object."""

from __future__ import annotations

import asyncio
import json
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aiokeyless.errors import ConflictError, NotFoundError
from aiokeyless.models import Operation, SuccessAnswer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiokeyless._http.protocol import Request

USER: Final = "C0FFEE"


class Stored(NamedTuple):
    """An operation at Keyless: what it is, and when its user approves it; never is infinity."""

    payload: str
    created_at: float
    approved_at: float


class Keyless:
    """What a worker needs of a client and its transport, and a service whose answers a test makes."""

    request_timeout: Final = 10.0
    base_url: Final = "https://api.keyless.io"
    listeners: tuple[()] = ()

    def __init__(self) -> None:
        self.operations: dict[str, Stored] = {}

    # -- what a test makes of it

    def approves_after(self, operation_id: str) -> float:
        """Return the seconds after its creation until the user of an operation approves it."""
        raise NotImplementedError

    async def exchange(self, method: str, path: str, operation_id: str) -> None:
        """Let some time pass; raise if the service, or what is in front of it, fails."""
        raise NotImplementedError

    def misses(self, _stored: Stored) -> bool:
        """Return whether a replica does not have an operation yet."""
        return False

    def lose_answer(self, path: str) -> None:
        """Raise if the answer to a create is lost."""

    # -- its transport

    def _open(self) -> tuple[Keyless, None]:
        return self, None

    def with_max_attempts(self, _attempts: int) -> Keyless:
        """Return what sends each call once."""
        return self

    def call(self) -> AbstractContextManager[None]:
        """Return the scope of one call."""
        return nullcontext()

    async def fetch(self, request: Request[Any]) -> Any:
        """Send a GET."""
        return await self.send(request)

    async def retry(self, attempt: Callable[[int], Awaitable[bool]], _may_repeat: object) -> bool:
        """Try once."""
        return await attempt(1)

    async def send(self, request: Request[Any], *, attempt: int = 1) -> Any:  # noqa: ARG002  # as the transport has it
        """Answer a request."""
        if request.endpoint.method == "GET":
            return await self._get(request.path)
        body = json.loads(request.body or b"{}")
        return await self._post(request.path, body["operationId"], body.get("operationPayload", ""))

    # -- the service

    def now(self) -> float:
        """Return the time of the event loop."""
        return asyncio.get_running_loop().time()

    async def _get(self, path: str) -> Operation:
        operation_id = path.rpartition("/")[2]
        await self.exchange("GET", path, operation_id)
        stored = self.operations.get(operation_id)
        if stored is None or self.misses(stored):
            raise NotFoundError(status=404, method="GET", path=path)
        approved = stored.approved_at <= self.now()
        return Operation(
            id=1,
            timestamp="2026-11-24T12:00:00",
            node_id="node",
            user_id=USER,
            operation_id=operation_id,
            operation_payload=stored.payload,
            result=approved,
            state="approved" if approved else "pending",
        )

    async def _post(self, path: str, operation_id: str, payload: str) -> SuccessAnswer:
        await self.exchange("POST", path, operation_id)
        is_new = operation_id not in self.operations
        if is_new:
            now = self.now()
            self.operations[operation_id] = Stored(payload, now, now + self.approves_after(operation_id))
        self.lose_answer(path)
        if not is_new:
            raise ConflictError(status=409, method="POST", path=path)
        return SuccessAnswer(success=True)
