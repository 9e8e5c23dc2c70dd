"""The reports of a client: `ApprovalUpdate` per poll, `ApprovalOutcome` per wait of many, `ClientStatistics`."""

from __future__ import annotations

from typing import TypeAlias

from .errors import KeylessError
from .models import Authentication, Model, Operation

__all__ = ["ApprovalOutcome", "ApprovalUpdate", "Approved", "ClientStatistics", "NotApproved"]


class ApprovalUpdate(Model, frozen=True, kw_only=True):
    """The result of one poll of a wait.

    Attributes:
        operation: The operation as the service returned it; None if the poll failed or the operation does not exist.
        error: The transient failure (or the 404 that counts as pending) of this poll, or None.
        polls: Polls sent on behalf of this wait so far.
        elapsed: Seconds since the wait started.
        next_poll_in: Seconds until the next poll is due, or None if this was the last one.
        attempts: The user's attempts to authenticate under this operation's id, oldest first, if the wait has
            ``explain=True``; else empty. They explain, and never approve.
    """

    operation: Operation | None
    error: KeylessError | None
    polls: int
    elapsed: float
    next_poll_in: float | None
    attempts: tuple[Authentication, ...] = ()


class Approved(Model, frozen=True, kw_only=True):
    """One of many waits ended with the approval.

    Attributes:
        operation_id: The operation that was waited for.
        operation: The approved operation.
        error: None.
    """

    operation_id: str
    operation: Operation
    error: None = None


class NotApproved(Model, frozen=True, kw_only=True):
    """One of many waits ended without an approval.

    Attributes:
        operation_id: The operation that was waited for.
        operation: None; ``error.last_operation`` of an `ApprovalError` is what the deciding poll returned.
        error: What `wait_for_approval` would have raised.
    """

    operation_id: str
    operation: None = None
    error: KeylessError


ApprovalOutcome: TypeAlias = Approved | NotApproved
"""How one of many waits ended. A type checker narrows it: if ``outcome.error is None``, the operation is not None."""


class ClientStatistics(Model, frozen=True, kw_only=True):
    """A client's waits at one instant, and its counts since it was created.

    Attributes:
        waiting: Waits under way.
        in_flight: Polls under way.
        polls: Polls sent.
        approvals: Waits that ended with an approval.
        timeouts: Waits that ended with `ApprovalTimeoutError`.
        transient_failures: Polls that failed transiently.
        lag: Seconds by which the oldest due poll is late. If it stays over a second, ``max_in_flight`` or
            ``max_polls_per_second`` is too small, or the process is too busy.
        rate_limit: Polls a second that may start now: ``max_polls_per_second``, or less for about a minute after the
            service answered 429. None: no limit.
        is_failing: Whether the service fails: nothing but failures for 10 s, or so many that few polls may start.
    """

    waiting: int = 0
    in_flight: int = 0
    polls: int = 0
    approvals: int = 0
    timeouts: int = 0
    transient_failures: int = 0
    lag: float = 0.0
    rate_limit: float | None
    is_failing: bool = False
