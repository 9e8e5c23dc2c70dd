"""Who may speak to the sandbox from a browser: the page that this sandbox served, and no other page.

The phone's endpoints need no key, and the API's default key is known, so any page that the developer happens to visit
could approve operations if it were let in. Three things keep it out: its requests name it (``Origin``,
``Sec-Fetch-Site``); a POST of JSON, or a header with a key, needs a preflight, which nothing here answers; and a name
of its own that it makes resolve to this machine (DNS rebinding) is no name of ours: that check is the API's too. It
knows neither sockets nor operations.

Source: Fetch Standard, "Origin header"; Fetch Metadata Request Headers, section 2.3.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final

from .api import JSON, Answer, error_answer

if TYPE_CHECKING:
    from collections.abc import Mapping

_HOST: Final = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/?#@\[\]]+)(?::[0-9]+)?")


def refuse_host(host: str, own: str) -> Answer | None:
    """Refuse a request that was sent to a name that is not this server's; None: it is let in.

    ``localhost`` always is, and so is any IP address: to be reached by one, a page would have to come from it. The port
    may be any, since ports are forwarded.

    Args:
        host: ``Host`` header, "" where there is none.
        own: Name or address that the server was told to listen on.
    """
    match = _HOST.fullmatch(host.lower())
    name = match[1].strip("[]") if match else ""
    if name in ("localhost", own.lower()) or _is_address(name):
        return None
    return error_answer(
        HTTPStatus.MISDIRECTED_REQUEST,
        "the sandbox does not answer to this host name (a guard against DNS rebinding): use localhost or an IP "
        "address, or start it with this name as its host (--host)",
    )


def refuse_stranger(method: str, headers: Mapping[str, str]) -> Answer | None:
    """Refuse what another page, or none, has sent, to a host that is ours; None: it is let in.

    A GET without a word of where it comes from is let in: some browsers send none to addresses that are not loopback,
    and what is not of the same origin cannot read the answer. A POST has an effect, so it must say.

    Args:
        method: HTTP method.
        headers: Headers of the request.
    """
    origin = headers.get("Origin")
    own_origin = f"http://{headers.get('Host', '')}".lower()
    foreign = origin is not None and origin.lower() != own_origin
    if foreign or headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
        return error_answer(HTTPStatus.FORBIDDEN, "only the sandbox's own page may ask for this")
    if method != "POST":
        return None
    if origin is None:
        return error_answer(HTTPStatus.FORBIDDEN, "Origin is missing; only the sandbox's own page may ask for this")
    if headers.get("Content-Type", "").partition(";")[0].strip().lower() != JSON:
        return error_answer(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Content-Type must be application/json")
    return None


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
