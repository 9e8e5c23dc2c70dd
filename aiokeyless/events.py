"""What listeners are told: an event for each exchange with the service.

An event is a frozen struct. It never holds a key, a payload or a user.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from .models import Model

__all__ = ["Event", "Listener", "RequestEnded"]


class RequestEnded(Model, frozen=True, kw_only=True):
    """One HTTP exchange with the service has ended, for a single call or for a poll.

    Attributes:
        method: HTTP method.
        route: The path as the API documents it, such as ``/v2/operations/{operationId}``: it names no operation.
        server: Host of the service.
        port: Its port.
        status: Status of the answer; None if there was none.
        error: Name of the exception's type if the exchange failed, such as ``"TransportError"`` or
            ``"NotFoundError"``; ``"CancelledError"`` if it was cut off because its answer was no longer needed; else
            None.
        seconds: Seconds that it took.
        attempt: 1 for the first attempt of a single call, then 2, ...; always 1 for a poll.
        request_id: The service's id of the exchange, for its support; None if the answer has none.
    """

    method: str
    route: str
    server: str
    port: int
    status: int | None
    error: str | None
    seconds: float
    attempt: int
    request_id: str | None


Event: TypeAlias = RequestEnded
"""The events that a listener is told of. Kinds may be added, so ignore those that you do not know."""

Listener: TypeAlias = Callable[[Event], object]
"""A plain function that takes an event."""
