"""One line of the sandbox's journal: what tests read in `Sandbox.requests`, and people on the phone's page."""

from __future__ import annotations

from typing import Final

import msgspec

# Room for every id in ASCII that the client takes, percent-encoded.
_MOST_CHARACTERS: Final = 2000


class RequestRecord(msgspec.Struct, frozen=True):
    """One request in `Sandbox.requests`.

    Attributes:
        method: HTTP method.
        path: Request target as it came: percent-encoded, query included; one of more than 2000 characters is cut.
        status: Status of the answer; None while there is none, and for good where none came: the connection was
            dropped, the client left, or the sandbox closed.
        at: When the request arrived, by the loop's clock, in seconds.
        duration: Seconds from there until it was answered, or until it was over without an answer; 0.0 until then.
    """

    method: str
    path: str
    status: int | None
    at: float
    duration: float = 0.0


def shorten(text: str) -> str:
    """Cut a text that is too long to keep, or to show; the result says that it was cut."""
    more = len(text) - _MOST_CHARACTERS
    return text if more <= 0 else f"{text[:_MOST_CHARACTERS]}… ({more} more characters)"
