"""Whom a wait waits for: people, who take their time to approve, and some of whom never do.

Their times are a known distribution, so that what a schedule costs can be computed, and drawn, so that one can learn.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class People:
    """How long people take: a mixture of log-normal groups (share, median in seconds, sigma); some never approve."""

    groups: tuple[tuple[float, float, float], ...]
    never: float = 0.2

    def __str__(self) -> str:
        if len(self.groups) == 1:
            ((_, median, sigma),) = self.groups
            return f"log-normal ({median:g} s, {sigma:g})"
        return " + ".join(f"{share:.0%} ({median:g} s, {sigma:g})" for share, median, sigma in self.groups)

    def approved_by(self, moment: float) -> float:
        """Return the share that approves up to ``moment``."""
        return self._sum(lambda share, median, sigma: share * _normal_cdf(math.log(moment / median) / sigma))

    def mean_time_by(self, moment: float) -> float:
        """Return the integral of time over those who approve up to ``moment``."""
        return self._sum(
            lambda share, median, sigma: (
                share * median * math.exp(sigma**2 / 2) * _normal_cdf(math.log(moment / median) / sigma - sigma)
            )
        )

    def _sum(self, term: Callable[[float, float, float], float]) -> float:
        return (1.0 - self.never) * sum(term(*group) for group in self.groups)

    def draw(self, source: random.Random) -> float:
        """Return when one of them approves: seconds, or infinity."""
        if source.random() < self.never:
            return math.inf
        ((_, median, sigma),) = source.choices(self.groups, [share for share, _, _ in self.groups])
        return source.lognormvariate(math.log(median), sigma)


TYPICAL: Final = People(((1.0, 8.0, 0.8),))
SLOW: Final = People(((1.0, 25.0, 1.2),))
TWO_GROUPS: Final = People(((0.6, 4.0, 0.5), (0.4, 40.0, 0.6)))


def seeded(seed: int) -> random.Random:
    """Return a source to draw people from: the same people for the same seed."""
    return random.Random(seed)  # noqa: S311 - people are simulated, not keys


def _normal_cdf(value: float) -> float:
    return math.erfc(-value / math.sqrt(2)) / 2
