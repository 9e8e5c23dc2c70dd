"""How long to pause after a transient failure, and whose pause is the service's own wish."""

from __future__ import annotations

import math

import pytest

from aiokeyless._rules.backoff import error_delay, failures_that_count, requested_pause
from aiokeyless.errors import KeylessError, NotFoundError, RateLimitError, ServerError, StatusError, TransportError

PATH = "/v2/operations/txn-1"
LONGEST = 5.0


def status_error(status: int, *, retry_after: float | None = None) -> StatusError:
    return StatusError(status=status, method="GET", path=PATH, retry_after=retry_after)


# -- how long to pause


def test_the_delay_is_in_the_second_half_of_a_window_that_doubles_from_half_a_second_to_five() -> None:
    for failures, window in [(1, 0.5), (2, 1.0), (3, 2.0), (4, 4.0), (5, 5.0), (6, 5.0), (500, 5.0)]:
        delays = [error_delay(failures) for _ in range(300)]
        assert 0.5 * window <= min(delays) < 0.65 * window
        assert 0.85 * window < max(delays) <= window


def test_the_delay_after_very_many_failures_is_no_overflow() -> None:
    assert 0 < error_delay(10**6) <= LONGEST


# -- how many failures count


@pytest.mark.parametrize(
    ("failures", "since_good", "is_refusal", "counted"),
    [
        (1, 0.0, False, 1),
        (2, 0.0, False, 2),
        (31, 30.0, False, 2),
        (32, 30.0, False, 3),
        (1000, 30.0, False, 3),
        (9, 30.01, False, 9),
        (9, math.inf, False, 9),
        (9, 0.0, True, 9),
    ],
)
def test_two_failures_count_and_three_of_many_unless_the_service_is_silent_or_refuses(
    failures: int, since_good: float, counted: int, *, is_refusal: bool
) -> None:
    assert failures_that_count(failures, since_good=since_good, is_refusal=is_refusal) == counted


# -- what the service asks for


@pytest.mark.parametrize(
    ("error", "pause"),
    [
        (RateLimitError(status=429, method="GET", path=PATH, retry_after=3.0), 3.0),
        (ServerError(status=503, method="GET", path=PATH, retry_after=0.0), 0.0),
        (RateLimitError(status=429, method="GET", path=PATH, retry_after=86_400.0), 120.0),
        (ServerError(status=503, method="GET", path=PATH, retry_after=2.5), 2.5),
        (status_error(429), 0.0),
        (status_error(503), 0.0),
        (status_error(500, retry_after=3.0), 0.0),
        (status_error(408, retry_after=3.0), 0.0),
        (status_error(302, retry_after=3.0), 0.0),
        (NotFoundError(status=404, method="GET", path=PATH, retry_after=3.0), 0.0),
        (TransportError("m", method="GET", path=PATH), 0.0),
    ],
    ids=lambda value: f"{type(value).__name__}-{value}" if isinstance(value, KeylessError) else str(value),
)
def test_only_a_429_and_a_503_ask_for_a_pause_and_two_minutes_count(error: KeylessError, pause: float) -> None:
    assert requested_pause(error) == pause


def test_a_longer_pause_of_a_503_is_the_longest_delay() -> None:
    pauses = [requested_pause(status_error(503, retry_after=30.0)) for _ in range(300)]
    assert 0.5 * LONGEST <= min(pauses) < 0.65 * LONGEST
    assert 0.85 * LONGEST < max(pauses) <= LONGEST
