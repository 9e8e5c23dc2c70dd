"""When to poll next: `wait_adaptive`, and `next_delay`, which calls any tenacity strategy.

Nothing here reads a clock, sleeps or sends. The engines do, and report their observations to the schedule. Times are
seconds since the operation was created.

The method has three parts:

* **Poll when the expected lateness is worth a request.** For an event with hazard rate h the best interval between
  polls is about ``sqrt(2 * poll_cost / h)`` (J. B. Keller, "Optimum checking schedules for systems subject to random
  failure", Management Science 21, 1974; R. E. Barlow, L. C. Hunter, F. Proschan, "Optimum checking procedures",
  J. SIAM 11, 1963). `_Curve.step` extends that to an h that changes before the next poll.
* **Learn from the polls.** A poll shows only that the approval came since the previous one; a timeout, only that it had
  not come yet. `_Histogram` and `_estimate` count both as censored observations.
* **Forget.** The weight of an observation halves with every 500 later ones, so that the estimate follows changes in how
  people behave. It never assumes that more than half of the users never approve.
"""

from __future__ import annotations

import logging
import math
import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from operator import add
from typing import Final, NamedTuple

from tenacity import RetryCallState, Retrying
from tenacity.wait import wait_base

from ._validation import check_number
from .errors import ConfigurationError

__all__ = ["next_delay", "wait_adaptive"]

logger: Final = logging.getLogger("aiokeyless")

#: Edges of the histogram's bins in seconds: 0, then three per octave from 0.5 s to 4096 s. Four or six per octave cost
#: the same to 0.3% (with poll costs of 0.02 and 0.3, after 0 to 300 waits), and the estimate visits all of them.
_EDGES: Final = (0.0, *(0.5 * 2.0 ** (k / 3) for k in range(40)))
_WIDTHS: Final = tuple(high - low for low, high in pairwise(_EDGES))
_BINS: Final = len(_WIDTHS)
_END: Final = _EDGES[-1]
_EDGE_NUMBERS: Final = range(_BINS + 1)

#: The prior: approvals are log-uniform between these two times; this share of users never approves.
_PRIOR_FIRST: Final = 1.0
_PRIOR_LAST: Final = 120.0
_PRIOR_NEVER: Final = 0.2
#: The weight of the prior, in waits: small, so that real observations soon outweigh it.
_PRIOR_WAITS: Final = 3.0

#: The factor by which one more observation reduces the weight of all earlier ones: a half-life of 500.
_KEPT: Final = 0.5 ** (1 / 500)
#: The largest share of users that is assumed to never approve. Unanswered waits (a load test, an outage of the push
#: service) do not show when people approve. Beyond this share they are ignored. Otherwise it would take hundreds of
#: approvals to forget them.
_MOST_NEVER: Final = 0.5
#: How far the share may stay above that, since the reduction is an approximation.
_NEARLY: Final = 0.001

#: An approval counts in the neighbouring bins too (a binomial kernel, about a quarter in log-time). Thirty observations
#: in forty bins are spikes, and a schedule that is fitted to spikes polls at the wrong times.
_KERNEL: Final = ((-2, 1 / 16), (-1, 4 / 16), (0, 6 / 16), (1, 4 / 16), (2, 1 / 16))

#: The smallest width of an approval's interval, in seconds, if its ends are equal.
_INSTANT: Final = 0.001
#: Density (waits per second) that is added everywhere, so that an interval without density is filled evenly.
_NO_OPINION: Final = 1e-6

#: Bisection steps of `previous_poll`: hours, halved 24 times, give a thousandth of a second.
_HALVINGS: Final = 24

#: Bounds of a strategy's delay, in seconds.
MIN_DELAY: Final = 0.02
_MAX_DELAY: Final = 3600.0
#: The most polls that `attempt_at` counts: a wait of days has many, and each of them would count all before it.
_MAX_COUNTED: Final = 256
#: A RetryCallState needs an owner; this one is never run.
_RETRYING: Final = Retrying()


