"""The checks of arguments and identifiers: each returns the value to use, or raises an error that says what is valid.

Nothing here does I/O.
"""

from __future__ import annotations

import inspect
import ipaddress
import math
import re
import sys
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, TypeVar, get_args
from urllib.parse import urlsplit

from tenacity.wait import wait_base
from yarl import URL

from ._base_errors import ConfigurationError, InvalidIdentifierError
from .models import AuthType, Region, Secret

if TYPE_CHECKING:
    from .events import Listener

T = TypeVar("T")

#: The smallest positive and the largest float, as bounds of "above 0" and "finite".
ABOVE_ZERO: Final = math.ulp(0.0)
FINITE: Final = sys.float_info.max
#: Characters: more than the ids in use have, and within the URL limits of gateways.
MAX_IDENTIFIER: Final = 512
#: A field of a ticket's JSON that other texts are not likely to contain.
_TICKET_FIELD: Final = '"payload_sha256"'


def _wrong(argument: str, requirement: str) -> ConfigurationError:
    return ConfigurationError(f"{argument} {requirement}", argument=argument)


def _wrong_identifier(argument: str, requirement: str) -> InvalidIdentifierError:
    return InvalidIdentifierError(f"{argument} {requirement}", argument=argument)


def check_operation_id(operation_id: str) -> str:
    """Return the operation id unchanged, if it can be sent as one path segment, and is not the JSON of a ticket."""
    # Before the length, since many tickets are too long for an id.
    text: object = operation_id
    if isinstance(text, str) and _TICKET_FIELD in text and text.lstrip().startswith("{"):
        raise _wrong_identifier(
            "operation_id", "must be an id, not the text of a ticket; pass ApprovalTicket.from_json(...) of that text"
        )
    return _check_segment(operation_id, "operation_id")


def check_requested_id(operation_id: str, started_by: str) -> str:
    """Return the id of an operation to ask for unchanged. If the library creates it, proxies must not change the id."""
    check_operation_id(operation_id)
    if started_by == "backend" and ("/" in operation_id or "\\" in operation_id):
        raise _wrong_identifier(
            "operation_id",
            f"must not contain / or \\, as {operation_id[:80]!r} does: proxies decode or refuse these in a URL, so "
            "the user would be asked and no poll would find the operation",
        )
    return operation_id


def check_external_user_id(external_user_id: str) -> str:
    """Return the external user id unchanged, if it can be sent as one path segment.

    The message does not show the id: it may be personal data.
    """
    return _check_segment(external_user_id, "external_user_id", shows=False)


def check_public_signing_key(public_signing_key: str) -> str:
    """Return a device's public signing key unchanged, if it can be sent as one path segment."""
    return _check_segment(public_signing_key, "public_signing_key")


def check_tenant(tenant: str) -> str:
    """Return the name of a tenant unchanged, if it can be sent as one path segment."""
    return _check_segment(tenant, "tenant")


def _check_segment(text: str, name: str, *, shows: bool = True) -> str:
    if not isinstance(text, str):
        raise _wrong_identifier(name, f"must be a string, not {type(text).__name__}")
    if not 1 <= len(text) <= MAX_IDENTIFIER:
        raise _wrong_identifier(name, f"must have 1 to {MAX_IDENTIFIER} characters, not {len(text)}")
    if text in {".", ".."}:
        raise _wrong_identifier(name, f"must not be {text!r}: a URL path cannot carry it")
    # A printable string contains neither of these, and isprintable() is much faster.
    if not text.isprintable() and any(unicodedata.category(c) in {"Cc", "Cs"} for c in text):
        raise _wrong_identifier(
            name, f"must not contain control characters or lone surrogates{f': {text[:80]!r}' if shows else ''}"
        )
    return text


_HEX: Final = re.compile(rf"[0-9A-Fa-f]{{1,{MAX_IDENTIFIER}}}", re.ASCII)


def check_user_id(user_id: str) -> str:
    """Return the user id in upper case, as the service requires it."""
    if not isinstance(user_id, str):
        raise _wrong_identifier("user_id", f"must be a string of hex digits, not {type(user_id).__name__}")
    if _HEX.fullmatch(user_id) is None:
        raise _wrong_identifier(
            "user_id", f"must be 1 to {MAX_IDENTIFIER} hex digits, such as '0123456789ABCDEF', not {user_id[:80]!r}"
        )
    return user_id.upper()


