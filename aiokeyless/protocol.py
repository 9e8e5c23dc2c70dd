"""The API as data: identifiers checked, requests built, answers turned into structs or exceptions.

Nothing here does I/O; every rule can be read off a table and tested without a network.

Source: Keyless documentation, Server API / Operations.
"""

from __future__ import annotations

import ipaddress
import re
import time
import unicodedata
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar
from urllib.parse import quote, urlsplit

import msgspec

from .errors import (
    AuthenticationError,
    BadRequestError,
    ConfigurationError,
    ConflictError,
    DecodeError,
    InvalidIdentifierError,
    KeylessError,
    NotAcceptableError,
    NotFoundError,
    NotJsonError,
    PermissionDeniedError,
    RateLimitError,
    ServerError,
    StatusError,
    TransportError,
    UnsupportedMediaTypeError,
)
from .models import CreateAnswer, NewOperation, Operation, PendingOperation, Region, decode_hook

if TYPE_CHECKING:
    from collections.abc import Mapping

T = TypeVar("T")

BASE_URLS: Final[Mapping[Region, str]] = {
    Region.EU: "https://api.keyless.io",
    Region.LATAM: "https://operations-service.eks.core-production.latam.keyless.technology",
    Region.US: "https://api.eks.core-production.saas-us-east.keyless.technology",
    Region.SG: "https://operations-service.eks.core-production.sg.keyless.technology",
}

MAX_IDENTIFIER: Final = 512  # characters: long enough for any id in use, short enough for any gateway's URL limit
MAX_BODY: Final = 1 << 20
MAX_PENDING_BODY: Final = 16 << 20
MAX_DETAIL: Final = 200


