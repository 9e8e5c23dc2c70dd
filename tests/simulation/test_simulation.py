"""The simulator in short: some stories, the same twice, and what it shows of a library that is broken on purpose.

``nox -s simulate`` runs it for as long as one likes; CONTRIBUTING.md says what it tries and promises.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from aiokeyless._waits import machine

from . import faults
from .__main__ import known_seeds, main, simulate
from .minimize import breaks, minimize
from .mutants import MUTANTS, PACKAGE, Mutant, search
from .story import make_up, run


@pytest.mark.parametrize("seed", range(10))
def test_a_story_breaks_no_promise(seed: int) -> None:
    assert breaks(make_up(seed)) == []


def test_stories_of_one_seed_are_identical() -> None:
    assert make_up(3) == make_up(3) != make_up(4)
    first, second = run(make_up(3)), run(make_up(3))
    assert first.lines() == second.lines()
    assert len(first.exchanges) > 50
    chosen = {create.outcome for create in first.creates if not create.id_is_new}
    assert chosen >= {"created", "reconciled", "ConflictStatusError"}  # else no promise of these was tried


def test_stories_try_everything() -> None:
    """What a generator never makes is never tried, and nobody notices."""
    stories = [make_up(seed) for seed in range(200)]
    legs = [leg for story in stories for actor in story.actors for leg in actor.legs]
    assert {leg.how for leg in legs} == {"wait", "report", "iterate", "hold", "many"}
    assert {actor.creates for story in stories for actor in story.actors} == {"application", "client", "phone"}
    kinds = {kind for kind in vars(faults).values() if hasattr(kind, "fate")} - {faults.Fault, faults.Failure}
    assert {type(fault) for story in stories for fault in story.faults} == kinds
    assert any(leg.handler for leg in legs)
    for trouble in ("closes", "rotates", "lag", "jumps", "has_no_key"):
        assert any(getattr(process, trouble) for story in stories for process in story.processes), trouble
    assert any(actor.is_compared for story in stories for actor in story.actors)


@pytest.fixture
def _broken_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library whose waits end too late where final polls are not answered."""
    monkeypatch.setattr(machine, "FINAL_POLL_TIMEOUT", 9.0)


@pytest.mark.slow
@pytest.mark.usefixtures("_broken_library")
def test_a_failure_is_cut_down_to_what_is_needed_for_it() -> None:
    _, failure = simulate(range(1000))
    assert failure is not None
    story, broken = failure
    smallest = minimize(story, broken[0].promise)
    assert breaks(smallest, broken[0].promise)
    assert len(smallest.tell()) < len(story.tell()) / 2


@pytest.mark.slow
@pytest.mark.usefixtures("_broken_library")
def test_the_command_shows_the_seed_the_story_and_what_was_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate", "--seed", "0", "--stories", "1000"])
    assert main() == 1
    said = capsys.readouterr().out
    assert said.startswith("seed 0\n")
    assert "simulated hours a minute" in said
    assert "\nseed " in said
    assert "  Actor(at=" in said
    assert "  poll " in said.partition("\nThere: ")[2]


def test_the_command_says_what_was_tried(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate", "--seed", "5", "--stories", "2"])
    assert main() == 0
    said = capsys.readouterr().out
    assert said.startswith("seed 5\n2 stories, ")
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
    is_found, stories, said = search(mutant, seconds=120.0)
    assert is_found
    assert stories > 0
    assert "truth about creation" in said
    assert not Path(mutant.file).exists()  # only the copy was changed
