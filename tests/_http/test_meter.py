from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import create_autospec

import pytest
from aiohttp import StreamReader
from aiohttp.client_proto import ResponseHandler

from aiokeyless._http.meter import Meter


@pytest.fixture
def handler() -> Any:
    return create_autospec(ResponseHandler, instance=True)


@pytest.fixture
def transport() -> Any:
    return create_autospec(asyncio.Transport, instance=True)


@pytest.fixture
def meter(handler: Any, transport: Any) -> Meter:
    return Meter(handler, transport, 0.0)


def test_flow_of_writes_is_told_to_aiohttp(handler: Any, meter: Meter) -> None:
    meter.pause_writing()
    handler.pause_writing.assert_called_once_with()
    handler.resume_writing.assert_not_called()
    meter.resume_writing()
    handler.resume_writing.assert_called_once_with()


@pytest.mark.parametrize("has_body", [False, True])
def test_connection_is_aborted_after_64_kibibytes_of_one_read(
    handler: Any, transport: Any, meter: Meter, has_body: bool
) -> None:
    if has_body:
        meter.start_body(create_autospec(StreamReader, instance=True, total_bytes=0))
    meter.data_received(bytes(1 << 20))
    assert sum(len(call.args[0]) for call in handler.data_received.mock_calls) == (1 << 16) + (1 << 14)
    transport.abort.assert_called_once_with()
