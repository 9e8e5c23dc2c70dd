"""The exact heads and bodies of requests: what the service is sent, and nothing else."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest
from raw_server import RawServer, answer, operation

from aiokeyless import KeylessClient, NotFoundError, __version__

pytestmark = pytest.mark.looptime

USER = "0123456789abcdef"
ODD_ID = "a/b?c#d%2F é"
ODD_PATH = "/v2/operations/a%2Fb%3Fc%23d%252F%20%C3%A9"
CREATED = b'{"success": true}'
HEADERS = {
    "X-Api-Key": "key",
    "Accept": "application/json",
    "Accept-Encoding": "identity",
    "User-Agent": f"aiokeyless/{__version__}",
}


@pytest.mark.parametrize(
    ("region", "base"),
    [
        ("eu", "https://api.keyless.io"),
        ("latam", "https://operations-service.eks.core-production.latam.keyless.technology"),
        ("us", "https://api.eks.core-production.saas-us-east.keyless.technology"),
        ("sg", "https://operations-service.eks.core-production.sg.keyless.technology"),
    ],
)
def test_region_has_its_address(region: str, base: str) -> None:
    assert KeylessClient("key", region=region).base_url == base


def parsed(head: bytes) -> tuple[str, dict[str, str]]:
    start, *lines = head.decode("ascii").removesuffix("\r\n\r\n").split("\r\n")
    names = [line.partition(": ")[0] for line in lines]
    assert len(names) == len(set(names))
    return start, dict(line.split(": ", 1) for line in lines)


@pytest.mark.parametrize("borrowed", [False, True], ids=["own session", "borrowed session"])
@pytest.mark.parametrize("base_path", ["", "/keyless", "/a%2Fb/"])
async def test_heads_on_the_wire(borrowed: bool, base_path: str) -> None:
    async with (
        RawServer(answer(operation()), answer(b"[]"), answer(CREATED), *[answer(b'{"content": []}')] * 2) as server,
        aiohttp.ClientSession() as session,
    ):
        options: dict[str, Any] = {"session": session} if borrowed else {}
        async with KeylessClient("key", base_url=server.url + base_path, **options) as client:
            await client.get_operation(ODD_ID)
            await client.get_pending_operations(USER)
            await client.create_operation(USER, operation_id=ODD_ID.replace("/", "'"), operation_payload="é")
            await client.get_authentications(user_id=USER, operation_id=ODD_ID)
            await client.get_authentications(external_user_id=ODD_ID)
    prefix, odd = base_path.rstrip("/"), ODD_PATH.rpartition("/")[2]
    common = HEADERS | {"Host": server.url.removeprefix("http://")}
    body = '{"operationId":"a\'b?c#d%2F é","operationPayload":"é"}'.encode()
    assert [parsed(head) for head in server.heads] == [
        (f"GET {prefix}{ODD_PATH} HTTP/1.1", common),
        (f"GET {prefix}/v2/users/0123456789ABCDEF/operations/pending HTTP/1.1", common),
        (
            f"POST {prefix}/v2/users/0123456789ABCDEF/operations HTTP/1.1",
            common | {"Content-Type": "application/json", "Content-Length": str(len(body))},
        ),
        (f"GET {prefix}/v2/users/0123456789ABCDEF/authentications?operationId={odd} HTTP/1.1", common),
        (f"GET {prefix}/v2/external-users/{odd}/authentications HTTP/1.1", common),
    ]
    assert server.bodies == [b"", b"", body, b"", b""]


async def test_base_path_is_not_in_messages() -> None:
    async with (
        RawServer(answer(b"", status=b"404 Not Found")) as server,
        KeylessClient("key", base_url=f"{server.url}/keyless") as client,
    ):
        with pytest.raises(NotFoundError, match=r"^GET /v2/operations/a answered 404") as caught:
            await client.get_operation("a")
    assert caught.value.path == "/v2/operations/a"