class Answer(msgspec.Struct, frozen=True):
    """What came back over the wire. `headers` looks names up without regard to case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Endpoint(Generic[T]):
    """What the three endpoints differ in: method, the shape of a good answer, and how large it may be."""

    __slots__ = ("decode", "max_body", "method")

    def __init__(self, method: str, shape: type[T], max_body: int = MAX_BODY) -> None:
        self.method = method
        self.decode = msgspec.json.Decoder(shape, dec_hook=decode_hook).decode
        self.max_body = max_body


GET_OPERATION: Final = Endpoint("GET", Operation)
GET_PENDING: Final = Endpoint("GET", list[PendingOperation], MAX_PENDING_BODY)
POST_OPERATION: Final = Endpoint("POST", CreateAnswer)


class Request(msgspec.Struct, Generic[T], frozen=True):
    """One request as data. `path` is percent-encoded and follows the base URL."""

    endpoint: Endpoint[T]
    path: str
    body: bytes | None = None


def get_operation(operation_id: str) -> Request[Operation]:
    """Build ``GET /v2/operations/{operationId}``."""
    return Request(GET_OPERATION, f"/v2/operations/{quote(check_operation_id(operation_id), safe='')}")


def get_pending_operations(user_id: str) -> Request[list[PendingOperation]]:
    """Build ``GET /v2/users/{userId}/operations/pending``."""
    return Request(GET_PENDING, f"/v2/users/{check_user_id(user_id)}/operations/pending")


def create_operation(user_id: str, operation: NewOperation) -> Request[CreateAnswer]:
    """Build ``POST /v2/users/{userId}/operations``."""
    check_operation_id(operation.operation_id)
    path = f"/v2/users/{check_user_id(user_id)}/operations"
    return Request(POST_OPERATION, path, msgspec.json.encode(operation))


def check_operation_id(operation_id: str) -> str:
    """Return the operation id as it is, or say why it cannot travel as one path segment.

    Raises:
        InvalidIdentifierError: Not a string; empty, too long, ``.`` or ``..`` (a path would lose them); control
            characters or lone surrogates in it.
    """
    if not isinstance(operation_id, str):
        raise InvalidIdentifierError(f"operation_id must be a string, not {type(operation_id).__name__}")
    if not 1 <= len(operation_id) <= MAX_IDENTIFIER:
        raise InvalidIdentifierError(
            f"operation_id must have 1 to {MAX_IDENTIFIER} characters, not {len(operation_id)}"
        )
    if operation_id in {".", ".."}:
        raise InvalidIdentifierError(f"operation_id must not be {operation_id!r}: a URL path cannot carry it")
    # What is printable holds neither, and is told in far less time.
    if not operation_id.isprintable() and any(unicodedata.category(c) in {"Cc", "Cs"} for c in operation_id):
        raise InvalidIdentifierError(
            f"operation_id must not hold control characters or lone surrogates: {operation_id[:80]!r}"
        )
    return operation_id


_HEX: Final = re.compile(rf"[0-9A-Fa-f]{{1,{MAX_IDENTIFIER}}}", re.ASCII)


def check_user_id(user_id: str) -> str:
    """Return the user id in upper case, as the service wants it.

    Raises:
        InvalidIdentifierError: Not a string of 1 to 512 hex digits.
    """
    if not isinstance(user_id, str):
        raise InvalidIdentifierError(f"user_id must be a string of hex digits, not {type(user_id).__name__}")
    if _HEX.fullmatch(user_id) is None:
        raise InvalidIdentifierError(
            f"user_id must be 1 to {MAX_IDENTIFIER} hex digits, such as '0123456789ABCDEF', not {user_id[:80]!r}"
        )
    return user_id.upper()


def check_text(text: str | None, name: str) -> str | None:
    """Return an optional text as it is, or say why JSON cannot carry it.

    Raises:
        ConfigurationError: Neither a string nor None; lone surrogates in it.
    """
    if text is None:
        return None
    if not isinstance(text, str):
        raise ConfigurationError(f"{name} must be a string or None, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(f"{name} must be text that UTF-8 can encode; it holds a lone surrogate") from None
    return text


def check_api_key(api_key: str | None) -> str:
    """Return the key without surrounding blanks.

    Raises:
        ConfigurationError: Absent, empty, or not made of printable ASCII. The message never shows it.
    """
    if api_key is None:
        raise ConfigurationError("no API key: pass api_key or set KEYLESS_API_KEY")
    if not isinstance(api_key, str):
        raise ConfigurationError(f"api_key must be a string, not {type(api_key).__name__}")
    api_key = api_key.strip()
    if not api_key:
        raise ConfigurationError("api_key is empty: pass the key of your Keyless tenant or set KEYLESS_API_KEY")
    if not (api_key.isascii() and api_key.isprintable()):
        raise ConfigurationError(
            "api_key must be printable ASCII; it holds control or non-ASCII characters, often from a bad paste"
        )
    return api_key


def check_region(region: Region | str) -> Region:
    """Return the region by its name.

    Raises:
        ConfigurationError: Unknown.
    """
    try:
        return Region(region)
    except ValueError:
        raise ConfigurationError(
            f"region must be one of {', '.join(Region)}, not {region!r}; for another address pass base_url"
        ) from None


def check_base_url(base_url: str) -> str:
    """Return the base URL without a trailing slash.

    Raises:
        ConfigurationError: Not an absolute https URL (http is for loopback hosts), or it carries what the API key
            must not travel with: userinfo, query, fragment.
    """
    if not isinstance(base_url, str):
        raise ConfigurationError(f"base_url must be a string, not {type(base_url).__name__}")
    base_url = base_url.strip()
    if any(c.isspace() or not c.isprintable() or c == "\\" for c in base_url):
        raise ConfigurationError("base_url must not hold blanks, control characters or backslashes")
    try:
        parts = urlsplit(base_url)
        host, _port = parts.hostname, parts.port  # .port raises on a bad one
    except ValueError:  # its text may quote userinfo
        raise ConfigurationError("base_url is no URL; it looks like https://api.keyless.io") from None
    if parts.scheme not in {"https", "http"} or not host:
        raise ConfigurationError("base_url must be an absolute URL such as https://api.keyless.io")
    if "@" in parts.netloc:
        raise ConfigurationError("base_url must not hold userinfo; the key goes into api_key")
    if "?" in base_url or "#" in base_url:
        raise ConfigurationError("base_url must not hold a query or a fragment")
    if any(segment in {".", ".."} for segment in parts.path.replace("%2E", ".").replace("%2e", ".").split("/")):
        raise ConfigurationError("base_url must not hold '.' or '..' segments")
    if parts.scheme == "http" and not _is_loopback(host):
        raise ConfigurationError(
            "base_url must be https: over http anyone on the way reads the API key "
            "(http is for loopback hosts, such as a sandbox)"
        )
    return base_url.rstrip("/")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


_STATUS_ERRORS: Final[Mapping[int, type[StatusError]]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    406: NotAcceptableError,
    409: ConflictError,
    415: UnsupportedMediaTypeError,
    429: RateLimitError,
}
# The documentation says "try again later" of a 500; the rest are what gateways send for a moment.
_TRANSIENT_STATUSES: Final = frozenset({408, 425, 429})


def read(endpoint: Endpoint[T], path: str, answer: Answer, *, api_key: str) -> T:
    """Turn an answer into the endpoint's struct.

    Args:
        endpoint: What was asked.
        path: Path of the request, for messages.
        answer: What came.
        api_key: Struck out wherever the answer echoes it.

    Raises:
        DecodeError: 2xx, JSON of the wrong shape.
        NotJsonError: 2xx, no JSON.
        StatusError: Any other status, by its subclass.
    """
    if 200 <= answer.status < 300:
        try:
            return endpoint.decode(answer.body)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            reason = error
        raise _decode_error(endpoint.method, path, answer, reason, api_key)
    raise _status_error(endpoint.method, path, answer, api_key)


def is_transient(error: KeylessError) -> bool:
    """Whether the same request may well succeed a little later."""
    if isinstance(error, StatusError):
        return error.status in _TRANSIENT_STATUSES or 500 <= error.status < 600
    return isinstance(error, TransportError | NotJsonError)


def _decode_error(method: str, path: str, answer: Answer, reason: Exception, api_key: str) -> DecodeError:
    facts: dict[str, Any] = {
        "status": answer.status,
        "method": method,
        "path": path,
        "request_id": _request_id(answer, api_key),
    }
    where = f"{method} {path} answered {answer.status}"
    if isinstance(reason, msgspec.ValidationError) and _is_json(answer.body):
        return DecodeError(f"{where} with JSON of another shape: {reason}; check base_url or upgrade", **facts)
    kind = "an empty body" if not answer.body.strip() else "a body that is not JSON"
    return NotJsonError(f"{where} with {kind}; a gateway or a captive portal in between?", **facts)


def _is_json(body: bytes) -> bool:
    """Whether the whole body is JSON: the typed decoder stops at the first wrong type and reads no further."""
    try:
        msgspec.json.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False
    return True


def _status_error(method: str, path: str, answer: Answer, api_key: str) -> StatusError:
    status = answer.status
    kind = _STATUS_ERRORS.get(status, ServerError if 500 <= status < 600 else StatusError)
    return kind(
        status=status,
        method=method,
        path=path,
        request_id=_request_id(answer, api_key),
        retry_after=retry_after(answer.headers),
        detail=_printable(answer.body.decode("utf-8", "replace"), api_key),
        advice=_advice(status),
    )


def _advice(status: int) -> str | None:
    """Better words for the statuses that have no class of their own."""
    if 300 <= status < 400:
        return "a redirect, not followed since that would hand the API key to another host; check base_url"
    if status in _TRANSIENT_STATUSES - _STATUS_ERRORS.keys():
        return "not now; try again later"
    return None


_REQUEST_ID_HEADERS: Final = ("X-Request-Id", "X-Correlation-Id", "X-Amzn-RequestId", "X-Amzn-Trace-Id", "CF-Ray")


def _request_id(answer: Answer, api_key: str) -> str | None:
    values = (answer.headers.get(name) for name in _REQUEST_ID_HEADERS)
    return next((_printable(value, api_key) for value in values if value), None)


def _printable(text: str, api_key: str) -> str | None:
    """At most 200 printable characters of a text, the API key struck out in every form in which it may be echoed."""
    # Struck out before the cut, so that no half of a key stays. Only what 200 characters can come from is searched: a
    # character stands for one of the text or, as a part of "***", for one echo.
    text = " ".join(text.split())[: MAX_DETAIL * _WIDEST * (len(api_key) + 1)]
    text = _echo(api_key).sub("***", text)
    text = "".join(c if c.isprintable() else " " for c in text[:MAX_DETAIL])
    return text.strip() or None


_WIDEST: Final = 10  # characters in the longest spelling of one: &#x00002F;
_ENTITIES: Final = (("amp", "&"), ("lt", "<"), ("gt", ">"), ("quot", '"'), ("apos", "'"))


def _echo(api_key: str) -> re.Pattern[str]:
    """Match the key as it is, and as JSON, a URL and HTML write it, with blanks folded as `_printable` folds them."""
    return re.compile("".join(_spellings(character) for character in " ".join(api_key.split())))


def _spellings(character: str) -> str:
    """Match one character of the key: letters and digits as they are, whatever else escaped too."""
    if character.isalnum():
        return character
    code = ord(character)
    code_hex = "".join(f"[{digit}{digit.upper()}]" for digit in f"{code:02x}")
    forms = [  # the longer first, so that nothing of one is left over
        f"%{code_hex}",
        rf"\\u00{code_hex}",
        rf"\\{re.escape(character)}",
        f"&#0{{0,4}}{code};",
        f"&#[xX]0{{0,4}}{code_hex};",
        *(f"&{name};" for name, meant in _ENTITIES if meant == character),
        re.escape(character),
    ]
    if character == " ":
        return f"(?:{'|'.join(forms)}|[+])+"  # a run of blanks was folded into one in the key, and may not be here
    return f"(?:{'|'.join(forms)})"


_SECONDS: Final = re.compile(r"\d{1,15}(\.\d{1,9})?", re.ASCII)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Read ``Retry-After``: seconds, or an HTTP date, which is compared with the answer's own ``Date`` if it has one.

    Returns:
        Seconds from now, at least 0; None where the header is absent or unreadable.
    """
    text = headers.get("Retry-After", "").strip()
    if _SECONDS.fullmatch(text):
        return float(text)
    at = _http_date(text)
    if at is None:
        return None
    # The server's clock may be off ours; its Date is of the same clock as the date that it names.
    now = _http_date(headers.get("Date", ""))
    return max(0.0, at - (time.time() if now is None else now))


def _http_date(text: str) -> float | None:
    try:
        date = parsedate_to_datetime(text)
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
