"""TLS and proxies that are not as they should be: what happened, and what to change. The servers are real ones."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import aiohttp
import pytest
from raw_server import RawServer, answer, hang

from aiokeyless import KeylessClient, NotJsonError, RequestTimeoutError, TransportError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from aiokeyless.sandbox import Sandbox

SERVICE = "https://service.example"
PASSWORD = "пароль"
OPENSSL = shutil.which("openssl") or "openssl"
pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificates")
LEND = "lend a session whose SSL context has"
PROGRAM = Path(__file__).parents[2] / "examples" / "client_certificate.py"


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class Files(NamedTuple):
    """An authority of the kind that a tool of ten years ago makes, a certificate that it has signed, and the key."""

    authority: Path
    certificate: Path
    key: Path


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("authority")
    names = "[req]\ndistinguished_name=dn\nx509_extensions=v3\n[dn]\n[v3]\nbasicConstraints=CA:TRUE\n"
    (folder / "names").write_text(names)
    (folder / "more").write_text("subjectAltName=IP:127.0.0.1\n")
    new = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -config names"
    for command in (
        f"req -x509 {new} -keyout ca.key -out authority.pem -days 2 -subj /CN=old",
        f"req {new} -keyout key.pem -out request.pem -subj /CN=service",
        "x509 -req -in request.pem -out certificate.pem -extfile more -set_serial 7 -CA authority.pem -CAkey ca.key",
    ):
        subprocess.run([OPENSSL, *command.split()], cwd=folder, check=True, capture_output=True)
    return Files(folder / "authority.pem", folder / "certificate.pem", folder / "key.pem")


@asynccontextmanager
async def openssl(certificate: tuple[Path, Path], *options: str) -> AsyncGenerator[str]:
    """Run OpenSSL's own server, and yield its URL. It answers with a page."""
    files = ("-cert", str(certificate[0]), "-key", str(certificate[1]))
    server = await asyncio.create_subprocess_exec(
        *(OPENSSL, "s_server", "-accept", "127.0.0.1:0", *files, "-www", *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert server.stdout is not None
    try:
        while not (line := (await server.stdout.readline()).decode()).startswith("ACCEPT"):
            assert line, "it has ended"
        yield f"https://127.0.0.1:{line.strip().rpartition(':')[2]}"
    finally:
        server.kill()
        await server.wait()


def wants_certificate(certificate: tuple[Path, Path]) -> tuple[str, ...]:
    return "-Verify", "1", "-CAfile", str(certificate[0]), "-verify_return_error"


async def fail(
    base_url: str, *, trusted: Path | None = None, flags: ssl.VerifyFlags | None = None, trust_env: bool = False
) -> str:
    """Return why a call fails, on a session that trusts an authority, or on one of ours."""
    async with AsyncExitStack() as stack:
        session = None
        if trusted is not None:
            context = ssl.create_default_context(cafile=str(trusted))
            context.verify_flags |= flags or context.verify_flags
            connector = aiohttp.TCPConnector(ssl=context)
            session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        client = KeylessClient("key", base_url=base_url, session=session, max_attempts=1, trust_env=trust_env)
        with pytest.raises(TransportError) as caught:
            await (await stack.enter_async_context(client)).get_operation("a")
    assert not re.search(r"\bkey\b|парол", str(caught.value))
    return str(caught.value).partition("got no answer ")[2]


async def test_a_port_of_http_is_named(sandbox: Sandbox) -> None:
    why = await fail(sandbox.url.replace("http:", "https:"))
    assert why == (
        "(ClientConnectorSSLError: WRONG_VERSION_NUMBER); what answers there speaks no TLS; check the scheme and the "
        "port of base_url"
    )


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("-tls1_3", f"TLSV13_ALERT_CERTIFICATE_REQUIRED); {LEND} a client certificate"),
        ("-tls1_2", f"SSLV3_ALERT_HANDSHAKE_FAILURE); perhaps it wants a client certificate: {LEND} one"),
    ],
)
async def test_a_demand_for_a_client_certificate_is_named(
    certificate: tuple[Path, Path], version: str, words: str
) -> None:
    async with openssl(certificate, *wants_certificate(certificate), version) as url:
        assert (await fail(url, trusted=certificate[0])).endswith(words)


async def test_what_a_proxy_does_not_let_pass_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async with RawServer(answer(b"", status=b"403 Forbidden")) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        why = await fail(SERVICE, trust_env=True)
    assert why.endswith("; the proxy refused with 403; it must let a tunnel to service.example:443 pass")


