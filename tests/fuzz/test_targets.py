"""No bytes whatever make a reader raise what it does not document, or find an approval that they do not state."""

from __future__ import annotations

from random import Random

import pytest

from .corpus import CORPUS, inputs_of
from .mutations import mutate
from .targets import TARGETS, check

CHANGED = 500  # inputs of each target, the same in each run; `nox -s fuzz` makes ever new ones


def test_every_target_has_inputs() -> None:
    assert {folder.name for folder in CORPUS.iterdir() if folder.is_dir()} == set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_the_promises_of_a_reader_hold_for_the_committed_inputs(name: str) -> None:
    for data in inputs_of(name):
        check(name, data)


@pytest.mark.parametrize("name", TARGETS)
def test_the_promises_of_a_reader_hold_for_changed_inputs(name: str) -> None:
    committed = inputs_of(name)
    for seed in range(CHANGED):
        random = Random(seed)  # noqa: S311  # guards nothing
        check(name, mutate(random.choice(committed), random))
