"""The order of polls while few may start: bad requests do not hold up good ones, and newcomers have their turn."""

from __future__ import annotations

import pytest

from aiokeyless._rules.order import Alternation


def test_every_second_poll_takes_an_untried_one_first() -> None:
    alternation, asked = Alternation(), []
    for _ in range(4):
        asked.append(untried := alternation.count_untried(1))
        alternation.record(untried=untried, others=1 - untried)
    assert asked == [1, 0, 1, 0]


def test_half_of_an_odd_number_of_polls_is_in_turn_more_and_less() -> None:
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
