"""The final poll, in tables: seconds that are left, and what follows."""

from __future__ import annotations

import pytest

from aiokeyless._rules.final import is_final, may_start


@pytest.mark.parametrize(
    ("left", "expected"), [(10.0, False), (2e-6, False), (1e-6, True), (1e-9, True), (0.0, True), (-3.0, True)]
)
def test_a_poll_that_starts_at_the_deadline_is_the_final_one_to_a_microsecond(left: float, expected: bool) -> None:
    assert is_final(left) is expected


@pytest.mark.parametrize(
    ("left", "expected"), [(10.0, True), (0.0, True), (-1.5, True), (-1.5001, False), (-2.0, False), (-9.0, False)]
)
def test_a_final_poll_does_not_start_in_its_last_half_second(left: float, *, expected: bool) -> None:
    assert may_start(left) is expected
