"""Holds: leases on ordinary waits. After each hold, the wait goes on for a while for the next hold.

So a series of holds polls like one wait, and needs no other state between two holds. See "Holds" in docs/rules.md.
"""

from __future__ import annotations

import asyncio
import copy
from typing import TYPE_CHECKING, Final

from aiokeyless._rules.final import RESOLUTION
from aiokeyless._tracing import context_without_traces

if TYPE_CHECKING:
    from aiokeyless.ticket import ApprovalTicket

    from .poller import FutureWait, Poller, WaitOptions
    from .state import WaitResult

#: Seconds for which a wait goes on after its last hold.
LEASE: Final = 10.0

#: The key of a lease: operation id, ticket, and whether a 404 counts as pending.
_Target = tuple[str, "ApprovalTicket | None", bool]


class _Lease:
    """A wait that one or more callers hold, or held a moment ago."""

    __slots__ = ("expiry", "holders", "is_explained", "wait")

    def __init__(self, wait: FutureWait, *, is_explained: bool) -> None:
        self.wait = wait
        self.is_explained = is_explained
        self.holders = 0
        self.expiry: asyncio.TimerHandle | None = None  # set while there are no holders


class Holds:
    """The holds of one client."""

    def __init__(self, poller: Poller) -> None:
        self._poller = poller
        self._loop = asyncio.get_running_loop()
        self._context = context_without_traces()  # a lease expires in no caller's context
        self._leases: dict[_Target, _Lease] = {}

    async def hold(self, options: WaitOptions, *, seconds: float, explain: bool) -> WaitResult:
        """Wait for a piece of a longer wait, so many seconds, and return its outcome; None if it goes on."""
        target = options["operation_id"], options["ticket"], options["may_be_missing"]
        lease = self._leases.get(target)
        if lease is None:
            wait = self._poller.start(**options, patience=seconds)
            lease = self._leases[target] = _Lease(wait, is_explained=explain)
            if explain:
                self._poller.explainer.start(wait)
        lease.holders += 1
        if lease.expiry is not None:
            lease.expiry.cancel()
            lease.expiry = None
        try:
            # If the wait's deadline comes first, the hold ends as the wait does.
            ends_within = lease.wait.deadline <= self._loop.time() + seconds + RESOLUTION
            await asyncio.wait((lease.wait,), timeout=None if ends_within else seconds)
            if not lease.wait.done():
                return None
            if self._leases.get(target) is lease:  # the next hold starts anew
                del self._leases[target]
            outcome = copy.copy(lease.wait.result())  # each caller raises an error of its own
            if lease.is_explained:
                await self._poller.explainer.complete(outcome, lease.wait)
            return outcome
        finally:
            self._release(target, lease)
            del lease  # else a cycle: its wait has the error, and the error's traceback has this frame

    def _release(self, target: _Target, lease: _Lease) -> None:
        """After the last hold, let the wait go on for the next one, which also gets the outcome if the wait ends."""
        lease.holders -= 1
        if lease.holders:
            return
        if self._leases.get(target) is lease:
            lease.expiry = self._loop.call_later(LEASE, self._expire, target, lease, context=self._context)
        else:
            self._end(lease)

    def _expire(self, target: _Target, lease: _Lease) -> None:
        del self._leases[target]
        lease.expiry = None
        self._poller.stop(lease.wait)
        self._end(lease)

    def close(self) -> None:
        """Forget the waits without holders. The poller ends them."""
        leases, self._leases = self._leases, {}
        for lease in leases.values():
            if lease.expiry is not None:  # else its holders get the error, and leave it
                lease.expiry.cancel()
                self._end(lease)

    def _end(self, lease: _Lease) -> None:
        if lease.is_explained:
            self._poller.explainer.leave(lease.wait)