class wait_adaptive(wait_base):  # noqa: N801 - tenacity names its strategies so, and this is one of them
    """Poll often when approval is likely and seldom when it is not, and learn from every wait.

    Each delay ends when the expected lateness is worth one more request. The schedule first assumes that approvals are
    log-uniform over 1..120 s, and that one user in five never approves. It learns from `observe`, which the client
    calls for each of its waits. It works wherever tenacity takes a wait strategy: in sums, in ``wait_chain``, in a
    plain ``AsyncRetrying``. All clients of one event loop may share an instance; it has no lock.

    Args:
        poll_cost: Seconds of lateness that one request is worth; above 0. A larger value means fewer requests and
            later answers. Default: 0.02. If people approve after 8 s (median) and one in five never does, that is as
            prompt as one poll a second, with 40% fewer requests. If all approve, it learns to send 40% more than
            that loop, and is 0.17 s earlier. 0.3 needs a fifth of the requests, and is 1.8 s late on average.
        min_interval: Shortest delay in seconds; above 0. Default: 0.25.
        max_interval: Longest delay in seconds; at least ``min_interval``. Default: 20.
        jitter: Fraction, 0 to 1, by which a delay varies at random in both directions, within the two intervals. It
            spreads the polls of many clients; 0 turns it off. Default: 0.1, since full jitter costs lateness.

    Raises:
        ConfigurationError: An argument is not a number or out of range.

    Example:
        >>> schedule = wait_adaptive(poll_cost=1.0, jitter=0)
        >>> schedule
        wait_adaptive(poll_cost=1.0, min_interval=0.25, max_interval=20.0, jitter=0.0)
        >>> schedule.observe(4.0, 6.5)  # pending at 4 s, approved at 6.5 s
        >>> schedule.observe(120.0, None)  # still pending when the wait ended
    """

    def __init__(
        self,
        *,
        poll_cost: float = 0.02,
        min_interval: float = 0.25,
        max_interval: float = 20.0,
        jitter: float = 0.1,
    ) -> None:
        self._poll_cost = check_number(poll_cost, "poll_cost", "a finite number of seconds above 0")
        self._min_interval = check_number(min_interval, "min_interval", "a finite number of seconds above 0")
        self._max_interval = check_number(
            max_interval, "max_interval", "a finite number of seconds, at least min_interval", least=self._min_interval
        )
        self._jitter = check_number(jitter, "jitter", "a fraction from 0 to 1", least=0.0, most=1.0)
        self._observed = _Histogram()
        # The curve of `_observed`; None: to be computed.
        self._curve: _Curve | None = None

    def __call__(self, retry_state: RetryCallState) -> float:
        """Return the delay before the next poll.

        Args:
            retry_state: tenacity's state of the call. Only ``seconds_since_start`` is read: the age of the operation at
                the answer from which the delay counts, in seconds. None counts as 0.

        Returns:
            Seconds, from ``min_interval`` to ``max_interval``.
        """
        start = retry_state.seconds_since_start
        # None, NaN and a negative number (a clock that ran backwards) all count as 0.
        delay = self._interval(start if start and start > 0.0 else 0.0)
        shortest = max(delay * (1.0 - self._jitter), self._min_interval)
        longest = min(delay * (1.0 + self._jitter), self._max_interval)
        return shortest + (longest - shortest) * random.random()  # noqa: S311 - spreads load, guards nothing

    def _interval(self, start: float) -> float:
        """Return the delay without its jitter."""
        if self._curve is None:
            self._curve = self._observed.curve()
        step = self._curve.step(start, self._poll_cost)
        # Not min(): an overflow gives NaN, which must count as a long delay.
        return max(step, self._min_interval) if step < self._max_interval else self._max_interval

    def previous_poll(self, moment: float) -> float:
        """Return the time of the poll before the one at `moment`, if this schedule set both.

        This is for an engine that keeps nothing of a wait between two polls, but needs the previous poll's time for
        `observe`. It is an estimate that ignores jitter, delayed polls and failed polls.

        Args:
            moment: Seconds since the operation was created, at least 0.

        Returns:
            Seconds since the operation was created; 0 if the poll at `moment` is the first one.
        """
        low, high = 0.0, moment
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            # Earlier by more than rounding: if no approvals are expected, all moments lead to the same next poll.
            if middle + self._interval(middle) < moment * (1 - 1e-9):
                low = middle
            else:
                high = middle
        return low

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(poll_cost={self._poll_cost!r}, min_interval={self._min_interval!r}, "
            f"max_interval={self._max_interval!r}, jitter={self._jitter!r})"
        )

    def observe(self, after: float, until: float | None) -> None:
        """Learn the result of one wait; the client calls this once for each wait that began with its operation.

        Args:
            after: Start of the last poll that found the operation pending, in seconds since it was created; 0 if there
                was none.
            until: Time of the poll that found it approved, in the same seconds: it was approved in ``(after, until]``.
                None if no poll found it approved: it was still pending at ``after``.

        Raises:
            ConfigurationError: A time is not a number, negative or not finite, or ``until`` is before ``after``.
        """
        after = check_number(after, "after", "a finite number of seconds, at least 0", least=0.0)
        if until is not None:
            until = check_number(until, "until", "a finite number of seconds, at least after, or None", least=after)
        # Beyond the last bin, an approval shows only that it came later.
        if until is not None and after < _END:
            self._observed.age()
            self._observed.add_approval(after, until)
        # Otherwise, there was no time of observation.
        elif after > 0.0:
            self._observed.age()
            self._observed.add_pending(after)
        self._curve = None


