"""Deleting: repeated on transient failures, and a 404 that follows an ambiguous one is a success."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiokeyless._rules.ambiguity import may_have_taken_effect
from aiokeyless.errors import KeylessError, NotFoundError, TransportError

if TYPE_CHECKING:
    from . import protocol
    from .transport import Transport


class Deletion:
    """One DELETE and its repetitions.

    Args:
        transport: Sends the requests.
        request: The DELETE.
    """

    def __init__(self, transport: Transport, request: protocol.Request[None]) -> None:
        self._transport = transport
        self._request = request
        self._may_be_done = False  # whether an earlier attempt may have taken effect

    async def run(self) -> None:
        """Delete it, in at most as many attempts as the transport makes.

        Raises:
            NotFoundError: There is nothing to delete, and no earlier attempt can have deleted it.
            KeylessError: Deleting failed; it may have taken effect.
        """
        with self._transport.call():
            await self._transport.retry(self._attempt)

    async def _attempt(self, number: int) -> None:
        try:
            await self._transport.send(self._request, attempt=number)
        except NotFoundError:
            if not self._may_be_done:
                raise
        except KeylessError as error:
            self._may_be_done = self._may_be_done or may_have_taken_effect(error)
            if isinstance(error, TransportError):
                error.sent = self._may_be_done
            raise
