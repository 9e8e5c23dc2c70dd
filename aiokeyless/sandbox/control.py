"""The JSON API under ``/sandbox/``, with which other programs and the command line drive a running sandbox.

`ENDPOINTS` lists all of it. Each request must carry the sandbox's API key; guard.py refuses web pages. Simulated faults
do not affect these requests, and the journal does not contain them.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple

import msgspec
from aiohttp import web

from aiokeyless._validation import MAX_IDENTIFIER
from aiokeyless._version import __version__
from aiokeyless.errors import ConfigurationError

from .api import Answer, error_answer
from .attempts import CANCELLED, attempt_fields
from .guard import refuse_driver, refuse_host
from .page import HEADERS
from .service import Service
from .store import operation_fields
from .users import device_fields

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

IDENTITY: Final = "X-Keyless-Sandbox"
"""Header of every answer. Without it, the command line refuses the answer as not a sandbox's."""

_HEADERS: Final = {**HEADERS, IDENTITY: __version__}

UserId = Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Fa-f]+\Z")]
_ExternalUserId = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_IDENTIFIER)]
_OperationId = Annotated[str, msgspec.Meta(min_length=1)]
_AuthType = Literal["biom", "pin"]
_Times = Annotated[int, msgspec.Meta(ge=1)]
_Method = Literal["GET", "POST", "PATCH", "DELETE"]


class Body(msgspec.Struct, rename="camel", kw_only=True, forbid_unknown_fields=True):
    """Base of the bodies. An unknown field is an error."""


class Selection(Body):
    """Which operations to list."""

    user_id: UserId | None = None
    state: Literal["pending", "approved"] | None = None


class Approval(Body):
    """The arguments of `Sandbox.approve`."""

    operation_id: _OperationId
    auth_type: _AuthType = "biom"
    user_id: UserId | None = None
    operation_payload: str | None = None
    external_user_id: str | None = None


class Refusal(Body):
    """The arguments of `Sandbox.fail_authentication`. By default, the user cancels."""

    operation_id: _OperationId | None = None
    error_code: Annotated[int, msgspec.Meta(ge=1)] = CANCELLED
    auth_type: _AuthType = "biom"
    user_id: UserId | None = None
    external_user_id: str | None = None

    def __post_init__(self) -> None:
        if self.operation_id is None and self.user_id is None:
            raise ValueError("name an operationId, or the userId of an attempt without one")


class Drop(Body):
    """The arguments of `Sandbox.drop_next`. Without `times`, the fault lasts until `recover`."""

    times: _Times | None = None
    stored: bool = False
    method: _Method | None = None


class Failure(Drop):
    """The arguments of `Sandbox.fail_next`. Without `times`, the fault lasts until `recover`."""

    status: Annotated[int, msgspec.Meta(ge=200, le=599)] = HTTPStatus.SERVICE_UNAVAILABLE
    retry_after: Annotated[float, msgspec.Meta(ge=0)] | None = None


class Nothing(Body):
    """A body without fields."""


class NamedUser(Body):
    """A user that a request names."""

    user_id: UserId


class Enrolment(NamedUser):
    """The arguments of `Sandbox.enroll`."""

    external_user_id: _ExternalUserId | None = None


class Signature(Body):
    """The arguments of `Sandbox.sign`."""

    operation_id: _OperationId
    tampered: bool = False


class Rotation(Body):
    """The arguments of `Sandbox.rotate_keys`."""

    retire: bool = False


class _NotFoundError(Exception):
    """There is no such operation."""


def _list(sandbox: Service, user_id: str | None, state: str | None) -> object:
    user = user_id and user_id.upper()
    return {
        "operations": [
            operation_fields(operation)
            for operation in sandbox.operations.values()
            if user in (None, operation.user_id) and state in (None, operation.state)
        ]
    }


def _approve(sandbox: Service, operation_id: str, user_id: str | None, **others: Any) -> object:
    if user_id is None:
        _check_exists(sandbox, operation_id)
    return operation_fields(sandbox.approve(operation_id, user_id=user_id, **others))


def _decline(sandbox: Service, operation_id: str | None, user_id: str | None, **others: Any) -> object:
    if operation_id is not None and user_id is None:
        _check_exists(sandbox, operation_id)
    return attempt_fields(sandbox.fail_authentication(operation_id, user_id=user_id, **others))


