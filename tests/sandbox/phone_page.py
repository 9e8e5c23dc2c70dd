"""The phone's page as far as its requests show: what a browser would send, and what it is sent."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    import aiohttp

USER = "C0FFEE"
OTHER = "BADA55"
BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


async def create(http: aiohttp.ClientSession, operation_id: str = "a", user: str = USER, **fields: str) -> None:
    async with http.post(f"/v2/users/{user}/operations", json={"operationId": operation_id, **fields}) as response:
        assert response.status == 200


async def get(http: aiohttp.ClientSession, operation_id: str = "a") -> int:
    async with http.get(f"/v2/operations/{operation_id}") as response:
        return response.status


class Events:
    """The pictures that a page is sent."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response

    async def next(self) -> Any:
        async for line in self.response.content:
            if line.startswith(b"data: "):
                return json.loads(line.removeprefix(b"data: "))
        raise EOFError

    async def until(self, condition: Callable[[Any], bool]) -> Any:
        async with asyncio.timeout(PATIENCE):
            while not condition(picture := await self.next()):
                pass
        return picture


@asynccontextmanager
async def events(page: aiohttp.ClientSession, **query: str) -> AsyncGenerator[Events]:
    async with page.get("/sandbox/page/events", params=query) as response:
        assert (response.status, response.content_type) == (200, "text/event-stream")
        yield Events(response)


async def picture(page: aiohttp.ClientSession, **query: str) -> Any:
    async with events(page, **query) as stream:
        return await stream.next()


async def post(page: aiohttp.ClientSession, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    async with page.post(f"/sandbox/page/{path}", json=body, headers=headers) as response:
        return response.status, await response.json()


async def approve(page: aiohttp.ClientSession, operation_id: str = "a", how: str = "biom") -> int:
    status, _ = await post(page, "approve", {"operationId": operation_id, "authType": how})
    return status


async def fail(page: aiohttp.ClientSession, error_code: int) -> int:
    status, _ = await post(page, "decline", {"operationId": "a", "errorCode": error_code})
    return status