def next_delay(schedule: wait_base, *, attempt_number: int, since_start: float) -> float:
    """Return a tenacity wait strategy's delay before the next poll.

    The strategy receives a real ``RetryCallState`` with the two facts below and no outcome: a pending answer is neither
    a final result nor a failure.

    Args:
        schedule: The strategy.
        attempt_number: Number of the answered poll, from 1.
        since_start: Seconds since the operation was created; the state's ``seconds_since_start``.

    Returns:
        Seconds, clamped to 0.02..3600.

    Raises:
        ConfigurationError: The strategy raised, or returned something that is not a number.
    """
    state = RetryCallState(_RETRYING, None, (), {})
    state.attempt_number = attempt_number
    state.start_time = 0.0
    state.outcome_timestamp = since_start
    try:
        delay: object = schedule(state)
    except Exception as error:
        raise ConfigurationError(
            f"schedule {type(schedule).__name__} raised {type(error).__name__} instead of returning a delay; pass a "
            "tenacity wait strategy that needs no outcome, such as wait_fixed(2)",
            argument="schedule",
        ) from error
    if isinstance(delay, bool) or not isinstance(delay, (int, float)) or not -math.inf <= delay <= math.inf:
        raise ConfigurationError(
            f"schedule {type(schedule).__name__} returned {delay!r:.80} as a delay; it must return a number of seconds",
            argument="schedule",
        )
    return float(min(max(delay, MIN_DELAY), _MAX_DELAY))


def record_observation(schedule: wait_adaptive, after: float, until: float | None) -> None:
    """Call `observe` of a schedule, and log its errors.

    The schedule may be an application's subclass. Its failure may cost requests, but never an approval.
    """
    try:
        schedule.observe(after, until)
    except Exception:
        logger.exception("the schedule %r failed to learn from an observation", schedule)


def attempt_at(schedule: wait_base, age: float, *, most: int) -> int:
    """Return the number of the next poll at an age, at most `most`, if `schedule` set all polls before it.

    This is for an engine that keeps nothing of a wait between two polls. It cannot count deliveries: they include
    failed polls, so that an exponential schedule would jump after an outage.
    """
    # It does not read the number.
    if isinstance(schedule, wait_adaptive):
        return most
    attempt, time = 1, 0.0
    while attempt < min(most, _MAX_COUNTED):
        time += next_delay(schedule, attempt_number=attempt, since_start=time)
        if time > age:
            break
        attempt += 1
    return attempt


class _Curve(NamedTuple):
    """The survival curve: the inverse of the share S(t) of operations still pending at t, and its integral.

    Between two edges 1/S is linear. After the last edge no approvals are expected.
    """

    inverse: list[float]  # 1/S at each edge
    area: list[float]  # the integral of 1/S from 0 to each edge
    slope: list[float]  # the slope of 1/S after each edge

    def step(self, start: float, poll_cost: float) -> float:
        """Return the delay after which the expected lateness is worth one poll; infinity if no approvals are expected.

        From ``t = start`` it is the d with ``integral of S(t)/S(u) - 1 over u = t .. t+d  ==  poll_cost``. The left
        side is the lateness of the approvals not yet noticed, relative to the operations that are still pending at u.
        For a constant hazard h that is ``exp(h*d) - 1 - h*d == h*poll_cost``, the exact optimum, and
        ``sqrt(2*poll_cost/h)`` for small steps. Unlike that formula, it knows later changes of the hazard. So it polls
        in time when a hazard of zero rises, and seldom at the end, when few approvals are still to come.
        """
        if start >= _END:
            return math.inf
        inverse, area, slope = self
        here = _find_bin(start)
        into = start - _EDGES[here]
        level = inverse[here] + slope[here] * into
        goal = poll_cost * level
        # Multiplied by `level`, the integral from start to edge k is area[k] - level * _EDGES[k] - (the same at start).
        target = area[here] + into * (inverse[here] + slope[here] * into / 2) - level * start + goal
        edge = bisect_right(_EDGE_NUMBERS, target, lo=here + 1, key=lambda k: area[k] - level * _EDGES[k]) - 1
        if edge == here:
            covered, rise, rest = 0.0, 0.0, goal
        else:
            covered = _EDGES[edge] - start
            rise = inverse[edge] - level
            rest = target - (area[edge] - level * _EDGES[edge])
        # In the rest, 1/S is linear: rise * x + slope/2 * x**2 == rest. This form of the solution does not divide by
        # zero if the slope or the rise is zero.
        pace = rise + math.sqrt(rise * rise + 2.0 * slope[edge] * rest)
        return covered + 2.0 * rest / pace if pace > 0.0 else math.inf


