"""A timer queue for a hundred thousand entries: heapq, with entries that can be removed.

Removing an item leaves a stale entry in the heap. A call sweeps out a few stale entries, and drops some hundred at the
front. Fifty thousand in one call would block the event loop for tens of milliseconds. While stale entries are left at
the front, `TimerQueue.next_due` may return the time of one of them. That is early, never late.
"""

from __future__ import annotations

import math
from heapq import heappop, heappush
from typing import Final, Generic, TypeVar

import msgspec

#: Entries that each call moves while there are many stale ones.
_SWEEP: Final = 4
#: Stale entries that are not worth a sweep.
_SLACK: Final = 64
#: Stale entries at the front that one call drops.
_DROPPED: Final = 256


class Scheduled:
    """An item of a queue. Of two that are due at the same time, the one with the earlier origin comes first."""

    __slots__ = ()

    origin: float
    entry: Entry | None
    """Its one entry in a queue, if it has one."""

    def __lt__(self, other: Scheduled) -> bool:
        return self.origin < other.origin


class Entry(msgspec.Struct, order=True):
    """An entry of a heap. It compares like a tuple, as fast, and is smaller than one."""

    when: float
    item: Scheduled


class _Removed(Scheduled):
    """Takes the place of an item that was removed.

    Otherwise the item, and all that it references, would stay until its entry is swept out.
    """

    __slots__ = ()
    origin = -math.inf


_REMOVED: Final = _Removed()

T = TypeVar("T", bound=Scheduled)


class TimerQueue(Generic[T]):
    """A queue ordered by time, then by the items' origin. An item has at most one entry."""

    def __init__(self) -> None:
        self._heap: list[Entry] = []
        self._old: list[Entry] = []  # the heap before a sweep: a prefix of a heap is a heap
        self._live = 0

    def __len__(self) -> int:
        return self._live

    def schedule(self, item: T, when: float) -> None:
        """Add an item, or move its entry."""
        if item.entry is None:
            self._live += 1
        elif item.entry.when == when:
            return
        else:
            item.entry.item = _REMOVED
        item.entry = Entry(when, item)
        heappush(self._heap, item.entry)
        self._sweep()

    def remove(self, item: T) -> None:
        """Remove an item's entry, if it has one."""
        if item.entry is not None:
            item.entry.item = _REMOVED
            item.entry = None
            self._live -= 1
            self._sweep()

    def next_due(self) -> float:
        """Return the time of the earliest entry; infinity if there is none.

        If very many stale entries precede it, the time is that of one of these. `pop_due` drops them.
        """
        return self._front()[0].when if self._live else math.inf

    def pop_due(self, now: float) -> T | None:
        """Remove and return the earliest item that is due at `now`; None if there is none.

        It also returns None if very many stale entries preceded it and some are left. `next_due` is then not after
        `now`.
        """
        if not self._live:
            return None
        heap = self._front()
        entry = heap[0]
        if entry.when > now or entry.item is _REMOVED:
            return None
        heappop(heap)
        item: T = entry.item  # type: ignore[assignment]  # it is live
        item.entry = None
        self._live -= 1
        self._sweep()
        return item

    def _front(self) -> list[Entry]:
        """Return the heap whose top is the earliest entry of both. It is live unless there are more to drop."""
        heap, old = self._heap, self._old
        if not old and heap and heap[0].item is not _REMOVED:  # nearly always
            return heap
        if heap and not _is_live(heap[0]):
            _drop_stale(heap)
        if old and not _is_live(old[0]):
            _drop_stale(old)
        return old if old and (not heap or old[0] < heap[0]) else heap

    def _sweep(self) -> None:
        if not self._old:
            if len(self._heap) <= 2 * self._live + _SLACK:
                return
            self._old, self._heap = self._heap, []
        for _ in range(min(_SWEEP, len(self._old))):
            entry = self._old.pop()
            if _is_live(entry):
                heappush(self._heap, entry)


def _is_live(entry: Entry) -> bool:
    return entry.item is not _REMOVED


def _drop_stale(heap: list[Entry]) -> None:
    """Drop the stale entries at the front of a heap, as many as one call may."""
    for _ in range(_DROPPED):
        if not heap or _is_live(heap[0]):
            return
        heappop(heap)
