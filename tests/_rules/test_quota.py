"""The quota of repetitions: what a failure costs, what comes back, and that a lone failure is repeated as ever."""

from __future__ import annotations

import pytest

from aiokeyless import KeylessError, RequestTimeoutError, ServerError, TransportError
from aiokeyless._rules.quota import RepetitionQuota

LOST = TransportError("lost", method="GET", path="/")
BUSY = ServerError(status=503, method="GET", path="/")
LATE = RequestTimeoutError("late", method="GET", path="/")


def take_all(quota: RepetitionQuota, failure: KeylessError) -> int:
    """Take tokens until there are too few, and return how often there were enough."""
    return sum(quota.take(failure) for _ in range(100))


@pytest.mark.parametrize(("failure", "times"), [(LOST, 60), (BUSY, 60), (LATE, 30)])
def test_a_client_has_60_tokens_and_a_timeout_costs_two(failure: KeylessError, times: int) -> None:
    quota = RepetitionQuota()
    assert take_all(quota, failure) == times
    assert not quota.take(failure)


@pytest.mark.parametrize(("failure", "successes", "times"), [(BUSY, 1, 1), (BUSY, 7, 7), (LATE, 1, 0), (LATE, 5, 2)])
def test_each_success_gives_one_back(failure: KeylessError, successes: int, times: int) -> None:
    quota = RepetitionQuota()
    take_all(quota, BUSY)
    for _ in range(successes):
        quota.give_back()
    assert take_all(quota, failure) == times


def test_there_are_never_more_than_60() -> None:
    quota = RepetitionQuota()
    for _ in range(10):
        quota.give_back()
    assert take_all(quota, BUSY) == 60
    for _ in range(100):
        quota.give_back()
    assert take_all(quota, BUSY) == 60


def test_one_token_is_too_few_for_a_timeout_and_stays() -> None:
    quota = RepetitionQuota()
    take_all(quota, BUSY)
    quota.give_back()
    assert not quota.take(LATE)
    assert quota.take(BUSY)
