"""A delivery holds its slot for its first second; one that hangs holds up no other."""

from __future__ import annotations

import math
import random

import pytest

from aiokeyless._rules.circuit import Circuit, CircuitState
from aiokeyless._rules.slots import Slots, most_in_flight


@pytest.fixture
def circuit() -> Circuit:
    return Circuit(8)


@pytest.fixture
def slots(circuit: Circuit) -> Slots[str]:
    return Slots(circuit)


def open_it(circuit: Circuit, now: float) -> None:
    for number in range(5):
        circuit.record_failure(now, number, started_at=now, is_probe=True)
    assert circuit.state is CircuitState.OPEN


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


def test_more_may_be_in_flight_while_the_service_also_answers_well() -> None:
    assert most_in_flight(8, 10.0, answered_at=9.0) == 48
    assert most_in_flight(8, 10.0, answered_at=8.9) == 16


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


def test_what_started_before_the_circuit_opened_takes_no_slot_of_a_probe(circuit: Circuit, slots: Slots[str]) -> None:
    slots.take("before", 9.9, is_retry=False)
    open_it(circuit, 10.0)
    slots.release_slow(10.1)
    assert len(slots) == 0
    assert not slots.has_failed("before")


def test_what_hangs_after_a_pause_counts_by_operation(circuit: Circuit, slots: Slots[str]) -> None:
    circuit.record_pause(10.0, 1.0)
    for number in range(5):
        assert not circuit.is_probed
        slots.take(f"{number}", 11.0 + number, is_retry=False)
        slots.release_slow(12.0 + number)
        assert len(slots) == 0
    assert circuit.is_probed


def test_a_probe_that_hangs_counts_as_failed_once_and_from_its_start(circuit: Circuit, slots: Slots[str]) -> None:
    random.seed(1)
    open_it(circuit, 10.0)
    start = circuit.retry_at()
    slots.take("probe", start, is_retry=False)
    slots.release_slow(start + 0.9)
    assert len(slots) == 1
    assert not slots.has_failed("probe")
    slots.release_slow(start + 1.0)
    assert len(slots) == 0
    assert slots.has_failed("probe")
    assert start + 0.5 <= circuit.retry_at() <= start + 1.0  # the backoff's second step
    slots.release("probe")
    assert not slots.has_failed("probe")


def test_what_counted_as_failed_already_does_not_count_again(circuit: Circuit, slots: Slots[str]) -> None:
    open_it(circuit, 10.0)
    retry_at = circuit.retry_at()
    slots.take("probe", retry_at, is_retry=False)
    slots.count_as_failed("probe")
    slots.release_slow(retry_at + 1.0)
    assert len(slots) == 0
    assert circuit.retry_at() == retry_at


def test_polls_of_one_operation_that_hang_are_one_failure(circuit: Circuit, slots: Slots[str]) -> None:
    circuit.record_pause(10.0, 1.0)
    for number in range(5):
        slots.take(f"{number}", 11.0 + number, is_retry=False, operation="op")
        slots.release_slow(12.0 + number)
        assert len(slots) == 0
    assert not circuit.is_probed
