"""The exact bytes of the three requests: what the service is sent, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp_version import AIOHTTP
from aioresponses import aioresponses
from raw_server import RawServer, answer, operation
from yarl import URL

from aiokeyless import KeylessClient, NotFoundError, __version__

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

pytestmark = pytest.mark.looptime

BASE = "https://api.keyless.io"
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


class _NothingSent:
    output_size = 0


class _Response(aiohttp.ClientResponse):
    """What aioresponses 0.7.9 makes lacks an argument that aiohttp 3.14 wants."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if AIOHTTP >= (3, 14):
            kwargs["stream_writer"] = _NothingSent()
        super().__init__(*args, **kwargs)


@pytest.fixture
def service() -> Iterator[aioresponses]:
    with aioresponses() as mocked:
        yield mocked


@pytest.fixture
async def client() -> AsyncGenerator[KeylessClient]:
    # Borrowed, so that the headers are those of the request and none of the session's.
    async with aiohttp.ClientSession() as session, KeylessClient("key", session=session) as made:
        yield made


def only(service: aioresponses) -> tuple[str, str, dict[str, str], bytes | None]:
    """The one request that was made: method, URL, headers, body."""
    [((method, url), [call])] = service.requests.items()
    return method, str(url), call.kwargs["headers"], call.kwargs.get("data")


async def test_request_for_an_operation(service: aioresponses, client: KeylessClient) -> None:
    service.get(f"{BASE}/v2/operations/txn-1", body=operation(), response_class=_Response)
    await client.get_operation("txn-1")
    assert only(service) == ("GET", f"{BASE}/v2/operations/txn-1", HEADERS, None)


async def test_request_for_an_operation_with_an_odd_id(service: aioresponses, client: KeylessClient) -> None:
    service.get(URL(BASE + ODD_PATH, encoded=True), body=operation(), response_class=_Response)
    await client.get_operation(ODD_ID)
    assert only(service) == ("GET", BASE + ODD_PATH, HEADERS, None)


async def test_request_for_pending_operations(service: aioresponses, client: KeylessClient) -> None:
    url = f"{BASE}/v2/users/0123456789ABCDEF/operations/pending"
    service.get(url, body=b"[]", response_class=_Response)
    await client.get_pending_operations(USER)
    assert only(service) == ("GET", url, HEADERS, None)


CREATE = f"{BASE}/v2/users/0123456789ABCDEF/operations"


@pytest.mark.parametrize(
    ("fields", "body"),
    [
        ({}, '{"operationId":"a"}'),
        ({"operation_payload": "Pay 5 €"}, '{"operationId":"a","operationPayload":"Pay 5 €"}'),
        ({"external_user_id": "ann@example.org"}, '{"operationId":"a","externalUserId":"ann@example.org"}'),
        (
            {"operation_payload": 'x"\n', "external_user_id": "ü"},
            '{"operationId":"a","operationPayload":"x\\"\\n","externalUserId":"ü"}',
        ),
        ({"operation_payload": ""}, '{"operationId":"a","operationPayload":""}'),
        ({"operation_id": ODD_ID}, '{"operationId":"a/b?c#d%2F é"}'),
    ],
)
async def test_request_for_a_creation(
    service: aioresponses, client: KeylessClient, fields: dict[str, Any], body: str
) -> None:
    service.post(CREATE, body=CREATED, response_class=_Response)
    await client.create_operation(USER, **({"operation_id": "a"} | fields))
    assert only(service) == ("POST", CREATE, HEADERS | {"Content-Type": "application/json"}, body.encode())


@pytest.mark.parametrize(
    ("region", "base"),
    [
        ("eu", "https://api.keyless.io"),
        ("latam", "https://operations-service.eks.core-production.latam.keyless.technology"),
        ("us", "https://api.eks.core-production.saas-us-east.keyless.technology"),
        ("sg", "https://operations-service.eks.core-production.sg.keyless.technology"),
    ],
)
async def test_region_is_asked_at_its_address(service: aioresponses, region: str, base: str) -> None:
    service.get(f"{base}/v2/operations/a", body=operation(), response_class=_Response)
    async with KeylessClient("key", region=region) as client:
        assert (await client.get_operation("a")).operation_id == "a"


# On a socket


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
            await client.create_operation(USER, operation_id=ODD_ID, operation_payload="é")
            await client.get_authentications(user_id=USER, operation_id=ODD_ID)
            await client.get_authentications(external_user_id=ODD_ID)
    prefix, odd = base_path.rstrip("/"), ODD_PATH.rpartition("/")[2]
    common = HEADERS | {"Host": server.url.removeprefix("http://")}
    body = '{"operationId":"a/b?c#d%2F é","operationPayload":"é"}'.encode()
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
