"""An API key that rotates: asked for at each exchange, checked each time, and never shown."""

from __future__ import annotations

import asyncio
import functools
import pickle
import secrets
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from error_reports import reports
from mocked_service import URL, MockedService
from raw_server import RawServer, answer, failure, operation, reset

from aiokeyless import (
    ApprovalUnknownError,
    AuthenticationError,
    ConfigurationError,
    KeylessClient,
    Secret,
)
from aiokeyless._http.keys import ApiKey, ApiKeys, make_api_keys

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokeyless.sandbox import Sandbox

USER = "C0FFEE"
PATH = "/v2/operations/a"
# Made here, so that no line of source that a reporter quotes holds them.
FIRST, SECOND, THIRD, FOURTH = (f"key-{secrets.token_hex(8)}" for _ in range(4))


class Rotation:
    """A function that returns the newest key, and counts how often it was asked."""

    def __init__(self, key: object = FIRST) -> None:
        self.key = key
        self.asked = 0

    def __call__(self) -> Any:
        self.asked += 1
        if isinstance(self.key, BaseException):
            raise self.key
        return self.key


def sent_keys(mocked: MockedService) -> list[str]:
    return [headers["X-Api-Key"] for headers in mocked.sent_headers]


def after(*returned: str) -> ApiKey:
    """Return the key of an exchange that began when a function had returned these."""
    texts = iter(returned)
    keys = ApiKeys(lambda: next(texts))
    return [keys.current() for _ in returned][-1]


# The keys themselves


def test_only_a_key_that_never_changes_is_static() -> None:
    assert ApiKeys(Secret(FIRST)).static() == Secret(FIRST)
    keys = ApiKeys(Rotation())
    assert keys.static() is None
    keys.current()
    assert keys.static() is None


def test_static_key_is_the_key_of_each_exchange() -> None:
    keys = make_api_keys(" text ")
    assert isinstance(keys, ApiKeys)
    key = keys.current()
    assert key.secret == Secret("text")
    assert keys.current() is key
    assert not keys.is_replaced(key)


def test_function_is_asked_for_each_exchange_and_its_key_is_stripped() -> None:
    rotation = Rotation(f" {FIRST}\n")
    keys = ApiKeys(rotation)
    assert rotation.asked == 0
    first = keys.current()
    assert first.secret == Secret(FIRST)
    assert keys.current() is first
    assert rotation.asked == 2
    rotation.key = SECOND
    assert keys.is_replaced(first)
    assert not keys.is_replaced(keys.current())


def test_key_that_comes_back_is_not_replaced() -> None:
    rotation = Rotation()
    keys = ApiKeys(rotation)
    first = keys.current()
    rotation.key = SECOND
    keys.current()
    rotation.key = FIRST
    assert not keys.is_replaced(first)


def test_redaction_knows_the_key_of_the_exchange_and_the_two_before() -> None:
    third = after(FIRST, SECOND, SECOND, THIRD)
    assert third.redaction.redact(f"{FIRST} {SECOND} {THIRD}") == "*** *** ***"
    fourth = after(FIRST, SECOND, SECOND, THIRD, FOURTH)
    assert fourth.redaction.redact(f"{FIRST} {SECOND} {THIRD} {FOURTH}") == f"{FIRST} *** *** ***"


def test_longer_of_two_keys_is_redacted_whole() -> None:
    key = after(f"{FIRST}-more", FIRST)
    assert key.redaction.redact(f"a {FIRST}-more b {FIRST} c") == "a *** b *** c"


def test_placeholder_among_the_keys_makes_no_answer_an_echo() -> None:
    key = after(FIRST, "test")
    assert not key.redaction.is_echoed_in(["a test"], b'["a test"]')
    assert key.redaction.is_echoed_in([FIRST], f'["{FIRST}"]'.encode())
    assert key.redaction.redact(f"a test of {FIRST}") == "a *** of ***"


# What a function may do


WRONG: dict[str, tuple[object, str]] = {
    "it raises": (LookupError(FIRST), "api_key must be a function that returns the key; it raised LookupError"),
    "nothing": (None, "no API key: pass api_key or set KEYLESS_API_KEY"),
    "bytes": (FIRST.encode(), "api_key must be a string, not bytes"),
    "a blank": (" ", "api_key is empty: pass the server key of your Keyless tenant or set KEYLESS_API_KEY"),
    "a line": (f"{FIRST}\n{SECOND}", "api_key must be printable ASCII; it contains control or non-ASCII characters"),
}


