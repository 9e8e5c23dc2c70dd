"""The proxy of the environment: which one is used, for whom, and that its password is shown nowhere."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import re
import socket
import ssl
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from error_reports import reports
from raw_server import RawServer, answer, operation, refused, tunnel_to

import aiokeyless.sync
from aiokeyless import ConfigurationError, KeylessClient, KeylessError, Secret, TransportError
from aiokeyless._http.proxies import find_proxy, show_proxy
from aiokeyless.cli.app import app

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

SERVICE = "https://service.example"
PROXY = "http://proxy.example:3128"
PASSWORD = "hunter2+odd"
KEYS = b"/customers/acme/.well-known/jwks.json"
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
REFUSED = answer(b"", status=b"407 Proxy Authentication Required")


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        *(({}, None), ({"HTTPS_PROXY": PROXY}, PROXY), ({"https_proxy": PROXY}, PROXY)),
        *(({"HTTPS_PROXY": "http://other.example", "https_proxy": PROXY}, PROXY), ({"ALL_PROXY": PROXY}, PROXY)),
        *(({"all_proxy": "http://other.example", "HTTPS_PROXY": PROXY}, PROXY), ({"HTTP_PROXY": PROXY}, None)),
        ({"HTTPS_PROXY": ""}, None),
        ({"HTTPS_PROXY": "ann:pass%40word@proxy.example:3128"}, "http://ann:pass%40word@proxy.example:3128"),
        ({"HTTPS_PROXY": PROXY, "NO_PROXY": "service.example"}, None),
        ({"HTTPS_PROXY": PROXY, "no_proxy": ".example"}, None),
        ({"HTTPS_PROXY": PROXY, "NO_PROXY": "service.example:443"}, None),
        ({"HTTPS_PROXY": PROXY, "NO_PROXY": "*"}, None),
        ({"HTTPS_PROXY": PROXY, "NO_PROXY": "other.example"}, PROXY),
        ({"ALL_PROXY": PROXY, "NO_PROXY": "service.example"}, None),
    ],
    ids=str,
)
def test_proxy_is_the_one_that_the_environment_names(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, variables: dict[str, str], found: str | None
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    proxy = find_proxy(SERVICE)
    assert (None if proxy is None else proxy.reveal()) == found
    assert caplog.records == []


@pytest.mark.parametrize("base_url", ["http://127.0.0.1:3223", "https://localhost", "https://[::1]:8443"])
def test_loopback_host_has_no_proxy(monkeypatch: pytest.MonkeyPatch, base_url: str) -> None:
    monkeypatch.setenv("HTTPS_PROXY", PROXY)
    monkeypatch.setenv("ALL_PROXY", PROXY)
    assert find_proxy(base_url) is None


@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "https"])
def test_proxy_of_another_kind_is_not_used_and_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, scheme: str
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"{scheme}://ann:{PASSWORD}@proxy.example:1080")
    KeylessClient("key", base_url=SERVICE, trust_env=True)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert f"not {scheme}://" in record.getMessage()
    assert PASSWORD not in record.getMessage()


NO_PROXIES = [
    *("http://", f"http://ann:{PASSWORD}@proxy:port", f"//ann:{PASSWORD}@", "http://[::1"),
    *(f"http:/ann:{PASSWORD}@proxy", f"http//ann:{PASSWORD}@proxy", f"socks5:/ann:{PASSWORD}@proxy"),
    *(f"http://ann:p@{PASSWORD}{sign}word@proxy" for sign in "/?#"),
]


@pytest.mark.parametrize("text", NO_PROXIES)
def test_text_that_is_no_proxy_is_an_error_that_does_not_show_it(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HTTPS_PROXY", text)
    del text  # reports print the local variables of tests, too
    with pytest.raises(ConfigurationError, match=r"\$HTTPS_PROXY .* must be the URL of a proxy") as caught:
        KeylessClient("key", base_url=SERVICE, trust_env=True)
    for name, report in reports(caught.value).items():
        assert PASSWORD not in report, name


def test_url_of_a_proxy_is_shown_without_its_password() -> None:
    assert show_proxy(Secret(f"http://ann:{PASSWORD}@proxy.example:3128")) == PROXY


async def test_client_with_a_session_takes_no_proxy_from_the_environment() -> None:
    async with aiohttp.ClientSession() as session:
        with pytest.raises(ConfigurationError, match="make the session with trust_env=True") as caught:
            KeylessClient("key", session=session, trust_env=True)
    assert caught.value.argument == "trust_env"


@pytest.mark.parametrize("face", [KeylessClient, aiokeyless.sync.KeylessClient])
def test_argument_is_a_flag(face: Any) -> None:
    with pytest.raises(ConfigurationError, match="trust_env must be True or False, not 'yes'"):
        face("key", trust_env="yes")


async def failure(client: KeylessClient) -> KeylessError:
    """Make a call that fails, and return why."""
    async with client:
        with pytest.raises(KeylessError) as caught:
            await client.create_operation("C0FFEE", operation_id="txn-1")
    return caught.value


def once(**options: Any) -> KeylessClient:
    return KeylessClient("key", base_url=SERVICE, max_attempts=1, **options)


async def test_proxy_that_refuses_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    async with RawServer(REFUSED) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url.replace("//", f"//ann:{PASSWORD}@"))
        error = await failure(once(trust_env=True))
    assert "the proxy refused with 407; check its URL, user name and password" in str(error)
    [head] = proxy.heads  # no check of a create that was not sent
    assert head.startswith(b"CONNECT service.example:443 ")
    assert base64.b64encode(f"ann:{PASSWORD}".encode()) in head
    assert b"x-api-key" not in head.lower()
    assert isinstance(error, TransportError)
    assert not error.sent
    for name, report in reports(error).items():
        assert PASSWORD not in report, name


async def test_proxy_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", refused())
    error = await failure(once(trust_env=True))
    assert "the proxy cannot be reached; check its URL" in str(error)


@pytest.mark.parametrize(
    ("name", "proxy", "lends", "advised"),
    [
        *(("HTTPS_PROXY", PROXY, lends, True) for lends in (False, True)),
        *(("ALL_PROXY", PROXY, lends, not lends) for lends in (False, True)),  # which aiohttp does not read
        *(("HTTPS_PROXY", proxy, False, False) for proxy in ("socks5://proxy.example", "http://", "")),
        ("HTTP_PROXY", PROXY, False, False),
    ],
)
async def test_proxy_that_is_not_used_is_named_if_no_connection_can_be_made(
    monkeypatch: pytest.MonkeyPatch, name: str, proxy: str, *, lends: bool, advised: bool
) -> None:
    async def resolve(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    monkeypatch.setenv(name, proxy)
    async with aiohttp.ClientSession() as session:
        error = await failure(once(session=session if lends else None))
    advice = "is set, but not used: make the client, or its session, with trust_env=True"
    assert str(error).endswith(advice if advised else "; try again later")
    assert "proxy.example" not in str(error)


async def test_no_password_of_netrc_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    passwords = tmp_path / "netrc"
    passwords.write_text("default login ann password hunter2\n", encoding="utf-8")
    monkeypatch.setenv("NETRC", str(passwords))
    async with RawServer(answer(operation())) as server, RawServer(REFUSED) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        async with KeylessClient("key", base_url=server.url, trust_env=True) as client:
            await client.get_operation("a")
        await failure(once(trust_env=True))
    for head in (*server.heads, *proxy.heads):
        assert b"authorization" not in head.lower()


# -- the whole way: a program of its own, whose OpenSSL trusts a private authority

PROGRAM = """
import asyncio, logging
from aiokeyless import KeylessClient

