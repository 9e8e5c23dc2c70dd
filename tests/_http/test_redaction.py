"""Error reporters print local variables and causes: none of them shows the API key, the SDK key or a payload."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import secrets
import socket
import ssl
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from error_reports import reports
from mocked_service import URL, MockedService
from raw_server import RawServer, answer, hang, operation, refused, reset

from aiokeyless import ApprovalTicket, ConfigurationError, KeylessClient
from aiokeyless._http.protocol import RawAnswer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Call = Callable[[KeylessClient], Awaitable[object]]

# Made here, so that no line of source that a reporter quotes holds them.
KEY = f"key-{secrets.token_hex(8)}"
SDK_KEY = f"sdk-{secrets.token_hex(8)}"
PAYLOAD = f"payload-{secrets.token_hex(8)}"
HIDDEN = (KEY, SDK_KEY, PAYLOAD)


def get(client: KeylessClient) -> Awaitable[object]:
    return client.get_operation("a")


def pending(client: KeylessClient) -> Awaitable[object]:
    return client.get_pending_operations("C0FFEE")


def attempts(client: KeylessClient) -> Awaitable[object]:
    return client.get_authentications(user_id="C0FFEE")


def create(client: KeylessClient) -> Awaitable[object]:
    return client.create_operation("C0FFEE", operation_id="a")


def wait(client: KeylessClient) -> Awaitable[object]:
    return client.wait_for_approval(ApprovalTicket.for_operation("a", user_id="C0FFEE"), timeout=0.05)


async def cut_short(client: KeylessClient) -> None:
    async with asyncio.timeout(0.05):
        await client.get_operation("a")


async def closed(client: KeylessClient) -> None:
    call = asyncio.ensure_future(client.get_operation("a"))
    await asyncio.sleep(0.05)
    await client.aclose()
    await call


async def cancelled(client: KeylessClient) -> None:
    call = asyncio.ensure_future(client.get_operation("a"))
    await asyncio.sleep(0.05)
    call.cancel()
    await call


MISSING = answer(f"no operation for {KEY}".encode(), status=b"404 Not Found")
ECHO = answer(operation(operationId=KEY, userId=KEY, state=KEY, apiKey=SDK_KEY))
CASES: dict[str, tuple[Any, Call]] = {
    "404": (MISSING, get),
    "404 of a wait": (MISSING, wait),
    "a wrong shape": (answer(operation(result="yes", apiKey=SDK_KEY, operationPayload=PAYLOAD)), get),
    "a wrong shape of a wait": (answer(operation(result="yes", apiKey=SDK_KEY, operationPayload=PAYLOAD)), wait),
    "bad UTF-8": (answer(f'{{"apiKey": "{SDK_KEY} {PAYLOAD} {KEY}'.encode() + b'\xff"}'), get),
    "a page": (answer(f"<html>{SDK_KEY} {PAYLOAD} {KEY}".encode()), get),
    "an echo": (ECHO, wait),
    "an echo in an approval": (answer(operation(nodeId=f"node of {KEY}", result=True, state="approved")), wait),
    "an echo to a single call": (ECHO, get),
    "an echo in a list": (answer(f'[{{"operationId": "{KEY}", "authType": "{KEY}"}}]'.encode()), pending),
    "an echo in Telemetry": (
        answer(f'{{"content": [{{"authentications": [{{"deviceId": "{KEY}"}}]}}]}}'.encode()),
        attempts,
    ),
    "a reset": (reset, get),
    "a cut off answer": (answer(SDK_KEY.encode(), length=999), get),
    "an answer that is no HTTP": (f"{KEY}\r\n\r\n".encode(), get),
    "a timeout": (hang, get),
    "a timeout of the caller's": (hang, cut_short),
    "a client that was closed": (hang, closed),
    "a cancellation": (hang, cancelled),
    "409": (answer(KEY.encode(), status=b"409 Conflict"), create),
    "an ambiguous create": (answer(KEY.encode(), status=b"503 Busy"), create),
    "an answer of more than a mebibyte": (answer((SDK_KEY + " ").encode() * 50_000), get),
    "silence at a deadline": (hang, wait),
}
every_case = pytest.mark.parametrize(("answered", "call"), CASES.values(), ids=CASES.keys())


async def failed(call: Call, client: KeylessClient) -> BaseException:
    try:
        await call(client)
    except BaseException as error:  # noqa: BLE001  # a cancellation, too, is reported by some
        return error
    pytest.fail("it did not fail")


@pytest.mark.looptime
@every_case
async def test_no_report_shows_what_is_secret(answered: Any, call: Call) -> None:
    async with (
        RawServer(answered) as server,
        KeylessClient(KEY, base_url=server.url, max_attempts=2, request_timeout=0.5) as client,
    ):
        error = await failed(call, client)
    for name, text in reports(error).items():
        assert type(error).__name__ in text  # it is a report of this error
        assert [secret for secret in HIDDEN if secret in text] == [], name


@pytest.mark.parametrize("borrows", [False, True], ids=["own session", "borrowed session"])
async def test_no_report_of_a_refused_connection_shows_the_key(borrows: bool) -> None:
    async with (
        aiohttp.ClientSession(headers={"X-Mine": "1"}) as mine,
        KeylessClient(KEY, base_url=refused(), session=mine if borrows else None, max_attempts=2) as client,
    ):
        error = await failed(get, client)
    for name, text in reports(error).items():
        assert KEY not in text, name


LARGE = answer(b"x" * (2 << 20), f"X-Echo: {KEY}".encode())
NOT_A_GZIP = answer(b"x", f"X-Echo: {KEY}".encode(), b"Content-Encoding: gzip")


@pytest.mark.looptime
@pytest.mark.parametrize("call", [get, wait])
@pytest.mark.parametrize("answered", [LARGE, NOT_A_GZIP], ids=["too large", "not a gzip"])
async def test_no_report_shows_a_key_that_a_header_echoes(answered: bytes, call: Call) -> None:
    async with RawServer(answered) as server, KeylessClient(KEY, base_url=server.url, max_attempts=1) as client:
        error = await failed(call, client)
    for name, text in reports(error).items():
        assert KEY not in text, name


class OddError(BaseException):
    """What a hook can raise besides exceptions."""


def cancelled_from(text: str) -> BaseException:
    error = asyncio.CancelledError()
    error.__cause__ = RuntimeError(text)
    return error


def tls_error(text: str) -> BaseException:
    error = ssl.SSLCertVerificationError(1, text)
    error.verify_message = text
    return error


HOOKS: dict[str, Callable[[str], BaseException]] = {
    "an OSError": OSError,
    "an OSError with a number": lambda text: OSError(5, text),
    "a RuntimeError": RuntimeError,
    "a TLS error": tls_error,
    "a failure to resolve a name": lambda _: socket.gaierror(-2, "Name or service not known"),
    "an odd one": OddError,
    "a cancellation with a cause": cancelled_from,
}


@pytest.mark.looptime
@pytest.mark.parametrize("call", [get, wait])
@pytest.mark.parametrize("make", HOOKS.values(), ids=HOOKS.keys())
async def test_no_report_shows_what_a_hook_says_about_the_headers(
    mocked: MockedService, make: Callable[[str], BaseException], call: Call
) -> None:
    def say(_url: object, *, headers: dict[str, str], **_options: object) -> None:
        raise make(str(headers))

    mocked.get("/v2/operations/a", callback=say, repeat=True)
    async with KeylessClient(KEY, base_url=URL, max_attempts=2) as client:
        error = await failed(call, client)
    for name, text in reports(error).items():
        assert KEY not in text, name


async def test_no_report_of_a_create_shows_the_payload(mocked: MockedService) -> None:
    async def create_it(client: KeylessClient) -> None:
        await client.create_operation("C0FFEE", operation_payload=os.environ["PAYLOAD"])

    mocked.post("/v2/users/C0FFEE/operations", status=400)
    async with KeylessClient(KEY, base_url=URL, max_attempts=1) as client:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PAYLOAD", PAYLOAD)
            error = await failed(create_it, client)
    frame = error.__traceback__
    while frame is not None:  # the caller's own argument is in the client's method, and nowhere below it
        if frame.tb_frame.f_code.co_filename.endswith(("creation.py", "transport.py", "protocol.py")):
            assert PAYLOAD not in repr(frame.tb_frame.f_locals)
        frame = frame.tb_next


def made_with(**arguments: Any) -> BaseException:
    with pytest.raises(ConfigurationError) as caught:
        KeylessClient(os.environ["KEYLESS_API_KEY"], **arguments)
    return caught.value


@pytest.mark.parametrize(
    ("blemish", "arguments"),
    [
        *(("", {"region": "mars"}), ("", {"base_url": "http://a.b"}), ("", {"session": "x"})),
        *(("", {"request_timeout": 0}), ("\x7f", {}), ("é", {})),
    ],
)
def test_no_report_of_a_client_that_was_not_made_shows_the_key(
    monkeypatch: pytest.MonkeyPatch, blemish: str, arguments: dict[str, Any]
) -> None:
    monkeypatch.setenv("KEYLESS_API_KEY", KEY + blemish)
    for name, text in reports(made_with(**arguments)).items():
        assert KEY not in text, name


async def test_no_frame_keeps_an_answer_alive_once_its_error_was_handled() -> None:
    gc.collect()
    gc.disable()
    try:
        async with RawServer(MISSING) as server, KeylessClient(KEY, base_url=server.url) as client:
            for _ in range(3):
                with contextlib.suppress(Exception):
                    await client.get_operation("a")
            await asyncio.sleep(0)
        answers = [thing for thing in gc.get_objects() if type(thing) is RawAnswer]  # isinstance() asks lazy ones
        assert answers == []
    finally:
        gc.enable()


SENTRY = """
import asyncio, sys
import aiohttp, sentry_sdk
from sentry_sdk.integrations.aiohttp import AioHttpIntegration
from sentry_sdk.transport import Transport
from aiokeyless import KeylessClient