@pytest.mark.parametrize(("key", "words"), WRONG.values(), ids=WRONG.keys())
async def test_wrong_key_ends_the_call_and_sends_nothing(mocked: MockedService, key: object, words: str) -> None:
    async with KeylessClient(Rotation(key), base_url=URL) as client:
        error = await failure(client.get_operation("a"))
    assert not mocked.requests
    assert type(error) is ConfigurationError
    assert error.argument == "api_key"
    assert str(error).startswith(words)
    for name, text in reports(error).items():
        assert FIRST not in text, name


@pytest.mark.looptime
async def test_wrong_key_for_a_moment_is_a_failure_of_the_moment(
    sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    rotation = Rotation(sandbox.api_key)
    async with KeylessClient(rotation, base_url=sandbox.url) as client:
        ticket = await client.create_operation(USER)
        loop = asyncio.get_running_loop()
        loop.call_later(5, setattr, rotation, "key", LookupError())
        loop.call_later(10, setattr, rotation, "key", sandbox.api_key)
        loop.call_later(10, sandbox.approve, ticket.operation_id)
        await client.wait_for_approval(ticket)
        assert loop.time() < 11.5
    [warning] = [record for record in caplog.records if "go on: " in record.getMessage()]
    assert f"it raised LookupError at {__file__}:" in warning.getMessage()


async def test_line_that_raised_is_one_that_has_a_file() -> None:
    frozen = compile("{}['KEY']", "<frozen os>", "eval")
    async with KeylessClient(lambda: str(eval(frozen)), base_url=URL) as client:  # noqa: S307
        error = await failure(client.get_operation("a"))
    assert f"it raised KeyError at {__file__}:" in str(error)


@pytest.mark.looptime
async def test_wrong_key_at_the_deadline_leaves_the_outcome_unknown(sandbox: Sandbox) -> None:
    rotation = Rotation(sandbox.api_key)
    async with KeylessClient(rotation, base_url=sandbox.url) as client:
        ticket = await client.create_operation(USER)
        asyncio.get_running_loop().call_later(5, setattr, rotation, "key", " ")
        with pytest.raises(ApprovalUnknownError) as caught:
            await client.wait_for_approval(ticket)
    assert "api_key is empty" in str(caught.value)
    assert type(caught.value.last_error) is ConfigurationError


@pytest.mark.looptime
async def test_a_minute_without_a_key_ends_a_wait_without_a_deadline(sandbox: Sandbox) -> None:
    rotation = Rotation(sandbox.api_key)
    async with KeylessClient(rotation, base_url=sandbox.url) as client:
        ticket = await client.create_operation(USER)
        loop = asyncio.get_running_loop()
        loop.call_later(5, setattr, rotation, "key", LookupError())
        with pytest.raises(ConfigurationError, match="it raised LookupError"):
            await client.wait_for_approval(ticket, timeout=None)
        assert 65 <= loop.time() <= 75


@pytest.mark.looptime
async def test_function_that_never_returned_a_key_ends_the_wait_at_once() -> None:
    async with KeylessClient(Rotation(LookupError()), base_url="http://127.0.0.1:9") as client:
        with pytest.raises(ConfigurationError) as caught:
            await client.wait_for_approval("txn-1")
        assert not caught.value.is_transient


async def test_async_function_is_refused_at_once() -> None:
    async def ask() -> str:
        raise AssertionError("it is not called")

    with pytest.raises(ConfigurationError, match=r"^api_key must be a plain function, not an async one$") as caught:
        KeylessClient(ask)  # type: ignore[arg-type]  # a mistake that is easily made
    assert caught.value.argument == "api_key"


async def test_interruption_of_the_function_is_no_failure_of_it() -> None:
    async with KeylessClient(Rotation(asyncio.CancelledError()), base_url="http://127.0.0.1:9") as client:
        with pytest.raises(asyncio.CancelledError):
            await client.get_operation("a")


async def test_function_is_not_called_before_the_first_exchange() -> None:
    rotation = Rotation(LookupError())
    async with KeylessClient(rotation):
        assert rotation.asked == 0


@pytest.mark.parametrize("borrowed", [False, True])
async def test_each_exchange_carries_the_key_of_its_time(mocked: MockedService, borrowed: bool) -> None:
    rotation = Rotation()
    for status in (503, 200, 200):
        mocked.get(PATH, status=status, body=operation())
    async with (
        aiohttp.ClientSession() as session,
        KeylessClient(rotation, base_url=URL, session=session if borrowed else None) as client,
    ):
        await client.get_operation("a")
        rotation.key = SECOND
        await client.get_operation("a")
    assert sent_keys(mocked) == [FIRST, FIRST, SECOND]


# 401


def refuse_and_rotate(mocked: MockedService, **headers: str) -> Rotation:
    """Return a key that changes while it is refused."""
    rotation = Rotation()
    mocked.get(PATH, status=401, headers=headers, callback=lambda *_, **__: setattr(rotation, "key", SECOND))
    return rotation


async def test_refusal_of_a_key_that_was_replaced_meanwhile_is_repeated_with_the_new_one(mocked: MockedService) -> None:
    async with KeylessClient(refuse_and_rotate(mocked), base_url=URL) as client:
        mocked.get(PATH, body=operation())
        await client.get_operation("a")
    assert sent_keys(mocked) == [FIRST, SECOND]


async def test_refusal_of_a_replaced_key_says_so(mocked: MockedService) -> None:
    keys = refuse_and_rotate(mocked, **{"Retry-After": "5"})
    async with KeylessClient(keys, base_url=URL, max_attempts=1) as client:
        error = await failure(client.get_operation("a"))
    assert isinstance(error, AuthenticationError)
    assert error.key_was_replaced
    assert error.is_transient
    assert pickle.loads(pickle.dumps(error)).is_transient  # noqa: S301  # our own
    assert str(error).endswith(" answered 401 (Retry-After: 5 s): the key was replaced meanwhile; try again")


async def test_refusal_of_the_current_key_is_final(mocked: MockedService) -> None:
    mocked.get(PATH, status=401)
    async with KeylessClient(Rotation(), base_url=URL) as client:
        error = await failure(client.get_operation("a"))
    assert len(mocked.sent_headers) == 1
    assert isinstance(error, AuthenticationError)
    assert not error.key_was_replaced
    assert not error.is_transient
    assert "check the region, and that KEYLESS_API_KEY is" in str(error)


@pytest.mark.looptime
@pytest.mark.parametrize("lag", [0, 5, 20])
async def test_waits_go_on_when_the_key_rotates_and_the_function_lags(sandbox: Sandbox, lag: float) -> None:
    rotation = Rotation(sandbox.api_key)
    async with KeylessClient(rotation, base_url=sandbox.url) as client:
        sandbox.latency = 0.2
        tickets = await asyncio.gather(*(client.create_operation(USER) for _ in range(20)))
        loop = asyncio.get_running_loop()
        loop.call_later(5, setattr, sandbox._api, "_key", SECOND)
        loop.call_later(5 + lag, setattr, rotation, "key", SECOND)
        for number, ticket in enumerate(tickets):
            loop.call_later(3 + 1.5 * number, sandbox.approve, ticket.operation_id)
        approved = await asyncio.gather(*(client.wait_for_approval(ticket) for ticket in tickets))
    assert all(operation.is_approved for operation in approved)


# What reports show


MISSING = answer(f"no operation for {FIRST} and {SECOND}".encode(), status=b"404 Not Found")


@pytest.mark.parametrize("answered", [MISSING, reset, answer(f"<p>{FIRST}".encode())], ids=["404", "reset", "a page"])
@pytest.mark.parametrize("make", [Rotation, lambda: functools.partial(str, SECOND)], ids=["object", "partial"])
async def test_no_report_shows_a_key_or_the_one_before(answered: Any, make: Callable[[], Any]) -> None:
    function = make()
    async with (
        RawServer(answer(operation()), answered) as server,
        KeylessClient(function, base_url=server.url, max_attempts=2) as client,
    ):
        await client.get_operation("a")
        if isinstance(function, Rotation):
            function.key = SECOND
        error = await failure(client.get_operation("a"))
    for name, text in reports(error).items():
        assert type(error).__name__ in text
        assert SECOND not in text, name
        if isinstance(function, Rotation):
            assert FIRST not in text, name


def test_no_report_of_a_client_that_was_not_made_shows_what_its_function_was_given() -> None:
    hidden = Secret(functools.partial(str, SECOND))  # type: ignore[arg-type]  # a frame of this test is reported, too
    with pytest.raises(ConfigurationError) as caught:
        KeylessClient(hidden.reveal(), region="mars")
    for name, text in reports(caught.value).items():
        assert SECOND not in text, name


async def test_repr_shows_no_function() -> None:
    client = KeylessClient(functools.partial(str, SECOND))
    assert SECOND not in repr(client)
    assert SECOND not in repr(client._api_keys)


async def test_answer_that_repeats_the_key_before_is_refused(mocked: MockedService) -> None:
    rotation = Rotation()
    mocked.get(PATH, body=operation())
    mocked.get(PATH, body=operation(nodeId=FIRST))
    async with KeylessClient(rotation, base_url=URL) as client:
        await client.get_operation("a")
        rotation.key = SECOND
        assert "repeats the API key" in str(await failure(client.get_operation("a")))
