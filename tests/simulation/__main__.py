"""Runs stories until the time is up, and shows the first that breaks a promise, cut down to what is needed for that.

``python -m tests.simulation --seconds 600 --seed N``; without ``--seed``, at a new one, which is printed first.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .checker import check
from .evidence import Violation
from .minimize import breaks, minimize
from .story import make_up, run

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .history import Exchange, History, ObservedCreate, ObservedWait
    from .story import Story

SEEDS = Path(__file__).with_name("seeds.txt")
#: Requests, and calls, that are shown of a failure.
SHOWN = 25


class Report(NamedTuple):
    """How much was tried."""

    stories: int
    hours: float
    waits: int
    requests: int
    outcomes: Counter[str]

    def __str__(self) -> str:
        outcomes = ", ".join(f"{name} {number}" for name, number in self.outcomes.most_common())
        return (
            f"{self.stories} stories, {self.hours:.0f} hours, {self.waits} waits and holds, {self.requests} requests\n"
            f"ends: {outcomes}"
        )


def known_seeds() -> list[int]:
    """Return the seeds of all stories that have ever failed."""
    lines = (line.partition("#")[0].strip() for line in SEEDS.read_text(encoding="utf-8").splitlines())
    return [int(line) for line in lines if line]


def simulate(seeds: Iterable[int], until: float) -> tuple[Report, Story | None, list[Violation]]:
    """Run the stories of some seeds, to the first that breaks a promise or to a time.

    Args:
        seeds: The seeds.
        until: When to stop, by ``time.process_time``.
    """
    stories, hours, waits, requests, outcomes = 0, 0.0, 0, 0, Counter[str]()
    story, broken = None, list[Violation]()
    for seed in seeds:
        if time.process_time() >= until:
            break
        story = make_up(seed)
        history = run(story)
        broken = check(history, story.faults)
        stories += 1
        hours += history.ended_at / 3600
        waits += len(history.waits)
        requests += len(history.exchanges)
        outcomes.update(wait.outcome for wait in history.waits)
        if broken:
            break
    return (
        Report(stories, hours, waits, requests, outcomes),
        story if broken else None,
        broken,
    )


def tell_failure(story: Story, broken: list[Violation]) -> str:
    """Return what is to be read of a story that breaks a promise: the seed, the shortest story, what was seen."""
    smallest = minimize(story, broken[0].promise)
    violation = breaks(smallest, broken[0].promise)[0]
    history = run(smallest)
    events = "\n".join(f"  {line}" for line in _timeline(history, violation))
    return (
        f"seed {story.seed}: {broken[0]}\n\nThe shortest story that breaks the same promise:\n{smallest.tell()}\n\n"
        f"There: {violation}\n{events}"
    )


def _timeline(history: History, about: Violation) -> list[str]:
    """Return the events of an operation, at one client."""
    sent = [e for e in history.exchanges if e.sent_at <= about.at + 1.0 and _concerns(e, about)]
    every_call: list[ObservedWait | ObservedCreate] = [*history.waits, *history.creates]
    calls = [call for call in every_call if call.started_at <= about.at + 1.0 and _concerns(call, about)]
    events: list[Exchange | ObservedWait | ObservedCreate] = [
        *sent[-SHOWN:],
        *calls[-SHOWN:],
    ]
    return [event.tell() for event in sorted(events, key=lambda event: event.number)]


def _concerns(event: Exchange | ObservedWait | ObservedCreate, about: Violation) -> bool:
    return (event.operation_id, event.client) == (about.operation_id, about.client)


def main() -> int:
    """Run the command; its exit code is 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="simulate", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of computing (default: 60)")
    parser.add_argument("--seed", type=int, help="the first seed; the others follow it")
    parser.add_argument("--stories", type=int, help="so many stories, whatever time they take")
    parser.add_argument(
        "--known",
        action="store_true",
        help="the seeds that have ever failed, and no others",
    )
    parser.add_argument("--briefly", action="store_true", help="do not cut a failure down")
    options = parser.parse_args()
    first = random.SystemRandom().randrange(10**9) if options.seed is None else options.seed
    if options.known:
        seeds: Iterable[int] = known_seeds()
    else:
        print(f"seed {first}", flush=True)
        seeds = count(first) if options.stories is None else range(first, first + options.stories)
    unlimited = options.known or options.stories is not None
    started = time.process_time()
    report, story, broken = simulate(seeds, started + (86_400.0 if unlimited else options.seconds))
    minutes = (time.process_time() - started) / 60
    print(f"{report}\n{report.hours / minutes:.0f} simulated hours a minute", flush=True)
    if story is None:
        print("no promise was broken")
        return 0
    print(f"seed {story.seed}: {broken[0]}" if options.briefly else tell_failure(story, broken))
    return 1


if __name__ == "__main__":
    sys.exit(main())
