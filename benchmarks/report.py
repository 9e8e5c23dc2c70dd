"""Results: tables to read, raw numbers to keep, goals to judge."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class CannotMeasureError(Exception):
    """The measured number would not mean what it claims to; the text says why."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of repeated measurements, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Summarize; a single value has no spread."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def text(self, digits: int) -> str:
        """Write ``median [quartile, quartile]``."""
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def quantile(values: list[float], share: float) -> float:
    """Return the value that this share of the values, 0 to 1, does not exceed; 0 if there are none."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)] if values else 0.0


def p95(values: list[float]) -> float:
    """Return the value that one in twenty exceeds."""
    return statistics.quantiles(values, n=20, method="inclusive")[-1]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text with column titles."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)

    @classmethod
    def of(cls, title: str, formats: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> Table:
        """Write the figures of each row by these formats, one for each column."""
        return cls(title, [*formats], [[format(row[name], spec) for name, spec in formats.items()] for row in rows])

    @classmethod
    def of_pairs(cls, title: str, figures: Mapping[str, object], column: str = "") -> Table:
        """Write one figure a row, beside its name."""
        return cls(title, ["", column], [[name, f"{figure}"] for name, figure in figures.items()])

    def text(self) -> str:
        """Write it with aligned columns: names left, figures right."""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        lines = [self.title]
        for row in [self.columns, ["-" * width for width in widths], *self.rows]:
            first, *rest = (
                cell.rjust(width) if k else cell.ljust(width)
                for k, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            lines.append("  ".join([first, *rest]).rstrip())
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Goal:
    """An upper limit for a figure. The figure is None if it could not be measured; a required goal fails the run."""

    what: str
    at_most: float
    figure: float | None
    unit: str = ""
    required: bool = False

    @property
    def reached(self) -> bool:
        """Whether the figure was measured and does not exceed the limit."""
        return self.figure is not None and self.figure <= self.at_most

    def text(self) -> str:
        """Write it as one line, with its verdict."""
        limit = f"{self.what}: at most {self.at_most:g}{self.unit}"
        if self.figure is None:
            return f"[  ?   ] {limit}; not measured"
        verdict = "reached" if self.reached else "MISSED"
        return f"[{verdict:^7}] {limit}; is {self.figure:.4g}{self.unit}"


@dataclass(slots=True)
class Report:
    """The results of one benchmark."""

    title: str
    tables: list[Table] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether nothing was measured, or a required goal was missed."""
        return not self.tables or any(goal.required and not goal.reached for goal in self.goals)

    def text(self) -> str:
        """Write the whole report, for a terminal."""
        parts = [f"== {self.title}", *(table.text() for table in self.tables)]
        lines = [goal.text() for goal in self.goals] + [f"note: {note}" for note in self.notes]
        return "\n\n".join(parts + (["\n".join(lines)] if lines else []))
