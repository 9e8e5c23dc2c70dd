"""The broker's clock: a machine whose clock is wrong keeps the deadlines of the others."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime, timedelta

import pytest

from aiokeyless.worker.clock import BrokerClock

MIDNIGHT = datetime(2026, 11, 27, tzinfo=UTC)


class Machine:
    """A machine with a wall clock, which somebody may set, a monotonic one, and its idea of the broker's."""

    def __init__(self) -> None:
        self.elapsed = 0.0
        self.set_by = 0.0
        self.clock = BrokerClock(self.wall, self.monotonic)

    def monotonic(self) -> float:
        return 1000.0 + self.elapsed

    def wall(self) -> datetime:
        return MIDNIGHT + timedelta(seconds=self.elapsed + self.set_by)

    def ask(self, *, ahead: float = 0.0, waits: float = 0.0, travels: float = 0.0) -> None:
        """Ask a broker whose clock is ahead of the true time, and which waits before it answers, as for a lock."""
        began = self.clock.elapsed()
        self.elapsed += waits
        moment = MIDNIGHT + timedelta(seconds=self.elapsed + ahead)
        self.elapsed += travels
        self.clock.compare(moment, began=began)

    def error(self, ahead: float = 0.0) -> float:
        """Return by how many seconds its idea of the clock of that broker is wrong."""
        return (self.clock.now() - MIDNIGHT).total_seconds() - self.elapsed - ahead


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.mark.parametrize("ahead", [150.0, -130.0, 0.0])
def test_a_wrong_clock_is_corrected_and_told(machine: Machine, caplog: pytest.LogCaptureFixture, ahead: float) -> None:
    machine.ask(ahead=ahead)
    assert machine.clock.now() == MIDNIGHT + timedelta(seconds=ahead)
    assert machine.clock.ahead == ahead
    assert (f"worker.clock_differs broker_ahead_by={ahead}" in caplog.text) is bool(ahead)


@pytest.mark.parametrize("step", [3600.0, -3600.0])
def test_a_wall_clock_that_steps_moves_no_deadline_and_is_told(
    machine: Machine, caplog: pytest.LogCaptureFixture, step: float
) -> None:
    machine.set_by = step
    assert machine.clock.now() == MIDNIGHT
    machine.ask()
    assert (machine.clock.now(), machine.clock.ahead) == (MIDNIGHT, -step)
    assert "worker.clock_differs" in caplog.text


@pytest.mark.parametrize(
    ("waits", "travels", "ahead", "error"),
    [(4, 0, 0.05, 0), (0, 4, -0.05, 0), (2, 2, 0.05, -0.05), (4, 0, 60, 0), (4, 0, -150, 4), (0, 0, 0.5, 0)],
)
def test_a_slow_answer_moves_no_deadline_by_its_slowness(
    machine: Machine, waits: int, travels: int, ahead: float, error: float
) -> None:
    """A claim may wait for a connection, or for the lock of another transaction."""
    machine.ask(ahead=ahead, waits=waits, travels=travels)
    assert machine.error(ahead) == pytest.approx(error, abs=1e-9)


def test_two_answers_at_once_correct_the_clock_once(machine: Machine) -> None:
    began = machine.clock.elapsed()
    machine.ask(ahead=-60)
    machine.clock.compare(MIDNIGHT - timedelta(seconds=60), began=began)
    assert machine.error(-60) == 0


def test_a_difference_is_logged_once_and_again_on_change(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for ahead in (-0.5, 3600.0, 3600.0, 3600.0, -3600.0, -3600.0, 0.0, 0.5):
        machine.ask(ahead=ahead)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO"]


def test_where_suspension_is_in_no_clock_the_monotonic_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(time, "CLOCK_BOOTTIME", raising=False)
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    clock = BrokerClock(lambda: MIDNIGHT)
    monkeypatch.setattr(time, "monotonic", lambda: 8.0)
    assert clock.now() == MIDNIGHT + timedelta(seconds=3)
