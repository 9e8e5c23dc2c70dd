from __future__ import annotations

import pytest

from aiokeyless.worker.nats.load_shedding import LoadShedding


class Shedding(LoadShedding):
    """Load shedding with a clock that the test moves."""

    def __init__(self) -> None:
        self.time = 100.0
        super().__init__(lambda: self.time)

    def deliver(self, seconds: float, *, backlog: int, redelivered: bool = True) -> None:
        """Deliver ten times a second for so long."""
        for _ in range(round(seconds * 10)):
            self.on_delivery(redelivered=redelivered, backlog=backlog)
            self.time += 0.1


def test_with_room_for_all_the_schedule_stays_as_it_is() -> None:
    shedding = Shedding()
    shedding.deliver(100, backlog=0)
    assert shedding.factor == 1


def test_while_new_requests_wait_delays_double_every_five_seconds_up_to_a_bound() -> None:
    shedding = Shedding()
    shedding.deliver(5, backlog=1)
    assert shedding.factor == pytest.approx(2)
    shedding.deliver(5, backlog=10_000)
    assert shedding.factor == pytest.approx(4)
    shedding.deliver(60, backlog=1)
    assert shedding.factor == 16


@pytest.mark.parametrize("deliveries", [1, 1000])
def test_how_many_deliveries_come_at_once_makes_no_difference(deliveries: int) -> None:
    shedding = Shedding()
    for _ in range(deliveries):
        shedding.on_delivery(redelivered=True, backlog=700)
    shedding.time += 0.5
    assert shedding.factor == pytest.approx(2**0.1)


def test_a_burst_of_new_requests_stretches_nothing() -> None:
    shedding = Shedding()
    shedding.deliver(100, backlog=10_000, redelivered=False)
    assert shedding.factor == 1


@pytest.mark.parametrize("redelivered", [True, False])
def test_without_a_backlog_the_schedule_comes_back_twice_as_fast(*, redelivered: bool) -> None:
    shedding = Shedding()
    shedding.deliver(60, backlog=1)
    shedding.deliver(2.5, backlog=0, redelivered=redelivered)
    assert shedding.factor == pytest.approx(8)
    shedding.deliver(30, backlog=0, redelivered=redelivered)
    assert shedding.factor == 1


def test_an_idle_worker_forgets_the_load_of_before() -> None:
    shedding = Shedding()
    shedding.deliver(60, backlog=1)
    shedding.time += 15
    assert shedding.factor == 1
