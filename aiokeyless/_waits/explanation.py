"""Explains waits: asks Telemetry for the attempts at an operation, beside its polls and never in place of one.

An explanation approves nothing and ends no wait. It costs little: few requests are in flight at once, all waits for an
operation share them, and they are cancelled with the last of these waits. A request that fails is logged, as a warning
if the key may not read attempts, and otherwise ignored.

Source: Keyless documentation, Server API / Telemetry.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from typing import TYPE_CHECKING, Final

import msgspec

from aiokeyless._http.protocol import get_authentications
from aiokeyless._rules.backoff import requested_pause
from aiokeyless._rules.final import FINAL_POLL_TIMEOUT
from aiokeyless._tracing import context_without_traces
from aiokeyless.errors import (
    ApprovalTimeoutError,
    ApprovalUnknownError,
    AuthenticationError,
    KeylessError,
    NotFoundError,
    PermissionDeniedError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiokeyless._http.transport import Transport
    from aiokeyless.models import Authentication
    from aiokeyless.reports import ApprovalUpdate

    from .state import Wait, WaitResult

logger: Final = logging.getLogger("aiokeyless")

#: Seconds. Most users who approve have done so by then, and need no explanation.
PENDING_FOR: Final = 5.0
#: Seconds between two requests about one operation.
INTERVAL: Final = 10.0
#: Seconds by which the last request may delay the end of a wait.
AT_THE_END: Final = 1.0
#: Of one operation. A lockout usually stops a user much earlier.
_MOST_ATTEMPTS: Final = 100
_MOST_REASONS: Final = 3  # in one message
_MOST_REQUESTS: Final = 8  # at once, of all waits together
#: Seconds without a request after one that was not allowed. The next one would not be allowed either.
_REFUSED_FOR: Final = 120.0


class _Subject:
    """An operation that is explained, for one wait or for many."""

    __slots__ = ("asked_at", "attempts", "operation_id", "pending_since", "request", "user_id", "waits")

    def __init__(self, operation_id: str) -> None:
        self.operation_id = operation_id
        self.user_id: str | None = None  # from a ticket, or from the first answer about a bare id
        self.pending_since = math.inf
        self.asked_at = -math.inf
        self.attempts: tuple[Authentication, ...] = ()
        self.request: asyncio.Task[None] | None = None
        self.waits = 0


class Explainer:
    """Explains the waits of one client, from `start` to `leave`.

    Args:
        transport: Sends the requests. As with single calls, the budget neither delays nor counts them.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._slots = asyncio.Semaphore(_MOST_REQUESTS)
        self._subjects: dict[str, _Subject] = {}  # by operation id
        self._requests: set[asyncio.Task[None]] = set()
        self._not_before = -math.inf  # after a refusal, or by Retry-After

    def start(self, wait: Wait) -> None:
        """Explain a wait; the caller must `leave` it."""
        operation_id = wait.polled.operation_id
        subject = self._subjects.get(operation_id)
        if subject is None:
            subject = self._subjects[operation_id] = _Subject(operation_id)
        subject.waits += 1
        if wait.ticket is not None:
            subject.user_id = wait.ticket.user_id
        subject.pending_since = min(subject.pending_since, wait.origin)

    def add_to(self, update: ApprovalUpdate, wait: Wait) -> ApprovalUpdate:
        """Return an update with the known attempts. If the operation is pending, ask for more in the background.

        Not if it is too early, or if too many requests are in flight.
        """
        subject, operation = self._subjects[wait.polled.operation_id], update.operation
        if subject.user_id is None and operation is not None:
            subject.user_id = operation.user_id
        if isinstance(update.error, NotFoundError) if operation is None else not operation.is_approved:
            since, now = subject.pending_since, self._loop.time()
            may = may_ask(now, asked_at=subject.asked_at, pending_since=since, deadline=wait.deadline)
            if may and not self._slots.locked():
                self._ask(subject)
        return msgspec.structs.replace(update, attempts=subject.attempts)

    async def complete(self, outcome: WaitResult, wait: Wait) -> None:
        """If the outcome is a timeout, add the attempts to it.

        A last request is sent before, or the one in flight awaited: for a second, but not past the end of the wait.
        """
        if not isinstance(outcome, ApprovalTimeoutError):
            return
        subject = self._subjects[wait.polled.operation_id]
        if not isinstance(outcome, ApprovalUnknownError):  # else the service does not answer
            now = self._loop.time()
            if may_ask(now, asked_at=subject.asked_at):
                self._ask(subject)
            left = wait.deadline + FINAL_POLL_TIMEOUT - now
            if subject.request is not None and left > 0:
                await asyncio.wait([subject.request], timeout=min(AT_THE_END, left))
        explain(outcome, subject.attempts)

    def leave(self, wait: Wait) -> None:
        """Forget a wait. After the last wait for an operation, cancel its request."""
        subject = self._subjects[wait.polled.operation_id]
        subject.waits -= 1
        if not subject.waits:
            del self._subjects[subject.operation_id]
            if subject.request is not None:
                subject.request.cancel()

    async def aclose(self) -> None:
        """Cancel the requests in flight."""
        for request in self._requests:
            request.cancel()
        while self._requests:
            await asyncio.wait(self._requests)

    def _ask(self, subject: _Subject) -> None:
        if subject.user_id is None or subject.request is not None or self._loop.time() < self._not_before:
            return
        subject.asked_at = self._loop.time()
        # Neither by the loop's task factory nor in a caller's context, as with the poller's workers.
        subject.request = asyncio.Task(
            self._fetch(subject, subject.user_id), loop=self._loop, context=context_without_traces()
        )
        self._requests.add(subject.request)
        subject.request.add_done_callback(functools.partial(self._on_request_end, subject))

    def _on_request_end(self, subject: _Subject, request: asyncio.Task[None]) -> None:
        self._requests.discard(request)
        subject.request = None

    async def _fetch(self, subject: _Subject, user_id: str) -> None:
        try:
            with self._transport.call():
                async with self._slots:
                    if self._loop.time() < self._not_before:
                        return
                    answer = await self._transport.send(get_authentications(user_id, subject.operation_id))
        except KeylessError as error:
            # Not if the key was replaced meanwhile.
            was_refused = isinstance(error, AuthenticationError | PermissionDeniedError) and not error.is_transient
            is_new = self._loop.time() >= self._not_before  # else another request in flight was refused a moment ago
            level = logging.WARNING if was_refused and is_new else logging.DEBUG
            logger.log(level, "the attempts at operation %r are not known: %s", subject.operation_id, error)
            pause = _REFUSED_FOR if was_refused else requested_pause(error)
            self._not_before = max(self._not_before, self._loop.time() + pause)
        else:
            subject.attempts = merge_attempts(subject.attempts, answer.attempts, subject.operation_id)


