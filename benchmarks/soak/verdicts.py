"""What happened, by the service's own record, and what applications were told: the comparison finds lost and wrong.

It shares no code with the library: that a wait ended correctly is decided by who approved when. Times are seconds of
the machine's monotonic clock, which all processes share. Nothing here does I/O.
"""

from __future__ import annotations

from collections import Counter, deque
from enum import StrEnum
from typing import Final

import msgspec

from benchmarks.report import Goal, Table, quantile

#: The method that may return None.
HOLD: Final = "hold_for_approval"
#: Waits of a client with its default settings, and what runs beside them: loops of one poll a second.
BY_DEFAULT: Final = "wait_for_approval, by default"
LOOP: Final = "loop of one poll a second"
#: What a worker told of a request that it had been given.
WORKER: Final = "worker"
#: Who creates operations, and may fail to.
CREATING: Final = frozenset({"create_operation", "request_approval", WORKER})
#: Seconds by which a deadline that an application computes may differ from that of its wait.
_ROUNDING: Final = 0.01
#: What is told of findings, at most.
_EXAMPLES: Final = 20


class Event(StrEnum):
    """What the service records of an operation."""

    CREATED = "created"
    APPROVED = "approved"
    SWAPPED = "swapped"  # it answered with another operation in this one's place


class Entry(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One line of the service's record."""

    event: Event
    at: float
    operation_id: str
    user_id: str = ""
    payload: str = ""
    external_user_id: str | None = None
    due: float | None = None  # when the user approves; None: never


class Ending(StrEnum):
    """How a wait ended, by what it returned or raised."""

    APPROVED = "approved"
    TIMED_OUT = "timed out"
    UNKNOWN = "unknown"  # ApprovalUnknownError: the application asks again
    MISMATCHED = "mismatched"
    ALREADY_APPROVED = "already approved"
    NOT_CREATED = "not created"
    HELD = "held"  # a hold returned None: the wait goes on
    CANCELLED = "cancelled"  # by the application
    FAILED = "failed"  # anything else


class Outcome(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What an application was told about one wait."""

    operation_id: str
    how: str  # the application waited
    ending: Ending
    started: float
    ended: float
    deadline: float | None = None  # until when an approval had to be found; None where nothing is promised
    approved: tuple[str, str, str] | None = None  # id, user and payload of the operation that was returned
    detail: str = ""  # of a failed wait


class Verdict(StrEnum):
    """What the record says of an outcome."""

    RIGHT = "right"
    LOST = "lost"  # the user had approved in time, and the application was told that nobody had
    WRONG = "wrong"  # told that it is approved, and it was not, or another operation was
    UNEXPECTED = "unexpected"  # ended by an error that nothing in the record explains


class _Known:
    """What the record says of one operation."""

    __slots__ = ("approved_at", "created", "swapped")

    def __init__(self, created: Entry) -> None:
        self.created = created
        self.approved_at: float | None = None
        self.swapped = False


class Verdicts:
    """Compares outcomes with the record, as both are written.

    An operation is remembered for ``memory`` seconds after its creation.

    Attributes:
        verdicts: How many outcomes each verdict was given to.
        endings: How many outcomes there were of each method and ending.
        lateness: Seconds from the approval, or from the start of a later wait, until the application was told.
        slowest: The longest of them, and when it ended.
        examples: The first findings, in words.
    """

    def __init__(self, memory: float) -> None:
        self._memory = memory
        self._operations: dict[str, _Known] = {}
        self._ages: deque[tuple[float, str]] = deque()
        self.verdicts: Counter[Verdict] = Counter()
        self.endings: Counter[tuple[str, Ending]] = Counter()
        self.lateness: list[float] = []
        self.slowest = 0.0, 0.0
        self.examples: list[str] = []

    def record(self, entry: Entry) -> None:
        """Take a line of the service's record."""
        if entry.event is Event.CREATED:
            self._operations[entry.operation_id] = _Known(entry)
            self._ages.append((entry.at, entry.operation_id))
            while self._ages[0][0] < entry.at - self._memory:
                self._operations.pop(self._ages.popleft()[1], None)
            return
        known = self._operations.get(entry.operation_id)
        if known is None:
            return  # too old: no wait is as long
        if entry.event is Event.APPROVED:
            known.approved_at = entry.at
        else:
            known.swapped = True

    def evaluate(self, outcome: Outcome) -> Verdict:
        """Decide about an outcome, whose operation's lines were all taken before, and count it."""
        verdict = self._verdict(outcome, self._operations.get(outcome.operation_id))
        self.verdicts[verdict] += 1
        self.endings[outcome.how, outcome.ending] += 1
        if verdict is not Verdict.RIGHT and len(self.examples) < _EXAMPLES:
            self.examples.append(f"{verdict}: {outcome}")
        return verdict

    def counts(self) -> dict[str, int]:
        """Return how many outcomes each verdict was given to, also if there were none."""
        return {f"{verdict}": self.verdicts[verdict] for verdict in Verdict}

    def goals(self) -> list[Goal]:
        """Return what no outcome may be."""
        bad = {
            "approvals lost": Verdict.LOST,
            "wrong approvals": Verdict.WRONG,
            "outcomes that nothing explains": Verdict.UNEXPECTED,
        }
        return [Goal(what, 0, self.verdicts[verdict], required=True) for what, verdict in bad.items()]

    def figures(self) -> dict[str, object]:
        """Return what was found, by name."""
        return {
            **self.counts(),
            "told after the approval, median, s": f"{quantile(self.lateness, 0.5):.2f}",
            "the same, 99%": f"{quantile(self.lateness, 0.99):.2f}",
            "the same, the longest": f"{quantile(self.lateness, 1.0):.1f}",
        }

    def table(self) -> Table:
        """Write what was found."""
        return Table.of_pairs("compared with the service's record", self.figures())

    def _verdict(self, outcome: Outcome, known: _Known | None) -> Verdict:
        match outcome.ending:
            case Ending.APPROVED | Ending.ALREADY_APPROVED:
                return self._of_approval(outcome, known)
            case Ending.TIMED_OUT:
                return self._of_timeout(outcome, known)
            case Ending.MISMATCHED:
                explained = known is not None and known.swapped
            case Ending.NOT_CREATED:  # the same errors must never end a wait
                explained = outcome.how in CREATING
            case Ending.HELD:
                explained = outcome.how == HOLD
            case _:
                explained = outcome.ending in {Ending.UNKNOWN, Ending.CANCELLED}
        return Verdict.RIGHT if explained else Verdict.UNEXPECTED

    def _of_approval(self, outcome: Outcome, known: _Known | None) -> Verdict:
        if known is None or known.approved_at is None or known.approved_at > outcome.ended:
            return Verdict.WRONG
        created = known.created
        if outcome.ending is Ending.APPROVED:
            if outcome.approved != (outcome.operation_id, created.user_id, created.payload):
                return Verdict.WRONG
            seconds = outcome.ended - max(known.approved_at, outcome.started)
            self.lateness.append(seconds)
            self.slowest = max(self.slowest, (seconds, outcome.ended))
        return Verdict.RIGHT

    def _of_timeout(self, outcome: Outcome, known: _Known | None) -> Verdict:
        if known is None:
            return Verdict.UNEXPECTED
        if outcome.deadline is None or known.approved_at is None or known.approved_at > outcome.deadline - _ROUNDING:
            return Verdict.RIGHT
        return Verdict.LOST
