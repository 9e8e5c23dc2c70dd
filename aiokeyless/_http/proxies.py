"""The proxy that the environment names for the service, read as urllib and curl read it.

A proxy's URL may hold a password, so it is a secret, and no function that raises has it as a text.
"""

from __future__ import annotations

import logging
from base64 import b64encode
from typing import TYPE_CHECKING, Any, Final
from urllib.request import getproxies, proxy_bypass

from yarl import URL

from aiokeyless._validation import is_loopback
from aiokeyless.errors import ConfigurationError
from aiokeyless.models import Secret

if TYPE_CHECKING:
    import aiohttp

logger: Final = logging.getLogger("aiokeyless")


def find_proxy(base_url: str) -> Secret | None:
    """Return the URL of the proxy for a service; None if requests go directly.

    ``$HTTPS_PROXY`` comes before ``$ALL_PROXY``, and ``$NO_PROXY`` excepts hosts. A loopback host has no proxy. A SOCKS
    or ``https:`` proxy is not used, with a warning.
    """
    proxy = read_environment(base_url)
    scheme = "http" if proxy is None else _scheme_of(proxy)
    if scheme is None:
        raise ConfigurationError(
            "$HTTPS_PROXY (or $ALL_PROXY) must be the URL of a proxy, such as http://proxy.example:3128; its value is "
            "not shown, as it may hold a password"
        )
    if scheme == "http":
        return proxy
    logger.warning(
        "requests do not use the proxy of $HTTPS_PROXY (or $ALL_PROXY): it must be an http:// proxy, not %s://", scheme
    )
    return None


def read_environment(base_url: str) -> Secret | None:
    """Return the proxy that the environment names for a service; it may be of any kind."""
    return None if _is_excepted(base_url) else _find_named(base_url, "https", "all")


def why_unused(base_url: str, borrowed: aiohttp.ClientSession | None) -> str | None:
    """Return why a client without a proxy does not use the one that the environment names; None if it could not.

    On a session that it borrows, aiohttp would find the proxy, and does not read ``$ALL_PROXY``.
    """
    proxy = _find_named(base_url, *(("https", "all") if borrowed is None else ("https",)))
    if proxy is None or _scheme_of(proxy) != "http":
        return None
    if _is_excepted(base_url):
        return "$NO_PROXY excepts this host"
    if borrowed is not None and borrowed.trust_env:
        return None
    return "make the client, or its session, with trust_env=True"


def _is_excepted(base_url: str) -> bool:
    service = URL(base_url)
    return bool(proxy_bypass(f"{service.host}:{service.port}"))


def _find_named(base_url: str, *schemes: str) -> Secret | None:
    proxies = getproxies()
    named = next(filter(None, map(proxies.get, schemes)), None)
    if not named or is_loopback(URL(base_url).host or ""):
        return None
    return Secret(named if "://" in named else f"http://{named}")


def options_for(proxy: Secret) -> dict[str, Any]:
    """Return aiohttp's options for requests by a proxy. By itself, aiohttp can send only a password in Latin-1."""
    url = URL(proxy.reveal())
    login = b64encode(f"{url.user or ''}:{url.password or ''}".encode()).decode()
    headers = {"Proxy-Authorization": f"Basic {login}"} if url.raw_user or url.raw_password else {}
    return {"proxy": url.with_user(None), "proxy_headers": headers}


def show_proxy(proxy: Secret) -> str:
    """Return the scheme, the host and the port of a proxy."""
    return str(URL(proxy.reveal()).origin())


def _scheme_of(proxy: Secret) -> str | None:
    """Return the scheme of a proxy's URL; None if it is no URL of a host.

    What follows the port may be the rest of a password that has an ``@`` and a ``/``; or the slash was forgotten.
    """
    try:
        url = URL(proxy.reveal())
    except ValueError:
        return None
    return url.scheme if url.host and url.path_qs == "/" and not url.fragment else None
