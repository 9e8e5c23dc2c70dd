"""The endpoints of the API: each turns the parts of a request into a status and a body.

They are as strict as the documentation: they refuse what the real service refuses. Nothing here does I/O, or depends on
aiohttp, on time or on simulated faults.

Source: Keyless documentation, Server API: Operations, Telemetry, External User ID, Users, Devices.
"""

from __future__ import annotations

import hmac
import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple, TypeVar
from urllib.parse import parse_qsl, unquote

import msgspec

from .fields import is_user_id

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from aiokeyless.models import Operation

    from .store import OperationStore

    _Endpoint = Callable[["_Call"], "Answer"]

TENANT: Final = "sandbox"
"""The tenant whose keys the sandbox publishes."""

JSON: Final = "application/json"
_JSON_HEADERS: Final = {"Content-Type": JSON}
_RANGES_OF_JSON: Final = {JSON, "application/*", "*/*"}

#: A percent sign without two hex digits, a fragment, or a character other than printable ASCII.
_BAD_SEGMENT: Final = re.compile(r"%(?![0-9A-Fa-f]{2})|[^!-~]|#")


class Answer(NamedTuple):
    """A status, a body and the headers that go with them."""

    status: int
    body: bytes
    headers: Mapping[str, str] = _JSON_HEADERS


class _Call(NamedTuple):
    """A request that passed the checks of all endpoints; `ids` are the ids in its path, decoded."""

    ids: tuple[str, ...]
    query: str
    body: bytes


class _ExternalUser(msgspec.Struct, rename="camel"):
    """The body of a request that gives a user an external user id."""

    external_user_id: Annotated[str, msgspec.Meta(min_length=1)]


class _Creation(msgspec.Struct, rename="camel"):
    """The body of a creation. Null is refused: an absent field must be left out."""

    operation_id: Annotated[str, msgspec.Meta(min_length=1)]
    operation_payload: str | msgspec.UnsetType = msgspec.UNSET
    external_user_id: str | msgspec.UnsetType = msgspec.UNSET


_SUCCESS: Final = Answer(HTTPStatus.OK, b'{"success":true}')
_KEY_SET_PATH: Final = f"/customers/{TENANT}/.well-known/jwks.json"
_WITH_BODY: Final = {"POST", "PATCH"}
_Body = TypeVar("_Body")


def error_answer(status: int, message: str, headers: Mapping[str, str] | None = None) -> Answer:
    """Return an error answer. Its JSON is the sandbox's own: the documentation does not show an error's body."""
    return Answer(status, msgspec.json.encode({"error": message}), {**_JSON_HEADERS, **(headers or {})})


def is_key(sent: str, key: str) -> bool:
    """Return whether a request sent the right key, in constant time."""
    return hmac.compare_digest(sent.encode("utf-8", "surrogateescape"), key.encode())


_WELCOME: Final = error_answer(
    HTTPStatus.NOT_FOUND,
    "this is a Keyless sandbox: open this address in a browser for the phone; the API is under /v2, and the control "
    "of the sandbox under /sandbox/ (both need the header X-Api-Key)",
)


