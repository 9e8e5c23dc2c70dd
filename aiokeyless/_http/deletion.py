"""The deletes: transient failures are retried, and a 404 after an ambiguous failure is a success."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiokeyless._rules.ambiguity import may_have_taken_effect
from aiokeyless.errors import KeylessError, NotFoundError, TransportError

if TYPE_CHECKING:
    from . import protocol
    from .transport import Transport


class Deletion:
    """One DELETE and its retries.

    Args:
        transport: Sends the requests.
        request: The DELETE.
    """

    def __init__(self, transport: Transport, request: protocol.Request[None]) -> None:
        self._transport = transport
        self._request = request
        # Whether an earlier attempt may have taken effect.
        self._may_be_done = False

    async def run(self) -> None:
        """Send the DELETE, in at most `max_attempts` attempts.

        Raises:
            NotFoundError: There is nothing to delete, and no earlier attempt can have deleted it.
            KeylessError: The delete failed, but may have taken effect.
        """
        with self._transport.call():
            await self._transport.retry(self._attempt)

    async def _attempt(self, number: int) -> None:
        try:
            await self._transport.send(self._request, attempt=number)
            if number == 1:
                self._transport.quota.give_back()
        except NotFoundError:
            if not self._may_be_done:
                raise
        except KeylessError as error:
            self._may_be_done = self._may_be_done or may_have_taken_effect(error)
            if isinstance(error, TransportError):
                error.sent = self._may_be_done
            raise
