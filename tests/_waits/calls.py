"""The machine, called by hand: no loop, no clock, no network. Times are what a test says they are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tenacity import wait_fixed

from aiokeyless import (
    AuthenticationError,
    CachedAnswerError,
    ConfigurationError,
    KeylessError,
    NotFoundError,
    Operation,
    RateLimitError,
    ServerError,
    TransportError,
)
from aiokeyless._waits.machine import Machine
from aiokeyless._waits.reporting import Reporter
from aiokeyless._waits.state import WAIT_SLOTS, Poll, Wait, WaitResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from tenacity.wait import wait_base

    from aiokeyless import ApprovalTicket, ApprovalUpdate, WaitTimeout
    from aiokeyless._listeners import Listeners

TIMEOUT = 10.0
USER = "AB"


class PlainWait(Wait):
    """A wait that is no future."""

    __slots__ = (*WAIT_SLOTS, "_result", "is_cancelled")

    def __init__(self) -> None:
        self.is_cancelled = False
        self._result: list[WaitResult] = []

    def done(self) -> bool:
        return self.is_cancelled or bool(self._result)

    def cancelled(self) -> bool:
        return self.is_cancelled

    def result(self) -> WaitResult:
        return self._result[0]

    def set_result(self, result: WaitResult, /) -> None:
        assert not self.done()
        self._result.append(result)

    @property
    def outcome(self) -> str:
        """The name of what it ended with; empty while it goes on."""
        if not self._result:
            return ""
        result = self.result()
        return "approved" if isinstance(result, Operation) else type(result).__name__


class Updates(list["ApprovalUpdate"]):
    """Updates that are kept."""

    closed = False

    def send_nowait(self, item: ApprovalUpdate, /) -> None:
        self.append(item)

    def close(self) -> None:
        self.closed = True


def operation(operation_id: str = "op", *, approved: bool = False, **fields: Any) -> Operation:
    known: dict[str, Any] = {
        "id": 1,
        "timestamp": "",
        "node_id": "",
        "user_id": USER,
        "api_key": None,
        "operation_id": operation_id,
        "result": approved,
        "state": "approved" if approved else "pending",
    }
    return Operation(**{**known, **fields})


def error(status: int, retry_after: float | None = None) -> KeylessError:
    kind = {401: AuthenticationError, 404: NotFoundError, 429: RateLimitError}.get(status, ServerError)
    return kind(status=status, method="GET", path="/v2/operations/op", retry_after=retry_after)


def no_key() -> ConfigurationError:
    """Return the error of a key function that returned keys before."""
    failure = ConfigurationError("api_key must be a function that returns the key", argument="api_key")
    failure.key_was_good = True
    return failure


def replaced_key() -> AuthenticationError:
    """Return the refusal of a key that was replaced meanwhile."""
    failure = AuthenticationError(status=401, method="GET", path="/v2/operations/op")
    failure.key_was_replaced = True
    return failure


def no_answer() -> TransportError:
    return TransportError("no connection", method="GET", path="/v2/operations/op")


def cached() -> CachedAnswerError:
    return CachedAnswerError("a cache said so", method="GET", path="/v2/operations/op")


class Calls(Machine):
    """A machine with shorter calls."""

    def __init__(
        self,
        slots: int = 64,
        *,
        connections: float = math.inf,
        rate: float | None = None,
        schedule: wait_base | None = None,
        listeners: Listeners | None = None,
    ) -> None:
        super().__init__(
            Reporter(listeners),
            schedule=schedule or wait_fixed(1),
            max_in_flight=slots,
            max_connections=connections,
            max_polls_per_second=rate,
            request_timeout=TIMEOUT,
            path_of="/v2/operations/{}".format,
        )

    def wait(
        self,
        operation_id: str = "op",
        *,
        at: float = 0.0,
        ticket: ApprovalTicket | None = None,
        age: float = 0.0,
        is_fresh: bool = False,
        timeout: WaitTimeout = None,
        schedule: wait_base | None = None,
        may_be_missing: bool = False,
        updates: Updates | None = None,
        **options: Any,
    ) -> PlainWait:
        """Start a wait."""
        wait = PlainWait()
        self.start(
            wait,
            at,
            operation_id,
            ticket=ticket,
            age=age,
            is_fresh=is_fresh,
            timeout=timeout,
            schedule=schedule,
            may_be_missing=may_be_missing,
            updates=updates,
            **options,
        )
        return wait

    def give_up(self, wait: PlainWait, at: float) -> None:
        """Let the caller of a wait leave."""
        wait.is_cancelled = True
        self.leave(wait, at)

    def started(self, at: float) -> list[Poll]:
        """Let time pass, and start the polls that may start."""
        self.expire(at)
        polls: list[Poll] = []
        while (poll := self.next_poll(at)) is not None:
            polls.append(poll)
        return polls

    def wakes(self, at: float) -> float:
        """Return when it wakes by itself, once nothing may start at a time."""
        assert self.started(at) == []
        return self.wake_at()

    def one(self, at: float) -> Poll:
        """Let time pass, and start the one poll that may start."""
        (poll,) = self.started(at)
        return poll

    def answer(self, poll: Poll, at: float, answer: Operation | KeylessError | str | None = "pending") -> None:
        """End a poll with an answer, and apply it to all of its waits."""
        if isinstance(answer, str):
            answer = operation(poll.polled.operation_id, approved=answer == "approved")
        more = self.finish_poll(poll, answer, at)
        while more is not None and self.apply_more(more, at):
            pass

    def run(self, until: float, service: Callable[[str, float], Any], since: float = 0.0) -> list[tuple[float, str]]:
        """Let the time pass, with a service that answers at once; return the polls."""
        now, polls = since, []
        while (now := max(now, self.wake_at())) <= until:
            for poll in self.started(now):
                polls.append((now, poll.polled.operation_id))
                self.answer(poll, now, service(poll.polled.operation_id, now))
        return polls


def names(polls: list[Poll]) -> list[str]:
    return [poll.polled.operation_id for poll in polls]
