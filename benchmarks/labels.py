"""Labels beside the dots of a diagram, placed so that they do not overlap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

Point = tuple[float, float]

_SIZE: Final = 8.0  # of the font, points
_GAP: Final = 4.0  # between a dot and its label, and around each dot, points
#: Positions of a label relative to its dot, in order of preference: right, above, below, left; then further away.
_SIDES: Final = ((1, 0), (1, 1), (1, -1), (0, 1), (0, -1), (-1, 0), (-1, 1), (-1, -1))
_DISTANCES: Final = (1.0, 2.5, 4.0)


class _Box(NamedTuple):
    left: float
    bottom: float
    right: float
    top: float

    def shared(self, other: _Box) -> float:
        """Return the area of the intersection."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)


def label(axes: Axes, labels: Mapping[str, Point], others: Sequence[Point], color: str) -> None:
    """Write each label beside its dot, where it overlaps other labels and dots least.

    Args:
        axes: The diagram, its limits set.
        labels: The dot of each label, in data coordinates.
        others: Dots without labels.
        color: The text color.
    """
    figure = axes.figure.get_figure(root=True)
    figure.draw_without_rendering()  # the layout decides where a dot is drawn
    points = 72.0 / figure.dpi
    at = {name: tuple(points * c for c in axes.transData.transform(dot)) for name, dot in labels.items()}
    taken = [_around(*at[name]) for name in labels]
    taken += [_around(*(points * c for c in axes.transData.transform(dot))) for dot in others]
    frame = axes.get_window_extent()
    inside = _Box(*(points * edge for edge in frame.extents))
    for name, dot in labels.items():
        box = min(_places(name, *at[name]), key=lambda box: _overlap(box, taken, inside))
        taken.append(box)
        offset = (box.left - at[name][0], box.bottom - at[name][1])
        axes.annotate(name, dot, offset, textcoords="offset points", fontsize=_SIZE, color=color, va="baseline")


def _around(x: float, y: float) -> _Box:
    return _Box(x - _GAP / 2, y - _GAP / 2, x + _GAP / 2, y + _GAP / 2)


def _places(text: str, x: float, y: float) -> list[_Box]:
    # The font of the reader is unknown, so this is an estimate: a letter is a little over half as wide as high.
    width, height = 0.56 * _SIZE * len(text), _SIZE
    boxes = []
    for distance in _DISTANCES:
        for aside, above in _SIDES:
            left = x + aside * _GAP * distance - (1 - aside) * width / 2
            bottom = y + above * (height / 2 + _GAP * distance / 2) - height / 2
            boxes.append(_Box(left, bottom, left + width, bottom + height))
    return boxes


def _overlap(box: _Box, taken: Sequence[_Box], inside: _Box) -> float:
    """Return the area of a label that would be hard to read; the position with the smallest area is chosen."""
    outside = (box.right - box.left) * (box.top - box.bottom) - box.shared(inside)
    return round(10 * outside + sum(box.shared(other) for other in taken), 3)
