"""The final poll, in tables: seconds that are left, and what follows."""

from __future__ import annotations

import pytest

from aiokeyless._rules.final import is_final, repeat_final_after


@pytest.mark.parametrize(
    ("left", "expected"), [(10.0, False), (2e-6, False), (1e-6, True), (1e-9, True), (0.0, True), (-3.0, True)]
)
def test_a_poll_that_starts_at_the_deadline_is_the_final_one_to_a_microsecond(left: float, expected: bool) -> None:
    assert is_final(left) is expected


@pytest.mark.parametrize(
    ("delay", "left", "awaited", "alone"),
    [
        (0.5, 2.0, 0.5, 0.5),
        (1.9, 2.0, 1.9, 1.9),
        (2.0, 2.0, None, 2.0),
        (60.0, 0.1, None, 60.0),
        (0.5, 0.0, None, None),
        (0.5, -1.0, None, None),
    ],
)
def test_a_final_poll_is_repeated_while_there_is_time(
    delay: float, left: float, awaited: float | None, alone: float | None
) -> None:
    assert repeat_final_after(delay, left=left, is_awaited=True) == awaited
    assert repeat_final_after(delay, left=left, is_awaited=False) == alone
