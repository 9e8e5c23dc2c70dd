"""The creates: after an ambiguous failure they check whether the request took effect, and never blindly repeat it.

The service documents no idempotency key. But the client chooses the operation id, which is unique, and a user has one
external user id. So a search finds what was created. It may also find the effect of an earlier request.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from aiokeyless._rules.ambiguity import may_have_taken_effect
from aiokeyless._rules.approval import is_same_user
from aiokeyless.errors import (
    AlreadyApprovedError,
    ConfigurationError,
    ConflictError,
    ConflictStatusError,
    DecodeError,
    KeylessError,
    NotFoundError,
    StatusError,
    TransportError,
)
from aiokeyless.models import ExternalUser, Operation, OperationState, SuccessAnswer

from . import protocol

if TYPE_CHECKING:
    from aiokeyless.models import NewOperation

    from .transport import Transport

T = TypeVar("T")
AnswerT = TypeVar("AnswerT")
ResultT = TypeVar("ResultT")

#: Seconds between searches after a 409, while a lagging replica does not have the object yet: 5 in all.
_LAG: Final = (0.1, 0.2, 0.4, 0.8, 1.5, 2.0)
_OTHER_CONTENT: Final = (
    "the operation id is that of an operation of another user, or with another payload or external user id: its "
    "approval is not for this request; use a new id"
)


class Creation(ABC, Generic[AnswerT, ResultT]):
    """A POST that is repeated only if it had no effect.

    After an ambiguous failure, and after a 409 that follows one, the client searches for the object. It sends the POST
    again only if there is none. If it resumes, it also searches after a 409 on the first attempt.

    A creation that lasts some seconds goes on after a search that failed transiently. Each POST in doubt then follows a
    search that found nothing.
    """

    def __init__(self, transport: Transport, post: protocol.Request[AnswerT], *, resumes: bool = False) -> None:
        self._transport = transport
        self._post = post
        self._resumes = resumes
        self._lasts = 0.0
        self._attempts = 0
        # What to do after a 409 that only this call can have caused; None if another one may have the id.
        self._advice: str | None = None
        # The last failure of an attempt that may have taken effect.
        self._ambiguous: KeylessError | None = None
        # The same, if it is such a 409. There is no further POST then.
        self._taken: KeylessError | None = None
        # Whether a search has found nothing since the last POST.
        self._is_missing = False
        self._is_final = False

    @abstractmethod
    def _read(self, answer: AnswerT) -> ResultT:
        """Return the result for an answer to the POST. Raise a `DecodeError` if that proves nothing."""

    @abstractmethod
    async def _search(self) -> ResultT | None:
        """Return the result for the object that exists; None if there is none.

        Raise if it is not what this call was to create, or is approved already.
        """

    async def run(self, *, lasts: float = 0.0) -> ResultT:
        """Create the object, in at most `max_attempts` attempts, or more in this time: see `Transport.retry`."""
        self._lasts = lasts
        try:
            with self._transport.call():
                return await self._transport.retry(self._attempt, self._may_repeat, lasts=lasts)
        except KeylessError as error:
            if isinstance(error, TransportError):
                # An earlier attempt may have taken effect.
                error.sent = error.sent or self._ambiguous is not None
            # The frames of attempts reference the error.
            error.__traceback__ = None
            raise
        finally:
            self._ambiguous = self._taken = None

    async def _attempt(self, number: int) -> ResultT:
        self._attempts = number
        if self._lasts and self._ambiguous is not None and not self._is_missing:
            # The token of this attempt pays for the search.
            if (found := await self._look_up(conflicts=self._taken is not None)) is not None:
                return found
            self._take_token(self._ambiguous, "it was not repeated")
        self._is_missing = False
        try:
            result = self._read(await self._transport.send(self._post, attempt=number))
        except KeylessError as error:
            failure = error.with_traceback(None)
        else:
            if number == 1:
                self._transport.quota.give_back()
            return result
        self._remember(failure)
        if (found := await self._resolve(conflicts=failure is not self._ambiguous)) is None:
            raise failure
        return found

    def _remember(self, failure: KeylessError) -> None:
        """Remember what the failure of an attempt leaves unclear. Raise it if that is nothing."""
        if may_have_taken_effect(failure):
            self._ambiguous = failure
        elif isinstance(failure, ConfigurationError) and self._ambiguous is not None:
            # Without a key nothing was sent, which says nothing about the earlier attempt.
            raise self._ambiguous from failure
        elif not isinstance(failure, ConflictStatusError):
            raise failure
        elif self._ambiguous is None and self._advice is not None:
            self._ambiguous = self._taken = StatusError(
                status=failure.status,
                method=failure.method,
                path=failure.path,
                request_id=failure.request_id,
                advice=self._advice,
            )
        elif self._ambiguous is None and not self._resumes:
            raise failure

    def _take_token(self, failure: KeylessError, omitted: str) -> None:
        if not self._transport.take_tokens(failure, omitted):
            self._is_final = True
            raise failure

    async def _resolve(self, *, conflicts: bool) -> ResultT | None:
        """Search after an attempt, as `_look_up` does. Without a token, the ambiguous failure is final."""
        if self._ambiguous is not None:
            self._take_token(self._ambiguous, "whether it took effect was not checked")
        return await self._look_up(conflicts=conflicts)

    async def _look_up(self, *, conflicts: bool) -> ResultT | None:
        """Return the result for the object that exists; None if there is none, so that the POST may be sent again."""
        # After a 409 the object exists, so an empty answer comes from a lagging replica. Otherwise it is faster to send
        # the POST again than to wait.
        self._is_final = True  # if a search raises
        found = await self._search()
        for pause in _LAG if conflicts else ():
            if found is not None:
                break
            await asyncio.sleep(pause)
            found = await self._search()
        if found is None and self._taken is not None:
            raise self._taken
        self._is_final, self._is_missing = False, True
        return found

    async def _fetch(self, request: protocol.Request[T], *, may_be_missing: bool = False) -> T | None:
        """Send a GET as `Transport.fetch` does, but give no token back: it is part of a call that has failed.

        If it fails after an ambiguous failure, raise that one, with the GET's as its cause.
        """
        try:
            if self._lasts:  # the next attempt repeats it
                return await self._transport.send(request, attempt=self._attempts)
            return await self._transport.retry(lambda number: self._transport.send(request, attempt=number))
        except KeylessError as error:
            if may_be_missing and isinstance(error, NotFoundError):
                return None
            self._is_final = not (self._lasts and error.is_transient)
            # The object existed before this call, which had no effect.
            if self._ambiguous is None:
                raise
            raise self._ambiguous from error.with_traceback(None)

    def _may_repeat(self, error: KeylessError) -> bool:
        # After an ambiguous failure or a conflict, the search found nothing, or may be repeated.
        return not self._is_final and (
            error.is_transient
            or error is self._ambiguous
            or (isinstance(error, ConflictError) and (self._ambiguous is not None or self._resumes))
        )


class OperationCreation(Creation[SuccessAnswer, bool]):
    """The creation of one operation. The result is whether the operation is reconciled.

    A reconciled operation was not confirmed by this call's POST, but found under its id with this content:

    | found | an id that the caller chose | an id that this call generated |
    |---|---|---|
    | nothing | sent again | sent again |
    | other content | `ConflictError` | `ConflictError` |
    | the same content, pending | reconciled | reconciled |
    | the same content, approved | `AlreadyApprovedError` | reconciled |
    | (409 after an ambiguous failure) | GET, then as above | reconciled, without a GET |
    | (409 on the first attempt) | `ConflictError`, unless it resumes | GET, then as above; nothing: `StatusError` |
    """

    def __init__(
        self, transport: Transport, user_id: str, operation: NewOperation, *, id_is_new: bool, resumes: bool
    ) -> None:
        super().__init__(transport, protocol.create_operation(user_id, operation), resumes=resumes)
        self._user_id = user_id
        self._operation = operation
        self._id_is_new = id_is_new
        if id_is_new:
            self._advice = (
                "the create may have taken effect, as if a proxy sent it twice; repeat it with "
                f'operation_id={operation.operation_id!r} and if_exists="resume"'
            )
        self._get = protocol.get_operation(operation.operation_id)

    def _read(self, answer: SuccessAnswer) -> bool:
        # The documentation knows no false, so its meaning is unknown.
        if not answer.success:
            raise _make_error(self._post, "without success")
        return False

    async def _resolve(self, *, conflicts: bool) -> bool | None:
        if conflicts and self._id_is_new and self._taken is None:
            return True
        return await super()._resolve(conflicts=conflicts)

    async def find(self) -> bool:
        """Return whether the operation is there and pending, without a create: the phone starts it."""
        try:
            found = await self._transport.fetch(self._get)
        except NotFoundError:
            return False
        self._check(found, self._get)
        return True

    async def _search(self) -> bool | None:
        found = await self._fetch(self._get, may_be_missing=True)
        if found is None:
            return None
        # An answer about another operation proves nothing.
        if found.operation_id != self._operation.operation_id and self._ambiguous is not None:
            raise self._ambiguous
        self._check(found, self._post)
        return True

    def _check(self, found: Operation, request: protocol.Request[Any]) -> None:
        refuse = partial(ConflictStatusError, status=409, method=request.endpoint.method, path=request.path)
        if found.operation_id != self._operation.operation_id:
            raise refuse()
        if not self._is_ours(found):
            raise refuse(advice=_OTHER_CONTENT)
        if found.state == OperationState.APPROVED and not self._id_is_new:
            raise AlreadyApprovedError(status=409, method=request.endpoint.method, path=request.path)

    def _is_ours(self, found: Operation) -> bool:
        # An absent text and an empty one are the same.
        return (
            is_same_user(found.user_id, self._user_id)
            and (found.operation_payload or "") == (self._operation.operation_payload or "")
            and (found.external_user_id or "") == (self._operation.external_user_id or "")
        )


class ExternalUserCreation(Creation[ExternalUser, ExternalUser]):
    """The creation of one external user, which is the result.

    If the search finds the user under the external user id, this call or an equal earlier one has linked them.
    """

    def __init__(self, transport: Transport, user_id: str, external_user_id: str) -> None:
        super().__init__(transport, protocol.create_external_user(user_id, external_user_id))
        self._user_id = user_id
        self._external_user_id = external_user_id
        self._get = protocol.find_users(external_user_id)

    def _read(self, answer: ExternalUser) -> ExternalUser:
        return confirm_external_user(answer, self._post, self._user_id, self._external_user_id)

    async def _search(self) -> ExternalUser | None:
        for user in await self._fetch(self._get) or ():
            if is_same_user(user.user_id, self._user_id):
                return ExternalUser(
                    user_id=user.user_id,
                    external_user_id=self._external_user_id,
                    created_at=user.created_at,
                    updated_at=user.updated_at,
                )
        return None


def confirm_external_user(
    answer: ExternalUser, request: protocol.Request[ExternalUser], user_id: str, external_user_id: str
) -> ExternalUser:
    """Return an answer if it is about this user and this external user id; else raise a `DecodeError`."""
    if is_same_user(answer.user_id, user_id) and answer.external_user_id == external_user_id:
        return answer
    raise _make_error(request, "about another user or another external user id")


def _make_error(request: protocol.Request[T], what: str) -> DecodeError:
    method, path = request.endpoint.method, request.path
    return DecodeError(f"{method} {path} answered {what}", status=200, method=method, path=path)
