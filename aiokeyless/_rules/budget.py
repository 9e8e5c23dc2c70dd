"""A budget of failures: how many polls may start while the service fails. Pure.

Others call it a retry budget (Finagle) or retry throttling (gRPC). Nothing is held back while one answer of 41 is good.
If none is, the polls of thousands of waits soon become five in a second, then one, however many wait. Rule 4 of
docs/rules.md; docs/explanation/failures.md says what that means for waits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from aiokeyless.events import ServiceChanged

if TYPE_CHECKING:
    from aiokeyless.errors import KeylessError

#: Tokens for each wait; for all together there are at least and at most so many.
PER_WAIT: Final = 3
LEAST: Final = 32
MOST: Final = 512
#: Tokens that a good answer adds, beside the one that its poll took.
GAIN: Final = 40
#: Tokens that come by themselves in a second.
PER_SECOND: Final = 5.0
#: The same once nothing was answered well for `LONG` seconds.
PER_SECOND_LATER: Final = 1.0
LONG: Final = 30.0
#: Seconds of nothing but failures after which the service counts as failing.
FAILING_AFTER: Final = 10.0
#: Seconds without a good answer after which failures may be a connection's fault, not the service's.
IN_DOUBT: Final = 1.0
#: Seconds between two polls that use a new connection to find out.
RENEWS_EVERY: Final = 1.4
_ROUNDING: Final = 1e-6
#: Seconds between two pairs of log lines, of the beginning of failures and of their end.
_LOGS_EVERY: Final = 60.0


class Budget:
    """The tokens of one client or worker. Times are of one clock, in seconds.

    A poll takes a token when it starts. A good answer returns it and adds `GAIN`; a failure returns nothing. What is
    stored is how many are spent, so that each wait brings its own tokens with it.
    """

    def __init__(self) -> None:
        self.waits: int = 0
        """The waits, or requests, that are polled."""
        self.answered_at: float = -math.inf
        """When the last good answer came."""
        self.failing_since: float = math.inf
        """Start of the first of the polls that failed since then; infinity if none did."""
        self.is_failing: bool = False
        """Whether there have been nothing but failures for a while, or there is no token."""
        self._spent = 0.0
        self._filled_at = 0.0
        self._failed_at = -math.inf
        self._renewed_at = -math.inf

    @property
    def capacity(self) -> int:
        """The tokens that there are if all is well."""
        return min(max(PER_WAIT * self.waits, LEAST), MOST)

    def room(self, now: float) -> int:
        """Return how many polls may start at once."""
        self._fill(now)
        return int(self.capacity - self._spent + _ROUNDING)

    def is_short(self, now: float) -> bool:
        """Return whether so many tokens are spent that the polls that are due should be told apart."""
        return self._spent >= LEAST // 2 and 2 * self.room(now) < self.capacity

    def ready_at(self, now: float) -> float:
        """Return when the next poll may start; not after `now` if it may start at once."""
        if self._spent <= LEAST - 1:  # as there are never fewer tokens
            return now
        self._fill(now)
        missing = 1.0 - (self.capacity - self._spent)
        return now + max(0.0, missing) / self._per_second(now)

    def record_poll(self, now: float) -> None:
        """Take a token for a poll that starts. Without one, as a final poll may start, nothing is owed."""
        if self._spent:
            self._fill(now)
        else:
            self._filled_at = now
        self._spent += 1.0

    def record_success(self, now: float) -> None:
        """Record a good answer: the operation, or that there is none."""
        self.answered_at = now
        self._spent = max(0.0, self._spent - 1.0 - GAIN)
        self.failing_since = math.inf
        self.is_failing = False

    def record_other(self) -> None:
        """Record an answer that says nothing about the service, or a delivery without an exchange."""
        self._spent = max(0.0, self._spent - 1.0)

    def record_failure(self, now: float, *, started_at: float) -> None:
        """Record a transient failure of a poll that started then."""
        if self.failing_since == math.inf or now - self._failed_at > LONG:  # a failure of an hour ago is another one
            self.failing_since = max(started_at, self.answered_at)
        self._failed_at = now
        if now - self.failing_since >= FAILING_AFTER or self.room(now) < 1:
            self.is_failing = True

    # -- connections

    def take_renewal(self, now: float) -> bool:
        """Return whether the poll that starts now must use a new connection, since the kept ones may be at fault.

        After a failover by DNS, they may lead to a host that goes on failing. Handshakes are not for each poll.
        """
        is_in_doubt = self.failing_since < math.inf and now - self.answered_at > IN_DOUBT
        if not is_in_doubt or now - self._renewed_at < RENEWS_EVERY:
            return False
        self._renewed_at = now
        return True

    def _per_second(self, now: float) -> float:
        return PER_SECOND if now - self.failing_since < LONG else PER_SECOND_LATER

    def _fill(self, now: float) -> None:
        """Add the tokens since the last time."""
        gained = (now - self._filled_at) * self._per_second(now)
        self._spent = max(0.0, min(self._spent, self.capacity) - gained)
        self._filled_at = now


class ServiceWatch:
    """Notices when the service begins to fail, and when it answers again. A client or a worker has one."""

    def __init__(self) -> None:
        self.is_failing: bool = False
        """What was noticed last."""
        self._since = self._logged_at = -math.inf
        self._has_begun = False  # in the log

    def notice(
        self, budget: Budget, error: KeylessError | None, now: float
    ) -> tuple[ServiceChanged | None, ServiceChanged | None]:
        """Return the event if it is news for listeners, and the event if it is for the log; a good answer has no error.

        The log has one pair of lines a minute at most, so the first may come late.
        """
        is_new = budget.is_failing is not self.is_failing
        if is_new and budget.is_failing:
            self._since = budget.failing_since
        self.is_failing = budget.is_failing
        if self.is_failing:
            is_logged = not self._has_begun and now - self._logged_at >= _LOGS_EVERY
            if is_logged:
                self._has_begun, self._logged_at = True, now
        else:
            is_logged, self._has_begun = self._has_begun, False
        change = self._change(budget, error, now) if is_new or is_logged else None
        return change if is_new else None, change if is_logged else None

    def end(self, budget: Budget, error: KeylessError, now: float) -> ServiceChanged | None:
        """Return the event for listeners that count failing services, if this is one: nobody asks it any more."""
        was_failing, self.is_failing = self.is_failing, False
        return self._change(budget, error, now) if was_failing else None

    def _change(self, budget: Budget, error: KeylessError | None, now: float) -> ServiceChanged:
        return ServiceChanged(
            is_failing=self.is_failing,
            error=None if error is None else type(error).__name__,
            seconds=now - self._since,
            waiting=budget.waits,
        )
