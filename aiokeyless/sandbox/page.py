"""The phone's page as one document: phone.html with phone.css and phone.js, and a policy that allows only these."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

HEADERS: Final = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    # With no-referrer, a browser may send "Origin: null" with the page's own POSTs.
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Headers of the page and of all answers to it."""


class Page(NamedTuple):
    """The page and its headers."""

    html: bytes
    headers: Mapping[str, str]


@cache
def load_page() -> Page:
    """Read the page. Its policy allows only its own script and style, by their hashes."""
    folder = resources.files("aiokeyless.sandbox")
    style, script = (folder.joinpath(f"phone.{kind}").read_bytes() for kind in ("css", "js"))
    html = folder.joinpath("phone.html").read_bytes()
    html = html.replace(b"<style></style>", b"<style>%b</style>" % style)
    html = html.replace(b"<script></script>", b"<script>%b</script>" % script)
    policy = [
        "default-src 'none'",
        f"script-src {_hash(script)}",
        f"style-src {_hash(style)}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": "; ".join(policy)}
    return Page(html, {**HEADERS, **headers})


def _hash(content: bytes) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"
