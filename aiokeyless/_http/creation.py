"""Creating exactly once: after an ambiguous failure, check whether the request created something.

The service documents no idempotency key. An operation id is unique and chosen by the client, and a user has one
external user id, so what was created can be found. Neither is a lock: what is found may come from an earlier request.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from aiokeyless._rules.ambiguity import may_have_taken_effect
from aiokeyless._rules.approval import is_same_user
from aiokeyless.errors import (
    AlreadyApprovedError,
    ConflictError,
    DecodeError,
    KeylessError,
    NotFoundError,
    TransportError,
)
from aiokeyless.models import ExternalUser, Operation, OperationState, SuccessAnswer, User

from . import protocol

if TYPE_CHECKING:
    from aiokeyless.models import NewOperation

    from .transport import Transport

Sent = TypeVar("Sent")
Found = TypeVar("Found")
Made = TypeVar("Made")

#: Seconds between GETs of what exists (409) but a lagging replica does not have yet: 5 in all.
_LAG: Final = (0.1, 0.2, 0.4, 0.8, 1.5, 2.0)


class Creation(ABC, Generic[Sent, Found, Made]):
    """A POST that is never blindly repeated.

    After an ambiguous failure, and after a 409 that follows one, the client checks what is there. It sends the POST
    again only if there is nothing.

    Args:
        transport: Sends the requests.
        post: The POST.
        resumes: Whether the client also checks after a 409 on the first attempt.
    """

    def __init__(self, transport: Transport, post: protocol.Request[Sent], *, resumes: bool = False) -> None:
        self._transport = transport
        self._post = post
        self._resumes = resumes
        self._ambiguous: KeylessError | None = None  # the last failure of an attempt that may have taken effect
        self._given_up = False

    @abstractmethod
    def _confirm(self, answer: Sent) -> Made:
        """Return the result of a POST that was answered with a success; raise `DecodeError` if it proves nothing."""

    @abstractmethod
    async def _search(self) -> Found | None:
        """Return what is there, or None if there is nothing."""

    @abstractmethod
    def _accept(self, found: Found) -> Made:
        """Return the result for what was found; raise if this call was to create something else."""

    async def run(self) -> Made:
        """Create it, in at most as many attempts as the transport makes.

        Raises:
            ConflictError: The service has something else in its place.
            KeylessError: Creating failed, and it does not exist or could not be checked.
        """
        try:
            with self._transport.call():
                return await self._transport.retry(self._attempt, self._may_repeat)
        except KeylessError as error:
            if isinstance(error, TransportError):
                error.sent = error.sent or self._ambiguous is not None  # an earlier attempt may have taken effect
            error.__traceback__ = None  # the frames of attempts have variables for it
            raise
        finally:
            self._ambiguous = None

    async def _attempt(self, number: int) -> Made:
        try:
            return self._confirm(await self._transport.send(self._post, attempt=number))
        except KeylessError as error:
            failure = error.with_traceback(None)
        conflicts = isinstance(failure, ConflictError)
        if may_have_taken_effect(failure):
            self._ambiguous = failure
        elif not conflicts or (self._ambiguous is None and not self._resumes):
            raise failure
        made = await self._resolve(conflicts=conflicts)
        if made is None:
            raise failure
        return made

    async def _resolve(self, *, conflicts: bool) -> Made | None:
        """Return the result for what is there; None if there is nothing.

        If that cannot be checked, raise the ambiguous failure, which is then final.
        """
        # After a 409 it exists, so an empty answer comes from a lagging replica. Otherwise the POST is sent again,
        # which is faster.
        pauses = iter(_LAG if conflicts else ())
        while True:
            try:
                found = await self._search()
            except KeylessError as error:
                self._given_up = True
                if self._ambiguous is None:  # it is there already: this call had no effect
                    raise
                raise self._ambiguous from error.with_traceback(None)
            if found is not None:
                break
            pause = next(pauses, None)
            if pause is None:
                return None
            await asyncio.sleep(pause)
        try:
            return self._accept(found)
        except KeylessError:
            self._given_up = True
            raise

    def _may_repeat(self, error: KeylessError) -> bool:
        # After an ambiguous failure or a conflict, a search found nothing: otherwise `_given_up` is set.
        return not self._given_up and (
            error.is_transient
            or may_have_taken_effect(error)
            or (isinstance(error, ConflictError) and (self._ambiguous is not None or self._resumes))
        )


class OperationCreation(Creation[SuccessAnswer, Operation, bool]):
    """The creation of one operation; its result is whether the operation is reconciled.

    A reconciled operation was found under its id with this content, and not confirmed by our own POST:

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
        super().__init__(transport, protocol.create_operation(user_id, operation), resumes=resumes)
        self._user_id = user_id
        self._operation = operation
        self._id_is_new = id_is_new
        self._get = protocol.get_operation(operation.operation_id)

    def _confirm(self, answer: SuccessAnswer) -> bool:
        if not answer.success:  # documented as always true, so its meaning is unknown
            raise _no_proof(self._post, "without success")
        return False

    async def _resolve(self, *, conflicts: bool) -> bool | None:
        if conflicts and self._ambiguous is not None and self._id_is_new:
            return True
        return await super()._resolve(conflicts=conflicts)

    async def _search(self) -> Operation | None:
        try:
            return await self._transport.fetch(self._get)
        except NotFoundError:
            return None

    def _accept(self, found: Operation) -> bool:
        if found.operation_id != self._operation.operation_id:  # an answer about another operation proves nothing
            raise self._ambiguous or ConflictError(status=409, method="POST", path=self._post.path)
        if not self._is_ours(found):
            raise ConflictError(status=409, method="POST", path=self._post.path)
        if found.state == OperationState.APPROVED and not self._id_is_new:
            raise AlreadyApprovedError(status=409, method="POST", path=self._post.path)
        return True

    def _is_ours(self, found: Operation) -> bool:
        # An absent text and an empty one are the same.
        return (
            is_same_user(found.user_id, self._user_id)
            and (found.operation_payload or "") == (self._operation.operation_payload or "")
            and (found.external_user_id or "") == (self._operation.external_user_id or "")
        )


