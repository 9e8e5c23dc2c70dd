from __future__ import annotations

import pytest
from tenacity import wait_fixed

from aiokeyless.schedule import next_delay
from aiokeyless.worker.load_shedding import LoadShedding


def delay(spacing: LoadShedding) -> float:
    return next_delay(spacing, attempt_number=1, since_start=0.0)


def test_where_there_is_room_for_all_the_schedule_is_as_it_is() -> None:
    spacing = LoadShedding(wait_fixed(3))
    for _ in range(1000):
        spacing.on_delivery(redelivered=True, backlog=0)
    assert delay(spacing) == 3


def test_looks_that_are_made_before_new_requests_are_spaced_out_up_to_a_bound() -> None:
    spacing = LoadShedding(wait_fixed(3))
    spacing.on_delivery(redelivered=True, backlog=1)
    assert delay(spacing) > 3
    for _ in range(1000):
        spacing.on_delivery(redelivered=True, backlog=1)
    assert delay(spacing) == 48


def test_burst_of_new_requests_spaces_nothing_out() -> None:
    spacing = LoadShedding(wait_fixed(3))
    for untaken in range(10_000, 0, -1):
        spacing.on_delivery(redelivered=False, backlog=untaken)
    assert delay(spacing) == 3


def test_when_all_have_had_their_turn_the_schedule_comes_back() -> None:
    spacing = LoadShedding(wait_fixed(3))
    for untaken in (1, 0):
        for _ in range(500):
            spacing.on_delivery(redelivered=True, backlog=untaken)
    assert delay(spacing) == pytest.approx(3)
