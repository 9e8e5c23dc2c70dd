"""The simulator of workers in short: some stories, a crash at every step of one, and what it shows of a broken library.

``nox -s simulate`` runs it for longer; CONTRIBUTING.md says what it tries.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, Any

import pytest
from simulation.faults import Failure, Lies, Outage, RoundTrips
from simulation.mutants import PACKAGE, Mutant, search
from simulation.people import Person

from aiokeyless.worker.sqlite import store

from .__main__ import breaks, main, minimize, simulate
from .mutants import MUTANTS, SIMULATOR
from .promises import STARTED, check
from .story import MISHAPS, WEATHER, Ask, Gateway, Reader, Story, make_up, run
from .world import Life, Mishap

if TYPE_CHECKING:
    from simulation.faults import Fault


def test_a_story_breaks_no_promise() -> None:
    assert simulate(range(10))[1:] == (None, [])  # `nox -s simulate` tells more


SHORT = Story(
    1,
    asks=(
        Ask(0, 0.0, "op-0", "Pay 0", 4.0, Person(2.0), lives=(Life(), Life(1.0))),
        Ask(1, 0.5, "op-1", "Pay 1", 2.0, Person(inf)),
    ),
    readers=(Reader("shop"), Reader("shop")),
    request_timeout=1.0,
    grace=0.0,
)


DYING = {
    "worker": lambda life: replace(SHORT, workers=((life,), ())),
    "reader": lambda life: replace(SHORT, readers=(Reader("shop", (life,)), Reader("shop"))),
    "application": lambda life: replace(SHORT, asks=(replace(SHORT.asks[0], lives=(life, Life(1.0))), SHORT.asks[1])),
}


@pytest.mark.parametrize("is_cancelled", [False, True], ids=["killed", "cancelled"])
@pytest.mark.parametrize("who", DYING)
def test_a_process_may_die_at_any_of_its_steps(who: str, is_cancelled: bool) -> None:
    for step in range(1, 1000):
        story = DYING[who](Life(dies_at=step, is_cancelled=is_cancelled))
        history = run(story)
        assert check(story, history) == []
        if not history.deaths:  # it has no more steps
            break
    assert 5 < step < 999


@pytest.mark.parametrize("at", [number / 20 for number in range(1, 14)])
def test_a_request_may_be_with_two_workers_at_once(at: float) -> None:
    story = replace(SHORT, faults=(RoundTrips(0.1, 0.4),), duplicates=(at,))
    assert check(story, run(story)) == []


def last_minute(count: int, approves_after: float, *faults: Fault, **options: Any) -> Story:
    """Return a story of one worker whose requests end at 60 to 62 s."""
    person = Person(approves_after)
    asks = tuple(Ask(n, n * 2.0 / count, f"op-{n}", f"Pay {n}", 60.0, person) for n in range(count))
    more = {"workers": ((),), "max_in_flight": 64, **options}
    return Story(1, asks, faults=(*faults, RoundTrips(0.05, 0.2)), **more)


def down(begins: float, ends: float) -> Gateway:
    return Gateway(begins, ends, Failure("status", 503))


def refused(begins: float, ends: float, pause: float, payload: str | None = None) -> Outage:
    return Outage(begins, ends, Failure("status", 429, pause), payload=payload)


def flapping(up: float, away: float) -> tuple[Mishap, ...]:
    return tuple(Mishap("away", 20.0 + n * (up + away), 20.0 + n * (up + away) + away) for n in range(80))


FROZEN = (Mishap("frozen", 50.0, 170.0),)
#: Stories in which workers cannot ask when requests end.
ABSENCES = {
    **{f"frozen 120 s, then 503 {s:g} s": last_minute(20, 48, down(47, 170 + s), mishaps=FROZEN) for s in (0.5, 2, 10)},
    "a machine is suspended 20 s, then 503 20 s": last_minute(20, 48, down(47, 79), steps=((59.0, 20.0),)),
    **{
        f"{count} refused, Retry-After {pause:g}, then 503 10 s": last_minute(
            count, 58, refused(59, 62, pause), down(62, 72 + pause)
        )
        for count, pause in ((20, 20.0), (20, 29.0), (200, 29.0))
    },
    **{
        f"one refused, Retry-After {pause:g}": last_minute(20, 54, refused(55, 92, pause, "Pay 0"))
        for pause in (20.0, 29.0)
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ABSENCES)
def test_no_approval_is_lost_since_a_worker_could_not_ask(name: str) -> None:
    history = run(ABSENCES[name])
    assert check(ABSENCES[name], history) == []
    assert {each.event.outcome for each in history.decided} == {"approved"}


@pytest.mark.slow
@pytest.mark.parametrize(("count", "pause", "most"), [(20, 20.0, 4), (20, 29.0, 4), (200, 29.0, 20)])
def test_of_many_that_are_refused_for_long_those_are_lost_that_the_halved_rate_reaches_too_late(
    count: int, pause: float, most: int
) -> None:
    story = last_minute(count, 44, refused(45, 85, pause), down(85, 95 + pause))
    history = run(story)
    assert check(story, history) == []
    lost = [each.event.operation_id for each in history.decided if each.event.outcome != "approved"]
    assert len(lost) <= most
    for name in lost:
        polls = [each.sent_at for each in history.exchanges if each.operation_id == name]
        assert polls[-3] > history.stored[name or ""][0] + 60.0 + story.grace + pause


@pytest.mark.slow
@pytest.mark.parametrize(
    ("story", "within"),
    [
        *(
            (last_minute(20, inf, down(20, inf), mishaps=flapping(up, away)), within)
            for up, away, within in ((25, 3, 70), (5, 10, 155), (20, 200, 460))
        ),
        (last_minute(200, inf, refused(59, inf, 29.0)), 90),
    ],
)
def test_no_outcome_waits_for_a_broker_that_flaps_or_a_limit_without_end(story: Story, within: float) -> None:
    history = run(story)
    assert check(story, history) == []
    assert len(history.decided) == len(story.asks)
    assert (
        30 < max(each.at - history.stored[each.event.operation_id or ""][0] - 60 for each in history.decided) < within
    )


def test_stories_of_one_seed_are_identical() -> None:
    assert make_up(3) == make_up(3) != make_up(4)
    first, second = run(make_up(3)), run(make_up(3))
    assert first.lines() == second.lines()
    assert repr(first.decided) == repr(second.decided)
    assert len(first.exchanges) > 20


def test_stories_try_everything() -> None:
    """What a generator never makes is never tried, and nobody notices."""
    stories = [make_up(seed) for seed in range(200)]
    asks = [ask for story in stories for ask in story.asks]
    lives = [life for story in stories for worker in story.workers for life in worker]
    others = {"moved", "nobody reads"}
    assert {mishap.kind for story in stories for mishap in story.mishaps} == {
        *MISHAPS,
        *WEATHER,
        "away",
        "frozen",
    } - others
    assert any(story.is_back_in_time for story in stories)
    assert any(reader.fails_until == 3600.0 for story in stories for reader in story.readers)
    assert {story.telling for story in stories} == {"", "raises", "slow", "hangs", "dies"}
    assert {ask.earlier for ask in asks} == {"", "the same", "another"}
    assert {ask.phone for ask in asks} == {"", "before", "after"}
    phones = [[ask.operation_id for ask in story.asks if ask.phone] for story in stories]
    assert any(len({*ids}) < len(ids) for ids in phones)
    assert any(len(ask.lives) > 1 for ask in asks)
    assert all(any(getattr(life, end) != getattr(Life(), end) for life in lives) for end in Life.__dataclass_fields__)
    assert {type(fault).__name__ for story in stories for fault in story.faults} == {
        *("FailOver", "Gateway", "Lag", "Lies", "Moved", "Outage", "RateLimit", "Repeats", "RoundTrips", "Shard"),
        "Slowness",
    }
    assert {seconds > 0 for story in stories for _, seconds in story.steps} == {True, False}
    assert any(story.duplicates for story in stories)
    assert any(reader.trouble for story in stories for reader in story.readers)
    assert any(story.is_steady for story in stories)
    assert any(len(story.asks) > 100 for story in stories)
    assert any(story.workers_begin for story in stories)


def test_a_worker_may_say_for_a_moment_that_it_has_not_started() -> None:
    story = make_up(910716790)
    story = replace(story, faults=tuple(fault for fault in story.faults if not isinstance(fault, Lies)))
    history = run(story)
    assert "not started" in str(history.seen[0].statistics.problems)
    assert check(story, history) == []
    history.seen[0] = history.seen[0]._replace(at=STARTED + 0.01)
    assert [violation.promise for violation in check(story, history)] == ["problems shown"]


def test_a_failure_is_shown_by_the_shortest_story_that_has_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store, "_HANDED_ON", 0.0)  # a reader's outcome is in two hands
    _, story, broken = simulate(range(1000))
    assert story is not None
    smallest = minimize(story, broken[0].promise)
    assert len(smallest.asks) == 1
    assert breaks(smallest, broken[0].promise)
    monkeypatch.setattr(sys, "argv", ["simulate", "--seed", str(story.seed), "--stories", "1"])
    assert main() == 1
    said = capsys.readouterr().out
    assert f"seed {story.seed}: handled once" in said
    assert smallest.tell() in said


def test_the_command_says_how_much_it_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate", "--seed", "5", "--stories", "2"])
    assert main() == 0
    said = capsys.readouterr().out
    assert said.startswith("seed 5\n")
    assert "stories 2" in said
    assert said.endswith("no promise was broken\n")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.why)
def test_each_mutant_still_changes_the_library(mutant: Mutant) -> None:
    path = PACKAGE / mutant.file
    text = path.read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1
    compile(text.replace(mutant.old, mutant.new), str(path), "exec")


@pytest.mark.slow
def test_a_mutant_is_found() -> None:
    mutant = next(m for m in MUTANTS if m.why == "an approval from before the request counts")
    is_found, _, said = search(mutant, 120.0, simulator=SIMULATOR)
    assert is_found
    assert "no wrong approval" in said
