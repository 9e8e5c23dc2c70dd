"""What an answer may show in an error message: printable, short, and the API key struck out in every form of it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from aiokeyless.models import Secret

MAX_DETAIL: Final = 200  # characters

_WIDEST: Final = 10  # characters in the longest spelling of one: &#x00002F;
_ENTITIES: Final = (("amp", "&"), ("lt", "<"), ("gt", ">"), ("quot", '"'), ("apos", "'"))


class Redaction:
    """Strikes one key out of texts.

    Args:
        api_key: The key.
    """

    __slots__ = ("_echo", "_reach")  # the key is in the pattern: error reporters print attributes by their repr

    def __init__(self, api_key: Secret) -> None:
        # As the key is, and as JSON, a URL and HTML write it, with blanks folded as `printable` folds them.
        characters = " ".join(api_key.reveal().split())
        self._echo = re.compile("".join(_spellings(character) for character in characters))
        # All that 200 characters can come from: a character stands for one of the text or, in "***", for one echo.
        self._reach = MAX_DETAIL * _WIDEST * (len(characters) + 1)

    def printable(self, text: str) -> str | None:
        """Return at most 200 printable characters of a text, or None where nothing is left of it."""
        # Struck out before the cut, so that no half of a key stays.
        text = self._echo.sub("***", " ".join(text.split())[: self._reach])
        text = "".join(c if c.isprintable() else " " for c in text[:MAX_DETAIL])
        return text.strip() or None


def _spellings(character: str) -> str:
    """Match one character of the key: letters and digits as they are, whatever else escaped too."""
    if character.isalnum():
        return character
    code = ord(character)
    code_hex = "".join(f"[{digit}{digit.upper()}]" for digit in f"{code:02x}")
    forms = [  # the longer first, so that nothing of one is left over
        f"%{code_hex}",
        rf"\\u00{code_hex}",
        rf"\\{re.escape(character)}",
        f"&#0{{0,4}}{code};",
        f"&#[xX]0{{0,4}}{code_hex};",
        *(f"&{name};" for name, meant in _ENTITIES if meant == character),
        re.escape(character),
    ]
    if character == " ":
        return f"(?:{'|'.join(forms)}|[+])+"  # a run of blanks was folded into one in the key, and may not be here
    return f"(?:{'|'.join(forms)})"