def _check_exists(sandbox: Service, operation_id: str) -> None:
    if operation_id not in sandbox.operations:
        raise _NotFoundError(
            f"there is no operation {operation_id!r}; create it first, or name its user if the phone is to create it"
        )


def _enroll(sandbox: Service, user_id: str, external_user_id: str | None) -> object:
    return device_fields(sandbox.enroll(user_id, external_user_id=external_user_id))


def _sign(sandbox: Service, operation_id: str, *, tampered: bool) -> object:
    _check_exists(sandbox, operation_id)
    return {"token": sandbox.sign(operation_id, tampered=tampered)}


def _rotate(sandbox: Service, *, retire: bool) -> object:
    return {"keyId": sandbox.rotate_keys(retire=retire)}


class ControlEndpoint(NamedTuple):
    """What one path does.

    Attributes:
        method: The HTTP method.
        body: The fields of the JSON body, or of the query of a GET.
        act: Called with the sandbox, and the fields by name; returns the body of the answer, as data for JSON. None: no
            fields.
    """

    method: str
    body: type[Body]
    act: Callable[..., object]


ENDPOINTS: Final[Mapping[str, ControlEndpoint]] = {
    "list": ControlEndpoint("GET", Selection, _list),
    "approve": ControlEndpoint("POST", Approval, _approve),
    "decline": ControlEndpoint("POST", Refusal, _decline),
    "fail": ControlEndpoint("POST", Failure, Service.fail_next),
    "drop": ControlEndpoint("POST", Drop, Service.drop_next),
    "recover": ControlEndpoint("POST", Nothing, Service.recover),
    "unlock": ControlEndpoint("POST", NamedUser, Service.unlock),
    "enroll": ControlEndpoint("POST", Enrolment, _enroll),
    "sign": ControlEndpoint("POST", Signature, _sign),
    "rotate": ControlEndpoint("POST", Rotation, _rotate),
}
"""The endpoints, by the last segment of their paths."""


class Control:
    """Answers the requests under ``/sandbox/``.

    Args:
        sandbox: The sandbox that they drive.
        host: Name or address that the server listens on.
    """

    def __init__(self, sandbox: Service, host: str) -> None:
        self._sandbox = sandbox
        self._host = host

    async def serve(self, request: web.Request) -> web.Response:
        """Answer one request."""
        headers = request.headers
        answer = refuse_host(headers.get("Host", ""), self._host) or refuse_driver(
            request.method, headers, self._sandbox.api_key
        )
        answer = answer or await apply(request, request.match_info["name"], ENDPOINTS, self._sandbox)
        return web.Response(status=answer.status, body=answer.body, headers={**_HEADERS, **answer.headers})


async def apply(request: web.Request, name: str, endpoints: Mapping[str, ControlEndpoint], sandbox: Service) -> Answer:
    """Apply a request to the sandbox, and return the answer."""
    endpoint = endpoints.get(name)
    if endpoint is None:
        return error_answer(HTTPStatus.NOT_FOUND, f"no such path; those under /sandbox/: {', '.join(ENDPOINTS)}")
    if request.method != endpoint.method:
        return error_answer(HTTPStatus.METHOD_NOT_ALLOWED, f"only {endpoint.method}", {"Allow": endpoint.method})
    try:
        body = await _read(request, endpoint)
    except (msgspec.DecodeError, web.RequestPayloadError, RecursionError) as error:
        return error_answer(HTTPStatus.BAD_REQUEST, f"the fields are not valid: {error}")
    try:
        return Answer(HTTPStatus.OK, msgspec.json.encode(endpoint.act(sandbox, **msgspec.structs.asdict(body)) or {}))
    except _NotFoundError as error:
        return error_answer(HTTPStatus.NOT_FOUND, str(error))
    # The body is valid, so the sandbox's state does not permit the request.
    except ConfigurationError as error:
        return error_answer(HTTPStatus.CONFLICT, str(error))


async def _read(request: web.Request, endpoint: ControlEndpoint) -> Body:
    if endpoint.method == "GET":
        return msgspec.convert(dict(request.query), endpoint.body)
    return msgspec.json.decode(await request.read(), type=endpoint.body)
