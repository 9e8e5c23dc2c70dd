from __future__ import annotations

import asyncio
from unittest.mock import create_autospec

from aiohttp.client_proto import ResponseHandler

from aiokeyless._http.meter import Meter


def test_flow_of_writes_is_told_to_aiohttp() -> None:
    handler = create_autospec(ResponseHandler, instance=True)
    meter = Meter(handler, create_autospec(asyncio.Transport, instance=True), 0.0)
    meter.pause_writing()
    handler.pause_writing.assert_called_once_with()
    handler.resume_writing.assert_not_called()
    meter.resume_writing()
    handler.resume_writing.assert_called_once_with()
