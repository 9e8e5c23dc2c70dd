"""Which operation or request goes first while polls fail, so that bad ones do not hold up good ones. Pure.

The order is used while the budget is short, while polls start slowly after silence, and while failing operations hold
over a quarter of the slots. The client's is in `_waits/dispatch.py`. A worker's broker takes those with the
fewest transient failures in a row first, and of equals those with the lowest `Standing`. Of those that no poll answered
well it takes the newest first: many bad ones that came at once hold up no later one.
"""

from __future__ import annotations

from enum import IntEnum


class Standing(IntEnum):
    """What is known of an operation."""

    ANSWERED = 0
    """A poll was answered well."""
    CREATED = 1
    """It was created or tried, and no poll was answered well. A create that succeeds says nothing about the polls."""
    UNTRIED = 2
    """It was never tried."""


class Alternation:
    """Every second poll takes one that was never tried first. Otherwise newcomers would wait for all others."""

    def __init__(self) -> None:
        self._lead = 0  # of untried ones, from -1 to 1

    def count_untried(self, polls: int) -> int:
        """Return how many of so many polls take one that was never tried first."""
        return (polls + 1 - self._lead) // 2

    def record(self, *, untried: int, others: int) -> None:
        """Record what was taken."""
        self._lead = max(-1, min(1, self._lead + untried - others))
