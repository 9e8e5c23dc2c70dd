"""Inputs made from others: JSON with a value changed, a key twice, something missing; and bytes that are damaged."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from random import Random

#: What takes the place of a value: the edges of types, and what the readers compare with.
VALUES: Final[tuple[Any, ...]] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, 120.0, -1e308, 1e308, 10**25, 1e-320),
    *("", " ", ".", "..", "txn-1", "TXN-1", "C0FFEE", "c0ffee", "Pay 40", "ada", "approved", "pending", "APPROVED"),
    *("true", "1", "\x00", "\ud800", "\ufb00", "\N{REPLACEMENT CHARACTER}", "sdk-key-0123456789", "x" * 600),
    *("2026-11-24T12:00:00Z", "2026-11-24T12:00:00", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59.999999-14:00"),
    *([], {}, [None], {"a": 1}, [[]]),
)

#: What is put between bytes.
TOKENS: Final = (
    *(b"null", b"true", b"false", b"NaN", b"Infinity", b"1e999", b"-0", b"1" * 400, b"[", b"{", b"[" * 70, b"]" * 70),
    *(b'"', b"\\", b"\\u0000", b"\\ud800", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\x00", b"\r\n", b" ", b","),
    *(b'"state":"approved",', b'"result":true,', b'"version":1,', b"Retry-After: 3", b"v1 "),
)


def mutate(data: bytes, random: Random) -> bytes:
    """Return the input with one to four changes."""
    for _ in range(random.choice((1, 1, 2, 4))):
        data = random.choice((_json_changed, _json_changed, _key_twice, _bytes_changed))(data, random)
    return data


def _json_changed(data: bytes, random: Random) -> bytes:
    """Change one value or key, if the input is JSON."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return _bytes_changed(data, random)
    root = [found]
    holder: Any = root
    key: Any = 0
    while isinstance(holder[key], dict | list) and holder[key] and random.random() < 0.8:
        holder = holder[key]
        key = random.choice(sorted(holder)) if isinstance(holder, dict) else random.randrange(len(holder))
    change = random.randrange(5)
    if change == 0 and holder is not root:
        del holder[key]
    elif change == 1 and isinstance(holder, dict):
        holder[random.choice(("x", key.upper(), key + " ", "version", "state"))] = holder.pop(key)
    elif change == 2:
        holder[key] = [holder[key]]
    else:
        holder[key] = random.choice(VALUES)
    return json.dumps(root[0], ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")


def _key_twice(data: bytes, random: Random) -> bytes:
    """Put a key that is there once more into the first object, if the input is JSON, before the others or after."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return _bytes_changed(data, random)
    if not isinstance(found, dict) or not found:
        return _bytes_changed(data, random)
    twice = json.dumps(random.choice(sorted(found))) + ": " + json.dumps(random.choice(VALUES))
    text = json.dumps(found)
    return ("{" + twice + ", " + text[1:] if random.random() < 0.5 else text[:-1] + ", " + twice + "}").encode()


def _bytes_changed(data: bytes, random: Random) -> bytes:
    """Cut something out, put something in, or flip a bit."""
    start = random.randint(0, len(data))
    end = random.randint(start, min(len(data), start + 20))
    change = random.randrange(5)
    if change == 0:
        return data[:start] + data[end:]
    if change == 1:
        return data[:end] + data[start:]  # a piece twice
    if change == 2 and start < len(data):
        return data[:start] + bytes([data[start] ^ (1 << random.randrange(8))]) + data[start + 1 :]
    if change == 3:
        return data[:start]
    return data[:start] + random.choice(TOKENS) + data[end if random.random() < 0.5 else start :]