class _RefusedError(Exception):
    """The request is refused; the message becomes the answer's body."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


class KeylessApi:
    """The endpoints of the API, for one store.

    Args:
        store: Holds the operations.
        api_key: The key that requests must carry.
        on_created: Called with each operation that a request created, before the request is answered.
        key_set: Returns the tenant's published keys, as a JSON Web Key Set. Default: an empty set.
    """

    def __init__(
        self,
        store: OperationStore,
        api_key: str,
        on_created: Callable[[Operation], None],
        key_set: Callable[[], bytes] = lambda: b'{"keys":[]}',
    ) -> None:
        self._store = store
        self._key_set = key_set
        self._key = api_key
        self._on_created = on_created
        routes: dict[str, dict[str, _Endpoint]] = {
            "/v2/operations/{id}": {"GET": self._get_operation},
            "/v2/users/{id}/operations": {"POST": self._create},
            "/v2/users/{id}/operations/pending": {"GET": self._get_pending},
            "/v2/users/{id}/authentications": {"GET": self._get_authentications},
            "/v2/external-users/{id}/authentications": {"GET": self._get_external_authentications},
            "/v2/users/{id}/external-user": {"POST": self._link, "PATCH": self._relink},
            "/v2/external-users/{id}": {"DELETE": self._unlink},
            "/v2/external-users/{id}/users": {"GET": self._find_users},
            "/v2/users/{id}": {"DELETE": self._delete_user},
            "/v2/users/{id}/devices": {"GET": self._get_devices},
            "/v2/users/{id}/devices/{id}": {"DELETE": self._remove_device},
        }
        self._routes = [(re.compile(path.replace("{id}", "([^/]*)")), endpoints) for path, endpoints in routes.items()]

    def answer(self, method: str, target: str, *, api_key: str, accept: str, content_type: str, body: bytes) -> Answer:
        """Answer one request, and apply its effect.

        The first failed check decides the error. The order is: key, route, method, ``Accept``, ``Content-Type``, ids
        and body, existence of what they name.

        Args:
            method: HTTP method.
            target: Request target as received: percent-encoded, with the query.
            api_key: ``X-Api-Key``; "" if absent.
            accept: All ``Accept`` headers, joined by commas; "" if absent.
            content_type: ``Content-Type``; "" if absent.
            body: Body of the request.
        """
        try:
            path = target.partition("?")[0]
            # For a person with curl, before they have a key.
            if path == "/":
                return _WELCOME
            # The key set is public.
            if path == _KEY_SET_PATH:
                _check_method(method, ("GET",))
                return Answer(HTTPStatus.OK, self._key_set())
            endpoint, segments = self._admit(method, target, api_key, accept, content_type)
            return endpoint(_Call(tuple(map(_decode, segments)), target.partition("?")[2], body))
        except _RefusedError as error:
            return error_answer(error.status, str(error), error.headers)

    def _admit(
        self, method: str, target: str, api_key: str, accept: str, content_type: str
    ) -> tuple[_Endpoint, tuple[str, ...]]:
        """Do the checks of all endpoints. Return the endpoint, and the ids in the path, still encoded."""
        if not is_key(api_key, self._key):
            raise _RefusedError(HTTPStatus.UNAUTHORIZED, "X-Api-Key is missing or wrong")
        endpoints, segments = self._route(target)
        _check_method(method, endpoints)
        if not _admits_json(accept):
            raise _RefusedError(HTTPStatus.NOT_ACCEPTABLE, "Accept does not admit application/json")
        if method in _WITH_BODY and content_type.partition(";")[0].strip().lower() != JSON:
            raise _RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Content-Type must be application/json")
        return endpoints[method], segments

    def _route(self, target: str) -> tuple[Mapping[str, _Endpoint], tuple[str, ...]]:
        """Return the endpoints of a path by method, and the ids in the path, still encoded."""
        # Split before decoding: an encoded slash belongs to an id.
        path = target.partition("?")[0]
        for pattern, endpoints in self._routes:
            if match := pattern.fullmatch(path):
                return endpoints, match.groups()
        raise _RefusedError(HTTPStatus.NOT_FOUND, "no such path; the API is under /v2")

    def _get_operation(self, call: _Call) -> Answer:
        found = self._store.operation_json(call.ids[0])
        if found is None:
            raise _RefusedError(HTTPStatus.NOT_FOUND, "no such operation")
        return Answer(HTTPStatus.OK, found)

    def _get_pending(self, call: _Call) -> Answer:
        return Answer(HTTPStatus.OK, self._store.pending_json(_read_user_id(call)))

    def _get_authentications(self, call: _Call) -> Answer:
        return _answer_telemetry(self._store.authentications_json(call.ids[0], _read_operation_id(call.query)))

    def _get_external_authentications(self, call: _Call) -> Answer:
        return _answer_telemetry(self._store.external_authentications_json(call.ids[0], _read_operation_id(call.query)))

    def _link(self, call: _Call) -> Answer:
        user_id, external_user_id = self._read_link(call)
        link = self._store.users.link(user_id, external_user_id)
        if link is None:
            raise _RefusedError(HTTPStatus.CONFLICT, "the user has an external user id, or another user has this one")
        return Answer(HTTPStatus.CREATED, link)

    def _relink(self, call: _Call) -> Answer:
        user_id, external_user_id = self._read_link(call)
        return Answer(HTTPStatus.OK, self._store.users.relink(user_id, external_user_id))

    def _read_link(self, call: _Call) -> tuple[str, str]:
        user_id, body = _read_user_id(call), _read(call.body, _ExternalUser, "an external user")
        self._check_exists(user_id)
        return user_id, body.external_user_id

    def _unlink(self, call: _Call) -> Answer:
        self._store.users.unlink(call.ids[0])
        return Answer(HTTPStatus.NO_CONTENT, b"", {})

    def _find_users(self, call: _Call) -> Answer:
        return Answer(HTTPStatus.OK, self._store.users.search_json(call.ids[0]))

    def _delete_user(self, call: _Call) -> Answer:
        user_id = _read_user_id(call)
        self._check_exists(user_id)
        self._store.users.delete(user_id)
        return _SUCCESS

    def _get_devices(self, call: _Call) -> Answer:
        user_id = _read_user_id(call)
        self._check_exists(user_id)
        return Answer(HTTPStatus.OK, self._store.users.devices_json(user_id))

    def _remove_device(self, call: _Call) -> Answer:
        if not self._store.users.remove_device(_read_user_id(call), call.ids[1]):
            raise _RefusedError(HTTPStatus.NOT_FOUND, "no such device or user")
        return _SUCCESS

    def _check_exists(self, user_id: str) -> None:
        if not self._store.users.exists(user_id):
            raise _RefusedError(HTTPStatus.NOT_FOUND, "no such user")

    def _create(self, call: _Call) -> Answer:
        user_id, creation = _read_user_id(call), _read(call.body, _Creation, "an operation")
        operation = self._store.create(
            user_id,
            creation.operation_id,
            operation_payload=_replace_unset(creation.operation_payload),
            external_user_id=_replace_unset(creation.external_user_id),
        )
        if operation is None:
            raise _RefusedError(HTTPStatus.CONFLICT, "the operationId is taken")
        self._on_created(operation)
        return _SUCCESS


def _check_method(method: str, allowed: Collection[str]) -> None:
    if method not in allowed:
        listed = ", ".join(allowed)
        raise _RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, f"only {listed}", {"Allow": listed})


def _answer_telemetry(found: bytes | None) -> Answer:
    # An id that is not hex is a 404 too: Telemetry documents no 400.
    if found is None:
        raise _RefusedError(HTTPStatus.NOT_FOUND, "user not found")
    return Answer(HTTPStatus.OK, found)


def _read_operation_id(query: str) -> str | None:
    """Return the operation id in a query, the first one of several; None if there is none.

    Raises:
        _RefusedError: The query is not percent-encoded UTF-8.
    """
    try:
        return dict(reversed(parse_qsl(query, keep_blank_values=True, errors="strict"))).get("operationId")
    except ValueError:
        raise _RefusedError(HTTPStatus.BAD_REQUEST, "the query must be percent-encoded UTF-8") from None


def _replace_unset(value: str | msgspec.UnsetType) -> str | None:
    return None if value is msgspec.UNSET else value


def _read_user_id(call: _Call) -> str:
    user_id = call.ids[0]
    if not is_user_id(user_id):
        raise _RefusedError(HTTPStatus.BAD_REQUEST, "the user id must be hex in upper case")
    return user_id


def _read(body: bytes, kind: type[_Body], what: str) -> _Body:
    try:
        # Decoded first, since msgspec does not check the bytes of fields that it skips.
        return msgspec.json.decode(body.decode(), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _RefusedError(HTTPStatus.BAD_REQUEST, f"the body is not {what}: {error}") from None


def _decode(segment: str) -> str:
    """Decode one segment of a path, once.

    Raises:
        _RefusedError: It is not percent-encoded UTF-8.
    """
    try:
        text = unquote(segment, errors="strict")
    except UnicodeDecodeError:
        text = ""
    if not text or _BAD_SEGMENT.search(segment):
        raise _RefusedError(HTTPStatus.BAD_REQUEST, "the id in the path must be percent-encoded UTF-8 and not empty")
    return text


def _admits_json(accept: str) -> bool:
    """Return whether an ``Accept`` header admits ``application/json``; an empty one admits everything."""
    ranges = {part.partition(";")[0].strip().lower() for part in accept.split(",")} - {""}
    return not ranges or not ranges.isdisjoint(_RANGES_OF_JSON)
