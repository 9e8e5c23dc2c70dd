"""How parameters are named that are odd texts."""

from __future__ import annotations

from string import punctuation
from urllib.parse import quote

_PLAIN = " " + punctuation.replace("\\", "").replace("%", "")


def plain(value: object) -> str:
    """Return the beginning of a value's repr, in printable ASCII without backslashes.

    pytest escapes all else once more each time that a process collects the tests, so mutmut, which collects twice,
    would not find them by their names.
    """
    return quote(repr(value)[:40], safe=_PLAIN)
