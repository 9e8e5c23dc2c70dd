"""`decode_content`: undoes the content encoding of an answer within a limit. Pure.

The requests ask for no encoding, and aiohttp inflates nothing: its older versions have no bound. Some gateways send
gzip all the same.
"""

from __future__ import annotations

import zlib
from typing import Final

#: For zlib: a header and a trailer of gzip, and the largest window.
_GZIP: Final = 16 + zlib.MAX_WBITS


class UnusableContentError(Exception):
    """The body of an answer cannot be used; the text says why, without any part of the body."""


def decode_content(body: bytes, encoding: str, limit: int) -> bytes:
    """Return the body, of at most `limit` bytes, without its encoding: the value of ``Content-Encoding``, redacted."""
    name = encoding.strip().lower()
    # A status without a body may have the header.
    if not body or name in {"", "identity"}:
        return body
    if name not in {"gzip", "x-gzip"}:  # the same, by RFC 9110
        raise UnusableContentError(f"the answer has the content encoding {encoding}, but none was accepted")
    inflation = zlib.decompressobj(_GZIP)
    try:
        content = inflation.decompress(body, limit + 1)
    except zlib.error:
        content = None
    if content is None:
        raise UnusableContentError("the answer is not the gzip that its content encoding says")
    if len(content) > limit:
        raise larger_than(limit)
    if not inflation.eof:
        raise UnusableContentError("the gzip of the answer is truncated")
    if inflation.unused_data:
        raise UnusableContentError("the gzip of the answer is followed by more data")
    return content


def larger_than(limit: int) -> UnusableContentError:
    """Return the error for an answer that is too large."""
    return UnusableContentError(f"the answer is larger than {limit} bytes and was cut off")
