"""Pictures of results, in one style: drawn from the raw numbers of a report, written as SVG.

matplotlib is imported when something is drawn: measuring processes import this module too, and should stay small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: The color of this library, and those of the other sides in order.
OURS: Final = "#0b6e4f"
OTHERS: Final = ("#8d99ae", "#e07a5f", "#3d5a80", "#f2cc8f", "#6d597a", "#b56576", "#457b9d", "#adb5bd")

_STYLE: Final[dict[str, object]] = {
    "svg.hashsalt": "aiokeyless",  # the same numbers give the same file
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def panels(count: int, *, width: float = 4.6, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """Make a picture of several diagrams side by side, each of this size in inches."""
    from matplotlib import rcParams  # noqa: PLC0415  # see above
    from matplotlib.figure import Figure  # noqa: PLC0415

    rcParams.update(_STYLE)  # type: ignore[arg-type]  # its type is a literal of all names
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, [figure.add_subplot(1, count, k + 1) for k in range(count)]


def save(figure: Figure, path: Path) -> None:
    """Write a picture with a white background, readable on any page."""
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})
