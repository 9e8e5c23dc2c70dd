"""The sandbox's bounded journal of requests, for tests and for the phone's page."""

from __future__ import annotations

from typing import Final

import msgspec

# Enough for every ASCII id that the client accepts, percent-encoded.
_MOST_CHARACTERS: Final = 2000
_MOST_METHOD: Final = 40


class RequestRecord(msgspec.Struct, frozen=True):
    """One request in `Sandbox.requests`.

    Attributes:
        method: HTTP method, cut after 40 characters.
        path: Request target as received: percent-encoded, with the query, and cut after 2000 characters.
        status: Status of the answer. None until there is one. It stays None if the connection was dropped, the client
            disconnected, or the sandbox closed.
        at: When the request arrived, by the loop's clock, in seconds.
        duration: Seconds until the request was answered or ended without an answer; 0.0 until then.
    """

    method: str
    path: str
    status: int | None
    at: float
    duration: float = 0.0


class Journal:
    """The latest requests; their number and the length of their paths are bounded.

    Args:
        most_text: Most characters of all paths together.

    Attributes:
        requests: The records, oldest first; the owner may clear this list.
    """

    def __init__(self, most_text: int = 4_000_000) -> None:
        self.requests: list[RequestRecord] = []
        self._most_text = most_text
        # At least the number of the paths' characters: the owner may have cleared `requests`.
        self._text = 0

    def add(self, method: str, path: str, at: float, most_records: int) -> RequestRecord:
        """Add a request, remove the oldest ones beyond the bounds, and return its record."""
        record = RequestRecord(shorten(method, _MOST_METHOD), shorten(path), None, at)
        self.requests.append(record)
        del self.requests[:-most_records]
        self._text += len(record.path)
        if self._text > self._most_text:
            self._halve()
        return record

    def _halve(self) -> None:
        """Keep the latest records, up to half of the permitted text, so that this is rarely needed."""
        space = self._most_text // 2
        kept = 0
        for record in reversed(self.requests):
            space -= len(record.path)
            if space < 0:
                break
            kept += 1
        kept = max(kept, 1)
        del self.requests[:-kept]
        self._text = sum(len(record.path) for record in self.requests)


def shorten(text: str, most: int = _MOST_CHARACTERS) -> str:
    """Return a text. If it is longer than `most` characters, cut it and add the number that was cut."""
    more = len(text) - most
    return text if more <= 0 else f"{text[:most]}… ({more} more characters)"
