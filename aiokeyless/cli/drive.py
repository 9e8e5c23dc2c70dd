"""The commands that drive a running sandbox: ``aiokeyless sandbox approve`` and the others.

They drive the sandbox at ``$KEYLESS_BASE_URL`` with ``$KEYLESS_API_KEY``. Without that address, they drive the one on
this machine's default port with the default key. A key in the environment may then be that of a real tenant.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

import aiohttp
import msgspec
from cyclopts import Parameter

from aiokeyless._validation import check_base_url, check_external_user_id, read_api_key
from aiokeyless._version import __version__
from aiokeyless.errors import ConfigurationError
from aiokeyless.models import Authentication, Device, Operation

from .app import (
    AsJson,
    AuthType,
    CommandError,
    Count,
    Flag,
    OperationId,
    OptionalCount,
    OptionalDelay,
    OptionalOperationId,
    User,
    UserId,
    limit,
    validator,
)
from .error_messages import describe_method, format_count
from .render import print_list, print_object, print_result, show_waiting
from .sandbox import DEFAULT_KEY, DEFAULT_PORT, sandbox

if TYPE_CHECKING:
    from collections.abc import Mapping

T = TypeVar("T")

_TIMEOUT: Final = aiohttp.ClientTimeout(total=10)
#: Copied from aiokeyless.sandbox.control, whose import would load the server.
_IDENTITY: Final = "X-Keyless-Sandbox"
#: The result of a command that has none.
_DONE: Final = {"done": True}

Method = Literal["GET", "POST", "PATCH", "DELETE"]
ExternalUserId = Annotated[str | None, Parameter(validator=validator(check_external_user_id))]


# -- approving


@sandbox.command(help_epilogue="Example:\n  aiokeyless sandbox approve order-7")
async def approve(
    operation_id: OperationId,
    /,
    *,
    auth_type: AuthType = "biom",
    user: User = None,
    payload: str | None = None,
    external_user_id: ExternalUserId = None,
    as_json: AsJson = False,
) -> None:
    """Approve an operation, as its user does on the phone.

    Args:
        auth_type: With the face (biom), or with the PIN (pin).
        user: The user, in hex: needed only if the phone is to create the operation.
        payload: The approved text; if the operation exists, its payload must be the same.
        external_user_id: Your own id of the user; if the operation exists, its own must be the same.
    """
    fields = {
        "operationId": operation_id,
        "authType": auth_type,
        "userId": user,
        "operationPayload": payload,
        "externalUserId": external_user_id,
    }
    operation = await _post("approve", fields, Operation, as_json=as_json)
    print_result(
        {**operation.to_dict(), "is_approved": operation.is_approved},
        f"{operation.operation_id} is approved{describe_method(operation.auth_type)}.",
        as_json=as_json,
    )


def _check_subject(operation_id: str | None = None, *, user: str | None = None, **_others: object) -> None:
    if operation_id is None and user is None:
        raise ValueError("Name an OPERATION_ID, or the --user of an attempt without one.")


@sandbox.command(
    validator=_check_subject,
    usage="Usage: aiokeyless sandbox decline [OPTIONS] [OPERATION_ID]",
    help_epilogue="Example:\n  aiokeyless sandbox decline order-7 --code 30004",
)
async def decline(
    operation_id: OptionalOperationId = None,
    /,
    *,
    code: Count = 30003,
    auth_type: AuthType = "biom",
    user: User = None,
    as_json: AsJson = False,
) -> None:
    """Let an attempt to authenticate fail; its operation stays pending.

    Args:
        operation_id: The operation; if left out, Telemetry shows the user's attempt without an operation id.
        code: Why: 30003 the user left the scan, 30004 the face did not match, or another code of the vendor.
        auth_type: With the face (biom), or with the PIN (pin).
        user: The user, in hex: needed only if the phone is to create the operation, or without one.
    """
    fields = {"operationId": operation_id, "errorCode": code, "authType": auth_type, "userId": user}
    attempt = await _post("decline", fields, Authentication, as_json=as_json)
    why = f"{attempt.reason or 'failed'} ({attempt.error_code})."
    declined = f"{operation_id} is declined: {why} It stays pending."
    line = declined if operation_id else f"An attempt without an operation id failed: {why}"
    print_result(attempt.to_dict(), line, as_json=as_json)


@sandbox.command(name="list", help_epilogue="Example:\n  aiokeyless sandbox list --state pending")
async def list_operations(
    *, user: User = None, state: Literal["pending", "approved"] | None = None, as_json: AsJson = False
) -> None:
    """List the operations, oldest first.

    Args:
        user: Only those of this user, in hex.
        state: Only those in this state.
    """
    answer = await _request(
        "GET", "list", {"userId": user, "state": state}, dict[str, list[Operation]], as_json=as_json
    )
    found = answer["operations"]
    rows = [
        {
            "Operation": operation.operation_id,
            "State": operation.state,
            "User": operation.user_id,
            "Payload": operation.operation_payload,
            "External user": operation.external_user_id,
        }
        for operation in found
    ]
    print_list({"operations": [operation.to_dict() for operation in found]}, rows, "No operations.", as_json=as_json)


# -- faults


@sandbox.command(help_epilogue="Example:\n  aiokeyless sandbox fail --status 429 --retry-after 2 --times 3")
async def fail(
    *,
    status: Annotated[int, limit(range(200, 600).__contains__, "from 200 to 599")] = 503,
    times: OptionalCount = None,
    retry_after: OptionalDelay = None,
    stored: Flag = False,
    method: Method | None = None,
    as_json: AsJson = False,
) -> None:
    """Let the service answer with an error.

    Args:
        status: The status to answer.
        times: Number of requests; if left out, all until "recover".
        retry_after: Seconds in the header Retry-After.
        stored: Let each request take effect before it fails.
        method: Only requests with this method.
    """
    fields = {"status": status, "times": times, "retryAfter": retry_after, "stored": stored, "method": method}
    await _post("fail", fields, dict[str, object], as_json=as_json)
    line = f"The service answers {status} to {_describe_requests(times, method)}."
    print_result(_DONE, line, as_json=as_json)


@sandbox.command(help_epilogue="Example:\n  aiokeyless sandbox drop --stored --method POST --times 1")
async def drop(
    *, times: OptionalCount = None, stored: Flag = False, method: Method | None = None, as_json: AsJson = False
) -> None:
    """Let the service drop connections without an answer.

    Args:
        times: Number of requests; if left out, all until "recover".
        stored: Let each request take effect before its connection is dropped.
        method: Only requests with this method.
    """
    await _post("drop", {"times": times, "stored": stored, "method": method}, dict[str, object], as_json=as_json)
    line = f"The service drops the connection of {_describe_requests(times, method)}."
    print_result(_DONE, line, as_json=as_json)


def _describe_requests(times: int | None, method: str | None) -> str:
    noun = f"{method} request" if method else "request"
    if times is None:
        return f"each {noun}, until: aiokeyless sandbox recover"
    return f"the next {noun if times == 1 else format_count(times, noun)}"


@sandbox.command(help_epilogue="Example:\n  aiokeyless sandbox recover")
async def recover(*, as_json: AsJson = False) -> None:
    """End the faults of "fail" and "drop"."""
    await _post("recover", {}, dict[str, object], as_json=as_json)
    print_result(_DONE, "The service works.", as_json=as_json)


# -- users and keys


@sandbox.command(help_epilogue="Example:\n  aiokeyless sandbox unlock C0FFEE")
async def unlock(user_id: UserId, /, *, as_json: AsJson = False) -> None:
    """End the lockout of a user, which follows five failed attempts."""
    await _post("unlock", {"userId": user_id}, dict[str, object], as_json=as_json)
    print_result(_DONE, f"User {user_id.upper()} is unlocked.", as_json=as_json)


@sandbox.command(help_epilogue="Example:\n  aiokeyless sandbox enroll C0FFEE --external-user-id account-1042")
async def enroll(user_id: UserId, /, *, external_user_id: ExternalUserId = None, as_json: AsJson = False) -> None:
    """Enroll a user, or enroll them on one more device.

    Args:
        external_user_id: Your own id of the user.
    """
    device = await _post("enroll", {"userId": user_id, "externalUserId": external_user_id}, Device, as_json=as_json)
    facts = {"Enrolled": device.user_id, "Device": device.public_signing_key}
    print_object(device.to_dict(), facts, bold="Enrolled", as_json=as_json)


@sandbox.command(
    help_epilogue="""\
