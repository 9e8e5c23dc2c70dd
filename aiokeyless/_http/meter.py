"""`Meter`: counts what comes beside the body of an answer.

aiohttp bounds neither how many interim answers (1xx) precede an answer nor, before 3.13.4, how many headers and
trailers it has (CVE-2026-22815).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from .content import UnusableContentError

if TYPE_CHECKING:
    from aiohttp import StreamReader
    from aiohttp.client_proto import ResponseHandler

#: Bytes of interim answers, headers and trailers of one answer.
_MAX_BYTES: Final = 1 << 16
#: Bytes of one answer before the call reads its head: aiohttp stops at half a MiB of the body, with what was read then.
_MAX_AHEAD: Final = 1 << 20
#: Bytes of one answer that are not looked at. Of the shortest interim answers, 256 are as long.
_SHORT: Final = 1 << 12
#: An unread interim answer takes far more memory than its bytes.
_MAX_UNREAD: Final = 64
#: A read may bring more; so many bytes are counted and handed over at a time.
_PIECE: Final = 1 << 14


class Meter(asyncio.Protocol):
    """Stands between the transport of a connection and aiohttp's protocol, and aborts the connection at too much."""

    __slots__ = ("_body", "_handler", "_received", "_transport", "made_at")

    def __init__(self, handler: ResponseHandler, transport: asyncio.Transport, now: float) -> None:
        self._handler = handler
        self._transport = transport
        self.made_at = now
        """When the connection was made, or used for the first time."""
        self.start()

    def start(self) -> None:
        """Count from zero, for another answer."""
        self._received = 0
        self._body: StreamReader | None = None

    def start_body(self, body: StreamReader) -> None:
        """Go on with the body of this answer, whose bytes and framing do not count."""
        self._body = body

    def data_received(self, data: bytes) -> None:
        # Most answers are so short that nothing of them can be too much.
        if self._received + len(data) < _SHORT:
            self._received += len(data)
            self._handler.data_received(data)
            return
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            # Then the piece may be of the body. The call has not run yet, so nothing tells how much.
            limit = _MAX_AHEAD if len(self._handler) else _MAX_BYTES
            self._received += len(piece)
            self._handler.data_received(piece)
            if self._body is None:
                has_too_much = self._received > limit or len(self._handler) > _MAX_UNREAD
            else:
                # The framing of chunks may be as large as the body.
                has_too_much = self._received > _MAX_BYTES + 2 * self._body.total_bytes
            if has_too_much:
                self._abort()
                break

    def _abort(self) -> None:
        error = UnusableContentError(f"the answer has over {_MAX_BYTES} bytes beside its body; check base_url")
        self._handler.set_exception(error)
        if self._body is not None:
            self._body.set_exception(error)
        self._transport.abort()

    def eof_received(self) -> None:
        self._handler.eof_received()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._handler.connection_lost(exc)

    def pause_writing(self) -> None:
        self._handler.pause_writing()

    def resume_writing(self) -> None:
        self._handler.resume_writing()
