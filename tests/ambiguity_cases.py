"""Which failures of a create may have taken effect, as one table of cases.

The pure function (tests/_rules/test_ambiguity.py), the client's create over real HTTP (tests/_http/test_ambiguity.py)
and the worker (tests/worker/test_ambiguity.py) run the same table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest

from aiokeyless.errors import (
    AuthenticationError,
    BadRequestError,
    ClientClosedError,
    ConfigurationError,
    ConflictStatusError,
    DecodeError,
    KeylessError,
    NotAcceptableError,
    NotFoundError,
    NotJsonError,
    PermissionDeniedError,
    RateLimitError,
    RequestTimeoutError,
    ServerError,
    StatusError,
    TransportError,
    UnsupportedMediaTypeError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokeyless.sandbox import Sandbox

USER_ID: Final = "0123456789ABCDEF"
OPERATION_ID: Final = "txn-1"
_POST: Final[dict[str, Any]] = {"method": "POST", "path": f"/v2/users/{USER_ID}/operations"}

_CLASSES: Final[dict[int, type[StatusError]]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    406: NotAcceptableError,
    409: ConflictStatusError,
    415: UnsupportedMediaTypeError,
    429: RateLimitError,
}


class AmbiguityCase(NamedTuple):
    """One failure of a create.

    Attributes:
        name: What the service, or what is in front of it, answers to the POST.
        error: The failure.
        may_have_taken_effect: Whether the operation may exist after it.
        fail: Has a sandbox answer the next POST so, although it has stored the operation.
    """

    name: str
    error: KeylessError
    may_have_taken_effect: bool
    fail: Callable[[Sandbox], None]

    def __str__(self) -> str:
        return self.name


def _answered(status: int, body: bytes = b"") -> Callable[[Sandbox], None]:
    return lambda sandbox: sandbox.fail_next(status, method="POST", stored=True, body=body)


def _status(status: int, *, may_have_taken_effect: bool) -> AmbiguityCase:
    kind = _CLASSES.get(status, ServerError if status >= 500 else StatusError)
    body = b'{"success": true}' if status < 300 else b""
    return AmbiguityCase(str(status), kind(status=status, **_POST), may_have_taken_effect, fail=_answered(status, body))


def _unreadable(name: str, kind: type[DecodeError], body: bytes, *, status: int = 200) -> AmbiguityCase:
    error = kind("cannot be decoded", status=status, **_POST)
    return AmbiguityCase(name, error, may_have_taken_effect=True, fail=_answered(status, body))


#: What a sandbox can be told to answer.
ANSWERED: Final = (
    # A success of whatever kind: the service documents 200 alone, and a 201 means the same.
    *(_status(status, may_have_taken_effect=True) for status in (202, 299)),
    *(_unreadable(f"{status} with a page", NotJsonError, b"<html>", status=status) for status in (200, 201)),
    *(_unreadable(f"{status} of another shape", DecodeError, b"{}", status=status) for status in (200, 201)),
    *(_unreadable(f"{status} with nothing", NotJsonError, b"", status=status) for status in (200, 201)),
    _unreadable("200 without success", DecodeError, b'{"success": false}'),
    *(_status(status, may_have_taken_effect=True) for status in (408, 500, 501, 502, 503, 504, 599)),
    AmbiguityCase(
        "a dropped connection",
        TransportError("no answer", **_POST),
        may_have_taken_effect=True,
        fail=lambda sandbox: sandbox.drop_next(method="POST", stored=True),
    ),
    # Refusals. An operation that is there after one is somebody else's.
    *(
        _status(status, may_have_taken_effect=False)
        for status in (300, 302, 307, 400, 401, 403, 404, 406, 409, 410, 415, 425, 429, 499)
    ),
)


def _raised(name: str, error: KeylessError, *, may_have_taken_effect: bool) -> AmbiguityCase:
    return AmbiguityCase(name, error, may_have_taken_effect, fail=lambda _: pytest.fail("no answer causes it"))


CASES: Final = (
    *ANSWERED,
    *(_status(status, may_have_taken_effect=True) for status in range(203, 299)),
    _raised("a taken id of its own", StatusError(status=409, **_POST), may_have_taken_effect=True),
    _raised("no answer in time", RequestTimeoutError("no answer", **_POST), may_have_taken_effect=True),
    _raised("the client was closed", ClientClosedError("closed"), may_have_taken_effect=True),
    _raised("no connection", TransportError("refused", sent=False, **_POST), may_have_taken_effect=False),
    _raised("a wrong argument", ConfigurationError("wrong"), may_have_taken_effect=False),
    _raised("a status that HTTP does not have", StatusError(status=600, **_POST), may_have_taken_effect=False),
)