Example:
  token=$(aiokeyless sandbox sign order-7)
  aiokeyless verify "$token" --tenant sandbox --user C0FFEE --data "Pay 40\""""
)
async def sign(operation_id: OperationId, /, *, tampered: Flag = False, as_json: AsJson = False) -> None:
    """Print what the phone signed at an approval; needs the extra "jwt".

    Args:
        tampered: Change the text after signing, so that the signature is wrong.
    """
    signed = await _post("sign", {"operationId": operation_id, "tampered": tampered}, dict[str, str], as_json=as_json)
    print_result(signed, signed["token"], as_json=as_json)


@sandbox.command(help_epilogue="Example:\n  aiokeyless sandbox rotate --retire")
async def rotate(*, retire: Flag = False, as_json: AsJson = False) -> None:
    """Let phones sign with a new key, and print its id; needs the extra "jwt".

    Args:
        retire: Do not publish the earlier keys any more.
    """
    key_id = (await _post("rotate", {"retire": retire}, dict[str, str], as_json=as_json))["keyId"]
    print_result({"key_id": key_id}, key_id, as_json=as_json)


# -- the exchange


async def _post(name: str, fields: Mapping[str, object], kind: type[T], *, as_json: bool) -> T:
    return await _request("POST", name, fields, kind, as_json=as_json)


