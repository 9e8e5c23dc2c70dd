"""What most programs do instead: a ``while`` loop of one poll a second, which survives every error.

It meets the weather of a story with the same operations and the same users. No wait may be much later than it is, nor
lose an approval that it gets.
"""

from __future__ import annotations

import copy
import json
import math
import random
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heapreplace
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from .evidence import Violation
from .faults import Flapping, Moved, Outage, RateLimit, Request, Shard
from .history import History
from .people import Person
from .service import Service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .actors import Actor, Process
    from .faults import Fault
    from .history import ObservedWait
    from .story import Story

F = TypeVar("F")

#: Seconds from an answer to the next poll, and seconds for which an answer is waited for.
PAUSE: Final = 1.0
TIMEOUT: Final = 10.0
#: A story that seems to be worse is told again by other dice, so many times, or up to so many approvals.
AGAIN: Final = 40
ENOUGH: Final = 120
#: Waits that are few: if one of them is answered well, that does not say soon enough that a 503 was one server's.
FEW: Final = 10


class Bound(NamedTuple):
    """How late waits may be on average.

    Attributes:
        why: Why.
        is_met: Tells whether it holds in some weather, if so many waits meet it.
        times: How many times as late as a loop.
        seconds: And by how many seconds more.
        may_lose: Whether approvals may be lost that a loop gets.
    """

    why: str
    is_met: Callable[[Sequence[Fault], int], bool]
    times: float = 1.5
    seconds: float = 0.5
    may_lose: bool = False


#: The known weather in which a loop is better.
EXCEPTIONS: Final = (
    Bound(
        "a 429's Retry-After is obeyed, and a loop ignores it",
        lambda faults, _: _asks_for_more(faults, 429, 1.0),
        seconds=math.inf,
        may_lose=True,
    ),
    Bound(
        "a limit that is our own is found and kept, and a loop runs into it on and on",
        lambda faults, waits: any(3 * (f.per_second - f.others) < 2 * waits for f in _only(RateLimit, faults)),
        seconds=math.inf,
        may_lose=True,
    ),
    Bound(
        "an old host that answers well is found out by the age of connections; a loop that keeps none meets none",
        lambda faults, _: any(fault.failure is None for fault in _only(Moved, faults)),
        seconds=math.inf,
        may_lose=True,
    ),
    Bound(
        "while a neighbour uses the limit up, over a third of some forty polls are refused",
        lambda faults, _: bool(_only(RateLimit, faults)),
        times=3.0,
    ),
    Bound(
        "a 503's Retry-After holds an operation for up to 5 s if no other one is answered well meanwhile",
        lambda faults, waits: waits < FEW and _asks_for_more(faults, 503, 0.0),
        seconds=math.inf,
    ),
)


def _only(kind: type[F], faults: Sequence[Fault]) -> list[F]:
    return [fault for fault in faults if isinstance(fault, kind)]


def _asks_for_more(faults: Sequence[Fault], status: int, seconds: float) -> bool:
    """Return whether a fault answers with a status, and a Retry-After of more seconds."""
    failures = [fault.failure for fault in faults if isinstance(fault, Flapping | Moved | Outage | Shard)]
    asked = [failure.retry_after for failure in failures if failure is not None and failure.status == status]
    asked += [fault.retry_after for fault in _only(RateLimit, faults) if status == 429]
    return any((retry_after or 0.0) > seconds for retry_after in asked)


@dataclass
class Score:
    """How late waits and loops were, for the same approvals."""

    approvals: int = 0
    waits: float = 0.0
    loops: float = 0.0
    lost: list[ObservedWait] = field(default_factory=list)
    lost_by_loops: int = 0
    latest: tuple[float, ObservedWait] | None = None

    def add(self, wait: ObservedWait, approved_at: float, found_at: float) -> None:
        """Add a wait that has ended, and when a loop found its approval; infinite: never."""
        is_found = wait.outcome == "approved"
        if is_found and found_at < math.inf:
            self.approvals += 1
            self.waits += wait.ended_at - approved_at
            self.loops += found_at - approved_at
            late = wait.ended_at - found_at
            self.latest = max((late, wait), self.latest or (late, wait), key=lambda each: each[0])
        elif found_at < math.inf:
            self.lost.append(wait)
        elif is_found:
            self.lost_by_loops += 1

    def is_within(self, times: float, seconds: float) -> bool:
        """Return whether the waits are about as good as the loops. A few that were lost may be bad luck."""
        lost, lost_by_loops = len(self.lost), self.lost_by_loops
        return self.waits <= times * self.loops + seconds * max(
            1, self.approvals
        ) and lost - lost_by_loops <= 1 + 2 * math.sqrt(lost + lost_by_loops)

    def __str__(self) -> str:
        count = max(1, self.approvals)
        return (
            f"{self.approvals} approvals: {self.waits / count:.2f} s late, by a loop {self.loops / count:.2f} s; "
            f"{len(self.lost)} lost, by a loop {self.lost_by_loops}"
        )


