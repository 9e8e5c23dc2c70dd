"""The simulator in short: some stories, the same twice, and what it shows of a library that is broken on purpose.

``nox -s simulate`` runs it for as long as one likes; CONTRIBUTING.md says what it tries and promises.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from aiokeyless._waits import machine

from .__main__ import DRIVERS, known_seeds, main, simulate
from .minimize import breaks, minimize
from .mutants import MUTANTS, PACKAGE, Mutant, search
from .story import make_up


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("seed", range(10))
def test_a_story_breaks_no_promise(seed: int, driver: str) -> None:
    assert breaks(make_up(seed), driver=DRIVERS[driver]) == []


@pytest.mark.parametrize("driver", DRIVERS)
def test_stories_of_one_seed_are_identical(driver: str) -> None:
    assert make_up(3) == make_up(3) != make_up(4)
    first, second = DRIVERS[driver](make_up(3)), DRIVERS[driver](make_up(3))
    assert first.lines() == second.lines()
    assert len(first.exchanges) > 50


def test_the_machine_alone_tries_what_the_whole_client_does() -> None:
    """Only waits that follow from the create differ: with the machine alone, it always succeeds."""
    reports, _ = simulate(range(10), drivers=["client", "machine"])
    client, machine = reports
    assert client.hours == pytest.approx(machine.hours, rel=0.01)
    assert client.requests == pytest.approx(machine.requests, rel=0.3)
    assert client.outcomes.keys() == machine.outcomes.keys()


def test_stories_try_everything() -> None:
    """What a generator never makes is never tried, and nobody notices."""
    stories = [make_up(seed) for seed in range(200)]
    legs = [leg for story in stories for actor in story.actors for leg in actor.legs]
    assert {leg.how for leg in legs} == {"wait", "report", "iterate", "hold", "many"}
    assert {actor.creates for story in stories for actor in story.actors} == {"application", "client", "phone"}
    assert {type(fault).__name__ for story in stories for fault in story.faults} == {
        "Capacity",
        "FailOver",
        "Flapping",
        "Lag",
        "Lies",
        "Moved",
        "Outage",
        "RateLimit",
        "RoundTrips",
        "Shard",
        "Slowness",
        "Standstill",
    }
    assert any(leg.handler for leg in legs)
    assert any(process.closes for story in stories for process in story.processes)
    assert any(process.rotates for story in stories for process in story.processes)
    assert any(process.jumps for story in stories for process in story.processes)
    assert any(process.has_no_key for story in stories for process in story.processes)
    assert any(actor.is_compared for story in stories for actor in story.actors)


@pytest.fixture
def _broken_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library whose waits end too late where final polls are not answered."""
    monkeypatch.setattr(machine, "FINAL_POLL_TIMEOUT", 9.0)


@pytest.mark.slow
@pytest.mark.usefixtures("_broken_library")
def test_a_failure_is_cut_down_to_what_is_needed_for_it() -> None:
    _, failure = simulate(range(1000), drivers=["machine"])
    assert failure is not None
    story, driver, broken = failure
    smallest = minimize(story, broken[0].promise, DRIVERS[driver])
    assert breaks(smallest, broken[0].promise, DRIVERS[driver])
    assert len(smallest.tell()) < len(story.tell()) / 2


@pytest.mark.slow
@pytest.mark.usefixtures("_broken_library")
def test_the_command_shows_the_seed_the_story_and_what_was_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate", "--seed", "0", "--stories", "1000", "--machine"])
    assert main() == 1
    said = capsys.readouterr().out
    assert said.startswith("seed 0\n")
    assert "simulated hours a minute" in said
    assert "\nseed " in said
    assert "  Actor(at=" in said
    assert "  poll " in said.partition("\nThere: ")[2]


def test_the_command_says_what_was_tried(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate", "--seed", "5", "--stories", "2", "--both"])
    assert main() == 0
    said = capsys.readouterr().out
    assert said.startswith("seed 5\nclient: 2 stories, ")
    assert "\nmachine: 2 stories, " in said
    assert said.endswith("no promise was broken\n")


def test_the_seeds_that_failed_can_be_read() -> None:
    assert len(set(known_seeds())) == len(known_seeds()) > 0


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.why)
def test_each_mutant_still_changes_the_library(mutant: Mutant) -> None:
    path = PACKAGE / mutant.file
    text = path.read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1
    compile(text.replace(mutant.old, mutant.new), str(path), "exec")


def test_there_are_mutants_enough() -> None:
    assert len(MUTANTS) >= 60
    assert len(set(MUTANTS)) == len(MUTANTS)


@pytest.mark.slow
def test_a_mutant_is_found() -> None:
    mutant = next(m for m in MUTANTS if m.why == "an approval from before the request counts")
    driver, stories, said = search(mutant, seconds=120.0, drivers=["client"])
    assert driver == "client"
    assert stories > 0
    assert "truth about creation" in said
    assert not Path(mutant.file).exists()  # only the copy was changed
