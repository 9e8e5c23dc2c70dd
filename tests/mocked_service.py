"""The service as aioresponses mocks it, on each aiohttp that pyproject.toml allows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import aiohttp
from aiohttp_version import AIOHTTP
from aioresponses import aioresponses

URL = "https://keyless.example"


class MockedResponse(aiohttp.ClientResponse):
    """A response that aioresponses 0.7.9 can make: from 3.14 on, aiohttp asks for what wrote the request."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        if AIOHTTP >= (3, 14):
            options["stream_writer"] = SimpleNamespace(output_size=0)
        super().__init__(*arguments, **options)


class MockedService(aioresponses):
    """Answers each request at a path of `URL` as it was told, and each once, unless it is to repeat."""

    def add(self, path: str, method: str = "GET", **options: Any) -> None:  # type: ignore[override]  # paths alone
        super().add(f"{URL}{path}", method, response_class=MockedResponse, **options)

    @property
    def sent_headers(self) -> list[dict[str, str]]:
        """The headers of all requests, by path."""
        return [call.kwargs["headers"] for calls in self.requests.values() for call in calls]