@pytest.mark.parametrize("trust_env", [True, False])
@pytest.mark.parametrize(
    "excepted", ["service.example", ".example", "example", "service.example:443", "*", "a, .example"]
)
async def test_an_exception_from_the_proxy_is_named(
    monkeypatch: pytest.MonkeyPatch, excepted: str, *, trust_env: bool
) -> None:
    async def resolve(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", excepted)
    why = await fail(SERVICE, trust_env=trust_env)
    assert why.endswith("$HTTPS_PROXY (or $ALL_PROXY) is set, but not used: $NO_PROXY excepts this host")


@pytest.mark.parametrize(
    ("excepted", "host"),
    [
        *((text, "service.example") for text in ("*.example", "service.*", "https://service.example", "other")),
        *((text, "10.1.2.3") for text in ("10.0.0.0/8", "10.", "10.1.2.0/24")),
    ],
)
async def test_other_forms_of_an_exception_do_not_work(
    monkeypatch: pytest.MonkeyPatch, excepted: str, host: str
) -> None:
    async with RawServer(answer(b"", status=b"403 Forbidden")) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", excepted)
        assert "the proxy refused" in await fail(f"https://{host}", trust_env=True)


async def test_a_proxys_password_may_have_any_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    async with RawServer(answer(b"", status=b"407 No")) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url.replace("//", f"//ann:{PASSWORD}@"))
        assert (await fail(SERVICE, trust_env=True)).endswith("refused with 407; check its URL, user name and password")
    assert base64.b64encode(f"ann:{PASSWORD}".encode()) in proxy.heads[0]


async def test_what_only_newer_pythons_check_is_named(old: Files) -> None:
    async with openssl((old.certificate, old.key)) as url:
        strict = await fail(url, trusted=old.authority, flags=ssl.VerifyFlags.VERIFY_X509_STRICT)
        assert strict.endswith(
            "; from 3.13 on, Python checks this: renew the authority's certificate, or lend a session"
        )
        context = ssl.create_default_context(cafile=str(old.authority))
        context.verify_flags &= ~ssl.VerifyFlags.VERIFY_X509_STRICT  # as the page says
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session,
            KeylessClient("key", base_url=url, session=session, max_attempts=1) as client,
        ):
            with pytest.raises(NotJsonError):  # OpenSSL's page
                await client.get_operation("a")


async def test_a_proxy_that_hangs_is_not_said_to_be_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with RawServer(hang) as proxy, aiohttp.ClientSession(trust_env=True) as session:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        client = KeylessClient("key", base_url=SERVICE, session=session, max_attempts=1, request_timeout=0.2)
        async with client:
            with pytest.raises(RequestTimeoutError, match=r"try again later$"):
                await client.get_operation("a")


CONNECT = """
import asyncio, sys
from aiokeyless import KeylessClient, KeylessError

async def main():
    async with KeylessClient("key", base_url=sys.argv[1], max_attempts=1) as client:
        try:
            await client.get_operation("a")
        except KeylessError as error:
            print(error)

asyncio.run(main())
"""


async def run(*arguments: str | Path, **variables: str | Path) -> str:
    """Run Python, and return what it prints."""
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    program = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output, _ = await program.communicate()
    return output.decode()


@pytest.mark.slow
@pytest.mark.parametrize("has_folder", [True, False])
async def test_a_file_of_authorities_comes_beside_the_folder_of_the_systems(
    certificate: tuple[Path, Path], old: Files, tmp_path: Path, *, has_folder: bool
) -> None:
    if has_folder:
        (tmp_path / "system.pem").write_bytes(certificate[0].read_bytes())
        rehashing = await asyncio.create_subprocess_exec(OPENSSL, "rehash", tmp_path)
        await rehashing.wait()
    async with openssl(certificate) as url:
        output = await run("-c", CONNECT, url, SSL_CERT_FILE=old.authority, SSL_CERT_DIR=tmp_path)
    assert ("not JSON" if has_folder else "ClientConnectorCertificateError") in output


@pytest.mark.slow
async def test_the_program_shows_its_certificate(certificate: tuple[Path, Path]) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(certificate[0]))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(*certificate)
    files = {"GATEWAY_AUTHORITY": certificate[0], "CLIENT_CERTIFICATE": certificate[0], "CLIENT_KEY": certificate[1]}
    async with RawServer(answer(b"[]"), tls=context) as gateway:
        url = gateway.url.replace("http:", "https:")
        output = await run(PROGRAM, KEYLESS_API_KEY="key", KEYLESS_BASE_URL=url, **files)
    assert output == "[]\n"
