"""All exceptions of the library, under one root.

Each has its facts (status, path, operation) as attributes, and a message of one line: what happened and what to do. The
message never contains an API key, a payload or a raw body. All can be pickled.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from ._base_errors import ConfigurationError, InvalidIdentifierError, KeylessError
from .models import Authentication, Operation
from .ticket import ApprovalTicket

__all__ = [
    "AlreadyApprovedError",
    "AmbiguousUserError",
    "ApprovalError",
    "ApprovalTimeoutError",
    "ApprovalUnknownError",
    "AuthenticationError",
    "BadRequestError",
    "BrokerError",
    "CachedAnswerError",
    "ClientClosedError",
    "ConfigurationError",
    "ConflictError",
    "ConflictStatusError",
    "DecodeError",
    "InconsistentOperationError",
    "InvalidIdentifierError",
    "InvalidRequestError",
    "KeylessError",
    "NotAcceptableError",
    "NotFoundError",
    "NotJsonError",
    "OperationMismatchError",
    "PermissionDeniedError",
    "RateLimitError",
    "RequestTimeoutError",
    "ServerError",
    "SignatureError",
    "SignatureReason",
    "StatusError",
    "TransportError",
    "UnsupportedMediaTypeError",
]


#: Statuses that gateways send for a moment. Every 5xx is transient too: of a 500, the documentation says "try again
#: later".
TRANSIENT_STATUSES: Final = frozenset({408, 425, 429})


class ClientClosedError(KeylessError, RuntimeError):
    """The client was closed before the call or during it.

    What to do: close the client only after its work is done. The operation of a wait may be approved by now: wait for
    its ticket again, with a new client. An interrupted create may have taken effect: repeat it with `operation_id` and
    ``if_exists="resume"``.

    Attributes:
        operation_id: The operation of an interrupted create; None for any other call.
    """

    operation_id: str | None = None


class TransportError(KeylessError):
    """No usable answer arrived: no connection, TLS failure, reset, or an answer that is cut off, too large or encoded.

    What to do: try again later. Single calls were already tried up to ``max_attempts`` times; waits retry until their
    deadline.

    Attributes:
        method: HTTP method of the request.
        path: Path of the request, percent-encoded.
        sent: False if the request certainly never left this machine, and so had no effect.
        operation_id: The operation of a create that failed, for ``get_operation``; None for any other call.
        failures: How the earlier tries of the same call failed, oldest first.
    """

    operation_id: str | None = None
    failures: tuple[KeylessError, ...] = ()

    def __init__(self, message: str, *, method: str, path: str, sent: bool = True) -> None:
        super().__init__(message)
        self.method = method
        self.path = path
        self.sent = sent

    @property
    def is_transient(self) -> bool:
        """True; see `KeylessError.is_transient`."""
        return True


class RequestTimeoutError(TransportError, TimeoutError):
    """One HTTP exchange took longer than ``request_timeout``.

    What to do: as for `TransportError`; if it is frequent, raise ``request_timeout`` or check the network.
    """


class CachedAnswerError(TransportError):
    """A cache said "pending" or "no such operation", from an answer that it had stored. Keyless may know better by now.

    What to do: let no cache between you and Keyless store answers. The message names it, if it gave a name (``Via``).
    """


class DecodeError(KeylessError):
    """A 2xx whose JSON has a shape that the API does not document, or repeats the API key.

    What to do: check ``base_url`` and the proxies. If they are correct, upgrade the library or report the message.

    Attributes:
        status: HTTP status, 2xx.
        method: HTTP method of the request.
        path: Path of the request, percent-encoded.
        request_id: The service's id of the exchange, or None if it sent none.
        operation_id: The operation of a create that failed, for ``get_operation``; None for any other call.
        failures: How the earlier tries of the same call failed, oldest first.
    """

    operation_id: str | None = None
    failures: tuple[KeylessError, ...] = ()

    def __init__(self, message: str, *, status: int, method: str, path: str, request_id: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.method = method
        self.path = path
        self.request_id = request_id


class NotJsonError(DecodeError):
    """A 2xx whose body is not JSON, most often the page of a gateway or of a captive portal.

    What to do: try again later, as it counts as a transient failure. If it persists, something between you and Keyless
    answers in its place: check ``base_url`` and the proxies.
    """

    @property
    def is_transient(self) -> bool:
        """True; see `KeylessError.is_transient`."""
        return True


class StatusError(KeylessError):
    """The service, or a gateway in front of it, answered with an error status or a redirect.

    What to do: see the subclass. The API does not document the status of a plain `StatusError`. A 3xx means that
    ``base_url`` is not the API's. The client never follows redirects, as that would send the key to another host. With
    a 409, it is the create of an operation that may exist: repeat it, as the message says.

    Attributes:
        status: HTTP status.
        method: HTTP method of the request.
        path: Path of the request, percent-encoded.
        request_id: The service's id of the exchange, or None if it sent none.
        retry_after: Seconds to wait before the next request, from ``Retry-After``; None if the service sent none.
        advice: What to do, as at the end of the message.
        detail: At most 200 printable characters of the error body, with the API key redacted; or None. Before you log
            it, consider that it may quote your request, including a payload.
        operation_id: The operation of a create that failed, for ``get_operation``; None for any other call.
        failures: How the earlier tries of the same call failed, oldest first.
    """

    operation_id: str | None = None
    failures: tuple[KeylessError, ...] = ()

    advice: str = "the API does not document this status; check base_url"

    def __init__(
        self,
        *,
        status: int,
        method: str,
        path: str,
        request_id: str | None = None,
        retry_after: float | None = None,
        detail: str | None = None,
        advice: str | None = None,
    ) -> None:
        self.advice = advice or self._advice_for(path)
        pause = f" (Retry-After: {retry_after:g} s)" if retry_after else ""
        super().__init__(f"{method} {path} answered {status}{pause}: {self.advice}")
        self.status = status
        self.method = method
        self.path = path
        self.request_id = request_id
        self.retry_after = retry_after
        self.detail = detail

    def _advice_for(self, path: str) -> str:  # noqa: ARG002  # some subclasses choose by it
        return self.advice

    @property
    def is_transient(self) -> bool:
        """True for 408, 425, 429 and 5xx; see `KeylessError.is_transient`."""
        return self.status in TRANSIENT_STATUSES or 500 <= self.status < 600


class BadRequestError(StatusError):
    """400: the service considers the request malformed.

    What to do: change the request; unchanged, it will fail again. `detail` may state what is wrong.
    """

    advice = "the request is malformed; do not repeat it unchanged, .detail may state what is wrong"


class AuthenticationError(StatusError):
    """401: the service refuses the API key.

    A wait that goes on raises it only if its client's polls were answered with nothing else for a minute.

    What to do: use the secret *server* key of your tenant, issued for this region or ``base_url``, and no key of the
    mobile SDK.

    Attributes:
        key_was_replaced: Whether ``api_key`` is a function that no longer returned the refused key. Try again then.
    """

    key_was_replaced: bool = False

    advice = (
        "the service refuses the API key; check the region, and that KEYLESS_API_KEY is your tenant's secret server "
        "key and not one of the mobile SDK's"
    )

    @property
    def is_transient(self) -> bool:
        """True if the key was replaced during the request; see `KeylessError.is_transient`."""
        return self.key_was_replaced


class PermissionDeniedError(StatusError):
    """403, which the API does not document: the key may not do this, or a gateway blocks this network.

    What to do: check the permissions of the key, and whether your address is on the gateway's allow list.
    """

    advice = "not allowed; check the permissions of the API key and whether a gateway blocks your address"


class NotFoundError(StatusError):
    """404: no such operation or user.

    What to do: check the id. An operation that the phone will create does not exist until the user has approved it.
    Wait for it with ``started_by="phone"``, or ``if_missing="wait"``.
    """

    advice = 'no such operation; check the id (for one that the phone creates: wait with if_missing="wait")'

    def _advice_for(self, path: str) -> str:
        return "no such user, external user id or device; check the id" if "users/" in path else self.advice


class NotAcceptableError(StatusError):
    """406: the service cannot answer in a format that ``Accept`` admits.

    What to do: something between you and Keyless rewrites the ``Accept`` header; remove it.
    """

    advice = "the Accept header did not arrive as sent; check the proxies in between"


class ConflictError(KeylessError):
    """The operation id is taken by something else, at Keyless or at a broker.

    The client raises a `ConflictStatusError`, which is one of these. `aiokeyless.worker.submit_approval` raises it as
    it is: the broker has another request under the id, and stored nothing.

    What to do: use a new id. An approval of what has the id is not for this request.

    Attributes:
        operation_id: The id that is taken. None if the conflict is about an external user id.
    """

    operation_id: str | None = None


class ConflictStatusError(ConflictError, StatusError):
    """409: another operation has the operation id, or the user or the external user id is linked already.

    If the client found an operation of another user, or with another payload or external user id, the message says so.
    Its approval is not for this request.

    What to do: use a new id (``operation_id=None`` generates one). If an earlier try of the same request may have taken
    the id, repeat the create with ``if_exists="resume"``, which compares. For a link, see
    `KeylessClient.update_external_user`.
    """

    advice = 'the operation id is taken; use a new one (after an earlier try of the same request: if_exists="resume")'

    def _advice_for(self, path: str) -> str:
        linked = "the user or the external user id is linked already; to change the link: update_external_user"
        return linked if path.endswith("/external-user") else self.advice


class AlreadyApprovedError(ConflictStatusError):
    """The operation id belongs to an operation with the same content that is approved already.

    The approval may belong to an earlier request that you have acted on. One approval must not count twice.

    What to do: wait for ``error.ticket``, then pay only if your record shows that it was asked, and neither paid nor
    ended. The wait also compares the factor that the create required. To ask again, use a new id.

    Attributes:
        ticket: The ticket that the create would have returned. A wait for it polls at least once, however old the
            operation is.
    """

    ticket: ApprovalTicket

    advice = (
        "the operation is approved already, maybe for an earlier request; wait for error.ticket, then pay only if your "
        "record shows that it was asked, and neither paid nor ended"
    )


class UnsupportedMediaTypeError(StatusError):
    """415: the service does not accept the body's content type.

    What to do: something between you and Keyless rewrites the ``Content-Type`` header; remove it.
    """

    advice = "the Content-Type header did not arrive as sent; check the proxies in between"


class RateLimitError(StatusError):
    """429, which the API does not document: too many requests.

    What to do: wait ``retry_after`` seconds, if it is not None. Use one client per process, so that all requests share
    its limits.
    """

    advice = "too many requests; slow down, .retry_after is the time to wait if the service sent one"


class ServerError(StatusError):
    """5xx: the service or its gateway failed.

    What to do: try again later. Single calls were already tried up to ``max_attempts`` times; waits retry until their
    deadline.
    """

    advice = "the service failed; try again later"


class AmbiguousUserError(KeylessError):
    """Several users have the external user id. The search ignores case.

    What to do: choose among `user_ids` by your own record of the user, and use ids that differ in more than case.

    Attributes:
        user_ids: The ids of these users, in hex.
    """

    def __init__(self, message: str, *, user_ids: tuple[str, ...]) -> None:
        super().__init__(message)
        self.user_ids = user_ids


class SignatureReason(StrEnum):
    """Why a signed transaction is refused."""

    MALFORMED = "malformed"
    UNKNOWN_KEY = "unknown_key"
    BAD_SIGNATURE = "bad_signature"
    WRONG_ALGORITHM = "wrong_algorithm"
    WRONG_USER = "wrong_user"
    WRONG_DATA = "wrong_data"
    WRONG_ISSUER = "wrong_issuer"
    WRONG_AUDIENCE = "wrong_audience"
    TOO_OLD = "too_old"
    NOT_YET_VALID = "not_yet_valid"
    EXPIRED = "expired"
    KEYS_UNAVAILABLE = "keys_unavailable"


_REASONS: Final = {
    SignatureReason.MALFORMED: "it is not a token of the documented form",
    SignatureReason.UNKNOWN_KEY: "the tenant has no valid key with its kid",
    SignatureReason.BAD_SIGNATURE: "its signature is wrong",
    SignatureReason.WRONG_ALGORITHM: "its algorithm is not the key's",
    SignatureReason.WRONG_USER: "another user signed it",
    SignatureReason.WRONG_DATA: "the user signed another text",
    SignatureReason.WRONG_ISSUER: "it has another issuer",
    SignatureReason.WRONG_AUDIENCE: "it is for another audience",
    SignatureReason.TOO_OLD: "it was signed too long ago; check max_age and the phone's clock",
    SignatureReason.NOT_YET_VALID: "it is not valid yet; check the phone's clock",
    SignatureReason.EXPIRED: "it has expired",
    SignatureReason.KEYS_UNAVAILABLE: "the tenant's public keys cannot be fetched now; check its name, or try later",
}


class SignatureError(KeylessError):
    """A signed transaction is refused. The message shows neither the token nor a key.

    What to do: do not use it as evidence, and keep the token for an investigation. If the keys were unavailable, verify
    it again later.

    Attributes:
        reason: Why it is refused.
    """

    def __init__(self, reason: SignatureReason) -> None:
        super().__init__(f"the signed transaction is refused: {_REASONS[reason]}")
        self.reason = reason

    @property
    def is_transient(self) -> bool:
        """True if the keys were unavailable; see `KeylessError.is_transient`."""
        return self.reason is SignatureReason.KEYS_UNAVAILABLE


class ApprovalError(KeylessError):
    """A wait ended without an approval; the subclass gives the reason.

    What to do: do not treat the operation as approved. See the subclass.

    Attributes:
        operation_id: The operation of the wait.
        last_operation: The answer of the deciding poll; None if that poll failed, or no poll was answered.
        last_error: The last transient failure of the wait, or None.
        polls: Number of polls that were sent for this wait.
        elapsed: Duration of the wait, in seconds.
        ticket: The ticket of the wait; None if it waited for an id.
    """

    def __init__(
        self,
        message: str,
        *,
        operation_id: str,
        last_operation: Operation | None = None,
        last_error: KeylessError | None = None,
        polls: int = 0,
        elapsed: float = 0.0,
        ticket: ApprovalTicket | None = None,
    ) -> None:
        super().__init__(message)
        self.operation_id = operation_id
        self.last_operation = last_operation
        self.last_error = last_error
        self.polls = polls
        self.elapsed = elapsed
        self.ticket = ticket


class ApprovalTimeoutError(ApprovalError, TimeoutError):
    """The deadline passed, and the final poll found the operation still pending.

    What to do: end the request in your own record, then refuse what the user wanted to do. A timeout is not a denial:
    the API has no cancel, so the user can still approve later. Once you have refused, that must have no effect. Ask
    again only under a new operation id.

    Attributes:
        attempts: The user's attempts to authenticate under this operation's id, oldest first, as far as a wait with
            ``explain=True`` knows them; else empty. They explain, and decide nothing.
    """

    attempts: tuple[Authentication, ...] = ()


class ApprovalUnknownError(ApprovalTimeoutError):
    """The deadline passed, and the final poll got no answer, or could not be sent: the outcome is unknown.

    What to do: leave the request open in your own record, and say that the outcome is not known yet. Later, wait for
    `ticket` again: a wait for an expired ticket polls once. Do not create a second operation before you know the
    outcome of the first.
    """


class OperationMismatchError(ApprovalError):
    """The answer is about another operation, user, external user or payload, or has another `auth_type` than required.

    What to do: refuse. After another factor, such as a PIN, ask again under a new id. Otherwise investigate: a proxy
    may mix up answers, or someone else may use your operation ids.
    """


class InconsistentOperationError(ApprovalError):
    """The answer contradicts itself (approved, but result is false), or its state is unknown.

    What to do: refuse. If the state is new in the API, upgrade the library.
    """


class BrokerError(KeylessError):
    """The broker cannot be reached, does not permit an action, or is not set up as it must be.

    What to do: if `is_transient`, try again later. Else fix the address, the permissions or the broker, as the message
    says, and start again. The broker keeps what it has stored.

    Attributes:
        operation_id: The operation of a `submit_approval` whose outcome is unknown. Submit it again under this id: it
            is then the same request, even if the broker has stored the first one. Else None.
    """

    operation_id: str | None = None

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        super().__init__(message)
        self._may_pass = may_pass

    @property
    def is_transient(self) -> bool:
        """True if the broker was away, locked, late or full; see `KeylessError.is_transient`."""
        return self._may_pass


class InvalidRequestError(KeylessError):
    """A message is no request for an approval, or one that the broker cannot store. Repeating it does not help.

    What to do: fix the application that publishes it, or let it use `aiokeyless.worker.submit_approval`.
    """
