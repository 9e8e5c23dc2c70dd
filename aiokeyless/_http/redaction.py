"""Redaction: what an error may show of an answer. It is printable, short, and without the API key in any encoding."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from aiokeyless.models import Secret

MAX_DETAIL: Final = 200  # characters

_SHORTEST: Final = 8  # characters: a shorter key is a placeholder, such as "test", that ids contain by chance
_WIDEST: Final = 10  # characters in the longest spelling of one: &#x00002F;
_ENTITIES: Final = (("amp", "&"), ("lt", "<"), ("gt", ">"), ("quot", '"'), ("apos", "'"))


class Redaction:
    """Redacts one API key in texts.

    Args:
        api_key: The key.
    """

    # The key is in the pattern: error reporters print attributes by their repr.
    __slots__ = ("_echo", "_echo_in_bytes", "_is_placeholder", "_reach")

    def __init__(self, api_key: Secret) -> None:
        # The key in plain form and as JSON, a URL and HTML write it, with runs of blanks folded as in `printable`.
        characters = " ".join(api_key.reveal().split())
        self._is_placeholder = len(characters) < _SHORTEST
        self._echo = re.compile("".join(_spellings(character) for character in characters))
        self._echo_in_bytes = re.compile(self._echo.pattern.encode())
        # The longest input that 200 characters can result from: each is a character of the text, or, in "***", of an
        # echo of the key.
        self._reach = MAX_DETAIL * _WIDEST * (len(characters) + 1)

    def is_echoed_in(self, answer: object, body: bytes) -> bool:
        """Return whether a text of an answer repeats the key; a `Secret` is no text.

        A wait compares the texts of an answer, so they cannot be redacted, and applications log them.

        Args:
            answer: The answer, decoded.
            body: The JSON that it was decoded from.
        """
        # Without a backslash, each text is in the JSON as it is: one search is enough for nearly all answers.
        if self._is_placeholder or (b"\\" not in body and self._echo_in_bytes.search(body) is None):
            return False
        return self._is_in(answer)

    def _is_in(self, answer: object) -> bool:
        if isinstance(answer, list):
            return any(map(self._is_in, answer))
        if isinstance(answer, msgspec.Struct):
            return any(map(self._is_in, msgspec.structs.astuple(answer)))
        return isinstance(answer, str) and self._echo.search(answer) is not None

    def printable(self, text: str) -> str | None:
        """Return at most 200 printable characters of a text, or None if nothing is left."""
        # Redacted before the cut, so that no part of a key remains.
        text = self._echo.sub("***", " ".join(text.split())[: self._reach])
        text = text[:MAX_DETAIL]
        if not text.isprintable():  # nearly all are, and each poll that a listener is told of may have an id
            text = "".join(c if c.isprintable() else " " for c in text)
        return text.strip() or None


def _spellings(character: str) -> str:
    """Return a pattern for one character of the key: letters and digits as they are, others escaped too."""
    if character.isalnum():
        return character
    code = ord(character)
    code_hex = "".join(f"[{digit}{digit.upper()}]" for digit in f"{code:02x}")
    forms = [  # longer forms first, so that no part of one remains
        f"%{code_hex}",
        rf"\\u00{code_hex}",
        rf"\\{re.escape(character)}",
        f"&#0{{0,4}}{code};",
        f"&#[xX]0{{0,4}}{code_hex};",
        *(f"&{name};" for name, meant in _ENTITIES if meant == character),
        re.escape(character),
    ]
    if character == " ":
        return f"(?:{'|'.join(forms)}|[+])+"  # runs of blanks are folded in the key, but maybe not in the text
    return f"(?:{'|'.join(forms)})"
