"""What happened in a story, as an observer outside of the library saw it: the only thing that the checker reads."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .service import Stored


@dataclass(slots=True, kw_only=True)
class Exchange:
    """One request of a client, and what came of it."""

    number: int
    """Its place among all events of the story: it tells apart what happened in one instant."""
    client: str
    method: str
    operation_id: str
    is_poll: bool
    """Whether it is a poll, and not a request of a single call."""
    sent_at: float
    ended_at: float = math.inf
    status: int | None = None
    """None: no answer arrived."""
    body: bytes = b""
    retry_after: float | None = None
    was_refused: bool = False
    """There was no connection, so that nothing was sent."""
    was_cut: bool = False
    """The client gave it up."""
    had_no_key: bool = False
    """The function for the key returned none, so that nothing was sent."""
    stored_for: float = 0.0
    """Seconds for which a cache had stored the answer."""
    was_dead: bool = False
    """The connection had been kept, and was lost at this use."""
    was_repeated: bool = False
    """A gateway sent it twice."""

    @property
    def was_stored(self) -> bool:
        """Whether that was for more than a second, in whole seconds."""
        return self.stored_for >= 2.0

    def tell(self) -> str:
        """Return it as a line of a timeline."""
        what = f"{'poll' if self.is_poll else self.method} {self.sent_at:.4f} .. {self.ended_at:.4f} s"
        pause = "" if self.retry_after is None else f", Retry-After {self.retry_after:g}"
        answer = "cut off" if self.was_cut else "no answer" if self.status is None else f"{self.status}{pause}"
        return f"{what}: {answer} {self.body.decode() if self.status == 200 else ''}"


@dataclass(slots=True, kw_only=True)
class Known:
    """What a ticket says about its operation."""

    user_id: str
    payload: str
    external_user_id: str | None
    lifetime: float
    """Seconds from its creation until it expires."""


@dataclass(slots=True, kw_only=True)
class ObservedWait:
    """One wait of an application, or one hold."""

    number: int
    client: str
    operation_id: str
    started_at: float
    ticket: Known | None
    ages: tuple[float, ...] = (0.0,)
    """Seconds since the operation was created, by each clock that the rules allow; 0 for a bare id."""
    timeout: float | None
    """Seconds; None: what the ticket has left."""
    hold: float | None = None
    """Seconds of a hold; None for a wait."""
    lease: ObservedWait | None = None
    """Of a hold: the wait that it holds. That one is none that a caller awaits."""
    is_lease: bool = False
    patience: float = 120.0
    """Seconds after which a wait for an expired ticket gets a final poll."""
    delays: tuple[float, float]
    """The shortest and the longest delay of its schedule."""
    may_be_missing: bool = False
    made_here: bool = False
    """The same client has just created the operation."""
    handler: float = 0.0
    """Seconds that its handler takes for each update; then `ended_at` is when the client says that it ended."""
    returned_at: float = math.inf
    """When its call returned, if its handler is slow."""
    ended_at: float = math.inf
    outcome: str = ""
    """approved, nothing (of a hold), held (of its wait), cancelled, or the name of the exception."""
    approved: dict[str, object] | None = None
    """The operation that it returned."""

    def tell(self) -> str:
        """Return it as a line of a timeline."""
        what = "lease" if self.is_lease else "wait" if self.hold is None else f"hold of {self.hold:g} s"
        limit = "" if self.timeout is None else f", timeout {self.timeout:g} s"
        ages = ", ".join(f"{age:.4f}" for age in self.ages)
        known = "bare id" if self.ticket is None else f"ticket for {self.ticket.lifetime:g} s, {ages} s old"
        return f"{what} {self.started_at:.4f} .. {self.ended_at:.4f} s ({known}{limit}): {self.outcome}"


@dataclass(slots=True, kw_only=True)
class ObservedCreate:
    """One call of ``create_operation``."""

    number: int
    client: str
    operation_id: str | None
    """None: the client made it, and the call ended with an error that names none."""
    id_is_new: bool
    resumes: bool
    user_id: str
    payload: str
    external_user_id: str | None
    started_at: float
    ended_at: float = math.inf
    outcome: str = ""
    """created, reconciled, cancelled, or the name of the exception."""
    was_sent: bool = True
    """What a `TransportError` says of itself."""

    def tell(self) -> str:
        """Return it as a line of a timeline."""
        return f"create {self.started_at:.4f} .. {self.ended_at:.4f} s: {self.outcome}"


@dataclass(slots=True, kw_only=True)
class ObservedClient:
    """One client, from its start to its end."""

    name: str
    max_in_flight: int
    rate: float
    request_timeout: float
    max_attempts: int
    started_at: float
    new_keys: tuple[float, ...] = ()
    """When its function began to return another key."""
    closed_at: float = math.inf
    leftovers: list[str] = field(default_factory=list)
    """What it left behind when its last wait had ended, or when it was closed."""


@dataclass(slots=True)
class History:
    """All of it."""

    exchanges: list[Exchange] = field(default_factory=list)
    waits: list[ObservedWait] = field(default_factory=list)
    creates: list[ObservedCreate] = field(default_factory=list)
    clients: dict[str, ObservedClient] = field(default_factory=dict)
    operations: dict[str, Stored] = field(default_factory=dict)
    """The service's own records: the truth."""
    standstills: list[tuple[float, float]] = field(default_factory=list)
    """When the event loop stood still, in order."""
    problems: list[str] = field(default_factory=list)
    ended_at: float = 0.0
    _events: int = 0

    def next_number(self) -> int:
        """Return the place of the next event."""
        self._events += 1
        return self._events

    def awake(self, at: float) -> float:
        """Return when what is due at a time can happen: while the loop stands still, nothing does."""
        for begins, ends in self.standstills:
            at = ends if begins <= at < ends else at
        return at

    def lines(self) -> list[str]:
        """Return the history as text, for comparing two runs."""
        return [*map(repr, (*self.exchanges, *self.waits, *self.creates)), *map(repr, self.clients.values())]
