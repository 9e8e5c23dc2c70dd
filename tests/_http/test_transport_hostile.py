"""Whatever a server sends, a call returns what it promised or raises a `KeylessError`; whatever an id, it arrives."""

from __future__ import annotations

import asyncio
import gzip
import unicodedata
import zlib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_server import RawServer, operation

from aiokeyless import ApprovalTicket, KeylessClient, KeylessError, Operation, PendingOperation
from aiokeyless.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Coroutine

pytestmark = pytest.mark.filterwarnings("error")

USER = "C0FFEE"
KEY = "k3y-S3CRET"


async def make_calls(raw: bytes) -> None:
    """Make each single call against a server that answers these bytes always."""
    async with (
        RawServer(raw) as server,
        KeylessClient(KEY, base_url=server.url, max_attempts=1, request_timeout=0.05) as client,
    ):
        for call in (_operation(client), _pending(client), _created(client)):
            try:
                assert await call
            except KeylessError as error:
                assert "S3CRET" not in f"{error}{error!r}{vars(error)}"  # noqa: PT017  # the other half of the promise
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def _operation(client: KeylessClient) -> bool:
    return isinstance(await client.get_operation("a"), Operation)


async def _pending(client: KeylessClient) -> bool:
    pending = await client.get_pending_operations(USER)
    return all(isinstance(item, PendingOperation) for item in pending)


async def _created(client: KeylessClient) -> bool:
    return isinstance(await client.create_operation(USER, operation_id="a"), ApprovalTicket)


def run(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner() as runner:
        runner.run(work)


quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# What a body may be, test_protocol.py asks. Here it only differs in its size, and in whether it is good.
good = [operation(), b"[]", b'{"success": true}']
body = st.sampled_from([*good, b"", KEY.encode(), b"[" * 100_000]) | st.binary(max_size=300)

header = st.one_of(
    st.sampled_from(
        [
            *(b"Content-Encoding: gzip", b"Content-Encoding: deflate", b"Content-Encoding: br"),
            *(b"Content-Encoding: gzip, gzip", b"Content-Type: application/json; charset=utf-99"),
            *(b"Connection: upgrade\r\nUpgrade: websocket", b"Connection: close", b"Transfer-Encoding: chunked"),
            *(b"Transfer-Encoding: gzip, chunked", b"Content-Length: -1", b"Content-Length: 99999999999999999999"),
            *(b"Retry-After: 1e9", b"Retry-After: 99999999999999999999999"),
            *(b"Retry-After: Fri, 99 Nov 99999 99:99:99 GMT", b"Set-Cookie: =;;a=\xff; Max-Age=x"),
            *(b"Location: http://[", b"X-Request-Id: " + KEY.encode(), b"Date: never"),
        ]
    ),
    st.builds(lambda name, value: name + b": " + value, st.binary(max_size=8), st.binary(max_size=30)),
    st.builds(
        lambda name, value: name + b": " + value,
        st.sampled_from([b"Retry-After", b"X-Request-Id", b"Date", b"Set-Cookie", b"Content-Type"]),
        st.text(max_size=20).map(str.encode),
    ),
)
status = st.integers(100, 599).map(lambda code: b"%d X" % code) | st.binary(max_size=12) | st.just(b"200 OK")
encode = st.sampled_from([bytes, gzip.compress, zlib.compress, lambda plain: gzip.compress(plain)[:-9]])


def _chunked(content: bytes) -> bytes:
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content) if content else b"0\r\n\r\n"


@quick
@given(st.binary(max_size=400))
def test_any_bytes(raw: bytes) -> None:
    run(make_calls(raw))


@quick
@given(st.sampled_from([b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 200\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"]), st.binary())
def test_any_bytes_after_a_right_beginning(start: bytes, rest: bytes) -> None:
    run(make_calls(start + rest))


@quick
@given(status, st.lists(header, max_size=4), body, encode, st.sampled_from(["length", "chunked", "neither", "short"]))
def test_any_answer(code: bytes, headers: list[bytes], content: bytes, encoder: Any, framing: str) -> None:
    content = encoder(content)
    lines = [b"HTTP/1.1 " + code, *headers]
    if framing == "chunked":
        lines.append(b"Transfer-Encoding: chunked")
        content = _chunked(content)
    elif framing != "neither":
        lines.append(b"Content-Length: %d" % (len(content) + 7 * (framing == "short")))
    run(make_calls(b"\r\n".join([*lines, b"", content])))


CHUNKS = st.sampled_from([b"1\r\n{\r\n", b"0\r\n", b"\r\n", b"zz", b"-1\r\n", b"1;a=b\r\n", b"f" * 18 + b"\r\n"])


@quick
@given(st.lists(CHUNKS))
def test_any_chunks(pieces: list[bytes]) -> None:
    run(make_calls(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(pieces)))


# Identifiers


def _travels(text: str) -> bool:
    if {*text} & {"/", "\\"} or text in {".", ".."}:  # what proxies change in a path is refused for a new operation
        return False
    return not any(unicodedata.category(character) in {"Cc", "Cs"} for character in text)


identifiers = st.one_of(
    st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="/\\"), min_size=1, max_size=60),
    st.text(st.sampled_from("a.?#%&=+;:@ ~é\u200b\u2028😀%2F%"), min_size=1, max_size=12),
).filter(_travels)
texts = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


async def _round_trip(operation_id: str, user_id: str, payload: str | None, external: str | None) -> None:
    async with Sandbox() as sandbox, sandbox.client(max_attempts=1) as client:
        ticket = await client.create_operation(
            user_id, operation_id=operation_id, operation_payload=payload, external_user_id=external
        )
        assert ticket.operation_id == operation_id
        assert list(sandbox.operations) == [operation_id]
        found = await client.get_operation(operation_id)
        assert (found.operation_id, found.user_id) == (operation_id, user_id.upper())
        assert (found.operation_payload, found.external_user_id) == (payload, external)
        [pending] = await client.get_pending_operations(user_id)
        assert (pending.operation_id, pending.operation_payload) == (operation_id, payload)
        failed = sandbox.fail_authentication(operation_id)
        answered = await client.get_authentications(user_id=user_id, operation_id=operation_id)
        assert answered.attempts == (failed,)


@quick
@given(identifiers, st.text("0123456789abcdefABCDEF", min_size=1, max_size=64), texts, texts)
def test_any_identifier_arrives_as_it_is(
    operation_id: str, user_id: str, payload: str | None, external: str | None
) -> None:
    run(_round_trip(operation_id, user_id, payload, external))