async def main():
    async with KeylessClient("key", base_url="https://service.example", trust_env=True, max_attempts=1) as client:
        print((await client.get_operation("a")).state)
        print((await client.wait_for_approval("a")).state)
        print(await client.get_key_set("acme"))

logging.basicConfig(level=logging.DEBUG)
asyncio.run(main())
"""


async def run_program(variables: dict[str, str], *arguments: str) -> tuple[str, str]:
    """Run the program, or Python with arguments, with no other proxy, and return its output and its errors."""
    clean = {name: value for name, value in os.environ.items() if name.lower() not in VARIABLES}
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, *(arguments or ("-c", PROGRAM))),
        env=clean | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    output, errors = await program.communicate()
    return output.decode(), errors.decode()


@pytest.fixture
async def service(certificate: tuple[Path, Path]) -> AsyncIterator[RawServer]:
    """A service with a certificate of its own authority, behind the name in the certificate."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*certificate)
    approved = answer(operation(state="approved", result=True))
    async with RawServer(answer(operation()), approved, answer(b'{"keys": []}'), tls=tls) as server:
        yield server


@pytest.fixture
async def proxy(service: RawServer) -> AsyncIterator[RawServer]:
    """A proxy that makes a tunnel to the service for everyone."""
    async with RawServer(tunnel_to(service)) as server:
        yield server


