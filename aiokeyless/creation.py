"""A create that neither duplicates nor lies: after a lost answer it looks whether the operation is there.

The service documents no idempotency key, but an operation id is unique and ours, and so it is one: what is found
under it is either what was to be created, or somebody else's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from . import protocol
from .errors import ConflictError, DecodeError, KeylessError, NotFoundError, ServerError, StatusError, TransportError

if TYPE_CHECKING:
    from .models import NewOperation, Operation
    from .transport import Transport

_REQUEST_TIMEOUT: Final = 408


class Creation:
    """The creation of one operation.

    Args:
        transport: What sends the requests.
        user_id: The user, checked.
        operation: What to create.
    """

    def __init__(self, transport: Transport, user_id: str, operation: NewOperation) -> None:
        self._transport = transport
        self._user_id = user_id
        self._operation = operation
        self._post = protocol.create_operation(user_id, operation)
        self._doubt: KeylessError | None = None  # the failure of an attempt that may have taken effect
        self._given_up = False

    async def run(self) -> None:
        """Create it, in as many attempts as the transport makes.

        Raises:
            ConflictError: The id is taken by another operation.
            KeylessError: It failed, and is not there or nobody knows.
        """
        await self._transport.retry(self._attempt, self._may_repeat)

    async def _attempt(self) -> None:
        try:
            answer = await self._transport.send(self._post)
            if not answer.success:  # documented as always true, so this is an answer that says nothing
                raise DecodeError(
                    f"POST {self._post.path} answered 200 but no success",
                    status=200,
                    method="POST",
                    path=self._post.path,
                )
        except KeylessError as error:
            if _is_ambiguous(error):
                self._doubt = error
            elif self._doubt is None or not isinstance(error, ConflictError):
                raise
            if not await self._is_there(self._doubt):
                raise

    def _may_repeat(self, error: KeylessError) -> bool:
        # A success that does not decode is no transient failure, nor is a conflict with what may be our own. But the
        # operation was seen to be missing, or it would have been final.
        return not self._given_up and (
            protocol.is_transient(error)
            or type(error) is DecodeError
            or (isinstance(error, ConflictError) and self._doubt is not None)
        )

    async def _is_there(self, doubt: KeylessError) -> bool:
        """Whether our operation exists; where that cannot be told, the failure that raised the doubt is final."""
        request = protocol.get_operation(self._operation.operation_id)
        try:
            found = await self._transport.fetch(request)
        except NotFoundError:
            return False
        except KeylessError as failure:
            self._given_up = True
            raise doubt from failure
        if found.operation_id != self._operation.operation_id:  # a mixed-up answer tells nothing about ours
            self._given_up = True
            raise doubt
        if self._is_ours(found):
            return True
        self._given_up = True
        raise ConflictError(status=409, method="POST", path=self._post.path)

    def _is_ours(self, found: Operation) -> bool:
        # An absent text and an empty one are the same.
        return (
            found.user_id.upper() == self._user_id
            and (found.operation_payload or "") == (self._operation.operation_payload or "")
            and (found.external_user_id or "") == (self._operation.external_user_id or "")
        )


def _is_ambiguous(error: KeylessError) -> bool:
    """Whether the request may have taken effect although it failed."""
    if isinstance(error, TransportError):
        return error.sent
    return isinstance(error, DecodeError | ServerError) or (
        isinstance(error, StatusError) and error.status == _REQUEST_TIMEOUT
    )
