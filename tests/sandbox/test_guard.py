"""Whom the sandbox lets in, and whom it does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aiokeyless.sandbox.guard import refuse_driver, refuse_foreign_origin, refuse_host

if TYPE_CHECKING:
    from aiokeyless.sandbox.api import Answer

OWN = "laptop.LAN"
PAGE = {"Host": "localhost:8000", "Origin": "http://localhost:8000", "Content-Type": "application/json"}


def status(refused: Answer | None) -> int | None:
    return None if refused is None else refused.status


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LocalHost:8000", "Laptop.lan:80"),
        *("127.0.0.1:8000", "127.1.2.3", "192.168.1.5:8000", "172.17.0.1", "0.0.0.0:8000"),
        *("[::1]:8000", "[::1]", "[fd00::5]:8000"),
    ],
)
def test_host_of_the_server_is_let_in(host: str) -> None:
    assert refuse_host(host, OWN) is None


@pytest.mark.parametrize(
    "host",
    [
        *("", "evil.example", "evil.example:8000", "lan", "host.docker.internal"),
        *("localhost.evil.example", "evil.localhost", "localhost@evil.example", "localhost:8000:9", "localhost:x"),
        *("localhost/", "[localhost]", "localhost.", " localhost"),
        *("127.0.0.1.evil.example", "192.168.1", "192.168.1.6.evil.example", "192.168.1.6 evil.example"),
        *("127.1", "2130706433", "::1", "[::1%25lo]", "[fd00::6].evil.example", "[fd00::6]evil"),
    ],
)
def test_host_that_is_not_the_servers_is_misdirected(host: str) -> None:
    assert status(refuse_host(host, OWN)) == 421


@pytest.mark.parametrize(
    "headers",
    [
        PAGE,
        {**PAGE, "Sec-Fetch-Site": "same-origin"},
        {**PAGE, "Content-Type": "Application/JSON; charset=utf-8"},
        {**PAGE, "Host": "[::1]:8000", "Origin": "http://[::1]:8000"},
    ],
)
def test_own_page_is_let_in(headers: dict[str, str]) -> None:
    assert refuse_foreign_origin("POST", headers) is None


@pytest.mark.parametrize("headers", [{"Host": "localhost"}, {"Host": "localhost", "Sec-Fetch-Site": "same-origin"}])
def test_reading_needs_no_word_of_where_it_comes_from(headers: dict[str, str]) -> None:
    assert refuse_foreign_origin("GET", headers) is None


STRANGERS = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "http://localhost:8001"},
    {"Origin": "https://localhost:8000"},
    {"Origin": "http://127.0.0.1:8000"},
    {"Origin": "http://localhost"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "none"},
]


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD"])
@pytest.mark.parametrize("stranger", STRANGERS)
def test_other_page_is_forbidden(method: str, stranger: dict[str, str]) -> None:
    assert status(refuse_foreign_origin(method, {**PAGE, **stranger})) == 403


def test_post_without_an_origin_is_forbidden() -> None:
    assert status(refuse_foreign_origin("POST", {"Host": "localhost", "Content-Type": "application/json"})) == 403


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
def test_post_that_needs_no_preflight_is_an_unsupported_type(content_type: str) -> None:
    assert status(refuse_foreign_origin("POST", {**PAGE, "Content-Type": content_type})) == 415


# What drives the sandbox; test_control.py has whom it refuses

KEY = "sandbox-key"
PROGRAM = {"Host": "keyless:8000", "X-Api-Key": KEY, "Content-Type": "application/json"}


@pytest.mark.parametrize("headers", [PROGRAM, {**PROGRAM, "Sec-Fetch-Mode": "cors"}, PAGE | {"X-Api-Key": KEY}])
def test_program_with_the_key_drives_the_sandbox(headers: dict[str, str]) -> None:
    assert refuse_driver("POST", headers, KEY) is None
    assert refuse_driver("GET", {name: headers[name] for name in ("Host", "X-Api-Key")}, KEY) is None
