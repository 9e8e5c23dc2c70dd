"""The deletes: transient failures are retried, and a 404 after an ambiguous failure is a success."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiokeyless._rules.ambiguity import may_have_taken_effect
from aiokeyless.errors import KeylessError, NotFoundError, TransportError

if TYPE_CHECKING:
    from . import protocol
    from .transport import Transport


async def delete(transport: Transport, request: protocol.Request[None]) -> None:
    """Send a DELETE, in at most `max_attempts` attempts."""
    may_be_done = False  # by an earlier attempt

    async def attempt(number: int) -> None:
        nonlocal may_be_done
        try:
            await transport.send(request, attempt=number)
            if number == 1:
                transport.quota.give_back()
        except NotFoundError:
            if not may_be_done:
                raise
        except KeylessError as error:
            may_be_done = may_be_done or may_have_taken_effect(error)
            if isinstance(error, TransportError):
                error.sent = may_be_done
            raise

    with transport.call():
        await transport.retry(attempt)
