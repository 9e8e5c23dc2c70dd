"""Proxies that send a POST twice, as real ones are told to: the users are asked once, and each call has its ticket."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest
from ports import hold_port
from waiting import until

from aiokeyless import KeylessClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aiokeyless import ApprovalTicket
    from aiokeyless.sandbox import Sandbox

pytestmark = pytest.mark.slow

USER = "C0FFEE"
SETTINGS = {
    "nginx": """
        daemon off; master_process off; pid pid; error_log stderr; events {{}}
        http {{
            access_log off; client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
            uwsgi_temp_path uwsgi; scgi_temp_path scgi;
            upstream keyless {{ server 127.0.0.1:{there} max_fails=0; server 127.0.0.1:{there} max_fails=0; }}
            server {{
                listen 127.0.0.1:{here};
                proxy_set_header Host $http_host;
                location / {{ proxy_pass http://keyless; proxy_next_upstream error timeout non_idempotent; }}
            }}
        }}
        """,
    "haproxy": """
        defaults
            mode http
            timeout connect 5s
            timeout client 5s
            timeout server 5s
            retry-on all-retryable-errors
        listen keyless
            bind 127.0.0.1:{here}
            server keyless 127.0.0.1:{there}
    """,
}
OPTIONS = {"nginx": ("-p", "{folder}", "-e", "stderr", "-c"), "haproxy": ("-db", "-f")}


@contextlib.asynccontextmanager
async def proxy(name: str, folder: Path, here: int, there: int) -> AsyncIterator[None]:
    program = shutil.which(name, path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    if program is None:
        pytest.skip(f"there is no {name}, which a machine need not have")
    settings = folder / "settings"
    settings.write_text(SETTINGS[name].format(here=here, there=there) + "\n")
    options = [option.format(folder=folder) for option in OPTIONS[name]]
    with subprocess.Popen([program, *options, settings]) as process:  # noqa: ASYNC220  # it returns at once
        try:
            await until(lambda: process.poll() is not None or accepts(here))
            assert process.poll() is None, "it does not like its settings"
            yield
        finally:
            process.kill()


def accepts(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("name", SETTINGS)
async def test_a_proxy_that_repeats_a_create_and_then_restarts_costs_no_request(
    name: str, sandbox: Sandbox, tmp_path: Path
) -> None:
    told: list[str] = []

    def approve(ticket: ApprovalTicket) -> None:
        told.append(ticket.operation_id)
        sandbox.approve(ticket.operation_id)

    here, there = hold_port()[0], int(sandbox.url.rpartition(":")[2])
    client = KeylessClient(sandbox.api_key, base_url=f"http://127.0.0.1:{here}")
    async with client, asyncio.TaskGroup() as group:
        async with proxy(name, tmp_path, here, there):
            for _ in range(20):
                sandbox.drop_next(method="POST", stored=True)
                ticket = await client.create_operation(USER)
                assert ticket.reconciled
            assert [record.status for record in sandbox.requests if record.method == "POST"] == [None, 409] * 20
        for _ in range(5):
            group.create_task(client.request_approval(USER, on_created=approve))
        await asyncio.sleep(1)
        async with proxy(name, tmp_path, here, there):
            await until(lambda: len(told) == 5)
            await until(lambda: not client.statistics.waiting)
    assert len(sandbox.operations) == 25