class Recording(Transport):
    def capture_envelope(self, envelope):
        sys.stdout.write(envelope.serialize().decode())

sentry_sdk.init(
    dsn="http://public@127.0.0.1/1",
    transport=Recording,
    traces_sample_rate=1.0,
    # By itself it would import all frameworks that are installed, to add theirs.
    auto_enabling_integrations=False,
    integrations=[AioHttpIntegration()],
)

async def main():
    async with aiohttp.ClientSession() as session:
        async with KeylessClient(base_url=sys.argv[1], session=session, max_attempts=1) as client:
            for call in (client.get_operation("a"), client.wait_for_approval("a", timeout=0.1)):
                try:
                    await call
                except Exception:
                    sentry_sdk.capture_exception()

asyncio.run(main())
"""


@pytest.mark.slow
async def test_sentry_with_its_own_integrations_and_that_of_aiohttp_shows_no_key() -> None:
    async with RawServer(MISSING) as server:
        run = asyncio.create_subprocess_exec(
            sys.executable, "-c", SENTRY, server.url, env={**os.environ, "KEYLESS_API_KEY": KEY}, stdout=subprocess.PIPE
        )
        program = await run
        out, _ = await program.communicate()
    assert program.returncode == 0
    assert out.count(b"NotFoundError") >= 2
    assert KEY.encode() not in out
