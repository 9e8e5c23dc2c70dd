"""From when a search for what is due starts, so that it does not pass all that was due before. It imports no driver.

While a transaction elsewhere is long, the server cannot remove what is handled from its indexes.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_COMMITS_WITHIN: Final = 1.0  # seconds within which most rows are committed
_SEARCHES_ALL_EVERY: Final = 1.0  # seconds between two searches without a floor, which find late commits
_SEARCHES_ALL_WITHIN: Final = 10.0  # seconds, if such a search is slow
_SHARE: Final = 20  # until then, they take at most a twentieth of the time


class Search:
    """One search. Times are seconds since 1970, by the server's clock."""

    def __init__(self, floor: float | None) -> None:
        self.floor = floor  # from when it starts; None for a search of everything
        self.oldest: float | None = None  # when the oldest row that it left was due; None if that is not known


class Floor:
    """The place at which the next search starts."""

    def __init__(self) -> None:
        self._floor = 0.0
        self._searches_all_at = 0.0

    @contextmanager
    def search(self) -> Iterator[Search]:
        """Search, and set `Search.oldest` in the body."""
        began = time.monotonic()
        search = Search(self._floor if began < self._searches_all_at else None)
        if search.floor is None:
            self._searches_all_at = began + _SEARCHES_ALL_EVERY
        yield search
        if search.floor is None:
            pause = min(_SHARE * (time.monotonic() - began), _SEARCHES_ALL_WITHIN)
            self._searches_all_at = max(self._searches_all_at, began + pause)
        if search.oldest is not None:
            self._floor = search.oldest - _COMMITS_WITHIN
