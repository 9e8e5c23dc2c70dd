"""``aiokeyless sandbox``, in the test's own loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
import signal
from typing import TYPE_CHECKING

import pytest

from aiokeyless import AuthenticationError, KeylessClient
from aiokeyless.cli.app import app
from aiokeyless.sandbox import Sandbox

from .terminal import Pipe, lines_of_json

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .terminal import Fail

pytestmark = pytest.mark.looptime


@contextlib.asynccontextmanager
async def serving(*arguments: str) -> AsyncIterator[tuple[Pipe, str]]:
    """Run `aiokeyless sandbox` in the test's loop until Ctrl-C, and yield its stdout and its URL."""
    with contextlib.redirect_stdout(Pipe()) as stdout:
        command = asyncio.create_task(app.run_async(["sandbox", "--port", "0", *arguments]))
        await stdout.until(r"\n$")
        yield stdout, (await stdout.until(r"(http://127\.0\.0\.1:\d+|http://0\.0\.0\.0:\d+)"))[1]
        signal.raise_signal(signal.SIGINT)
        assert await command is None


async def test_the_sandbox_prints_the_phone_and_the_environment_of_its_clients() -> None:
    async with serving("--api-key", "it's a key") as (stdout, url):
        await stdout.until(rf"Phone +{url}/ ")
        await stdout.until(rf"""\n  export KEYLESS_BASE_URL={url} KEYLESS_API_KEY='it'"'"'s a key'\n""")
        assert "User" not in stdout.getvalue()
        assert "Listens" not in stdout.getvalue()
        async with KeylessClient("it's a key", base_url=url) as client:
            assert await client.get_pending_operations("C0FFEE") == []


async def test_the_sandbox_as_json_prints_one_object_and_nothing_else() -> None:
    async with serving("--json") as (stdout, url):
        [data] = lines_of_json(stdout.getvalue())
        assert data == {
            "url": url,
            "api_key": "sandbox-key",
            "environment": {"KEYLESS_BASE_URL": url, "KEYLESS_API_KEY": "sandbox-key"},
        }
        async with KeylessClient("sandbox-key", base_url=url) as client:
            await client.get_pending_operations("C0FFEE")
    assert stdout.getvalue().count("\n") == 1


async def test_the_sandboxs_simulated_user_approves_after_the_delay() -> None:
    async with serving("--auto-approve", "2.5") as (stdout, url):
        assert "approves each operation after 2.5 s" in stdout.getvalue()
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with KeylessClient("sandbox-key", base_url=url) as client:
            await client.request_approval("C0FFEE")
        assert loop.time() - began >= 2.5


async def test_the_sandbox_prints_a_line_for_each_request_of_the_api() -> None:
    async with serving() as (stdout, url):
        async with KeylessClient("sandbox-key", base_url=url) as client:
            await client.create_operation("C0FFEE", operation_id="txn 1\u202e")
            await client.get_operation("txn 1\u202e")
        async with KeylessClient("another-key", base_url=url) as client:
            with pytest.raises(AuthenticationError):
                await client.get_pending_operations("C0FFEE")
        await stdout.until(r"pending\n")
    lines = stdout.getvalue().partition("Ctrl-C stops it.\n\n")[2]
    assert re.sub(r"(?m)^  \d\d:\d\d:\d\d  ", "", lines) == (
        "200  POST /v2/users/C0FFEE/operations\n"
        "200  GET  /v2/operations/txn%201%E2%80%AE\n"
        "401  GET  /v2/users/C0FFEE/operations/pending\n"
    )


async def test_a_request_that_got_no_answer_has_no_status() -> None:
    async with serving() as (stdout, url):
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(
            b"POST /v2/users/C0FFEE/operations HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Api-Key: sandbox-key\r\n"
            b"Content-Length: 9\r\n\r\n{"
        )
        await writer.drain()
        writer.close()
        await stdout.until(r"  -    POST /v2/users/C0FFEE/operations\n")


async def test_the_sandbox_warns_that_others_can_reach_it() -> None:
    async with serving("--host", "0.0.0.0") as (stdout, _):  # noqa: S104  # for a moment
        assert "on 0.0.0.0: anyone who can reach it can approve" in stdout.getvalue()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.EADDRINUSE, "error while attempting to bind"),
            "port 3223 is in use; stop the process that uses it, or choose another: aiokeyless sandbox --port 0",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            "no permission to use port 3223; choose another: aiokeyless sandbox --port 0",
        ),
        (
            OSError(-2, "Name or service not known"),
            "cannot listen on 127.0.0.1 port 3223 (Name or service not known); choose another --host or --port",
        ),
    ],
)
def test_a_sandbox_that_cannot_listen_is_one_line_that_says_what_to_change(
    fail: Fail, monkeypatch: pytest.MonkeyPatch, error: OSError, message: str
) -> None:
    async def start(_self: Sandbox) -> None:
        raise error

    monkeypatch.setattr(Sandbox, "start", start)
    assert fail("sandbox") == message