class ExternalUserCreation(Creation[ExternalUser, User, ExternalUser]):
    """The creation of one external user; its result is the external user.

    A user that is found among those of the external user id is this call's, or an earlier request's that did the same.

    Args:
        transport: Sends the requests.
        user_id: The user, checked.
        external_user_id: The external user id, checked.
    """

    def __init__(self, transport: Transport, user_id: str, external_user_id: str) -> None:
        super().__init__(transport, protocol.create_external_user(user_id, external_user_id))
        self._user_id = user_id
        self._external_user_id = external_user_id
        self._get = protocol.find_users(external_user_id)

    def _confirm(self, answer: ExternalUser) -> ExternalUser:
        return confirm_external_user(answer, self._post, self._user_id, self._external_user_id)

    async def _search(self) -> User | None:
        users = await self._transport.fetch(self._get)
        return next((user for user in users if is_same_user(user.user_id, self._user_id)), None)

    def _accept(self, found: User) -> ExternalUser:
        return ExternalUser(
            user_id=found.user_id,
            external_user_id=self._external_user_id,
            created_at=found.created_at,
            updated_at=found.updated_at,
        )


def confirm_external_user(
    answer: ExternalUser, request: protocol.Request[ExternalUser], user_id: str, external_user_id: str
) -> ExternalUser:
    """Return the answer if it is about this user and this external user id.

    Raises:
        DecodeError: It is about another one.
    """
    if is_same_user(answer.user_id, user_id) and answer.external_user_id == external_user_id:
        return answer
    raise _no_proof(request, "about another user or another external user id")


def _no_proof(request: protocol.Request[Sent], what: str) -> DecodeError:
    method, path = request.endpoint.method, request.path
    return DecodeError(f"{method} {path} answered {what}", status=200, method=method, path=path)
