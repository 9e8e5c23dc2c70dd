"""When a user approves: log-normal times, never, long after everybody stopped waiting, or at the worst moment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import random


@dataclass(frozen=True)
class Person:
    """The user of one operation.

    Attributes:
        approves_after: Seconds from the creation of the operation; infinite: never.
    """

    approves_after: float


#: A user who never approves.
NOBODY: Final = Person(math.inf)


def someone(rng: random.Random, deadline: float) -> Person:
    """Return a user.

    Args:
        rng: The random numbers.
        deadline: Seconds after which the application stops waiting: some approve just before, some just after it.
    """
    kind = rng.random()
    if kind < 0.15:
        return NOBODY
    if kind < 0.25:
        return Person(rng.uniform(60.0, 900.0))
    if kind < 0.4:
        return Person(max(0.0, deadline + rng.uniform(-0.6, 2.2)))
    return Person(rng.lognormvariate(math.log(rng.choice((8.0, 25.0))), rng.choice((0.8, 1.2))))
