"""What the history shows about one client: what its answers mean, by docs/rules.md, and when it had no trouble.

Nothing of the library is used here or in the promises: what checks it must not share its mistakes.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from .tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .history import Exchange, History, Known, ObservedClient, ObservedCreate, ObservedWait

TIMED_OUT, UNKNOWN = "ApprovalTimeoutError", "ApprovalUnknownError"
#: Seconds by which times may differ: wall clocks tell microseconds, and the loop's clock rounds.
EPS: Final = 1e-4
#: Seconds that a final poll may take, its repetitions included (rule 3).
FINAL: Final = 2.0
#: The last of these, in which none starts.
TOO_LATE: Final = 0.5
#: Seconds by which a deadline is handled late if the loop stood still.
STOOD_STILL: Final = 0.5
#: Seconds for which a wait that is held goes on after the last hold.
LEASE: Final = 10.0
#: Seconds for which an operation may still be missing, since a replica lags (rule 5).
YOUNG: Final = 5.0
#: Seconds of a Retry-After that count.
LONGEST_PAUSE: Final = 120.0
#: Seconds after which a poll gives its slot back.
SLOW: Final = 1.0
#: Good answers in a row that show a queue, and the seconds by which each is later than twice the quickest.
QUEUED: Final = 8
LATE: Final = 0.3
#: Refusals, of forty polls, up to which a limit is not the tenant's.
MANY_REFUSED: Final = 13
#: Polls that may be in flight in any case after polls without an answer, and after an outage; good answers in a row
#: after which there are many again.
NARROW: Final = 2
WIDE: Final = 16
WIDENED: Final = 40

_SHAPE: Final = {"operationId": str, "userId": str, "state": str, "result": bool}
_ERRORS: Final = {
    400: "BadRequestError",
    403: "PermissionDeniedError",
    406: "NotAcceptableError",
    409: "ConflictStatusError",
    415: "UnsupportedMediaTypeError",
}


class Violation(NamedTuple):
    """A promise that was broken."""

    promise: str
    client: str
    operation_id: str
    at: float
    text: str

    def __str__(self) -> str:
        return f"{self.promise}: {self.client}, operation {self.operation_id!r}, at {self.at:.4f} s: {self.text}"


class Reading(NamedTuple):
    """What came of a poll.

    Attributes:
        kind: Its answer said something; a transient failure; 404; another error, which ends waits; one that ends waits
            unless the operation was seen, which is not certain; or the client gave it up, which says nothing.
        said: The answer.
        error: The name of the error, if it is not one that the service gives now and then.
    """

    kind: Literal["said", "failed", "missing", "error", "unsure", "cut"]
    said: dict[str, Any] | None = None
    error: str = ""


def read(exchange: Exchange, request_timeout: float) -> Reading:
    """Return what came of a poll, by rules 2, 4 and 5. A key is refused only if it was replaced meanwhile."""
    status = exchange.status
    if exchange.had_no_key:
        return Reading("error", error="ConfigurationError")
    if status is None:
        is_overdue = exchange.ended_at - exchange.sent_at >= request_timeout - EPS
        return Reading("cut") if exchange.was_cut and not is_overdue else Reading("failed")
    if status == 404:
        return Reading("failed") if exchange.was_stored else Reading("missing", error="NotFoundError")
    if status in {401, 408, 425, 429} or 500 <= status < 600:
        return Reading("failed")
    if status != 200:
        return Reading("error", error=_ERRORS.get(status, "StatusError"))
    reading = _read_body(exchange.body)
    is_old = exchange.was_stored and reading.said is not None and reading.said["state"] == "pending"
    return Reading("failed") if is_old else reading


@lru_cache(maxsize=4096)
def _read_body(body: bytes) -> Reading:
    twice: list[str] = []
    try:
        said = json.loads(body, object_pairs_hook=lambda pairs: _object(pairs, twice))
    except ValueError:
        return Reading("failed")
    if not isinstance(said, dict) or any(not isinstance(said.get(name), kind) for name, kind in _SHAPE.items()):
        return Reading("error", error="DecodeError")
    return Reading("error", error="DecodeError") if twice else Reading("said", said)


def _object(pairs: list[tuple[str, Any]], twice: list[str]) -> dict[str, Any]:
    said = dict(pairs)
    twice += [name for name, _ in pairs[len(said) :]]
    return said


def verdict(said: dict[str, Any], operation_id: str, ticket: Known | None) -> str:
    """Return what an answer means by rule 2: approved, pending, or the name of the error that rejects it."""
    if said["operationId"] != operation_id:
        return "OperationMismatchError"
    if ticket is not None:
        same = (
            said["userId"].upper() == ticket.user_id.upper()
            and (said.get("operationPayload") or "") == ticket.payload
            and ticket.external_user_id in (None, "", said.get("externalUserId"))
        )
        if not same:
            return "OperationMismatchError"
    if said["state"] == "approved" and said["result"] is True:
        return "approved"
    return "pending" if said["state"] == "pending" else "InconsistentOperationError"


def least_in_flight(slots: int) -> int:
    """Return how many ordinary polls may be in flight in any case, slow ones included."""
    return max(3 * slots // 2, min(2 * slots, 384))


def most_in_flight(slots: int) -> int:
    """Return how many ordinary polls may be in flight at most, slow ones included."""
    return max(2 * slots, min(6 * slots, 512))


def most_final(slots: int) -> int:
    """Return how many final polls may be in flight."""
    return max(slots, min(4 * slots, 256))


@dataclass(frozen=True, slots=True)
class Budget:
    """When a wait must end, as one of the clocks that the rules allow tells.

    Attributes:
        deadline: The time of its final poll.
        had_expired: Whether there was no time left when it began.
        origin: When the operation was created.
    """

    deadline: float
    had_expired: bool
    origin: float


def _budget(wait: ObservedWait, age: float) -> Budget:
    start, origin = wait.started_at, wait.started_at - age
    left = math.inf if wait.ticket is None else max(0.0, wait.ticket.lifetime - age)
    if wait.timeout is not None:
        return Budget(start + wait.timeout, had_expired=False, origin=origin)
    if left <= 0.0:
        return Budget(start + wait.patience, had_expired=True, origin=origin)
    return Budget(start + left, had_expired=False, origin=origin)


class _Groups(dict[str, list[Any]]):
    def __missing__(self, name: str) -> list[Any]:
        return []


class Evidence:
    """The history of one client.

    Args:
        client: The client.
        history: All that happened.
    """

    def __init__(self, client: ObservedClient, history: History) -> None:
        self.client = client
        self.history = history
        self.exchanges = [exchange for exchange in history.exchanges if exchange.client == client.name]
        self.polls = [exchange for exchange in self.exchanges if exchange.is_poll]
        waits = [wait for wait in history.waits if wait.client == client.name]
        self.waits = [wait for wait in waits if wait.hold is None]
        """The waits, those among them that are held."""
        self.holds = [wait for wait in waits if wait.hold is not None]
        self.creates: list[ObservedCreate] = [c for c in history.creates if c.client == client.name]
        self.polls_of: dict[str, list[Exchange]] = _Groups()
        self.waits_of: dict[str, list[ObservedWait]] = _Groups()
        for poll in self.polls:
            self.polls_of.setdefault(poll.operation_id, []).append(poll)
        for wait in self.waits:
            self.waits_of.setdefault(wait.operation_id, []).append(wait)
        # How long an exchange can take.
        self._longest = client.request_timeout + max((ends - begins for begins, ends in history.standstills), default=0)
        self._readings: dict[int, Reading] = {}
        self._budgets: dict[int, list[Budget]] = {}
        self._final: dict[tuple[int, float], bool] = {}
        self._key_was_good_at = min((e.sent_at for e in self.exchanges if not e.had_no_key), default=math.inf)
        self._sent = [poll.sent_at for poll in self.polls]
        self._sent_of = {name: [poll.sent_at for poll in polls] for name, polls in self.polls_of.items()}

    def awake(self, at: float) -> float:
        """Return when what is due at a time can happen: while the loop stands still, nothing does."""
        return self.history.awake(at)

    def final_from(self, deadline: float) -> float:
        """Return when the two seconds of a final poll begin: at the deadline, or when the loop goes on after it."""
        awake = self.awake(deadline)
        return awake if awake > deadline + STOOD_STILL else deadline

    def last_end(self, deadline: float) -> float:
        """Return when a wait must have ended. If the loop stood still then, too, it may take two seconds more."""
        end = self.final_from(deadline) + FINAL
        awake = self.awake(end)
        return end if awake == end else self.last_end(awake)

    def violation(
        self, promise: str, about: ObservedWait | ObservedCreate | Exchange, at: float, text: str
    ) -> Violation:
        """Return the violation of a promise by this client."""
        return Violation(promise, self.client.name, str(about.operation_id), at, text)

    def read(self, poll: Exchange) -> Reading:
        """Return what came of a poll. What would end waits is a failure if the operation, or a key, was good before."""
        reading = self._readings.get(poll.number)
        if reading is None:
            reading = read(poll, self.client.request_timeout)
            if self._refuses_key(poll):
                reading = Reading("error", error="AuthenticationError")
            if poll.had_no_key:
                was_good = [self._key_was_good_at < poll.sent_at]
            elif reading.kind in {"missing", "error"}:
                was_good = [self._was_seen(poll, slack) for slack in (-EPS, EPS)]
            else:
                was_good = [False]
            if any(was_good):
                reading = reading._replace(kind="failed" if all(was_good) else "unsure")
            self._readings[poll.number] = reading
        return reading

    def _was_seen(self, poll: Exchange, slack: float) -> bool:
        """Return whether an earlier poll found the operation pending, and waits for it have gone on since.

        Args:
            poll: A poll, which has ended.
            slack: Seconds by which the next wait may begin after the end of the one before it.
        """
        begins = poll.sent_at
        for wait in sorted(self.waits_of[poll.operation_id], key=lambda wait: -wait.ended_at):
            if wait.started_at <= poll.sent_at and wait.ended_at >= begins - slack:
                begins = min(begins, wait.started_at)
        return any(
            begins <= earlier.ended_at < poll.ended_at + slack
            and any(
                self._means(earlier, wait) == "pending" for wait in self.waits_at(poll.operation_id, earlier.ended_at)
            )
            for earlier in self.polls_of[poll.operation_id]
        )

    def _means(self, poll: Exchange, wait: ObservedWait) -> str:
        """Return what an answer means for a wait; the empty text if it means nothing, or was not for that wait."""
        said = None if poll.number < wait.number else read(poll, self.client.request_timeout).said
        return "" if said is None else verdict(said, wait.operation_id, wait.ticket)

    def unexpected_for(self, poll: Exchange) -> float:
        """Return for how long the polls of an operation have failed so that each was unexpected, or others too."""
        since = math.inf
        for earlier in sorted(self.polls_of[poll.operation_id], key=lambda poll: poll.ended_at):
            reading = self.read(earlier)
            if earlier.ended_at > poll.ended_at or reading.kind == "cut":
                continue
            since = (
                math.inf if reading.kind != "failed" else min(since, earlier.ended_at if reading.error else math.inf)
            )
        return poll.ended_at - since

    def refused_for(self, at: float) -> float:
        """Return for how long all answers to the client have refused its key."""
        since = math.inf
        for poll in sorted(self.polls, key=lambda poll: poll.ended_at):
            if poll.ended_at <= at + EPS and poll.status is not None and not poll.had_no_key:
                is_refusal = self._refuses_key(poll)
                since = min(since, poll.ended_at) if is_refusal else math.inf
        return at - since

    def _refuses_key(self, poll: Exchange) -> bool:
        """Return whether an answer refuses the key that the client still has."""
        return poll.status == 401 and not any(poll.sent_at < at <= poll.ended_at for at in self.client.new_keys)

    def sent_between(self, begins: float, ends: float) -> Sequence[Exchange]:
        """Return the polls that were sent in a time, both ends included."""
        return self.polls[bisect_left(self._sent, begins) : bisect_right(self._sent, ends)]

    def around(self, poll: Exchange, at: float) -> Iterator[Exchange]:
        """Yield the polls of the same operation that were sent until a time, and may be under way then."""
        polls, sent = self.polls_of[poll.operation_id], self._sent_of[poll.operation_id]
        begins = bisect_left(sent, at - self._longest - EPS)
        return (other for other in polls[begins : bisect_right(sent, at)] if other is not poll)

    def budgets(self, wait: ObservedWait) -> list[Budget]:
        """Return the budgets that a wait may have: several where clocks disagree about the age of its ticket."""
        budgets = self._budgets.get(wait.number)
        if budgets is None:
            budgets = self._budgets[wait.number] = [_budget(wait, age) for age in wait.ages]
        return budgets

    def is_paced(self, wait: ObservedWait, at: float) -> bool:
        """Return whether the schedule of a wait counts: it has a deadline, which is later by each of the clocks."""
        return all(not budget.had_expired and budget.deadline > at for budget in self.budgets(wait))

    def in_flight(self, at: float) -> list[Exchange]:
        """Return the polls that were under way just before a time."""
        earlier = self.sent_between(at - self._longest - EPS, at - EPS)
        return [poll for poll in earlier if poll.ended_at > at + EPS]

    def is_final(self, poll: Exchange) -> bool:
        """Return whether a poll may be a final one: the deadline of a wait that goes on has passed."""
        at = poll.sent_at
        is_final = self._final.get((poll.number, at))
        if is_final is None:
            is_final = self._final[poll.number, at] = any(
                wait.started_at <= at <= wait.ended_at + EPS
                and any(b.had_expired or b.deadline <= at + EPS for b in self.budgets(wait))
                for wait in self.waits_of[poll.operation_id]
            )
        return is_final

    def is_only_final(self, poll: Exchange) -> bool:
        """Return whether a poll is certainly a final one: all deadlines have passed."""
        waits = list(self.waits_at(poll.operation_id, poll.sent_at))
        budgets = [budget for wait in waits for budget in self.budgets(wait)]
        return bool(budgets) and all(not b.had_expired and b.deadline <= poll.sent_at + EPS for b in budgets)

    def gives_way(self, poll: Exchange) -> bool:
        """Return whether a poll may have been cut off for one that is due: it is slow, and very many are in flight."""
        at = poll.ended_at
        in_flight = sum(p.ended_at >= at - EPS for p in self.sent_between(at - self._longest, at))
        return at >= poll.sent_at + SLOW - EPS and in_flight >= least_in_flight(self.client.max_in_flight)

    @cached_property
    def _good_at(self) -> list[float]:
        return sorted(p.ended_at for p in self.polls if self.read(p).kind in {"said", "missing"})

    def answered_between(self, begins: float, ends: float) -> list[float]:
        """Return when good answers came in a time, without its ends."""
        return self._good_at[bisect_right(self._good_at, begins) : bisect_left(self._good_at, ends)]

    @cached_property
    def most_tokens(self) -> list[tuple[Exchange, float]]:
        """The polls, and how many tokens there were at most when each started."""
        return Tokens(self, is_generous=True).taken

    @cached_property
    def _least_tokens(self) -> Tokens:
        return Tokens(self, is_generous=False)

    @cached_property
    def _refused_at(self) -> list[float]:
        """When polls were refused; not again and again, since that is the operation's own limit."""
        return sorted(poll.ended_at for poll in self.polls if poll.status == 429 and not self._failed_before(poll))

    def _failed_before(self, poll: Exchange) -> bool:
        """Return whether the poll before, of the same operation and for the same wait, certainly failed."""
        before = next((p for p in reversed(self.polls_of[poll.operation_id]) if p.number < poll.number), None)
        return (
            before is not None
            and before.ended_at < poll.sent_at
            and self.read(before).kind == "failed"
            and any(
                wait.number < before.number and wait.ended_at > poll.ended_at
                for wait in self.waits_of[poll.operation_id]
            )
        )

    def is_free(self, at: float, polls: int) -> bool:
        """Return whether so many polls, final ones too, may certainly start at a time: there are tokens, and no pause.

        The rate that the service refused is forgotten after a while.
        """
        refused = bisect_right(self._refused_at, at + EPS)
        is_refused = refused > MANY_REFUSED and at - self._refused_at[refused - 1] <= LONGEST_PAUSE + 10.0
        return not is_refused and self._least_tokens.at(at) >= polls + 1.0

    @cached_property
    def _silent_at(self) -> list[float]:
        """When polls ended that got no answer; final ones among them, which are cut off after two seconds."""

        def is_silent(poll: Exchange) -> bool:
            is_long = poll.ended_at - poll.sent_at >= FINAL - EPS
            return self.read(poll).kind == "failed" or self.gives_way(poll) or is_long

        return sorted(poll.ended_at for poll in self.polls if poll.status is None and is_silent(poll))

    def starts_slowly(self, at: float) -> bool:
        """Return whether a poll got no answer lately, so that few may be in flight, and those that failed go last."""
        return self._window(at) < WIDE

    def _window(self, at: float) -> int:
        """Return how many polls may be in flight in any case."""
        silences = bisect_right(self._silent_at, at + EPS)
        if not silences:
            return WIDE
        last = self._silent_at[silences - 1]
        is_long_ago = at - last > LONGEST_PAUSE and len(self.answered_between(last, at)) >= WIDENED
        return WIDE if is_long_ago else NARROW

    @cached_property
    def _late_at(self) -> list[float]:
        """When so many good answers in a row were late that the client may take them for those of a queue."""
        late, in_a_row, quickest = [], 0, math.inf
        good = (p for p in self.polls if self.read(p).kind in {"said", "missing"})
        for poll in sorted(good, key=lambda poll: poll.ended_at):
            seconds = poll.ended_at - poll.sent_at
            quickest = min(quickest, seconds)
            in_a_row = in_a_row + 1 if seconds > 2 * quickest + LATE - EPS else 0
            if in_a_row >= QUEUED:
                late.append(poll.ended_at)
        return late

    def is_saturated(self, at: float) -> bool:
        """Return whether fewer polls may be in flight at a time, since answers were late in the minutes before it."""
        last = bisect_right(self._late_at, at + EPS)
        return last > 0 and self._late_at[last - 1] > at - LONGEST_PAUSE

    def woke_lately(self, at: float) -> bool:
        """Return whether the loop stood still a moment ago, so that many polls are due at once."""
        return any(ends - EPS <= at <= ends + 1.0 for _, ends in self.history.standstills)

    def has_room(self, at: float, others: int = 0) -> bool:
        """Return whether one more ordinary poll can start at a time, beside some that begin at the same moment."""
        lately = len(self.sent_between(at - 2.0, at - EPS))
        if not self.is_free(at, others + lately) or self.is_saturated(at) or self.woke_lately(at):
            return False
        slots, in_flight = self.client.max_in_flight, self.in_flight(at)
        with_slot = sum(poll.sent_at > at - SLOW - EPS for poll in in_flight)
        return (
            with_slot + others < min(4, slots)
            and len(in_flight) + others < min(least_in_flight(slots), self._window(at))
            and lately + others < self.client.rate / 2
        )

    def failed_lately(self, operation_id: str, at: float) -> bool:
        """Return whether an operation failed, so that its next poll may be on the backoff."""
        return any(
            poll.sent_at <= at and self.read(poll).kind != "said" and poll.ended_at > at - 30.0
            for poll in self.polls_of[operation_id]
        )

    def waits_at(self, operation_id: str, at: float, until: float | None = None) -> Iterator[ObservedWait]:
        """Yield the waits for an operation that are under way at a time, or at some time until another one."""
        for wait in self.waits_of[operation_id]:
            if wait.started_at <= (at if until is None else until) + EPS and wait.ended_at >= at - EPS:
                yield wait