def _estimate(approved: Sequence[float], pending: Sequence[float]) -> _Curve:
    """Compute the survival curve from the histograms and the prior.

    This is the product-limit estimate (E. L. Kaplan, P. Meier 1958). Each bin compares its approvals with the waits
    that were still observed, so a wait that ended does not affect later bins.
    """
    at_risk = _PRIOR_WAITS + sum(approved) + sum(pending)
    inverse, area, slope = [1.0], [0.0], []
    level, total = 1.0, 0.0
    for width, expected, seen, given_up in zip(_WIDTHS, _PRIOR, approved, pending, strict=False):
        before = at_risk - given_up
        at_risk = before - expected - seen
        # In this order, rounding cannot make it less than the last level.
        next_level = level * (before / at_risk)
        slope.append((next_level - level) / width)
        total += width * (level + next_level) / 2.0
        inverse.append(next_level)
        area.append(total)
        level = next_level
    slope.append(0.0)
    return _Curve(inverse, area, slope)


class _Histogram:
    """The observations, in bins of time."""

    def __init__(self) -> None:
        self.approved = [0.0] * _BINS  # approvals in each bin
        self.pending = [0.0] * (_BINS + 1)  # at each edge, the waits whose observation ended there without an approval

    def age(self) -> None:
        """Reduce the weight of all observations so far, as for one later observation."""
        self.approved = [weight * _KEPT for weight in self.approved]
        self.pending = [weight * _KEPT for weight in self.pending]

    def curve(self) -> _Curve:
        """Reduce the unanswered waits to the largest share allowed, and return the survival curve."""
        curve = _estimate(self.approved, self.pending)
        while (never := self._share_of_never(curve)) > _MOST_NEVER + _NEARLY:
            # This is exact if the waits lasted longer than half of the approvals took: the odds are then those of the
            # sums. Otherwise it reduces too little, and is repeated. A second call must reduce nothing.
            kept = _MOST_NEVER / (1.0 - _MOST_NEVER) * (1.0 - never) / never
            self.pending = [weight * kept for weight in self.pending]
            curve = _estimate(self.approved, self.pending)
        return curve

    def _share_of_never(self, curve: _Curve) -> float:
        """Return the share of users who never approve, from the share approved when half of the approvals have come.

        The share approved at the end would not do: short unanswered waits show nothing about the end.
        """
        expected: list[float] = [*accumulate(map(add, _PRIOR, self.approved))]
        half = bisect_left(expected, expected[-1] / 2)
        return 1.0 - (1.0 - 1.0 / curve.inverse[half + 1]) * expected[-1] / expected[half]

    def add_approval(self, after: float, until: float) -> None:
        """Count an approval in ``(after, until]``.

        It is spread over the interval in proportion to the approvals known so far: self-consistency (B. W. Turnbull
        1976), with each observation spread once, when it arrives (M. A. Newton 2002, predictive recursion).
        """
        until = min(max(until, after + _INSTANT), _END)
        first = _find_bin(after)
        parts = [
            ((self.approved[k] + _PRIOR[k]) / _WIDTHS[k] + _NO_OPINION)
            * (min(until, _EDGES[k + 1]) - max(after, _EDGES[k]))
            for k in range(first, bisect_left(_EDGES, until))
        ]
        total = sum(parts)
        for k, part in enumerate(parts, first):
            for offset, share in _KERNEL:
                self.approved[_clamp(k + offset)] += part / total * share

    def add_pending(self, after: float) -> None:
        """Count a wait that was pending until ``after``, in proportion at the two edges of the bin."""
        k = _find_bin(after)
        passed = (after - _EDGES[k]) / _WIDTHS[k] if k < _BINS else 0.0
        self.pending[k] += 1.0 - passed
        if passed:
            self.pending[k + 1] += passed


def _find_bin(time: float) -> int:
    return bisect_right(_EDGES, time) - 1


def _clamp(k: int) -> int:
    """Return the bin, or the nearest one if there is none."""
    return min(max(k, 0), _BINS - 1)


def _make_prior() -> tuple[float, ...]:
    """Return the approvals that the prior expects in each bin, as a number of waits."""
    rate = _PRIOR_WAITS * (1.0 - _PRIOR_NEVER) / math.log(_PRIOR_LAST / _PRIOR_FIRST)
    return tuple(
        rate * max(math.log(min(high, _PRIOR_LAST) / max(low, _PRIOR_FIRST)), 0.0) for low, high in pairwise(_EDGES)
    )


_PRIOR: Final = _make_prior()
