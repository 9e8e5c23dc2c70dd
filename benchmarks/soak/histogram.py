"""Quantiles of any number of durations in bounded memory: what measures for hours must not grow itself."""

from __future__ import annotations

from collections import Counter


class Histogram:
    """Durations, each kept as a count of its value to two significant digits.

    Args:
        counts: What `counts` of another histogram returned.
    """

    def __init__(self, counts: dict[str, int] | None = None) -> None:
        self._counts = Counter({float(value): count for value, count in (counts or {}).items()})

    def add(self, seconds: float) -> None:
        """Count a duration; a negative one counts as none."""
        self._counts[float(f"{max(seconds, 0.0):.2g}")] += 1

    def update(self, other: Histogram) -> None:
        """Add all durations of another histogram."""
        self._counts.update(other._counts)

    @property
    def counts(self) -> dict[str, int]:
        """The counts by value, for JSON."""
        return {f"{value:g}": count for value, count in sorted(self._counts.items())}

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
