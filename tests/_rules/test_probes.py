"""The order of probes: bad requests do not hold up good ones, and newcomers have their turn."""

from __future__ import annotations

import pytest

from aiokeyless._rules.probes import Alternation, Rank, Standing, choose

RANKS = {
    "answered": Rank(0, Standing.ANSWERED, 5.0),
    "answered, later": Rank(0, Standing.ANSWERED, 6.0),
    "created": Rank(0, Standing.CREATED, 1.0),
    "newest": Rank(0, Standing.UNTRIED, -9.0),
    "new": Rank(0, Standing.UNTRIED, -8.0),
    "answered once, failed": Rank(1, Standing.ANSWERED, 0.0),
    "failed": Rank(1, Standing.CREATED, 0.0),
    "failed twice": Rank(2, Standing.ANSWERED, 0.0),
}


def chosen(up_to: int, untried: int) -> list[str]:
    return choose(reversed(RANKS), RANKS.__getitem__, up_to, untried)


def test_fewest_failures_go_first_then_answered_then_created_then_the_newest_untried() -> None:
    assert chosen(99, 0) == list(RANKS)
    assert chosen(3, 0) == ["answered", "answered, later", "created"]


def test_of_some_probes_so_many_take_an_untried_one_first() -> None:
    assert chosen(1, 1) == ["newest"]
    assert chosen(4, 1) == ["newest", "answered", "answered, later", "created"]
    assert chosen(4, 3) == ["newest", "new", "answered", "answered, later"]


def test_every_second_probe_takes_an_untried_one_first() -> None:
    alternation, asked = Alternation(), []
    for _ in range(4):
        asked.append(untried := alternation.count_untried(1))
        alternation.record(untried=untried, others=1 - untried)
    assert asked == [1, 0, 1, 0]


def test_half_of_an_odd_number_of_probes_is_in_turn_more_and_less() -> None:
    alternation, asked = Alternation(), []
    for _ in range(4):
        asked.append(untried := alternation.count_untried(3))
        alternation.record(untried=untried, others=3 - untried)
    assert sorted(asked) == [1, 1, 2, 2]


@pytest.mark.parametrize("count", [1, 40])
def test_after_a_time_without_untried_ones_one_is_next_and_neither_kind_catches_up(count: int) -> None:
    alternation = Alternation()
    for _ in range(count):
        alternation.record(untried=0, others=1)
    assert alternation.count_untried(1) == 1
    for _ in range(3):
        alternation.record(untried=1, others=0)
    assert alternation.count_untried(1) == 0
    alternation.record(untried=0, others=1)
    assert alternation.count_untried(1) == 1
