"""The event loop that a measured process runs on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .report import CannotMeasureError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable


def loop_factory(*, uvloop: bool) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes the loop; None for asyncio's own.

    Raises:
        CannotMeasureError: uvloop is not installed.
    """
    if not uvloop:
        return None
    try:
        from uvloop import new_event_loop  # noqa: PLC0415  # not on Windows
    except ImportError:
        raise CannotMeasureError("uvloop is not installed") from None
    return new_event_loop
