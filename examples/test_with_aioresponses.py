"""A payment, tested with aioresponses: docs/howto/test-with-aioresponses.md."""

import inspect
from collections.abc import AsyncGenerator, Iterator
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aioresponses import aioresponses
from tenacity import wait_none

from aiokeyless import ApprovalTimeoutError, ApprovalUnknownError, KeylessClient

URL = "https://keyless.example"
CREATE = f"{URL}/v2/users/C0FFEE/operations"
READ = f"{URL}/v2/operations/order-7"
PENDING = {
    "userId": "C0FFEE",
    "operationId": "order-7",
    "operationPayload": "Pay 40 to Alice",
    "result": False,
    "state": "pending",
}
APPROVED = PENDING | {"result": True, "state": "approved", "authType": "biom"}


async def pay(client: KeylessClient) -> str:  # what is tested
    """Ask the user, and return how it ended."""
    try:
        await client.request_approval(
            "C0FFEE",
            operation_id="order-7",
            operation_payload="Pay 40 to Alice",
            require_auth_type="biom",
            expires_in=1,
        )
    except ApprovalUnknownError:
        raise  # perhaps approved
    except ApprovalTimeoutError:
        return "not paid"
    return "paid"


class Response(aiohttp.ClientResponse):
    """What aioresponses 0.7.9 makes on aiohttp 3.14 and newer, too."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Add what is new."""
        if "stream_writer" in inspect.signature(aiohttp.ClientResponse).parameters:
            options["stream_writer"] = SimpleNamespace(output_size=0)
        super().__init__(*arguments, **options)


@pytest.fixture
def service() -> Iterator[aioresponses]:
    """A service that creates the operation."""
    with aioresponses() as service:
        service.post(CREATE, payload={"success": True}, response_class=Response)
        yield service


@pytest_asyncio.fixture
async def client() -> AsyncGenerator[KeylessClient]:
    """A client that polls at once."""
    async with KeylessClient("key", base_url=URL, schedule=wait_none()) as client:
        yield client


@pytest.mark.asyncio
async def test_an_approval_pays(service: aioresponses, client: KeylessClient) -> None:
    service.get(READ, payload=PENDING, response_class=Response)
    service.get(READ, exception=aiohttp.ServerDisconnectedError())
    service.get(READ, payload=APPROVED, response_class=Response)
    assert await pay(client) == "paid"


@pytest.mark.asyncio
async def test_without_an_approval_nothing_is_paid(service: aioresponses, client: KeylessClient) -> None:
    service.get(READ, payload=PENDING, repeat=True, response_class=Response)
    assert await pay(client) == "not paid"
