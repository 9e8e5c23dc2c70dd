"""`Redaction`: makes text of an answer printable, short, and free of API keys in any encoding, for errors.

Text of an exception that others' code raised is not used at all: see `find_place`.
"""

from __future__ import annotations

import functools
import re
import traceback
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokeyless.models import Secret

#: Characters of a redacted text, at most.
MAX_DETAIL: Final = 200

#: Characters. A shorter key is a placeholder, such as "test", that ids contain by chance.
_SHORTEST_KEY: Final = 8
#: Characters of the longest spelling of one character: &#x00002F;
_LONGEST_SPELLING: Final = 10
#: A run of characters that are never encoded.
_PLAIN: Final = re.compile(r"[^\W_]+")
_ENTITIES: Final = (("amp", "&"), ("lt", "<"), ("gt", ">"), ("quot", '"'), ("apos", "'"))


class Redaction:
    """Redacts API keys, at least one, in texts."""

    # No attribute shows a key: error reporters print attributes by their repr, and that of a pattern shows the pattern.
    __slots__ = ("_is_hinted_at", "_patterns")

    def __init__(self, *api_keys: Secret) -> None:
        # Compiled on first use. It takes milliseconds, and a function may return a new key for each exchange.
        self._patterns = functools.cache(lambda: _Patterns(api_keys))
        hints = tuple(max(_PLAIN.findall(key), key=len, default="").encode() for key in _searched(api_keys))
        self._is_hinted_at: Callable[[bytes], bool] = lambda body: any(map(body.__contains__, hints))

    def is_echoed_in(self, answer: object, body: bytes) -> bool:
        """Return whether a text of an answer repeats a key; a `Secret` does not count.

        These texts cannot be redacted, since a wait compares them, and applications log them. `body` is its JSON.
        """
        # Without a backslash, the JSON contains each text unchanged. In no form of a key are its letters and digits
        # encoded, so one look is enough for nearly all answers.
        if b"\\" not in body and not self._is_hinted_at(body):
            return False
        return _is_in(answer, self._patterns().repeated)

    def redact(self, text: str) -> str | None:
        """Return at most 200 printable characters of a text, without the keys; None if nothing is left."""
        # Redacted before the cut, so that no part of a key remains.
        patterns = self._patterns()
        text = patterns.echo.sub("***", " ".join(text.split())[: patterns.reach])
        text = text[:MAX_DETAIL]
        # Nearly all texts are printable; with listeners, this runs for each poll.
        if not text.isprintable():
            text = "".join(c if c.isprintable() else " " for c in text)
        return text.strip() or None


class _Patterns:
    """The compiled patterns of keys."""

    __slots__ = ("echo", "reach", "repeated")

    def __init__(self, api_keys: tuple[Secret, ...]) -> None:
        keys = _folded(api_keys)
        self.echo = _compile_patterns(keys)
        self.repeated = _compile_patterns(_searched(api_keys))
        # The longest input that can become MAX_DETAIL characters. Each of these is a character of the text, or part of
        # the "***" for an echo of a key.
        self.reach = MAX_DETAIL * _LONGEST_SPELLING * (len(keys[0]) + 1)


def _folded(api_keys: tuple[Secret, ...]) -> list[str]:
    """Return the keys with runs of blanks folded, as in `redact`; longer ones first, as others may begin like them."""
    return sorted({" ".join(key.reveal().split()) for key in api_keys}, key=len, reverse=True)


def _searched(api_keys: tuple[Secret, ...]) -> list[str]:
    """Return the keys for which answers are searched: a placeholder is in texts by chance."""
    return [key for key in _folded(api_keys) if len(key) >= _SHORTEST_KEY]


def _is_in(answer: object, pattern: re.Pattern[str]) -> bool:
    if isinstance(answer, list | tuple):
        return any(_is_in(item, pattern) for item in answer)
    if isinstance(answer, msgspec.Struct):
        return any(_is_in(field, pattern) for field in msgspec.structs.astuple(answer))
    return isinstance(answer, str) and pattern.search(answer) is not None


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


def find_place(failure: BaseException) -> str:
    """Return the file and the line at which others' code raised an exception, whose text may be secret.

    The innermost frame may be in a module that Python froze, as `os.environ` is: it has no file.
    """
    frames = ((frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(failure.__traceback__))
    *_, (file, line) = sorted(frames, key=lambda place: not place[0].startswith("<frozen "))  # these come first
    return f"{file}:{line}"
