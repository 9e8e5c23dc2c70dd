"""The record of a request in the sandbox's journal, for tests and for the phone's page."""

from __future__ import annotations

import msgspec


class RequestRecord(msgspec.Struct, frozen=True):
    """One request in `Sandbox.requests`.

    Attributes:
        method: HTTP method.
        path: Request target as received: percent-encoded, with the query.
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
