"""What users test with aioresponses, at the public client: docs/howto/test-with-aioresponses.md."""

from __future__ import annotations

import asyncio
import functools
import json
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aioresponses import CallbackResult
from mocked_service import URL, MockedResponse
from raw_server import operation
from tenacity import wait_none

from aiokeyless import (
    ApprovalTimeoutError,
    ApprovalUnknownError,
    KeylessClient,
    KeylessError,
    NotJsonError,
    RequestTimeoutError,
    StatusError,
    TransportError,
    sync,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from mocked_service import MockedService

PATH = "/v2/operations/a"


class InThread:
    """A client without a loop, as async tests call it."""

    def __init__(self, client: sync.KeylessClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return functools.partial(asyncio.to_thread, getattr(self._client, name))


SESSIONS = "own session", "borrowed session", "a session that raises for statuses"


@pytest.fixture(params=[*(pytest.param(each, marks=pytest.mark.looptime) for each in SESSIONS), "sync"])
async def client(request: pytest.FixtureRequest) -> AsyncGenerator[Any]:
    options: dict[str, Any] = {"base_url": URL, "max_attempts": 1, "schedule": wait_none()}
    async with aiohttp.ClientSession(raise_for_status="raises" in request.param) as session:
        if request.param == "sync":
            yield (in_thread := InThread(sync.KeylessClient("key", **options)))
            await in_thread.close()
        else:
            async with KeylessClient("key", session=session if "a " in request.param else None, **options) as client:
                yield client


async def test_an_approval_after_a_pending_answer_and_a_lost_connection(client: Any, mocked: MockedService) -> None:
    def create(_url: object, *, data: bytes, **_options: object) -> CallbackResult:
        mocked.get(PATH, body=operation(**json.loads(data)))
        mocked.get(PATH, exception=aiohttp.ServerDisconnectedError())
        mocked.get(PATH, body=operation(**json.loads(data), state="approved", result=True))
        return CallbackResult(body=b'{"success": true}', response_class=MockedResponse)

    mocked.post("/v2/users/C0FFEE/operations", callback=create)
    fields = {"operation_id": "a", "operation_payload": "Pay 40", "external_user_id": "ann"}
    updates: list[Any] = []
    approved = await client.request_approval("c0ffee", **fields, expires_in=60, on_poll=updates.append)
    assert approved.is_approved
    assert fields.items() <= {name: getattr(approved, name) for name in fields}.items()
    assert updates[-1].operation == approved


ANSWERS: dict[type[KeylessError], dict[str, Any]] = {
    TransportError: {"exception": LookupError},
    RequestTimeoutError: {"timeout": True},
    NotJsonError: {"body": "<html>"},
    **{kind: {"status": int((kind.__doc__ or "")[:3].replace("xx", "00"))} for kind in StatusError.__subclasses__()},
}


@pytest.mark.parametrize("kind", ANSWERS, ids=lambda kind: kind.__name__)
async def test_each_answer_is_the_exception_whose_docstring_names_it(
    client: Any, mocked: MockedService, kind: type[KeylessError]
) -> None:
    mocked.get(PATH, headers={"Retry-After": "7"}, **ANSWERS[kind])
    with pytest.raises(kind) as caught:
        await client.get_operation("a")
    assert type(caught.value) is kind
    assert not isinstance(caught.value, StatusError) or caught.value.retry_after == 7
    assert [headers["X-Api-Key"] for headers in mocked.sent_headers] == ["key"]


@pytest.mark.parametrize(("repeat", "kind"), [(True, ApprovalTimeoutError), (False, ApprovalUnknownError)])
async def test_a_wait_ends_in_time_if_its_last_answer_repeats_and_is_unknown_if_a_mock_is_missing(
    client: Any, mocked: MockedService, repeat: bool, kind: type[ApprovalTimeoutError]
) -> None:
    mocked.get(PATH, body=operation(), repeat=repeat)
    assert not repeat or await client.hold_for_approval("a", seconds=0.05) is None
    with pytest.raises(ApprovalTimeoutError) as caught:
        await client.wait_for_approval("a", timeout=0.1)
    assert type(caught.value) is kind
    assert repeat or "ClientConnectionError" in str(caught.value.last_error)
