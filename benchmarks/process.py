"""This process: its resident memory, its heap, its event loop."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final, NamedTuple

import psutil  # type: ignore[import-untyped]  # it has no type hints

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

_FIELDS: Final = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "top")
#: From this size on glibc takes memory from the system for each allocation, and gives it back; unset, it learns a
#: higher one from what is freed.
THRESHOLD: Final = "MALLOC_MMAP_THRESHOLD_"


class Heap(NamedTuple):
    """What the C library's allocator has handed out, and what it keeps besides: the holes between what is in use.

    The resident memory alone cannot tell a leak from holes. Objects up to 512 bytes are in memory of Python's own
    (`sys.getallocatedblocks`), all others here.
    """

    in_use: int
    free: int


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in _FIELDS)


_mallinfo2: Final = ctypes.CDLL(None).mallinfo2
_mallinfo2.restype = _Mallinfo2


def read_heap() -> Heap:
    """Return the sizes."""
    found = _mallinfo2()
    return Heap(found.uordblks, found.fordblks)


def resident() -> int:
    """Return the resident memory, in bytes."""
    held: int = psutil.Process().memory_info().rss
    return held


def loop_factory(*, uvloop: bool) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes the loop; None for asyncio's own."""
    if not uvloop:
        return None
    from uvloop import new_event_loop  # noqa: PLC0415  # the memory of processes without it is measured, too

    return new_event_loop
