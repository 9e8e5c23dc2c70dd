"""Creating an operation exactly once: after an ambiguous failure, check whether the operation exists.

The service documents no idempotency key, but an operation id is unique and chosen by the client, so it serves as one.
It is not a lock: what is found under an id may be the operation of an earlier request, and approved for that.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from aiokeyless._rules.ambiguity import may_have_taken_effect
from aiokeyless._rules.approval import is_same_user
from aiokeyless._rules.backoff import is_transient
from aiokeyless.errors import (
    AlreadyApprovedError,
    ConflictError,
    DecodeError,
    KeylessError,
    NotFoundError,
    TransportError,
)
from aiokeyless.models import OperationState

from . import protocol

if TYPE_CHECKING:
    from aiokeyless.models import NewOperation, Operation

    from .transport import Transport

#: Seconds between GETs of an operation that exists (409) but that a lagging replica does not have yet (404): 5 in all.
_LAG: Final = (0.1, 0.2, 0.4, 0.8, 1.5, 2.0)


class Creation:
    """The creation of one operation.

    The client GETs the operation after an ambiguous failure, and after a 409 that follows one (with `resumes`, after
    any 409). What the GET finds decides:

    | found | an id that the caller chose | an id that this call generated |
    |---|---|---|
    | nothing | sent again | sent again |
    | other content | `ConflictError` | `ConflictError` |
    | the same content, pending | reconciled | reconciled |
    | the same content, approved | `AlreadyApprovedError` | reconciled |
    | (409 after an ambiguous failure) | GET, then as above | reconciled, without a GET |

    Args:
        transport: Sends the requests.
        user_id: The user, checked.
        operation: The operation to create.
        id_is_new: Whether the id was generated for this call, so that an operation with that id is this call's.
        resumes: Whether the client GETs the operation after a 409 on the first attempt too.
    """

    def __init__(
        self, transport: Transport, user_id: str, operation: NewOperation, *, id_is_new: bool, resumes: bool
    ) -> None:
        self._transport = transport
        self._user_id = user_id
        self._operation = operation
        self._id_is_new = id_is_new
        self._resumes = resumes
        self._post = protocol.create_operation(user_id, operation)
        self._get = protocol.get_operation(operation.operation_id)
        self._ambiguous: KeylessError | None = None  # the last failure of an attempt that may have taken effect
        self._given_up = False

    async def run(self) -> bool:
        """Create the operation, in at most as many attempts as the transport makes.

        Returns:
            Whether it is reconciled: found under its id with this content, and not confirmed by our own POST.

        Raises:
            AlreadyApprovedError: The id names an operation of this content that is approved.
            ConflictError: The id is taken by another operation.
            KeylessError: Creating failed, and the operation does not exist or could not be checked.
        """
        try:
            return await self._transport.retry(self._attempt, self._may_repeat)
        except KeylessError as error:
            if isinstance(error, TransportError):
                error.sent = error.sent or self._ambiguous is not None  # an earlier attempt may have taken effect
            error.__traceback__ = None  # the frames of attempts have variables for it
            raise
        finally:
            self._ambiguous = None

    async def _attempt(self, number: int) -> bool:
        try:
            answer = await self._transport.send(self._post, attempt=number)
            if not answer.success:  # documented as always true, so its meaning is unknown
                raise DecodeError(
                    f"POST {self._post.path} answered without success",
                    status=200,
                    method="POST",
                    path=self._post.path,
                )
        except KeylessError as error:
            failure = error.with_traceback(None)
        else:
            return False
        conflicts = isinstance(failure, ConflictError)
        if may_have_taken_effect(failure):
            self._ambiguous = failure
        elif not conflicts or (self._ambiguous is None and not self._resumes):
            raise failure
        if conflicts and self._ambiguous is not None and self._id_is_new:
            return True
        found = await self._find(failure)
        if found is None:
            raise failure
        self._check(found)
        return True

    async def _find(self, failure: KeylessError) -> Operation | None:
        """Return the operation, or None if it does not exist.

        If that cannot be checked, raise the ambiguous failure, which is then final.
        """
        # After a 409 it exists, so a 404 comes from a lagging replica. Otherwise it is sent again, which is faster.
        pauses = iter(_LAG if isinstance(failure, ConflictError) else ())
        while True:
            try:
                return await self._transport.fetch(self._get)
            except NotFoundError:
                pause = next(pauses, None)
                if pause is None:
                    return None
            except KeylessError as error:
                self._given_up = True
                if self._ambiguous is None:  # the id is taken: this call had no effect
                    raise
                raise self._ambiguous from error.with_traceback(None)
            await asyncio.sleep(pause)

    def _check(self, found: Operation) -> None:
        """Raise unless the operation that was found has the content that this call was to create."""
        self._given_up = True
        if found.operation_id != self._operation.operation_id:  # an answer about another operation proves nothing
            raise self._ambiguous or ConflictError(status=409, method="POST", path=self._post.path)
        if not self._is_ours(found):
            raise ConflictError(status=409, method="POST", path=self._post.path)
        if found.state == OperationState.APPROVED and not self._id_is_new:
            raise AlreadyApprovedError(status=409, method="POST", path=self._post.path)

    def _is_ours(self, found: Operation) -> bool:
        # An absent text and an empty one are the same.
        return (
            is_same_user(found.user_id, self._user_id)
            and (found.operation_payload or "") == (self._operation.operation_payload or "")
            and (found.external_user_id or "") == (self._operation.external_user_id or "")
        )

    def _may_repeat(self, error: KeylessError) -> bool:
        # After an ambiguous failure or a conflict, a GET found no operation: otherwise `_given_up` is set.
        return not self._given_up and (
            is_transient(error)
            or may_have_taken_effect(error)
            or (isinstance(error, ConflictError) and (self._ambiguous is not None or self._resumes))
        )
