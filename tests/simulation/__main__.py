"""Runs stories until the time is up, and shows the first that breaks a promise, cut down to what is needed for that.

``python -m tests.simulation --seconds 600 --seed N``; without ``--seed``, at a new one, which is printed first.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .checker import check
from .loop import compare
from .minimize import breaks, minimize
from .story import make_up, run

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .evidence import Violation
    from .history import Exchange, History, ObservedCreate, ObservedWait
    from .story import Story

SEEDS = Path(__file__).with_name("seeds.txt")
#: Requests, and calls, that are shown of a failure.
SHOWN = 25


@dataclass
class Report:
    """What was tried."""

    stories: int = 0
    hours: float = 0.0
    waits: int = 0
    requests: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)

    def add(self, seed: int) -> Failure | None:
        """Try one story more."""
        started = time.process_time()
        story = make_up(seed)
        history = run(story)
        broken = [*check(history, story.faults), *compare(story, history, run)]
        self.seconds += time.process_time() - started
        self.stories += 1
        self.hours += history.ended_at / 3600
        self.waits += len(history.waits)
        self.requests += len(history.exchanges)
        self.outcomes.update(wait.outcome for wait in history.waits)
        self.outcomes.update(f"create: {create.outcome}" for create in history.creates)
        return Failure(story, broken) if broken else None

    @property
    def speed(self) -> float:
        """Simulated hours a minute."""
        return 60.0 * self.hours / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        outcomes = ", ".join(f"{name} {number}" for name, number in self.outcomes.most_common())
        return (
            f"{self.stories} stories, {self.hours:.0f} hours, {self.waits} waits and holds, "
            f"{self.requests} requests; {self.speed:.0f} simulated hours a minute\nends: {outcomes}"
        )


class Failure(NamedTuple):
    """A story that breaks promises."""

    story: Story
    broken: list[Violation]


def known_seeds() -> list[int]:
    """Return the seeds of all stories that have ever failed."""
    lines = (line.partition("#")[0].strip() for line in SEEDS.read_text(encoding="utf-8").splitlines())
    return [int(line) for line in lines if line]


def simulate(seeds: Iterable[int], until: float = math.inf) -> tuple[Report, Failure | None]:
    """Run the stories of some seeds, to the first that breaks a promise or to a time of ``time.process_time``."""
    report, failure = Report(), None
    for seed in seeds:
        if failure is not None or time.process_time() >= until:
            break
        failure = report.add(seed)
    return report, failure


def tell_failure(failure: Failure) -> str:
    """Return what is to be read of a story that breaks a promise: the seed, the shortest story, what was seen."""
    story, broken = failure
    smallest = minimize(story, broken[0].promise)
    violation = breaks(smallest, broken[0].promise)[0]
    events = "\n".join(f"  {line}" for line in _timeline(run(smallest), violation))
    return (
        f"seed {story.seed}: {broken[0]}\n\nThe shortest story that breaks the same promise:\n"
        f"{smallest.tell()}\n\nThere: {violation}\n{events}"
    )


def _timeline(history: History, about: Violation) -> list[str]:
    """Return the events of an operation, at one client."""
    sent = [e for e in history.exchanges if e.sent_at <= about.at + 1.0 and _concerns(e, about)]
    every_call: list[ObservedWait | ObservedCreate] = [*history.waits, *history.creates]
    calls = [call for call in every_call if call.started_at <= about.at + 1.0 and _concerns(call, about)]
    events: list[Exchange | ObservedWait | ObservedCreate] = [*sent[-SHOWN:], *calls[-SHOWN:]]
    return [event.tell() for event in sorted(events, key=lambda event: event.number)]


def _concerns(event: Exchange | ObservedWait | ObservedCreate, about: Violation) -> bool:
    return (event.operation_id, event.client) == (about.operation_id, about.client)


def main() -> int:
    """Run the command; its exit code is 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="simulate", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of computing (default: 60)")
    parser.add_argument("--seed", type=int, help="the first seed; the others follow it")
    parser.add_argument("--stories", type=int, help="so many stories, whatever time they take")
    parser.add_argument("--known", action="store_true", help="the seeds that have ever failed, and no others")
    parser.add_argument("--briefly", action="store_true", help="do not cut a failure down")
    options = parser.parse_args()
    first = random.SystemRandom().randrange(10**9) if options.seed is None else options.seed
    if options.known:
        seeds: Iterable[int] = known_seeds()
    else:
        print(f"seed {first}", flush=True)
        seeds = count(first) if options.stories is None else range(first, first + options.stories)
    unlimited = options.known or options.stories is not None
    until = math.inf if unlimited else time.process_time() + options.seconds
    report, failure = simulate(seeds, until)
    print(report, flush=True)
    if failure is None:
        print("no promise was broken")
        return 0
    story, broken = failure
    print(f"seed {story.seed}: {broken[0]}" if options.briefly else tell_failure(failure))
    return 1


if __name__ == "__main__":
    sys.exit(main())