def may_ask(now: float, *, asked_at: float, pending_since: float = -math.inf, deadline: float = math.inf) -> bool:
    """Return whether Telemetry may be asked about an operation now.

    Shortly before the deadline of a wait, only the last request is sent.
    """
    return now - asked_at >= INTERVAL and now - pending_since >= PENDING_FOR and deadline - now >= INTERVAL


def merge_attempts(
    known: tuple[Authentication, ...], answered: Sequence[Authentication], operation_id: str
) -> tuple[Authentication, ...]:
    """Return the known attempts at one operation, and those that were answered last; the oldest first.

    Telemetry forgets an attempt after ten minutes. A wait may last longer, so it keeps earlier answers.
    """
    fresh = [attempt for attempt in answered if attempt.operation_id == operation_id]
    everything = [*(attempt for attempt in known if attempt not in fresh), *fresh]
    # All timestamps have one form, so they sort as text. Attempts without one come first.
    everything.sort(key=lambda attempt: attempt.created_at or "")
    return tuple(everything[-_MOST_ATTEMPTS:])


def describe_failures(attempts: Sequence[Authentication]) -> str | None:
    """Return a clause such as "2 attempts failed: the face did not match (30004)"; None if no attempt failed.

    It quotes no text of the service, since an answer may echo anything.
    """
    failed = [attempt for attempt in attempts if attempt.failed]
    if not failed:
        return None
    reasons = list(dict.fromkeys(_reason(attempt) for attempt in failed))[-_MOST_REASONS:]
    return f"{len(failed)} {'attempt' if len(failed) == 1 else 'attempts'} failed: {', '.join(reasons)}"


def explain(error: ApprovalTimeoutError, attempts: tuple[Authentication, ...]) -> None:
    """Add attempts to the error that ends a wait, and the failed ones to its message."""
    error.attempts = attempts
    if words := describe_failures(attempts):
        error.args = (f"{error}; {words}",)


def _reason(attempt: Authentication) -> str:
    code = attempt.error_code or 0
    if not code:
        return "no reason was given"
    return f"{attempt.reason} ({code})" if attempt.reason else f"error {code}"
