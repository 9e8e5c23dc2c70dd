"""What this process holds in memory, now and at the most since a moment of one's choice.

`getrusage` will not do for the latter: its peak is of the process's whole life, and a new process inherits that of the
one that made it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import psutil  # type: ignore[import-untyped]  # it comes without types

from .report import CannotMeasureError

_OURSELVES: Final = Path("/proc/self")


def resident() -> int:
    """Return the bytes that are resident."""
    held: int = psutil.Process().memory_info().rss
    return held


def forget_peak() -> None:
    """Have the system count the peak anew from here on.

    Raises:
        CannotMeasureError: It cannot: this is no Linux, or none that lets us.
    """
    try:
        (_OURSELVES / "clear_refs").write_text("5")
    except OSError:
        raise CannotMeasureError("this system does not count the peak of a part of a process's life") from None


def peak() -> int:
    """Return the most bytes that were resident since `forget_peak`."""
    for line in (_OURSELVES / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise CannotMeasureError("this system does not tell the peak of a process")
