"""The resident memory of this process: now, and its peak since `forget_peak`.

`getrusage` cannot measure that peak: it reports the maximum of the whole process, and a child inherits it from its
parent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import psutil  # type: ignore[import-untyped]  # it has no type hints

from .report import CannotMeasureError

_SELF: Final = Path("/proc/self")


def resident() -> int:
    """Return the resident memory, in bytes."""
    held: int = psutil.Process().memory_info().rss
    return held


def forget_peak() -> None:
    """Reset the peak.

    Raises:
        CannotMeasureError: The system is not Linux, or does not permit it.
    """
    try:
        (_SELF / "clear_refs").write_text("5")
    except OSError:
        raise CannotMeasureError("this system cannot reset the peak memory of a process") from None


def peak() -> int:
    """Return the maximum resident memory since `forget_peak`, in bytes."""
    for line in (_SELF / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise CannotMeasureError("this system does not report the peak memory of a process")
