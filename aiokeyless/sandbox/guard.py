"""The checks that refuse browser requests from any page other than the one that this sandbox served.

The phone's endpoints need no key, and the default key of all others is public. Without these checks, any page that a
developer visits could approve operations. Three things prevent that:

- The browser names the page in each request (``Origin``, ``Sec-Fetch-Site``).
- A POST of JSON, or a header with a key, needs a preflight, which the sandbox does not answer.
- A request for another host name is refused, by the API too. The page's owner may have made that name resolve to this
  machine (DNS rebinding).

Source: Fetch Standard, "Origin header"; Fetch Metadata Request Headers, section 2.3.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final

from .api import JSON, Answer, error_answer, is_key

if TYPE_CHECKING:
    from collections.abc import Mapping

_HOST: Final = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/?#@\[\]]+)(?::[0-9]+)?")


def refuse_host(host: str, own: str) -> Answer | None:
    """Return the refusal of a request that names a host other than this server; None if the host is accepted.

    ``localhost`` and any IP address are accepted: a page whose requests name an address was itself served from that
    address. Any port is accepted, since ports may be forwarded.

    Args:
        host: ``Host`` header; "" if absent.
        own: Name or address that the server listens on.
    """
    match = _HOST.fullmatch(host.lower())
    name = match[1].strip("[]") if match else ""
    if name in ("localhost", own.lower()) or _is_address(name):
        return None
    return error_answer(
        HTTPStatus.MISDIRECTED_REQUEST,
        "the sandbox does not accept this host name (a protection against DNS rebinding): use localhost or an IP "
        "address, or start it with this name as its host (--host)",
    )


def refuse_foreign_origin(method: str, headers: Mapping[str, str]) -> Answer | None:
    """Return the refusal of a request that did not come from the sandbox's own page; None if it is accepted.

    A GET without an origin is accepted: some browsers send none to addresses other than loopback, and a page of another
    origin cannot read the answer. A POST has an effect, so it must name its origin.

    Args:
        method: HTTP method.
        headers: Headers of the request.
    """
    if _is_foreign(headers):
        return error_answer(HTTPStatus.FORBIDDEN, "only the sandbox's own page may request this")
    if method == "POST" and "Origin" not in headers:
        return error_answer(HTTPStatus.FORBIDDEN, "Origin is missing; only the sandbox's own page may request this")
    return _refuse_type(method, headers)


def refuse_driver(method: str, headers: Mapping[str, str], api_key: str) -> Answer | None:
    """Return the refusal of a request that did not come from a program with the key; None if it is accepted.

    No web page may drive the sandbox, even with the key.

    Args:
        method: HTTP method.
        headers: Headers of the request.
        api_key: The key that the request must carry.
    """
    if _is_foreign(headers):
        return error_answer(HTTPStatus.FORBIDDEN, "no web page may request this")
    if not is_key(headers.get("X-Api-Key", ""), api_key):
        return error_answer(HTTPStatus.UNAUTHORIZED, "X-Api-Key is missing or wrong")
    return _refuse_type(method, headers)


def _is_foreign(headers: Mapping[str, str]) -> bool:
    """Return whether a request comes from a page other than the sandbox's own."""
    own_origin = f"http://{headers.get('Host', '')}"
    is_own = headers.get("Origin", own_origin).lower() == own_origin.lower()
    return not is_own or headers.get("Sec-Fetch-Site", "same-origin") != "same-origin"


def _refuse_type(method: str, headers: Mapping[str, str]) -> Answer | None:
    if method != "POST" or headers.get("Content-Type", "").partition(";")[0].strip().lower() == JSON:
        return None
    return error_answer(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Content-Type must be application/json")


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
