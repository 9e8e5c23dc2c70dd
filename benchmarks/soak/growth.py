"""How values grew in a long run, after its warm-up."""

from __future__ import annotations

import statistics
import sys
import time
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from benchmarks import pictures
from benchmarks.process import Heap, read_heap
from benchmarks.report import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

#: Of the time. Until then caches and pools fill, and the allocator keeps memory of the first bursts of connections.
WARM_UP: Final = 1 / 3

Points = list[tuple[float, float]]  # seconds since the start, and the value


class Sample(NamedTuple):
    """What a process holds, as only the process itself can see it, at one instant."""

    at: float
    blocks: int  # of memory that Python's objects take: unlike the resident memory, without what is free between them
    heap: Heap  # of the C library, for what is larger

    @classmethod
    def take(cls) -> Self:
        """Take one of this process."""
        return cls(time.monotonic(), sys.getallocatedblocks(), read_heap())


def held(name: str, samples: Sequence[Sample], start: float) -> dict[str, Points]:
    """Return what a process of this name held."""
    return {
        f"objects of the {name}, blocks": [(sample.at - start, sample.blocks) for sample in samples],
        f"heap of the {name}, in use, MB": [(sample.at - start, sample.heap.in_use / 1e6) for sample in samples],
        f"heap of the {name}, free, MB": [(sample.at - start, sample.heap.free / 1e6) for sample in samples],
    }


def warm(points: Points, seconds: float) -> Points:
    """Return the points after the warm-up of a run of so many seconds."""
    return [(at, value) for at, value in points if at >= WARM_UP * seconds] or points[-1:]


def an_hour(points: Points) -> float:
    """Return how fast a value grew in an hour, by a straight line."""
    if len(points) < 2:
        return 0.0
    return statistics.linear_regression([at / 3600 for at, _ in points], [value for _, value in points]).slope


def percent_an_hour(points: Points) -> float:
    """Return the same, of the value at the start."""
    return 100 * an_hour(points) / points[0][1]


def table(series: Mapping[str, Points]) -> Table:
    """Write where each value began, where it ended, and how fast it grew."""
    rows = [
        [name, f"{points[0][1]:.2f}", f"{points[-1][1]:.2f}", f"{an_hour(points):.2f}"]
        for name, points in series.items()
        if points
    ]
    return Table("what it takes", ["", "after the warm-up", "at the end", "growth an hour"], rows)


def draw(panel: Axes, series: Mapping[str, Points], seconds: float) -> None:
    """Draw values over time."""
    for (name, points), color in zip(series.items(), (pictures.OURS, *pictures.OTHERS[1:]), strict=False):
        panel.plot([at / 60 for at, _ in points], [value for _, value in points], color=color, label=name)
    panel.axvline(WARM_UP * seconds / 60, color=pictures.OTHERS[0], linestyle="--", label="end of the warm-up")
    panel.set_ylim(bottom=0)
    panel.set_xlabel("minutes")