async def test_all_requests_reach_a_service_of_a_private_authority_through_the_proxy(
    service: RawServer, proxy: RawServer, certificate: tuple[Path, Path]
) -> None:
    named = proxy.url.replace("//", f"//ann:{PASSWORD}@")
    output, errors = await run_program({"HTTPS_PROXY": named, "SSL_CERT_FILE": str(certificate[0])})
    assert output.split("\n") == ["pending", "approved", "b'{\"keys\": []}'", ""], errors
    assert [head.split()[1] for head in service.heads] == [b"/v2/operations/a", b"/v2/operations/a", KEYS]
    assert {head.split(b"\r\n")[0] for head in proxy.heads} == {b"CONNECT service.example:443 HTTP/1.1"}
    assert PASSWORD not in output + errors
    # A proxy sees the request for a tunnel unencrypted.
    assert not [head for head in proxy.heads if b"x-api-key" in head.lower()]
    assert [b"x-api-key: key" in head.lower() for head in service.heads] == [True, True, False]


async def test_doctor_says_what_the_way_through_the_proxy_is(
    service: RawServer, proxy: RawServer, certificate: tuple[Path, Path]
) -> None:
    named = proxy.url.replace("//", f"//ann:{PASSWORD}@")
    variables = {"HTTPS_PROXY": named, "SSL_CERT_FILE": str(certificate[0]), "KEYLESS_API_KEY": "key-of-the-server"}
    output, errors = await run_program({**variables, "KEYLESS_BASE_URL": SERVICE}, "-m", "aiokeyless", "doctor")
    assert re.search(r"connection +IPv4, TLSv1.3, certificate of broker for \d more days\n", output), errors
    assert re.search(rf"proxy +{proxy.url}\n", output)
    assert PASSWORD not in output + errors
    assert b"x-api-key" not in service.heads[0].lower(), "anything may answer the first request"
    assert b"x-api-key: key-of-the-server" in service.heads[-1].lower()
    assert not [head for head in proxy.heads if b"x-api-key" in head.lower()]


async def test_service_that_is_not_trusted_gets_nothing_through_the_proxy(service: RawServer, proxy: RawServer) -> None:
    output, errors = await run_program({"HTTPS_PROXY": proxy.url, "SSL_CERT_FILE": "/dev/null"})
    assert output == ""
    assert "TransportError: GET /v2/operations/a got no answer" in errors
    assert service.heads == []
    assert len(proxy.heads) == 1


async def test_command_line_uses_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"KEYLESS_API_KEY": "key", "KEYLESS_BASE_URL": SERVICE}.items():
        monkeypatch.setenv(name, value)
    async with RawServer(REFUSED) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        with pytest.raises(TransportError, match="the proxy refused with 407"):
            await app.run_async(["get", "txn-1"])
    assert proxy.heads
