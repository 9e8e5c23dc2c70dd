"""Which operation or request goes first while polls fail, so that bad ones do not hold up good ones. Pure.

This order is used for probes, and also while failing requests hold over a quarter of the slots.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")


class Standing(IntEnum):
    """What is known of an operation. The lower one goes first, among those with equally many failures."""

    ANSWERED = 0
    """A poll was answered well."""
    CREATED = 1
    """It was created or tried, and no poll was answered well. A create that succeeds says nothing about the polls."""
    UNTRIED = 2
    """It was never tried."""


class Rank(NamedTuple):
    """The place in the order; the lowest goes first.

    Attributes:
        failures: Transient failures in a row.
        standing: What is known of it.
        since: When it was due. Of those that no poll answered well, the negative of it: the newest goes first, so many
            bad ones that came at once hold up no later one.
    """

    failures: int
    standing: Standing
    since: float


class Alternation:
    """Every second probe takes one that was never tried first. Otherwise newcomers would wait for all others."""

    __slots__ = ("_lead",)

    def __init__(self) -> None:
        self._lead = 0  # of untried ones, from -1 to 1

    def count_untried(self, probes: int) -> int:
        """Return how many of so many probes take one that was never tried first."""
        return (probes + 1 - self._lead) // 2

    def record(self, *, untried: int, others: int) -> None:
        """Record what was taken."""
        self._lead = max(-1, min(1, self._lead + untried - others))


def choose(candidates: Iterable[T], rank: Callable[[T], Rank], up_to: int, untried: int) -> list[T]:
    """Return the candidates that go first.

    Args:
        candidates: What may go.
        rank: Tells the rank of each.
        up_to: How many may go.
        untried: How many of them are to be ones that were never tried, if there are so many.
    """
    ordered = sorted(candidates, key=rank)
    first = [each for each in ordered if rank(each).standing is Standing.UNTRIED][:untried]
    return [*first, *(each for each in ordered if each not in first)][:up_to]
