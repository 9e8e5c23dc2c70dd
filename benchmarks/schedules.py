"""Common polling schedules for work that is done elsewhere, as wait strategies of tenacity."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final, NamedTuple

from tenacity import wait_exponential, wait_fixed, wait_random_exponential
from tenacity.wait import wait_base

if TYPE_CHECKING:
    from tenacity import RetryCallState


class Decorrelated(wait_base):
    """Decorrelated jitter, for one wait at a time: each delay depends on the previous one."""

    def __init__(self, base: float, cap: float) -> None:
        self._base = base
        self._cap = cap
        self._previous = base

    def __call__(self, retry_state: RetryCallState) -> float:
        """Return the delay after this attempt; the first attempt resets the sequence."""
        previous = self._base if retry_state.attempt_number == 1 else self._previous
        self._previous = min(self._cap, random.uniform(self._base, 3 * previous))  # noqa: S311 - delays, not keys
        return self._previous


class Fibonacci(wait_base):
    """1, 1, 2, 3, 5, ... seconds up to a cap."""

    def __init__(self, cap: float) -> None:
        self._cap = cap

    def __call__(self, retry_state: RetryCallState) -> float:
        """Return the delay after this attempt."""
        delay, following = 1.0, 1.0
        for _ in range(retry_state.attempt_number - 1):
            if delay >= self._cap:
                break
            delay, following = following, delay + following
        return min(delay, self._cap)


class Baseline(NamedTuple):
    """A schedule in common use, and its label in the picture."""

    schedule: wait_base
    label: str
    randomized: bool = False


#: All follow the same rules of a wait; only the delays differ. (The waiters of botocore also poll at the very start,
#: when no approval is possible: that request is left out.)
BASELINES: Final = {
    "every 1 s": Baseline(wait_fixed(1), "1 s"),
    "every 2 s": Baseline(wait_fixed(2), "2 s"),
    "every 5 s": Baseline(wait_fixed(5), "5 s"),
    # botocore: "delay" of a waiter, which has no common default. EC2's is 15 s, CloudFormation's 30 s:
    # https://boto3.amazonaws.com/v1/documentation/api/1.36.2/reference/services/ec2/waiter/PasswordDataAvailable.html
    # https://docs.aws.amazon.com/boto3/latest/reference/services/cloudformation/waiter/StackCreateComplete.html
    "every 15 s (botocore: EC2)": Baseline(wait_fixed(15), "botocore 15 s"),
    # azure-core: LROBasePolling(timeout=30) sleeps this long before each poll if the answer has no Retry-After:
    # https://github.com/Azure/azure-sdk-for-python/blob/main/sdk/core/azure-core/azure/core/polling/base_polling.py
    "every 30 s (azure-core; botocore: CloudFormation)": Baseline(wait_fixed(30), "azure-core 30 s"),
    "0.5 s * 1.5^k, at most 5 s": Baseline(wait_exponential(0.5, max=5, exp_base=1.5), "1.5^k ≤ 5 s"),
    # The caps of tenacity's own examples are 10 s here and 60 s under full jitter:
    # https://tenacity.readthedocs.io/en/latest/#waiting-before-retrying
    "1 s * 2^k, at most 10 s": Baseline(wait_exponential(1, max=10), "2^k ≤ 10 s"),
    "1 s * 2^k, at most 30 s": Baseline(wait_exponential(1, max=30), "2^k ≤ 30 s"),
    # The backoff library's example of polling: backoff.fibo with max_value=13, here without jitter:
    # https://github.com/litl/backoff/blob/master/README.rst
    "Fibonacci, at most 13 s": Baseline(Fibonacci(13), "Fibonacci"),
    "full jitter, 1 s * 2^k, at most 10 s": Baseline(
        wait_random_exponential(1, max=10), "full jitter ≤ 10 s", randomized=True
    ),
    "full jitter, 1 s * 2^k, at most 60 s": Baseline(
        wait_random_exponential(1, max=60), "full jitter ≤ 60 s", randomized=True
    ),
    # sleep = min(cap, random_between(base, sleep * 3)):
    # https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    "decorrelated jitter, 1 to 10 s": Baseline(Decorrelated(1, 10), "decorrelated ≤ 10 s", randomized=True),
    "decorrelated jitter, 1 to 30 s": Baseline(Decorrelated(1, 30), "decorrelated ≤ 30 s", randomized=True),
}
