from __future__ import annotations

from aiokeyless.worker.load_shedding import LoadShedding


def test_with_room_for_all_the_schedule_stays_as_it_is() -> None:
    shedding = LoadShedding()
    for _ in range(1000):
        shedding.on_delivery(redelivered=True, backlog=0)
    assert shedding.factor == 1


def test_polls_made_before_new_requests_are_stretched_up_to_a_bound() -> None:
    shedding = LoadShedding()
    shedding.on_delivery(redelivered=True, backlog=1)
    assert shedding.factor > 1
    for _ in range(1000):
        shedding.on_delivery(redelivered=True, backlog=1)
    assert shedding.factor == 16


def test_a_burst_of_new_requests_stretches_nothing() -> None:
    shedding = LoadShedding()
    for backlog in range(10_000, 0, -1):
        shedding.on_delivery(redelivered=False, backlog=backlog)
    assert shedding.factor == 1


def test_without_a_backlog_the_schedule_comes_back() -> None:
    shedding = LoadShedding()
    for backlog in (1, 0):
        for _ in range(500):
            shedding.on_delivery(redelivered=True, backlog=backlog)
    assert abs(shedding.factor - 1) < 1e-9


def test_it_is_noticeable_once_delays_differ_from_the_schedule_by_more_than_its_jitter() -> None:
    shedding = LoadShedding()
    shedding.on_delivery(redelivered=True, backlog=1)
    assert not shedding.is_noticeable
    for _ in range(10):
        shedding.on_delivery(redelivered=True, backlog=1)
    assert shedding.is_noticeable
