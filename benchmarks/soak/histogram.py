"""Quantiles of any number of durations in bounded memory: what measures for hours must not grow itself."""

from __future__ import annotations

from collections import Counter


class Histogram:
    """Durations, each kept as a count of its value to two significant digits."""

    def __init__(self) -> None:
        self._counts: Counter[float] = Counter()

    def add(self, seconds: float) -> None:
        """Count a duration; a negative one counts as none."""
        self._counts[float(f"{max(seconds, 0.0):.2g}")] += 1

    @property
    def total(self) -> int:
        """How many durations were added."""
        return self._counts.total()

    def quantile(self, share: float) -> float:
        """Return the value that this share of the durations, 0 to 1, does not exceed; 0 if there are none."""
        rest = share * self.total
        value = 0.0
        for value, count in sorted(self._counts.items()):  # noqa: B007  # the last value is what is returned
            rest -= count
            if rest <= 0:
                break
        return value