def check_text(text: str | None, name: str) -> str | None:
    """Return an optional text unchanged, if JSON can carry it."""
    if text is None:
        return None
    if not isinstance(text, str):
        raise _wrong(name, f"must be a string or None, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _wrong(name, "must be text that UTF-8 can encode; it contains a lone surrogate") from None
    return text


def check_auth_type(auth_type: object) -> str | None:
    """Return the factor that an approval must have, or None for any. It must be a documented one."""
    if auth_type is None:
        return None
    if not isinstance(auth_type, str) or auth_type not in tuple(AuthType):
        raise _wrong("require_auth_type", f"must be 'biom' for a face, 'pin', or None for any, not {auth_type!r:.80}")
    return str.__str__(auth_type)  # without the name of an enum


def check_choice(value: T, choices: object, name: str) -> T:
    """Return an argument that is one of the values of a ``Literal``."""
    if value not in (valid := get_args(choices)):
        raise _wrong(name, f"must be {' or '.join(map(repr, valid))}, not {value!r:.80}")
    return value


def check_required_text(text: str, name: str) -> str:
    """Return a text unchanged, if JSON can carry it."""
    checked = check_text(text, name)
    if checked is None:
        raise _wrong(name, "must be a string, not None")
    return checked


_TRACEPARENT: Final = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)


def is_traceparent(value: object) -> bool:
    """Return whether this is a ``traceparent`` of W3C Trace Context."""
    return isinstance(value, str) and _TRACEPARENT.fullmatch(value) is not None


def check_number(value: object, name: str, right: str, *, least: float = ABOVE_ZERO, most: float = FINITE) -> float:
    """Return an argument that is a number from `least` to `most`; `right` is what it must be, for the message."""
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most:
            return float(value)
        shown = f"{value!r:.80}"
    except (OverflowError, ValueError):  # of an integer with hundreds or thousands of digits
        shown = "an integer too large for a float"
    raise _wrong(name, f"must be {right}, not {shown}")


def seconds(value: object, name: str, *, zero: bool = False) -> float:
    """Return an argument that is a number of seconds above 0, or at least 0 if `zero`; perhaps infinite."""
    right = f"a number of seconds{', at least 0' if zero else ' above 0'}"
    return check_number(value, name, right, least=0.0 if zero else ABOVE_ZERO, most=math.inf)


def finite_seconds(value: object, name: str, *, zero: bool = False) -> float:
    """Return an argument that is a finite number of seconds above 0, or at least 0 if `zero`."""
    right = f"a finite number of seconds{', at least 0' if zero else ' above 0'}"
    return check_number(value, name, right, least=0.0 if zero else ABOVE_ZERO)


def read_api_key(api_key: object) -> Secret | ConfigurationError:
    """Return the key without surrounding blanks, or the error to raise.

    A key that is absent, empty or not printable ASCII is an error. The message never contains the key. The error is
    returned, not raised: error reporters print local variables, and a frame of its traceback would have the key.
    """
    if api_key is None:
        return ConfigurationError("no API key: pass api_key or set KEYLESS_API_KEY", argument="api_key")
    if not isinstance(api_key, str):
        return _wrong("api_key", f"must be a string, not {type(api_key).__name__}")
    api_key = api_key.strip()
    if not api_key:
        return _wrong("api_key", "is empty: pass the server key of your Keyless tenant or set KEYLESS_API_KEY")
    if not (api_key.isascii() and api_key.isprintable()):
        return _wrong(
            "api_key", "must be printable ASCII; it contains control or non-ASCII characters, often from copy and paste"
        )
    return Secret(api_key)


def check_region(region: Region | str) -> Region:
    """Return the region by its name."""
    try:
        return Region(region)
    except ValueError:
        raise _wrong(
            "region", f"must be one of {', '.join(Region)}, not {region!r}; for another address pass base_url"
        ) from None


# Only hosts that urlsplit and yarl, whose result the connection uses, parse in the same way: ASCII, no zone, no percent
# sign. Resolving an empty or a longer label would raise something other than an OSError.
_LABEL: Final = "[a-z0-9_-]{1,63}"
_AUTHORITY: Final = re.compile(
    rf"(?:\[[0-9a-f:.]+\]|{_LABEL}(?:\.{_LABEL})*\.?)(?::0*[1-9][0-9]*)?", re.ASCII | re.IGNORECASE
)


#: Every path of the API begins with this.
API_VERSION: Final = "/v2"


