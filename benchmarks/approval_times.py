"""How long users take to approve: distributions of approval times, with a share that is never approved.

The distributions are known, so the cost of a schedule can be computed; samples of them train a schedule that learns.
"""

from __future__ import annotations

import dataclasses
import math
import random
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class ApprovalTimes:
    """A mixture of log-normal groups (share, median in seconds, sigma); some users never approve."""

    groups: tuple[tuple[float, float, float], ...]
    never: float = 0.2

    def __str__(self) -> str:
        if len(self.groups) == 1:
            ((_, median, sigma),) = self.groups
            return f"log-normal ({median:g} s, {sigma:g})"
        return " + ".join(f"{share:.0%} ({median:g} s, {sigma:g})" for share, median, sigma in self.groups)

    def approved_by(self, time: float) -> float:
        """Return the share of users who approve by ``time``."""
        return self._sum(lambda share, median, sigma: share * _normal_cdf(math.log(time / median) / sigma))

    def mean_time_by(self, time: float) -> float:
        """Return the integral of time over the users who approve by ``time``."""
        return self._sum(
            lambda share, median, sigma: (
                share * median * math.exp(sigma**2 / 2) * _normal_cdf(math.log(time / median) / sigma - sigma)
            )
        )

    def _sum(self, term: Callable[[float, float, float], float]) -> float:
        return (1.0 - self.never) * sum(term(*group) for group in self.groups)

    def draw(self, source: random.Random) -> float:
        """Return a random approval time: seconds, or infinity."""
        if source.random() < self.never:
            return math.inf
        ((_, median, sigma),) = source.choices(self.groups, [share for share, _, _ in self.groups])
        return source.lognormvariate(math.log(median), sigma)


#: A button that is tapped at once.
QUICK: Final = ApprovalTimes(((1.0, 1.5, 0.6),))
TYPICAL: Final = ApprovalTimes(((1.0, 8.0, 0.8),))
EAGER: Final = dataclasses.replace(TYPICAL, never=0.0)
SLOW: Final = ApprovalTimes(((1.0, 25.0, 1.2),))
TWO_GROUPS: Final = ApprovalTimes(((0.6, 4.0, 0.5), (0.4, 40.0, 0.6)))


def seeded_random(seed: int) -> random.Random:
    """Return a source of random numbers: the same seed gives the same approval times."""
    return random.Random(seed)  # noqa: S311 - simulated users, not keys


def _normal_cdf(value: float) -> float:
    return math.erfc(-value / math.sqrt(2)) / 2