def compare(story: Story, history: History, run: Callable[[Story], History]) -> Iterator[Violation]:
    """Yield a violation if loops would have been better.

    Args:
        story: The story.
        history: What happened.
        run: Tells it again.
    """
    actors = tuple(actor for actor in story.actors if actor.is_compared)
    begins = min((actor.at for actor in actors), default=0.0)
    storm = [fault for fault in story.faults if getattr(fault, "begins", -math.inf) >= begins]
    met = [bound for bound in EXCEPTIONS if bound.is_met(storm, len(actors))]
    if not actors or any(bound.may_lose for bound in met):
        return
    times, seconds = (max(each) for each in zip((1.5, 0.5), *(bound[2:4] for bound in met), strict=True))
    score = Score()
    _measure(story, history, score)
    rng = random.Random(f"{story.seed} again")  # noqa: S311
    for number in range(0 if score.is_within(times, seconds) else AGAIN):
        shifted = tuple(_shift(actor, rng.uniform(-3.0, 0.9)) for actor in actors)
        again = replace(story, seed=1000 * story.seed + number, actors=shifted)
        _measure(again, run(again), score)
        if score.approvals >= ENOUGH:
            break
    if not score.is_within(times, seconds):
        wait = score.lost[0] if score.lost or score.latest is None else score.latest[1]
        yield Violation("as good as a loop", wait.client, wait.operation_id, wait.ended_at, str(score))


def _shift(actor: Actor, seconds: float) -> Actor:
    """Return the same actor with a user who approves at another time: a poll is not to be lucky each time."""
    return replace(actor, person=Person(max(0.5, actor.person.approves_after + seconds)))


def _measure(story: Story, history: History, score: Score) -> None:
    payloads = {actor.payload: story.processes[actor.process] for actor in story.actors if actor.is_compared}
    waits = [
        wait
        for wait in history.waits
        if (true := history.operations.get(wait.operation_id)) is not None and true.payload in payloads
    ]
    process = next(iter(payloads.values()))
    found, _ = run_loops(story, history, waits, process)
    for wait, found_at in zip(waits, found, strict=True):
        score.add(wait, max(history.operations[wait.operation_id].approved_at, wait.started_at), found_at)


def run_loops(
    story: Story, history: History, waits: list[ObservedWait], process: Process
) -> tuple[list[float], list[float]]:
    """Return when loops in place of some waits would have found the approvals, infinite: never; and all their polls."""
    service = Service(story.seed, copy.deepcopy(story.faults), {}, History())
    service.operations.update(history.operations)
    found = [math.inf] * len(waits)
    sent: list[float] = []
    due = [(wait.started_at, number) for number, wait in enumerate(waits)]
    heapify(due)
    while due:
        at, number = due[0]
        wait = waits[number]
        assert wait.ticket is not None
        if at >= wait.started_at + wait.ticket.lifetime - wait.ages[0]:
            heappop(due)
            continue
        sent.append(at)
        ends, is_approved = _poll(service, wait.operation_id, at, has_key=bool(process.key(at)))
        if is_approved:
            found[number] = ends
            heappop(due)
        else:
            heapreplace(due, (ends + PAUSE, number))
    return found, sent


def _poll(service: Service, operation_id: str, at: float, *, has_key: bool) -> tuple[float, bool]:
    """Return when one poll ends, on a connection of its own, and whether it finds the approval."""
    if not has_key:
        return at, False
    request = Request(at, "GET", operation_id, "", b"", service.operations[operation_id].payload or "")
    fate = service.fate(request)
    seconds = fate.latency + (fate.pieces - 1) * fate.between_pieces
    if seconds >= TIMEOUT:
        return at + TIMEOUT, False
    if fate.is_refused or fate.is_lost or fate.is_truncated:
        return at + seconds, False
    status, body = service.answer(request, fate, 0)
    try:
        said = json.loads(body) if status == 200 else None
    except ValueError:
        said = None
    found = (said.get("operationId"), said.get("state")) if isinstance(said, dict) else None
    return at + seconds, found == (operation_id, "approved")