async def _request(method: str, name: str, fields: Mapping[str, object], kind: type[T], *, as_json: bool) -> T:
    """Send the sandbox a request, and return its answer.

    Args:
        method: HTTP method.
        name: The endpoint.
        fields: The fields of the body, or of the query of a GET. None leaves a field out.
        kind: The type of the answer.
        as_json: The command prints JSON only.

    Raises:
        CommandError: No sandbox answers, or it refuses.
    """
    given = {field: value for field, value in fields.items() if value is not None}
    sent: dict[str, Any] = {"params": given} if method == "GET" else {"json": given}
    url, key = _read_address()
    try:
        async with (
            show_waiting(url, quiet=as_json),
            aiohttp.ClientSession(timeout=_TIMEOUT, headers={"X-Api-Key": key}) as session,
            session.request(method, f"{url}/sandbox/{name}", allow_redirects=False, **sent) as answer,
        ):
            content = await answer.read()
    except (aiohttp.ClientError, TimeoutError):
        raise CommandError(f"no sandbox answers at {url}; {_ADVICE}") from None
    if _IDENTITY not in answer.headers:
        raise CommandError(f"the server at {url} is not a sandbox; {_ADVICE}")
    if (version := answer.headers[_IDENTITY]) != __version__:
        raise CommandError(f"the sandbox at {url} is that of aiokeyless {version}; start it with {__version__}")
    if answer.status == 401:
        raise CommandError(
            f"the sandbox at {url} has another key; export both variables that it printed, KEYLESS_BASE_URL and "
            "KEYLESS_API_KEY"
        )
    if answer.status != 200:
        raise CommandError(msgspec.json.decode(content)["error"])
    return msgspec.json.decode(content, type=kind)


_ADVICE: Final = "start one with: aiokeyless sandbox, or export the KEYLESS_BASE_URL that it printed"


def _read_address() -> tuple[str, str]:
    """Return the base URL of the sandbox, and its key."""
    base_url = os.environ.get("KEYLESS_BASE_URL", "").strip()
    if not base_url:
        return f"http://127.0.0.1:{DEFAULT_PORT}", DEFAULT_KEY
    key = read_api_key(os.environ.get("KEYLESS_API_KEY", "").strip() or DEFAULT_KEY)
    if isinstance(key, ConfigurationError):
        raise CommandError(f"$KEYLESS_API_KEY is wrong: {key}")
    try:
        return check_base_url(base_url), key.reveal()
    except ConfigurationError as error:
        raise CommandError(f"$KEYLESS_BASE_URL is wrong: {error}") from None