def check_base_url(base_url: str) -> str:
    """Return the base URL without a trailing slash or a default port, its host in lower case."""
    if not isinstance(base_url, str):
        raise _wrong("base_url", f"must be a string, not {type(base_url).__name__}")
    base_url = base_url.strip()
    if any(c.isspace() or not c.isprintable() or c == "\\" for c in base_url):
        raise _wrong("base_url", "must not contain blanks, control characters or backslashes")
    try:
        parts = urlsplit(base_url)
        # Raises for an invalid port, even if yarl does not.
        _ = parts.port
        url = URL(base_url)
        # The host that the client will connect to, so the one to check.
        host = url.raw_host
        # Raises if a label that begins with xn-- does not encode a name.
        _ = url.host
    # Its text may quote userinfo.
    except ValueError:
        raise _wrong("base_url", "is not a valid URL; an example is https://api.keyless.io") from None
    if parts.scheme not in {"https", "http"} or not host:
        raise _wrong("base_url", "must be an absolute URL such as https://api.keyless.io")
    if "@" in parts.netloc:
        raise _wrong("base_url", "must not contain userinfo; pass the key as api_key")
    if "?" in base_url or "#" in base_url:
        raise _wrong("base_url", "must not contain a query or a fragment")
    if any(segment in {".", ".."} for segment in parts.path.replace("%2E", ".").replace("%2e", ".").split("/")):
        raise _wrong("base_url", "must not contain '.' or '..' segments")
    _check_host(parts.scheme, parts.netloc, host)
    # One service has one base URL: brokers compare it.
    authority = parts.netloc.lower().removesuffix(":443" if parts.scheme == "https" else ":80")
    base_url = f"{parts.scheme}://{authority}{parts.path}".rstrip("/")
    if base_url.endswith(API_VERSION):
        raise _wrong(
            "base_url",
            f"must not end in {API_VERSION}, since each path of the API begins with it; write "
            f"{base_url.removesuffix(API_VERSION)}",
        )
    return base_url


def _check_host(scheme: str, authority: str, host: str) -> None:
    if _AUTHORITY.fullmatch(authority) is None:
        raise _wrong(
            "base_url",
            "must have an unambiguous host: a name in ASCII (xn--... for an international one) or an IP "
            "address (IPv6 in brackets, without a zone), and a port from 1 to 65535 or none",
        )
    if scheme == "http" and not is_loopback(host):
        raise _wrong(
            "base_url",
            "must be https: http would send the API key unencrypted (http is for loopback hosts, such as a sandbox)",
        )


def is_loopback(host: str) -> bool:
    """Return whether a URL's host is this machine, by its name or its address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def whole_number(value: object, name: str, least: int = 1, most: float = math.inf) -> int:
    """Return an argument that is a whole number of this range."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        limits = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise _wrong(name, f"must be a whole number, {limits}, not {value!r}")
    return value


def check_rate(rate: object, name: str) -> float | None:
    """Return a number of polls a second, or None for no limit."""
    return None if rate is None else check_number(rate, name, "a finite number of polls above 0, or None for no limit")


def check_flag(value: object, name: str) -> None:
    if not isinstance(value, bool):
        raise _wrong(name, f"must be True or False, not {value!r}")


def check_schedule(schedule: wait_base | None) -> wait_base | None:
    if schedule is not None and not isinstance(schedule, wait_base):
        raise _wrong(
            "schedule", f"must be a tenacity wait strategy, such as wait_adaptive() or wait_fixed(2), not {schedule!r}"
        )
    return schedule


def check_handler(handler: object, name: str, *, is_plain: bool = False) -> None:
    """Check a function that is called back, or None: no generator function and, if it must be plain, no async one."""
    if handler is not None and not callable(handler):
        raise _wrong(name, f"must be callable or None, not {type(handler).__name__}")
    functions = (handler, type(handler).__call__)
    if any(inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each) for each in functions):
        raise _wrong(name, "must not be a generator function: a call runs none of it")
    if is_plain and any(map(inspect.iscoroutinefunction, functions)):
        raise _wrong(
            name, "must be a plain function: an async one would never be awaited; or use aiokeyless.KeylessClient"
        )


def check_name(name: object) -> str | None:
    if name is not None and not (isinstance(name, str) and name.isprintable() and 1 <= len(name) <= 64):
        raise _wrong("name", "must be 1 to 64 printable characters, or None")
    return name


def check_listeners(listeners: object) -> tuple[Listener, ...]:
    if not isinstance(listeners, Iterable) or isinstance(listeners, str | bytes):
        raise _wrong("listeners", f"must be an iterable of functions, such as a list, not {type(listeners).__name__}")
    checked = tuple(listeners)
    for listener in checked:
        if not callable(listener):
            raise ConfigurationError(
                f"each of listeners must be callable, not {type(listener).__name__}", argument="listeners"
            )
        if any(inspect.iscoroutinefunction(function) for function in (listener, type(listener).__call__)):
            raise ConfigurationError(
                "each of listeners must be a plain function: the client never awaits an async one",
                argument="listeners",
            )
    return checked
