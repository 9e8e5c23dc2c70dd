"""Runs stories of workers until the time is up, and shows the first that breaks a promise, cut down.

In the folder ``tests``: ``python -m worker.simulation --seconds 600 --seed N``. Without ``--seed``, at a new one.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulation.minimize import fewest

from .promises import check
from .story import make_up, run

if TYPE_CHECKING:
    from collections.abc import Iterable

    from simulation.evidence import Violation

    from .story import Story

SEEDS = Path(__file__).with_name("seeds.txt")


def known_seeds() -> list[int]:
    """Return the seeds of all stories that have ever failed."""
    lines = (line.partition("#")[0].strip() for line in SEEDS.read_text(encoding="utf-8").splitlines())
    return [int(line) for line in lines if line]


def simulate(seeds: Iterable[int], until: float = float("inf")) -> tuple[Counter[str], Story | None, list[Violation]]:
    """Run the stories of some seeds, to the first that breaks a promise, or to a time by ``time.process_time``.

    Returns:
        What was tried, the story that breaks a promise, and what it breaks.
    """
    tried = Counter[str]()
    for seed in seeds:
        if time.process_time() >= until:
            break
        story = make_up(seed)
        history = run(story)
        tried.update({"stories": 1, "requests": len(story.asks), "deaths": history.deaths})
        tried.update(f"{each.event.outcome} {each.event.reason or ''}".strip() for each in history.decided)
        if broken := check(story, history):
            return tried, story, broken
    return tried, None, []


def breaks(story: Story, promise: str) -> list[Violation]:
    """Run a story, and return how it breaks a promise."""
    return [violation for violation in check(story, run(story)) if violation.promise == promise]


def minimize(story: Story, promise: str) -> Story:
    """Return a story that still breaks a promise, and does not if anything of it is left out."""
    for part in ("faults", "asks", "duplicates", "steps", "faults", "readers"):

        def only(some: tuple[Any, ...], part: str = part, story: Story = story) -> Story:
            changed: dict[str, Any] = {part: some}
            return replace(story, **changed)

        story = only(fewest(getattr(story, part), lambda some, only=only: bool(breaks(only(some), promise))))  # type: ignore[misc]  # it infers no default
    for number in range(len(story.workers)):
        calm = replace(story, workers=(*story.workers[:number], (), *story.workers[number + 1 :]))
        story = calm if breaks(calm, promise) else story
    return story


def tell_failure(story: Story, broken: list[Violation]) -> str:
    """Return the seed, the shortest story that breaks the same promise, and what happened in it."""
    smallest = minimize(story, broken[0].promise)
    history, violation = run(smallest), breaks(smallest, broken[0].promise)[0]
    events = [
        (e.sent_at, f"{e.client}: {e.tell()}") for e in history.exchanges if e.operation_id == violation.operation_id
    ]
    events += [(d.at, f"{d.by} decides: {d.event} {d.event.reason}") for d in history.decided]
    events += [(d.began_at, f"{d.reader} reads: {d.event}, {d.result}") for d in history.delivered]
    timeline = "\n".join(f"  {at:.4f} {what}" for at, what in sorted(events))
    return (
        f"seed {story.seed}: {broken[0]}\n\nThe shortest story that breaks the same promise:\n{smallest.tell()}\n\n"
        f"There: {violation}\n{timeline}"
    )


def main() -> int:
    """Run the command; its exit code is 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="simulate", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of computing (default: 60)")
    parser.add_argument("--seed", type=int, help="the first seed; the others follow it")
    parser.add_argument("--stories", type=int, help="so many stories, whatever time they take")
    parser.add_argument("--known", action="store_true", help="the seeds that have ever failed, and no others")
    parser.add_argument("--briefly", action="store_true", help="do not cut a failure down")
    options = parser.parse_args()
    first = random.SystemRandom().randrange(10**9) if options.seed is None else options.seed
    seeds: Iterable[int] = count(first) if options.stories is None else range(first, first + options.stories)
    started, is_unlimited = time.process_time(), options.known or options.stories is not None
    print(f"seed {first}", flush=True)
    tried, story, broken = simulate(
        known_seeds() if options.known else seeds, float("inf") if is_unlimited else started + options.seconds
    )
    print(", ".join(f"{name} {number}" for name, number in tried.most_common()))
    print(f"{tried['stories'] / (time.process_time() - started):.1f} stories a second", flush=True)
    if story is None:
        print("no promise was broken")
        return 0
    print(f"seed {story.seed}: {broken[0]}" if options.briefly else tell_failure(story, broken))
    return 1


if __name__ == "__main__":
    sys.exit(main())
