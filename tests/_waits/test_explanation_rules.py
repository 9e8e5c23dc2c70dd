"""When Telemetry may be asked, which attempts explain a wait, and how they are put into words."""

from __future__ import annotations

import math
import pickle

import pytest

from aiokeyless import ApprovalTimeoutError, Authentication
from aiokeyless._waits.explanation import describe_failures, explain, may_ask, merge_attempts


def attempt(code: int | None = 30004, created_at: str | None = None, operation_id: str = "op") -> Authentication:
    return Authentication(error_code=code, created_at=created_at, operation_id=operation_id)


@pytest.mark.parametrize(
    ("now", "asked_at", "pending_since", "deadline", "may"),
    [
        (100.0, -math.inf, 95.0, math.inf, True),
        (100.0, -math.inf, 95.1, math.inf, False),  # it is pending for too short a time
        (100.0, 90.0, 0.0, math.inf, True),
        (100.0, 90.1, 0.0, math.inf, False),  # it was asked less than 10 s ago
        (100.0, -math.inf, 0.0, 110.0, True),
        (100.0, -math.inf, 0.0, 109.9, False),  # the end may ask
        (100.0, -math.inf, -math.inf, math.inf, True),
    ],
)
def test_it_is_asked_late_and_seldom_and_at_the_end(
    now: float, asked_at: float, pending_since: float, deadline: float, may: bool
) -> None:
    assert may_ask(now, asked_at=asked_at, pending_since=pending_since, deadline=deadline) is may


def test_attempts_are_kept_that_telemetry_has_forgotten_oldest_first() -> None:
    first, second, third = (attempt(created_at=f"2025-05-21T10:3{minute}:00.000") for minute in range(3))
    known = merge_attempts((), [second, first], "op")
    assert known == (first, second)
    assert merge_attempts(known, [third, second], "op") == (first, second, third)
    assert merge_attempts(known, [], "op") == known


def test_two_equal_attempts_in_one_answer_are_two() -> None:
    assert merge_attempts((attempt(),), [attempt(), attempt()], "op") == (attempt(), attempt())


@pytest.mark.parametrize("other", [attempt(operation_id="other"), Authentication(error_code=30003)])
def test_attempts_at_something_else_explain_nothing(other: Authentication) -> None:
    assert merge_attempts((), [other, attempt()], "op") == (attempt(),)


def test_timestamps_of_any_number_of_digits_are_in_order_and_absent_ones_come_first() -> None:
    times = [None, "2025-05-21T10:34:00", "2025-05-21T10:34:00.05", "2025-05-21T10:34:00.051", "2025-05-21T10:34:00.1"]
    attempts = tuple(attempt(created_at=time) for time in times)
    assert merge_attempts((), attempts[::-1], "op") == attempts


def test_the_newest_hundred_attempts_are_kept() -> None:
    attempts = [attempt(created_at=f"{number:03}") for number in range(150)]
    assert merge_attempts(tuple(attempts[:100]), attempts[100:], "op") == tuple(attempts[50:])


@pytest.mark.parametrize(
    ("attempts", "words"),
    [
        ([], None),
        ([Authentication(result="APPROVED", error_code=0)], None),
        ([attempt()], "1 attempt failed: the face did not match (30004)"),
        ([attempt(), attempt()], "2 attempts failed: the face did not match (30004)"),
        (
            [attempt(), attempt(0), attempt(30003)],
            "2 attempts failed: the face did not match (30004), the user left the scan (30003)",
        ),
        ([attempt(12345)], "1 attempt failed: error 12345"),
        ([Authentication(result="the-secret-key")], "1 attempt failed: no reason was given"),
        (
            [attempt(code) for code in (30000, 30003, 30004, 30008, 30008)],
            (
                "5 attempts failed: the user left the scan (30003), the face did not match (30004), "
                "the attempt was rejected (30008)"
            ),
        ),
    ],
)
def test_failed_attempts_are_counted_with_their_last_reasons(attempts: list[Authentication], words: str | None) -> None:
    assert describe_failures(attempts) == words


def test_an_error_carries_the_attempts_through_pickling_and_its_message_says_what_failed() -> None:
    error = ApprovalTimeoutError("it is pending", operation_id="op")
    assert error.attempts == ()
    explain(error, (attempt(),))
    for same in (error, pickle.loads(pickle.dumps(error))):  # noqa: S301
        assert str(same) == "it is pending; 1 attempt failed: the face did not match (30004)"
        assert same.attempts == (attempt(),)


def test_a_message_without_failed_attempts_stays_as_it_is() -> None:
    error = ApprovalTimeoutError("it is pending", operation_id="op")
    explain(error, (Authentication(result="APPROVED"),))
    assert (str(error), len(error.attempts)) == ("it is pending", 1)
