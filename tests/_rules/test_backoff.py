"""Which failures are transient, how long to pause after them, and whose pause is the service's own wish."""

from __future__ import annotations

import pytest

from aiokeyless._rules.backoff import error_delay, is_transient, requested_pause
from aiokeyless.errors import (
    ApprovalTimeoutError,
    ClientClosedError,
    ConfigurationError,
    DecodeError,
    KeylessError,
    NotFoundError,
    NotJsonError,
    RateLimitError,
    RequestTimeoutError,
    ServerError,
    StatusError,
    TransportError,
)

PATH = "/v2/operations/txn-1"
LONGEST = 5.0


def status_error(status: int, *, retry_after: float | None = None) -> StatusError:
    return StatusError(status=status, method="GET", path=PATH, retry_after=retry_after)


# -- what is transient


@pytest.mark.parametrize(
    ("status", "transient"),
    [
        (199, False),
        (204, False),
        (302, False),
        (400, False),
        (401, False),
        (403, False),
        (404, False),
        (406, False),
        (407, False),
        (408, True),
        (409, False),
        (415, False),
        (424, False),
        (425, True),
        (426, False),
        (428, False),
        (429, True),
        (430, False),
        (499, False),
        (500, True),
        (502, True),
        (503, True),
        (504, True),
        (599, True),
        (600, False),
    ],
)
def test_a_status_is_transient_or_not_whatever_its_class(status: int, *, transient: bool) -> None:
    assert is_transient(status_error(status)) is transient


@pytest.mark.parametrize("status", [400, 404])
def test_a_retry_after_makes_no_failure_transient(status: int) -> None:
    assert not is_transient(status_error(status, retry_after=1.0))


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (TransportError("m", method="GET", path=PATH), True),
        (RequestTimeoutError("m", method="GET", path=PATH), True),
        (NotJsonError("m", status=200, method="GET", path=PATH), True),
        (DecodeError("m", status=200, method="GET", path=PATH), False),
        (ConfigurationError("m"), False),
        (ClientClosedError("m"), False),
        (ApprovalTimeoutError("m", operation_id="a"), False),
        (KeylessError("m"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_transient_without_a_status(error: KeylessError, *, transient: bool) -> None:
    assert is_transient(error) is transient


# -- how long to pause


def test_the_delay_is_in_the_second_half_of_a_window_that_doubles_from_half_a_second_to_five() -> None:
    for failures, window in [(1, 0.5), (2, 1.0), (3, 2.0), (4, 4.0), (5, 5.0), (6, 5.0), (500, 5.0)]:
        delays = [error_delay(failures) for _ in range(300)]
        assert 0.5 * window <= min(delays) < 0.65 * window
        assert 0.85 * window < max(delays) <= window


def test_the_delay_after_very_many_failures_is_no_overflow() -> None:
    assert 0 < error_delay(10**6) <= LONGEST


# -- what the service asks for


@pytest.mark.parametrize(
    ("error", "pause"),
    [
        (RateLimitError(status=429, method="GET", path=PATH, retry_after=3.0), 3.0),
        (ServerError(status=503, method="GET", path=PATH, retry_after=0.0), 0.0),
        (ServerError(status=503, method="GET", path=PATH, retry_after=86_400.0), 120.0),
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
