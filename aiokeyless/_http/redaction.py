"""`Redaction`: makes text of an answer printable, short, and free of API keys in any encoding, for errors."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from aiokeyless.models import Secret

#: Characters of a redacted text, at most.
MAX_DETAIL: Final = 200

#: Characters. A shorter key is a placeholder, such as "test", that ids contain by chance.
_SHORTEST_KEY: Final = 8
#: Characters of the longest spelling of one character: &#x00002F;
_LONGEST_SPELLING: Final = 10
_ENTITIES: Final = (("amp", "&"), ("lt", "<"), ("gt", ">"), ("quot", '"'), ("apos", "'"))


class Redaction:
    """Redacts API keys in texts.

    Args:
        api_keys: The keys, at least one.
    """

    # No attribute is a key itself, since error reporters print attributes by their repr.
    __slots__ = ("_echo", "_echo_in_bytes", "_reach", "_repeated")

    def __init__(self, *api_keys: Secret) -> None:
        # With runs of blanks folded as in `redact`. Longer keys first: another one may begin like them.
        keys = sorted({" ".join(key.reveal().split()) for key in api_keys}, key=len, reverse=True)
        self._echo = _compile_patterns(keys)
        # Those for which answers are searched: a placeholder is in texts by chance.
        self._repeated = _compile_patterns([key for key in keys if len(key) >= _SHORTEST_KEY])
        self._echo_in_bytes = re.compile(self._repeated.pattern.encode())
        # The longest input that can become MAX_DETAIL characters. Each of these is a character of the text, or part of
        # the "***" for an echo of a key.
        self._reach = MAX_DETAIL * _LONGEST_SPELLING * (len(keys[0]) + 1)

    def is_echoed_in(self, answer: object, body: bytes) -> bool:
        """Return whether a text of an answer repeats a key; a `Secret` does not count.

        These texts cannot be redacted, since a wait compares them, and applications log them.

        Args:
            answer: The decoded answer.
            body: Its JSON.
        """
        # Without a backslash, the JSON contains each text unchanged, so one search is enough for nearly all answers.
        if b"\\" not in body and self._echo_in_bytes.search(body) is None:
            return False
        return self._is_in(answer)

    def _is_in(self, answer: object) -> bool:
        if isinstance(answer, list):
            return any(map(self._is_in, answer))
        if isinstance(answer, msgspec.Struct):
            return any(map(self._is_in, msgspec.structs.astuple(answer)))
        return isinstance(answer, str) and self._repeated.search(answer) is not None

    def redact(self, text: str) -> str | None:
        """Return at most 200 printable characters of a text, without the keys; None if nothing is left."""
        # Redacted before the cut, so that no part of a key remains.
        text = self._echo.sub("***", " ".join(text.split())[: self._reach])
        text = text[:MAX_DETAIL]
        # Nearly all texts are printable; with listeners, this runs for each poll.
        if not text.isprintable():
            text = "".join(c if c.isprintable() else " " for c in text)
        return text.strip() or None


def _compile_patterns(keys: list[str]) -> re.Pattern[str]:
    """Compile a pattern for keys in plain form, and as JSON, a URL and HTML encode them; for none, it never matches."""
    return re.compile("|".join("".join(map(_build_pattern, key)) for key in keys) or "(?!)")


def _build_pattern(character: str) -> str:
    """Return a pattern for one character of the key: plain for a letter or a digit, else with all its escapes."""
    if character.isalnum():
        return character
    code = ord(character)
    code_hex = "".join(f"[{digit}{digit.upper()}]" for digit in f"{code:02x}")
    # Longer forms first, so that no part of one remains.
    forms = [
        f"%{code_hex}",
        rf"\\u00{code_hex}",
        rf"\\{re.escape(character)}",
        f"&#0{{0,4}}{code};",
        f"&#[xX]0{{0,4}}{code_hex};",
        *(f"&{name};" for name, meant in _ENTITIES if meant == character),
        re.escape(character),
    ]
    if character == " ":
        # Runs of blanks are folded in the key, but perhaps not in the text.
        return f"(?:{'|'.join(forms)}|[+])+"
    return f"(?:{'|'.join(forms)})"
