"""`RequestRecord`: one request in the sandbox's journal, for tests and for the phone's page."""

from __future__ import annotations

from typing import Final

import msgspec

# Enough for every ASCII id that the client accepts, percent-encoded.
_MOST_CHARACTERS: Final = 2000


class RequestRecord(msgspec.Struct, frozen=True):
    """One request in `Sandbox.requests`.

    Attributes:
        method: HTTP method.
        path: Request target as received: percent-encoded, with the query, and cut after 2000 characters.
        status: Status of the answer. None until there is one, and permanently if there is none: the connection was
            dropped, the client disconnected, or the sandbox closed.
        at: When the request arrived, by the loop's clock, in seconds.
        duration: Seconds until the request was answered or ended without an answer; 0.0 until then.
    """

    method: str
    path: str
    status: int | None
    at: float
    duration: float = 0.0


def shorten(text: str) -> str:
    """Return a text, cut after 2000 characters; a note of how many are missing is added."""
    more = len(text) - _MOST_CHARACTERS
    return text if more <= 0 else f"{text[:_MOST_CHARACTERS]}… ({more} more characters)"
