"""The API as data: its endpoints, functions that build requests, and `read`, which turns answers into structs.

Nothing here does I/O, so all of it is tested without a network.

Source: Keyless documentation, Server API: Operations, Telemetry, External User ID, Users, Devices.
"""

from __future__ import annotations

import json
import re
import time
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar
from urllib.parse import quote

import msgspec
from multidict import istr

from aiokeyless._validation import (
    check_external_user_id,
    check_operation_id,
    check_public_signing_key,
    check_tenant,
    check_user_id,
)
from aiokeyless.errors import (
    TRANSIENT_STATUSES,
    AuthenticationError,
    BadRequestError,
    CachedAnswerError,
    ConflictStatusError,
    DecodeError,
    KeylessError,
    NotAcceptableError,
    NotFoundError,
    NotJsonError,
    PermissionDeniedError,
    RateLimitError,
    ServerError,
    StatusError,
    UnsupportedMediaTypeError,
)
from aiokeyless.models import (
    Authentications,
    Device,
    ExternalUser,
    NewExternalUser,
    NewOperation,
    Operation,
    OperationState,
    PendingOperation,
    Region,
    SuccessAnswer,
    TelemetryAnswer,
    User,
    decode_hook,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from .redaction import Redaction

T = TypeVar("T")


ADDRESSES: Final[Mapping[Region, str]] = {
    Region.EU: "https://api.keyless.io",
    Region.LATAM: "https://operations-service.eks.core-production.latam.keyless.technology",
    Region.US: "https://api.eks.core-production.saas-us-east.keyless.technology",
    Region.SG: "https://operations-service.eks.core-production.sg.keyless.technology",
}


MAX_BODY: Final = 1 << 20
MAX_LIST_BODY: Final = 16 << 20


class RawAnswer(msgspec.Struct, frozen=True):
    """An HTTP answer, not decoded yet. The names in `headers` are case-insensitive.

    Its repr does not show the body, since error reporters print local variables: a body contains the SDK key and the
    payload.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes

    def __rich_repr__(self) -> Iterator[tuple[str, object]]:  # type: ignore[override]  # msgspec's says Any
        yield "status", self.status
        yield "size", len(self.body)

    def __repr__(self) -> str:
        return f"<RawAnswer {self.status}, {len(self.body)} bytes>"


class Endpoint(msgspec.Struct, Generic[T], frozen=True):
    """The properties of one endpoint.

    Attributes:
        method: HTTP method.
        route: The path as documented, with the names of its parameters.
        decode: Turns the body of a success into a struct.
        success: The statuses of a success.
        max_body: Largest body of an answer, in bytes.
        sends_key: Whether to send the API key.
        is_personal: Whether the path has an external user id, which may be personal data. Messages then show `route`.
    """

    method: str
    route: str
    decode: Callable[[bytes], T]
    success: frozenset[int] = frozenset({200})
    max_body: int = MAX_BODY
    sends_key: bool = True
    is_personal: bool = False


_read_operation: Final = msgspec.json.Decoder(Operation, dec_hook=decode_hook).decode
# Not strict: a number may arrive as a text.
_read_telemetry: Final = msgspec.json.Decoder(TelemetryAnswer, strict=False).decode


def _decode_operation(body: bytes) -> Operation:
    operation = _read_operation(body)
    # Only for an approval, so that the many pending answers cost nothing extra.
    if operation.is_approved:
        _refuse_duplicate_keys(body)
    return operation


def _make_strict_decoder(kind: type[T]) -> Callable[[bytes], T]:
    """Return a decoder that refuses an object with the same key twice."""
    decode = msgspec.json.Decoder(kind).decode

    def decode_strictly(body: bytes) -> T:
        answer = decode(body)
        _refuse_duplicate_keys(body)
        return answer

    return decode_strictly


_read_success: Final = _make_strict_decoder(SuccessAnswer)


def _decode_deleted(body: bytes) -> None:
    if not _read_success(body).success:
        raise msgspec.ValidationError("success is false")


def _decode_nothing(_body: bytes) -> None:
    """Accept any body: the status is enough."""


def _decode_authentications(body: bytes) -> Authentications:
    return _read_telemetry(body).first_page


def _refuse_duplicate_keys(body: bytes) -> None:
    """Refuse JSON such as ``{"result": false, "result": true}``, which parsers read in different ways."""
    json.loads(body, object_pairs_hook=_refuse_duplicates)


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> None:
    if len({key for key, _ in pairs}) < len(pairs):
        raise msgspec.ValidationError("an object has the same key twice")


GET_OPERATION: Final = Endpoint("GET", "/v2/operations/{operationId}", _decode_operation)
GET_PENDING: Final = Endpoint(
    "GET",
    "/v2/users/{userId}/operations/pending",
    msgspec.json.Decoder(list[PendingOperation]).decode,
    max_body=MAX_LIST_BODY,
)
GET_AUTHENTICATIONS: Final = Endpoint(
    "GET", "/v2/users/{userId}/authentications", _decode_authentications, max_body=MAX_LIST_BODY
)
GET_EXTERNAL_AUTHENTICATIONS: Final = Endpoint(
    "GET",
    "/v2/external-users/{externalUserId}/authentications",
    _decode_authentications,
    max_body=MAX_LIST_BODY,
    is_personal=True,
)
# 200 is documented; 201 is HTTP's status for a creation, and a gateway may send it.
_CREATED: Final = frozenset({200, 201})
POST_OPERATION: Final = Endpoint("POST", "/v2/users/{userId}/operations", _read_success, success=_CREATED)
# 201 is documented here, and 200 for the operations.
POST_EXTERNAL_USER: Final = Endpoint(
    "POST", "/v2/users/{userId}/external-user", _make_strict_decoder(ExternalUser), success=_CREATED
)
PATCH_EXTERNAL_USER: Final = Endpoint("PATCH", "/v2/users/{userId}/external-user", _make_strict_decoder(ExternalUser))
DELETE_EXTERNAL_USER: Final = Endpoint(
    "DELETE", "/v2/external-users/{externalUserId}", _decode_nothing, success=frozenset({204}), is_personal=True
)
GET_EXTERNAL_USERS: Final = Endpoint(
    "GET",
    "/v2/external-users/{externalUserId}/users",
    _make_strict_decoder(list[User]),
    max_body=MAX_LIST_BODY,
    is_personal=True,
)
DELETE_USER: Final = Endpoint("DELETE", "/v2/users/{userId}", _decode_deleted)
GET_DEVICES: Final = Endpoint(
    "GET", "/v2/users/{userId}/devices", _make_strict_decoder(list[Device]), max_body=MAX_LIST_BODY
)
DELETE_DEVICE: Final = Endpoint("DELETE", "/v2/users/{userId}/devices/{publicSigningKey}", _decode_deleted)


GET_KEY_SET: Final = Endpoint("GET", "/customers/{tenant}/.well-known/jwks.json", bytes, sends_key=False)


class Request(msgspec.Struct, Generic[T], frozen=True):
    """One request as data. `path` and `query` are percent-encoded, and follow the base URL."""

    endpoint: Endpoint[T]
    path: str
    body: bytes | None = None
    query: str = ""

    @property
    def shown_path(self) -> str:
        """The path for messages, without an external user id."""
        return self.endpoint.route if self.endpoint.is_personal else self.path

    def __rich_repr__(self) -> Iterator[tuple[str, object]]:  # type: ignore[override]  # msgspec's says Any
        yield "path", self.shown_path

    def __repr__(self) -> str:
        # Without the body, which contains a payload.
        return f"<Request {self.endpoint.method} {self.shown_path}>"


def get_operation(operation_id: str) -> Request[Operation]:
    """Build ``GET /v2/operations/{operationId}``."""
    return Request(GET_OPERATION, operation_path(check_operation_id(operation_id)))


def operation_path(operation_id: str) -> str:
    """Return the path of an operation; its id must have been checked."""
    return f"/v2/operations/{quote(operation_id, safe='')}"


def get_pending_operations(user_id: str) -> Request[list[PendingOperation]]:
    """Build ``GET /v2/users/{userId}/operations/pending``."""
    return Request(GET_PENDING, f"/v2/users/{check_user_id(user_id)}/operations/pending")


def create_operation(user_id: str, operation: NewOperation) -> Request[SuccessAnswer]:
    """Build ``POST /v2/users/{userId}/operations``."""
    check_operation_id(operation.operation_id)
    path = f"/v2/users/{check_user_id(user_id)}/operations"
    return Request(POST_OPERATION, path, msgspec.json.encode(operation))


def get_authentications(user_id: str, operation_id: str | None = None) -> Request[Authentications]:
    """Build ``GET /v2/users/{userId}/authentications``."""
    return _build_authentications(GET_AUTHENTICATIONS, f"/v2/users/{check_user_id(user_id)}", operation_id)


def get_external_authentications(external_user_id: str, operation_id: str | None = None) -> Request[Authentications]:
    """Build ``GET /v2/external-users/{externalUserId}/authentications``."""
    return _build_authentications(GET_EXTERNAL_AUTHENTICATIONS, _external_user_path(external_user_id), operation_id)


def _build_authentications(
    endpoint: Endpoint[Authentications], user_path: str, operation_id: str | None
) -> Request[Authentications]:
    query = "" if operation_id is None else f"operationId={quote(check_operation_id(operation_id), safe='')}"
    return Request(endpoint, f"{user_path}/authentications", query=query)


def create_external_user(user_id: str, external_user_id: str) -> Request[ExternalUser]:
    """Build ``POST /v2/users/{userId}/external-user``."""
    return _build_external_user(POST_EXTERNAL_USER, user_id, external_user_id)


def update_external_user(user_id: str, external_user_id: str) -> Request[ExternalUser]:
    """Build ``PATCH /v2/users/{userId}/external-user``."""
    return _build_external_user(PATCH_EXTERNAL_USER, user_id, external_user_id)


def _build_external_user(
    endpoint: Endpoint[ExternalUser], user_id: str, external_user_id: str
) -> Request[ExternalUser]:
    body = NewExternalUser(external_user_id=check_external_user_id(external_user_id))
    return Request(endpoint, f"/v2/users/{check_user_id(user_id)}/external-user", msgspec.json.encode(body))


def delete_external_user(external_user_id: str) -> Request[None]:
    """Build ``DELETE /v2/external-users/{externalUserId}``."""
    return Request(DELETE_EXTERNAL_USER, _external_user_path(external_user_id))


def find_users(external_user_id: str) -> Request[list[User]]:
    """Build ``GET /v2/external-users/{externalUserId}/users``."""
    return Request(GET_EXTERNAL_USERS, f"{_external_user_path(external_user_id)}/users")


def delete_user(user_id: str) -> Request[None]:
    """Build ``DELETE /v2/users/{userId}``."""
    return Request(DELETE_USER, f"/v2/users/{check_user_id(user_id)}")


def get_devices(user_id: str) -> Request[list[Device]]:
    """Build ``GET /v2/users/{userId}/devices``."""
    return Request(GET_DEVICES, f"/v2/users/{check_user_id(user_id)}/devices")


def delete_device(user_id: str, public_signing_key: str) -> Request[None]:
    """Build ``DELETE /v2/users/{userId}/devices/{publicSigningKey}``."""
    key = quote(check_public_signing_key(public_signing_key), safe="")
    return Request(DELETE_DEVICE, f"/v2/users/{check_user_id(user_id)}/devices/{key}")


def get_key_set(tenant: str) -> Request[bytes]:
    """Build ``GET /customers/{tenant}/.well-known/jwks.json``."""
    return Request(GET_KEY_SET, f"/customers/{quote(check_tenant(tenant), safe='')}/.well-known/jwks.json")


def _external_user_path(external_user_id: str) -> str:
    return f"/v2/external-users/{quote(check_external_user_id(external_user_id), safe='')}"


_AGE: Final = istr("Age")
#: Seconds after which a stored answer hides an approval for too long.
_MAX_AGE: Final = 1.0
_STATUS_ERRORS: Final[Mapping[int, type[StatusError]]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    406: NotAcceptableError,
    409: ConflictStatusError,
    415: UnsupportedMediaTypeError,
    429: RateLimitError,
}


def read(endpoint: Endpoint[T], path: str, answer: RawAnswer, redaction: Redaction) -> T:
    """Turn an answer into the endpoint's struct. Messages show the path, and no API key that the answer echoes.

    Raises:
        CachedAnswerError: A cache says, after over a second, that an operation is pending, or that there is none.
        DecodeError: A success whose JSON has the wrong shape or a duplicate key, or repeats the API key.
        NotJsonError: A success whose body is not JSON.
        StatusError: Any other status, as its subclass.
    """
    is_stored = _AGE in answer.headers and endpoint is GET_OPERATION and _read_age(answer.headers) > _MAX_AGE
    if answer.status not in endpoint.success:
        if is_stored and answer.status == 404:
            raise _make_cached_error(path, answer, redaction)
        raise _make_status_error(endpoint.method, path, answer, redaction)
    failure: KeylessError
    try:
        decoded = _decode(endpoint, answer.body, redaction)
        # An approval stays one.
        if not (is_stored and isinstance(decoded, Operation) and decoded.state == OperationState.PENDING):
            return decoded
        failure = _make_cached_error(path, answer, redaction)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        failure = _make_decode_error(endpoint.method, path, answer, error, redaction)
    # Raised outside the except block, so that no frame keeps the reason: a UnicodeDecodeError contains the body.
    try:
        raise failure
    finally:
        del failure


def _decode(endpoint: Endpoint[T], body: bytes, redaction: Redaction) -> T:
    decoded = endpoint.decode(body)
    if redaction.is_echoed_in(decoded, body):
        raise msgspec.ValidationError("it repeats the API key")
    return decoded


def _make_decode_error(
    method: str, path: str, answer: RawAnswer, reason: Exception, redaction: Redaction
) -> DecodeError:
    facts: dict[str, Any] = {
        "status": answer.status,
        "method": method,
        "path": path,
        "request_id": request_id(answer, redaction),
    }
    where = f"{method} {path} answered {answer.status}"
    if isinstance(reason, msgspec.ValidationError) and _is_json(answer.body):
        return DecodeError(f"{where} with JSON of another shape: {reason}; check base_url or upgrade", **facts)
    kind = "an empty body" if not answer.body.strip() else "a body that is not JSON"
    return NotJsonError(f"{where} with {kind}; check for a gateway or a captive portal in between", **facts)


def _is_json(body: bytes) -> bool:
    """Return whether the whole body is JSON; the typed decoder stops at the first wrong type."""
    try:
        msgspec.json.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False
    return True


def _make_cached_error(path: str, answer: RawAnswer, redaction: Redaction) -> CachedAnswerError:
    via = redaction.redact(answer.headers.get("Via", ""))
    cache = f"a cache (Via: {via})" if via else "a cache"
    age = f"{_read_age(answer.headers):g} s ago"
    message = f"GET {path} was answered by {cache} with what it stored {age}; let it store nothing of this API"
    return CachedAnswerError(message, method="GET", path=path)


def _read_age(headers: Mapping[str, str]) -> float:
    match = _SECONDS.match(headers["Age"].strip())
    return float(match[0]) if match else 0.0


def _make_status_error(method: str, path: str, answer: RawAnswer, redaction: Redaction) -> StatusError:
    status = answer.status
    kind = _STATUS_ERRORS.get(status, ServerError if 500 <= status < 600 else StatusError)
    return kind(
        status=status,
        method=method,
        path=path,
        request_id=request_id(answer, redaction),
        retry_after=retry_after(answer.headers),
        detail=redaction.redact(answer.body.decode("utf-8", "replace")),
        advice=_choose_advice(status),
    )


def _choose_advice(status: int) -> str | None:
    """Return the advice for a status without a class of its own; None for any other."""
    if 300 <= status < 400:
        return "a redirect, not followed since that would send the API key to another host; check base_url"
    if 200 <= status < 300:
        return "a success that the API does not document, so it does not count as one; check base_url and the proxies"
    if status == 407:
        return "from a proxy; check its URL, user name and password"
    if status in TRANSIENT_STATUSES - _STATUS_ERRORS.keys():
        return "a temporary failure; try again later"
    return None


# Looking up an istr takes half the time of a str.
_REQUEST_ID_HEADERS: Final = tuple(
    istr(name) for name in ("X-Request-Id", "X-Correlation-Id", "X-Amzn-RequestId", "X-Amzn-Trace-Id", "CF-Ray")
)


def request_id(answer: RawAnswer, redaction: Redaction) -> str | None:
    """Return the service's id of the exchange; None if the answer has none."""
    for name in _REQUEST_ID_HEADERS:
        value = answer.headers.get(name)
        if value:
            return redaction.redact(value)
    return None


_SECONDS: Final = re.compile(r"\d{1,15}(\.\d{1,9})?", re.ASCII)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of ``Retry-After``, which may be a date; None if the header is absent or malformed."""
    text = headers.get("Retry-After", "").strip()
    if _SECONDS.fullmatch(text):
        return float(text)
    at = parse_http_date(text)
    if at is None:
        return None
    # The server's clock may differ from ours. Its Date header is from the clock that it computed the date with.
    now = parse_http_date(headers.get("Date", ""))
    return max(0.0, at - (time.time() if now is None else now))


def parse_http_date(text: str) -> float | None:
    """Return an HTTP date in seconds since 1970; None if it is malformed."""
    try:
        date = parsedate_to_datetime(text)
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
