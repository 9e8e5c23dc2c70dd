"""Good requests among many whose operations always fail: how long until each is asked, and approved."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from aiokeyless.errors import ServerError
from aiokeyless.worker import ApprovalWorker, submit_approval

from .keyless import USER, Keyless

if TYPE_CHECKING:
    from aiokeyless import KeylessClient
    from aiokeyless.worker import Broker

APPROVES_AFTER: Final = 4.0  # seconds after the user was asked
_BEFORE: Final = 5.0  # seconds of good requests alone
ROUND_TRIP: Final = 0.05  # seconds


class PartlyFailing(Keyless):
    """All requests about an operation called "bad-..." get a 500."""

    def __init__(self) -> None:
        super().__init__()
        self.seen_at: dict[str, float] = {}  # first polled after its approval

    def approves_after(self, _operation_id: str) -> float:
        """See `Keyless`."""
        return APPROVES_AFTER

    async def exchange(self, method: str, path: str, operation_id: str) -> None:
        """See `Keyless`."""
        await asyncio.sleep(ROUND_TRIP)
        if operation_id.startswith("bad"):
            raise ServerError(status=500, method=method, path=path)
        stored = self.operations.get(operation_id)
        if stored is not None and stored.approved_at <= self.now():
            self.seen_at.setdefault(operation_id, self.now())


class Lateness(NamedTuple):
    """How late good requests were, in seconds: until they were asked, and from their approval until it was seen."""

    asked: list[float]
    approved: list[float]
    missing: int

    def asked_p95(self) -> float:
        """Return how late 95 % of them were asked, at most."""
        return _p95(self.asked)

    def approved_p95(self) -> float:
        """Return how late 95 % of the approvals were seen, at most."""
        return _p95(self.approved)


def _p95(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.95)]


async def measure(broker: Broker, *, bad: int, rate: float, seconds: float) -> Lateness:
    """Submit good requests at a rate a second, and bad ones, all at once, after the first few; return how late."""
    loop, keyless = asyncio.get_running_loop(), PartlyFailing()
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
        with suppress(TimeoutError):
            async with asyncio.timeout(15):
                while len(keyless.seen_at) < len(submitted):  # noqa: ASYNC110  # it is on a clock that moves, too
                    await asyncio.sleep(0.1)
    return Lateness(
        asked=[
            keyless.operations[name].created_at - at for name, at in submitted.items() if name in keyless.operations
        ],
        approved=[at - keyless.operations[name].approved_at for name, at in keyless.seen_at.items()],
        missing=len(submitted.keys() - keyless.seen_at.keys()),
    )
