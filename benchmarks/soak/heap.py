"""What the C library's allocator has handed out, and what it keeps besides: the holes between what is in use.

The resident memory alone cannot tell a leak from holes. Objects up to 512 bytes are in memory of Python's own
(`sys.getallocatedblocks`), all others here.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

_FIELDS: Final = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "top")
#: From this size on glibc takes memory from the system for each allocation, and gives it back; unset, it learns a
#: higher one from what is freed.
THRESHOLD: Final = "MALLOC_MMAP_THRESHOLD_"


class Heap(NamedTuple):
    """Bytes of the heap."""

    in_use: int
    free: int


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in _FIELDS)


def read() -> Heap | None:
    """Return the sizes; None where the C library is not glibc."""
    mallinfo2 = _mallinfo2()
    if mallinfo2 is None:
        return None
    found = mallinfo2()
    return Heap(found.uordblks, found.fordblks)


@functools.cache
def _mallinfo2() -> Callable[[], _Mallinfo2] | None:
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):  # another library; on Windows None is no library
        return None
    mallinfo2.restype = _Mallinfo2
    return mallinfo2


def threshold() -> str | None:
    """Return the threshold that is set in the environment."""
    return os.environ.get(THRESHOLD)
