"""A delivery holds its slot for its first second; one that hangs holds up no other."""

from __future__ import annotations

import math

import pytest

from aiokeyless._rules.slots import Slots, most_final_in_flight, most_in_flight


@pytest.fixture
def slots() -> Slots[str]:
    return Slots(8)


def test_a_slot_is_held_for_a_second_or_until_the_end(slots: Slots[str]) -> None:
    slots.take("a", 10.0, is_retry=False)
    slots.take("b", 10.5, is_retry=False)
    slots.release_slow(10.9)
    assert (len(slots), slots.slow_at()) == (2, 11.0)
    slots.release_slow(11.0)
    assert (len(slots), slots.slow_at()) == (1, 11.5)
    slots.release("b")
    assert (len(slots), slots.slow_at()) == (0, math.inf)
    slots.release("a")  # which is slow
    assert len(slots) == 0


@pytest.mark.parametrize(("slots", "most", "least"), [(8, 48, 16), (200, 512, 384), (301, 602, 451)])
def test_more_may_be_in_flight_while_the_service_also_answers_well(slots: int, most: int, least: int) -> None:
    assert most_in_flight(slots, 10.0, answered_at=9.0) == most
    assert most_in_flight(slots, 10.0, answered_at=8.9) == least


def test_failing_ones_that_hold_over_a_quarter_of_the_slots_are_noticed(slots: Slots[str]) -> None:
    for name in "ab":
        slots.take(name, 10.0, is_retry=True)
    assert not slots.are_held_by_failing
    slots.take("good", 10.0, is_retry=False)
    assert not slots.are_held_by_failing
    slots.take("c", 10.5, is_retry=True)
    slots.take("d", 10.5, is_retry=True)
    slots.release("d")
    assert slots.are_held_by_failing
    slots.release("c")
    assert not slots.are_held_by_failing
    slots.release_slow(12.0)
    slots.take("d", 12.0, is_retry=True)
    assert not slots.are_held_by_failing


@pytest.mark.parametrize(("slots", "most"), [(1, 4), (64, 256), (100, 256), (500, 500)])
def test_four_times_as_many_final_polls_may_be_in_flight_up_to_256(slots: int, most: int) -> None:
    assert most_final_in_flight(slots) == most
