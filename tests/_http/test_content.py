"""The content encoding of an answer: none was asked for, one member of gzip is understood, and nothing else is."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib

import pytest

from aiokeyless._http.content import UnusableContentError, decode_content

LIMIT = 1 << 20
BODY = b'{"state": "pending"}'
ZIPPED = gzip.compress(BODY, mtime=0)


@pytest.mark.parametrize("encoding", ["", " ", "identity", "Identity"])
def test_body_without_an_encoding_stays_as_it_is(encoding: str) -> None:
    assert decode_content(ZIPPED, encoding, LIMIT) == ZIPPED


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", " gzip ", "x-gzip"])
def test_one_member_of_gzip_is_inflated(encoding: str) -> None:
    assert decode_content(ZIPPED, encoding, LIMIT) == BODY


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate"])
def test_empty_body_has_no_encoding(encoding: str) -> None:
    assert decode_content(b"", encoding, LIMIT) == b""


@pytest.mark.parametrize("size", [0, 1, LIMIT])
def test_content_up_to_the_limit_is_returned(size: int) -> None:
    assert decode_content(gzip.compress(bytes(size)), "gzip", LIMIT) == bytes(size)


@pytest.mark.parametrize("size", [LIMIT + 1, LIMIT + 2, 3 * LIMIT])
def test_content_over_the_limit_is_cut_off(size: int) -> None:
    with pytest.raises(UnusableContentError) as caught:
        decode_content(gzip.compress(bytes(size)), "gzip", LIMIT)
    assert str(caught.value) == "the answer is larger than 1048576 bytes and was cut off"


UNUSABLE = {
    "no last byte": (ZIPPED[:-1], "gzip", "the gzip of the answer is truncated"),
    "no trailer": (ZIPPED[:-8], "gzip", "the gzip of the answer is truncated"),
    "half a header": (ZIPPED[:3], "gzip", "the gzip of the answer is truncated"),
    "two members": (ZIPPED + ZIPPED, "gzip", "the gzip of the answer is followed by more data"),
    "a byte more": (ZIPPED + b"\0", "gzip", "the gzip of the answer is followed by more data"),
    "plain": (BODY, "gzip", "the answer is not the gzip that its content encoding says"),
    "zlib": (zlib.compress(BODY), "gzip", "the answer is not the gzip that its content encoding says"),
    "a wrong checksum": (
        ZIPPED[:-5] + b"\0" + ZIPPED[-4:],
        "gzip",
        "the answer is not the gzip that its content encoding says",
    ),
    "deflate": (zlib.compress(BODY), "deflate", "the answer has the content encoding deflate, but none was accepted"),
    "br": (BODY, "br", "the answer has the content encoding br, but none was accepted"),
    "two": (ZIPPED, "gzip, gzip", "the answer has the content encoding gzip, gzip, but none was accepted"),
}


@pytest.mark.parametrize(("body", "encoding", "words"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_anything_else_is_named(body: bytes, encoding: str, words: str) -> None:
    with pytest.raises(UnusableContentError) as caught:
        decode_content(body, encoding, LIMIT)
    assert str(caught.value) == words
    assert caught.value.__context__ is None  # zlib's error


def test_bomb_takes_little_more_than_the_limit() -> None:
    bomb = gzip.compress(bytes(64 * LIMIT))
    tracemalloc.start()
    try:
        with pytest.raises(UnusableContentError, match="larger than"):
            decode_content(bomb, "gzip", LIMIT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * LIMIT
