"""The command line: what it prints, where, and the exit codes.

Time moves by the loop's clock, and commands run in the test's own loop, beside the sandbox that they speak to; those
on the machine's own clock speak to an `aiokeyless sandbox` of another process.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from rich.console import Console

from aiokeyless import (
    ApprovalError,
    ApprovalTicket,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    ApprovalUpdate,
    BadRequestError,
    ConfigurationError,
    ConflictError,
    InconsistentOperationError,
    KeylessClient,
    KeylessError,
    NotFoundError,
    OperationMismatchError,
    RateLimitError,
    ServerError,
    TransportError,
    __version__,
    cli,
)
from aiokeyless.cli.screen import Display, PlainLines, Progress, print_pending, safe
from aiokeyless.cli.words import in_words
from aiokeyless.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
    from pathlib import Path

ESCAPE = "\x1b"
COMMANDS = ["create", "demo", "get", "pending", "sandbox", "wait", "worker"]
#: Takes over the terminal, starts a new line, is markup of rich's, and turns the direction of writing.
HOSTILE = "\x1b[2J\x9b1m\r\n\x07[bold red]Pay 1[/] :smile: \u202eecila"
HARMLESS = r"\x1b[2J\x9b1m\r\n\x07[bold red]Pay 1[/] :smile: \u202eecila"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Pipe(io.StringIO):
    """A stdout of which a test awaits a text."""

    async def until(self, pattern: str) -> re.Match[str]:
        while not (match := re.search(pattern, self.getvalue())):  # noqa: ASYNC110  # a stream tells nobody
            await asyncio.sleep(0.01)
        return match


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox) -> Sandbox:
    """The sandbox of the test's loop, as the environment names it."""
    monkeypatch.setenv("KEYLESS_BASE_URL", sandbox.url)
    monkeypatch.setenv("KEYLESS_API_KEY", sandbox.api_key)
    return sandbox


async def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, *arguments: str) -> str:
    """What a command writes to such a stdout, when it ends well."""
    monkeypatch.setattr(sys, "stdout", stream)
    assert await cli.app.run_async(arguments) == cli.Exit.DONE
    return stream.getvalue()


def later(seconds: float, what: Callable[..., object], *arguments: object) -> None:
    asyncio.get_running_loop().call_later(seconds, what, *arguments)


def lines_of_json(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# -- words


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    assert re.search(r"Example.*:\n  aiokeyless demo", capsys.readouterr().out)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_an_example_and_80_columns(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert cli.run([command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert re.search(rf"Example.*:\n  aiokeyless {command}", out)
    assert max(map(len, out.splitlines())) <= 80
    assert err == ""


def test_no_words_at_all_print_the_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["aiokeyless"])
    assert cli.run() == 0
    out, _ = capsys.readouterr()
    assert "Usage: aiokeyless COMMAND" in out
    assert all(command in out for command in COMMANDS)


def test_the_version_is_the_librarys(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"aiokeyless {__version__}\n"


def test_a_stdout_that_is_no_file_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    assert cli.run(["--version"]) == 0
    assert stdout.getvalue() == f"aiokeyless {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "named", "help_of"),
    [
        (["dmeo"], ["dmeo", "demo"], ""),
        (["--nope"], ["--nope"], ""),
        (["demo", "--nope"], ["--nope"], "demo "),
        (["demo", "more"], ["more"], "demo "),
        (["demo", "--after"], ["--after"], "demo "),
        (["demo", "--after", "soon"], ["--after", "soon"], "demo "),
        *((["demo", "--after", value], ["--after", "0 to 3600"], "demo ") for value in ("-1", "3601", "nan", "inf")),
        (["demo", "--phone", "--after", "3"], ["--phone", "--after"], "demo "),
        *((["sandbox", "--port", value], ["--port", "65535"], "sandbox ") for value in ("-1", "65536")),
        *((["sandbox", "--auto-approve", value], ["at least 0"], "sandbox ") for value in ("-1", "nan", "inf")),
        (["create"], ["USER_ID"], "create "),
        (["create", "xyz"], ["USER_ID", "hex"], "create "),
        (["create", "C0FFEE", "--operation-id", ".."], ["--operation-id", "'..'"], "create "),
        (["create", "C0FFEE", "--payload", "--json"], ["--payload"], "create "),
        (["create", "C0FFEE", "--expires-in", "0"], ["--expires-in", "more than 0"], "create "),
        (["get"], ["OPERATION_ID"], "get "),
        (["get", "a\nb"], ["OPERATION_ID", r"a\nb", "control characters"], "get "),
        (["pending", "0x1"], ["USER_ID", "hex"], "pending "),
        (["wait"], ["OPERATION_ID", "--ticket"], "wait "),
        (["wait", ""], ["1 to 512"], "wait "),
        (["wait", "a", "--if-missing", "hope"], ["--if-missing", "hope", "raise", "wait"], "wait "),
        *((["wait", "a", "--timeout", value], ["--timeout", "more than 0"], "wait ") for value in ("0", "-1", "nan")),
        (["no\nsuch\x1b[2J"], [r"no\nsuch\x1b[2J"], ""),
    ],
    ids=repr,
)
def test_wrong_words_are_one_line_on_stderr_that_names_them_and_exit_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], named: list[str], help_of: str
) -> None:
    # What is said beyond that is cyclopts' wording, which changes.
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"aiokeyless: [ -~]+[.?] See aiokeyless {help_of}--help\.\n", err)
    assert [word for word in named if word not in err] == []


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigurationError("api_key is missing"), 1, "api_key is missing"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "[Errno 28] No space left on device"),
        (cli.CommandError("cannot: mend it"), 1, "cannot: mend it"),
        (ConfigurationError("two\nlines\x1b[2J"), 1, r"two\nlines\x1b[2J"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=repr,
)
def test_what_a_command_raises_is_one_line_on_stderr_and_an_exit_code(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli.demo, "run_demo", fail)
    assert cli.run(["demo", "--json"]) == code
    assert capsys.readouterr() == ("", f"aiokeyless: {message}\n")


def test_an_approval_that_did_not_come_in_time_is_exit_3(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ApprovalTimeoutError("", operation_id="a b", polls=1, elapsed=2)

    monkeypatch.setattr(cli.demo, "run_demo", fail)
    assert cli.run(["demo", "--json"]) == 3
    assert capsys.readouterr().err == (
        "aiokeyless: still missing after 2.0 s and 1 poll; a timeout is not a denial, it can be approved yet; "
        "look again: aiokeyless get 'a b'\n"
    )


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            BadRequestError(status=400, method="POST", path="/v2/x", detail="no such field"),
            ["POST /v2/x answered 400", "malformed (no such field)"],
        ),
        (BadRequestError(status=400, method="POST", path="/v2/x"), ["answered 400", "malformed"]),
        (NotFoundError(status=404, method="GET", path="/v2/x"), ["answered 404", "check the id", "--if-missing wait"]),
        (ConflictError(status=409, method="POST", path="/v2/x"), ["answered 409", "--operation-id"]),
        (RateLimitError(status=429, method="GET", path="/v2/x", detail="x"), ["answered 429", "try again later"]),
        (ServerError(status=503, method="GET", path="/v2/x"), ["answered 503", "try again later"]),
        (TransportError("GET /v2/x got no answer", method="GET", path="/v2/x"), ["GET /v2/x got no answer"]),
        (
            ApprovalUnknownError("", operation_id="a", polls=2, elapsed=2, last_error=KeylessError("it is down")),
            ["2.0 s and 2 polls", "nobody knows", "aiokeyless get a", "it is down"],
        ),
        (ApprovalUnknownError("", operation_id="a"), ["0 polls", "nobody knows"]),
    ],
    ids=repr,
)
def test_errors_speak_of_commands_and_not_of_the_librarys_names(error: KeylessError, words: list[str]) -> None:
    message = in_words(error)
    assert [word for word in words if word not in message] == []
    assert not re.search(r"get_operation|if_missing|operation_id|retry_after|\.detail", message)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "no API key: export KEYLESS_API_KEY=..."),
        ({"KEYLESS_API_KEY": ""}, "no API key: export KEYLESS_API_KEY=..."),
        ({"KEYLESS_API_KEY": " \t"}, "no API key: export KEYLESS_API_KEY=..."),
        ({"KEYLESS_API_KEY": "k\u00e9y"}, "KEYLESS_API_KEY must be printable ASCII"),
        ({"KEYLESS_API_KEY": "key", "KEYLESS_REGION": "mars"}, "KEYLESS_REGION must be one of eu, us, latam, sg"),
        ({"KEYLESS_API_KEY": "key", "KEYLESS_BASE_URL": "http://example.com"}, "KEYLESS_BASE_URL must be https"),
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    "command", [["create", "C0FFEE"], ["get", "a"], ["pending", "C0FFEE"], ["wait", "a"]], ids=repr
)
def test_an_environment_that_is_wrong_is_one_line_that_names_the_variable(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    variables: dict[str, str],
    message: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.run(command) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"aiokeyless: {message}")
    assert err.count("\n") == 1
    assert "k\u00e9y" not in err


# -- texts that are not ours


@pytest.mark.parametrize(
    ("text", "harmless"),
    [
        ("Pay 40 \u20ac to \u00c9ve \U0001f600", "Pay 40 \u20ac to \u00c9ve \U0001f600"),
        (HOSTILE, HARMLESS),
        ("\x00\x7f\x85\u2028\ud800\U000e0001", r"\x00\x7f\x85\u2028\ud800\U000e0001"),
        (r"C:\new", r"C:\new"),
        ("", ""),
    ],
    ids=ascii,
)
def test_what_is_not_printable_is_escaped_and_all_else_is_left(text: str, harmless: str) -> None:
    assert safe(text) == harmless
    assert safe(text).isprintable()


@pytest.mark.looptime
@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("command", ["get", "pending"])
async def test_a_text_of_the_services_is_shown_and_never_obeyed(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, stream: type[io.StringIO], command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("NO_COLOR", "1")
    async with service.client() as client:
        await client.create_operation(
            "C0FFEE", operation_id="[red]a[/]", operation_payload=HOSTILE, external_user_id=HOSTILE
        )
    text = await shown(monkeypatch, stream(), command, "[red]a[/]" if command == "get" else "C0FFEE")
    assert text.count(HARMLESS) == 2
    assert "[red]a[/]" in text
    text = re.sub(r"\x1b\[[\d;]*m", "", text)  # rich's own: dim and bold
    assert text.replace("\n", "").isprintable()


@pytest.mark.looptime
@pytest.mark.parametrize("command", ["get", "pending"])
async def test_json_carries_a_text_of_the_services_whole_and_in_printable_ascii(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, command: str
) -> None:
    async with service.client() as client:
        await client.create_operation("C0FFEE", operation_id="a", operation_payload=HOSTILE + "\x7f\u00e9")
    text = await shown(monkeypatch, io.StringIO(), command, "a" if command == "get" else "C0FFEE", "--json")
    assert re.fullmatch(r"[ -~]+\n", text)
    data = json.loads(text)
    assert (data if command == "get" else data["pending"][0])["operation_payload"] == HOSTILE + "\x7f\u00e9"


# -- create, get, pending


@pytest.mark.looptime
async def test_create_says_what_it_made_and_how_to_wait_for_it(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox
) -> None:
    text = await shown(
        monkeypatch, io.StringIO(), "create", "c0ffee", "--operation-id", "txn 1", "--payload", "Pay 40 to Alice"
    )
    assert re.search(r"Created +txn 1\n +User +C0FFEE\n", text)
    assert "\n  aiokeyless wait 'txn 1'\n" in text
    assert service.operations["txn 1"].operation_payload == "Pay 40 to Alice"


@pytest.mark.looptime
async def test_create_without_an_id_makes_one(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    text = await shown(monkeypatch, io.StringIO(), "create", "C0FFEE")
    [operation_id] = service.operations
    assert f"aiokeyless wait {operation_id}\n" in text


@pytest.mark.looptime
async def test_create_as_json_is_the_ticket(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    text = await shown(
        monkeypatch,
        io.StringIO(),
        "create",
        "C0FFEE",
        "--json",
        "--expires-in=30",
        "--external-user-id=\u00e9ve",
        "--payload=-5",
    )
    ticket = ApprovalTicket.from_json(text)
    [operation] = service.operations.values()
    assert (ticket.operation_id, ticket.external_user_id) == (operation.operation_id, "\u00e9ve")
    assert (ticket.expires_at - ticket.created_at).total_seconds() == 30
    assert operation.operation_payload == "-5"
    assert text.count("\n") == 1
    assert text.isascii()


@pytest.mark.looptime
@pytest.mark.parametrize(
    ("auth_type", "state"), [("biom", "approved with their face"), ("pin", "approved with their PIN")]
)
async def test_get_shows_an_operation_but_not_its_key(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, auth_type: str, state: str
) -> None:
    operation = service.approve("txn-1", user_id="C0FFEE", auth_type=auth_type, operation_payload="Pay 40 to Alice")
    text = await shown(monkeypatch, io.StringIO(), "get", "txn-1")
    assert text == (
        "  Operation  txn-1\n"
        f"  State      {state}\n"
        "  Payload    Pay 40 to Alice\n"
        "  User       C0FFEE\n"
        f"  Created    {operation.timestamp}\n"
        "  Number     1\n"
        "  Node       sandbox\n"
    )


@pytest.mark.looptime
async def test_get_as_json_is_the_operation_without_its_key(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    operation = service.approve("txn-1", user_id="C0FFEE")
    text = await shown(monkeypatch, io.StringIO(), "get", "txn-1", "--json")
    assert lines_of_json(text) == [{**operation.to_dict(), "is_approved": True}]
    assert operation.api_key is not None
    assert operation.api_key.reveal() not in text
    assert "api_key" not in text


@pytest.mark.looptime
@pytest.mark.parametrize(
    ("lie", "state"),
    [
        ({"result": True, "state": "pending"}, "pending"),
        ({"result": False, "state": "approved"}, "approved, with result False: contradictory"),
        ({"state": "denied\x1b[2J"}, r"denied\x1b[2J, with result True: contradictory or unknown, not to be trusted"),
        ({"auth_type": None}, "approved"),
        ({"auth_type": "voice"}, "approved by voice"),
    ],
    ids=repr,
)
async def test_get_calls_approved_only_what_is(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, lie: dict[str, object], state: str
) -> None:
    service.approve("txn-1", user_id="C0FFEE")
    service.tamper("txn-1", **lie)
    text = await shown(monkeypatch, io.StringIO(), "get", "txn-1")
    assert re.search(rf"State +{re.escape(state)}", text)


@pytest.mark.looptime
async def test_get_refuses_an_answer_about_another_operation(service: Sandbox) -> None:
    service.approve("txn-1", user_id="C0FFEE")
    service.tamper("txn-1", operation_id="txn-2")
    with pytest.raises(cli.CommandError, match="another operation, txn-2"):
        await cli.app.run_async(["get", "txn-1"])


@pytest.mark.looptime
async def test_a_file_gets_a_payload_on_one_line_and_a_terminal_in_its_columns(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox
) -> None:
    payload = ("Pay 40 to Alice. " * 12).strip()
    service.approve("txn-1", user_id="C0FFEE", operation_payload=payload)
    assert payload in await shown(monkeypatch, io.StringIO(), "get", "txn-1")
    text = await shown(monkeypatch, Terminal(), "get", "txn-1")
    lines = re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line[:13] for line in lines].count(" " * 13) == 2


@pytest.mark.looptime
async def test_pending_is_a_table_of_what_there_is(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    async with service.client() as client:
        await client.create_operation("C0FFEE", operation_id="txn-1", operation_payload="Pay 40 to Alice")
        await client.create_operation("C0FFEE", operation_id="txn-2")
        await client.create_operation("BADA55", operation_id="txn-3")
    text = await shown(monkeypatch, io.StringIO(), "pending", "c0ffee")
    assert [line.split() for line in text.splitlines()] == [
        ["Operation", "Payload"],
        ["txn-1", "Pay", "40", "to", "Alice"],
        ["txn-2"],
    ]


@pytest.mark.looptime
async def test_pending_as_json_is_one_object(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    async with service.client() as client:
        await client.create_operation("C0FFEE", operation_id="txn-1", external_user_id="alice")
    assert lines_of_json(await shown(monkeypatch, io.StringIO(), "pending", "c0ffee", "--json")) == [
        {
            "user_id": "C0FFEE",
            "pending": [
                {
                    "operation_id": "txn-1",
                    "operation_payload": None,
                    "external_user_id": "alice",
                    "auth_type": None,
                }
            ],
        }
    ]


@pytest.mark.looptime
@pytest.mark.usefixtures("service")
async def test_pending_says_that_nothing_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await shown(monkeypatch, io.StringIO(), "pending", "c0ffee") == "Nothing waits for C0FFEE.\n"
    assert lines_of_json(await shown(monkeypatch, io.StringIO(), "pending", "c0ffee", "--json")) == [
        {"user_id": "C0FFEE", "pending": []}
    ]


@pytest.mark.parametrize("width", [24, 80])
@pytest.mark.parametrize("operation_id", ["7ab9c0de-0000-4000-8000-00000000beef", "x" * 512, "\u6f22" * 36])
def test_a_table_loses_nothing_in_a_narrow_terminal(operation_id: str, width: int) -> None:
    stream = io.StringIO()
    texts = {"Operation": operation_id, "Payload": "y" * 200, "External user": "z" * 50, "By": None}
    print_pending(Console(file=stream, width=width), [texts])
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= width
    content = text.partition("user")[2] if width == 80 else text
    for character, count in (("y", 200), ("z", 50), (operation_id[0], operation_id.count(operation_id[0]))):
        assert content.count(character) >= count
    assert (operation_id in text) is (width == 80 and len(operation_id) == 36 and operation_id.isascii())


# -- wait


@pytest.mark.looptime
async def test_wait_without_a_terminal_is_a_plain_line_a_poll(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox
) -> None:
    async with service.client() as client:
        await client.create_operation("C0FFEE", operation_id="txn-1", operation_payload="Pay 40 to Alice")
    later(5, service.approve, "txn-1")
    text = await shown(monkeypatch, io.StringIO(), "wait", "txn-1")
    assert ESCAPE not in text
    assert max(map(len, text.splitlines())) <= 80
    assert re.match(r"  Operation  txn-1\n  Time       120 s at most\n\n", text)
    assert re.search(r"\n +\d\.\d\d s  poll 1: pending, next in \d\.\d\d s\n", text)
    assert re.search(r"\n +\d\.\d\d s  poll \d: approved\n\n", text)
    assert re.search(r"Approved   after [5-8]\.\d s and \d polls with their face\n  User       C0FFEE\n$", text)
    assert "Pay 40" not in text, "a log of a script is no place for it"


@pytest.mark.looptime
async def test_wait_on_a_terminal_is_a_line_of_elapsed_polls_next_look_and_time_left(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    async with service.client() as client:
        await client.create_operation("C0FFEE", operation_id="txn-1")
    later(5, service.approve, "txn-1")
    text = await shown(monkeypatch, Terminal(), "wait", "txn-1")
    text = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert re.search(r"Waiting for the user +2\.\d s  \d polls?  next in \d\.\d s  11[78] s left", text)
    assert max(len(re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", line)) for line in re.split(r"[\r\n]", text)) < 80
    assert "poll 1: pending" not in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is back"
    assert re.search(r"Approved +after [5-8]\.\d s", text)


@pytest.mark.looptime
async def test_the_line_stays_one_line_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    service.approve("txn-1", user_id="C0FFEE")
    text = await shown(monkeypatch, Terminal(), "wait", "txn-1")
    assert text.count("\x1b[1A") == 1, "no line above had to be taken back but at the end"


@pytest.mark.looptime
async def test_wait_tells_what_is_wrong_while_there_is_no_answer_and_while_nothing_is_there(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    service.fail_next(times=1)
    later(8, service.approve, "txn-1")
    later(7, lambda: service.approve("txn-1", user_id="C0FFEE"))
    for stream, no_answer, missing in (
        (Terminal(), "No answer, trying on ", "Not there yet "),
        (io.StringIO(), "poll 1: no answer (ServerError), next in", "not there yet, next in"),
    ):
        text = await shown(monkeypatch, stream, "wait", "txn-1", "--if-missing", "wait")
        assert no_answer in text
        assert missing in text
        service.forget("txn-1")
        service.fail_next(times=1)
        later(7, lambda: service.approve("txn-1", user_id="C0FFEE"))


@pytest.mark.looptime
async def test_wait_takes_no_end_for_a_time(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    async with service.client() as client:
        await client.create_operation("C0FFEE", operation_id="txn-1")
    later(130, service.approve, "txn-1")
    text = await shown(monkeypatch, Terminal(), "wait", "txn-1", "--timeout", "inf")
    assert "no end" in text
    assert "left" not in text


@pytest.mark.looptime
@pytest.mark.parametrize("arguments", [["--timeout", "3"], ["--timeout", "3", "--json"]], ids=repr)
async def test_wait_ends_after_its_time(service: Sandbox, arguments: list[str]) -> None:
    async with service.client() as client:
        await client.create_operation("C0FFEE", operation_id="txn-1")
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(ApprovalTimeoutError) as end:
        await cli.app.run_async(["wait", "txn-1", *arguments])
    assert loop.time() - began == pytest.approx(3, abs=0.1)
    assert "still pending after 3.0 s" in in_words(end.value)


@pytest.mark.looptime
async def test_wait_as_json_is_a_line_a_poll_and_the_outcome(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    async with service.client() as client:
        await client.create_operation("C0FFEE", operation_id="txn-1")
    service.fail_next()
    later(5, service.approve, "txn-1")
    text = await shown(monkeypatch, Terminal(), "wait", "txn-1", "--json")
    first, *polls, last, outcome = lines_of_json(text)
    assert first == {
        "event": "poll",
        "poll": 1,
        "elapsed": pytest.approx(0, abs=0.1),
        "state": None,
        "error": {"type": "ServerError", "message": first["error"]["message"]},
        "next_poll_in": pytest.approx(0.5, abs=0.5),
    }
    assert "answered 503" in first["error"]["message"]
    assert {poll["state"] for poll in polls} == {"pending"}
    assert (last["state"], last["error"], last["next_poll_in"]) == ("approved", None, None)
    assert [poll["poll"] for poll in (first, *polls, last)] == list(range(1, len(polls) + 3))
    assert outcome == {
        "event": "outcome",
        "outcome": "approved",
        "polls": last["poll"],
        "elapsed": pytest.approx(last["elapsed"], abs=0.1),
        "operation": service.operations["txn-1"].to_dict(),
        "error": None,
    }


@pytest.mark.looptime
@pytest.mark.parametrize(
    ("lie", "error", "outcome"),
    [
        ({}, ApprovalTimeoutError, "timed_out"),
        ({"operation_id": "txn-2"}, OperationMismatchError, "mismatch"),
        ({"state": "denied"}, InconsistentOperationError, "inconsistent"),
        (None, NotFoundError, "error"),
        ("down", ApprovalUnknownError, "unknown"),
    ],
    ids=repr,
)
async def test_the_last_line_of_json_names_the_outcome_whatever_it_is(
    monkeypatch: pytest.MonkeyPatch,
    service: Sandbox,
    lie: dict[str, object] | str | None,
    error: type[ApprovalError],
    outcome: str,
) -> None:
    if lie is not None:
        async with service.client() as client:
            await client.create_operation("C0FFEE", operation_id="txn-1")
    if lie == "down":
        service.fail_next(times=None)
    elif isinstance(lie, dict):
        service.tamper("txn-1", **lie)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(error) as end:
        await cli.app.run_async(["wait", "txn-1", "--timeout", "2", "--json"])
    last = lines_of_json(stream.getvalue())[-1]
    assert (last["event"], last["outcome"], last["operation"]) == ("outcome", outcome, None)
    assert last["error"] == {"type": error.__name__, "message": in_words(end.value)}


@pytest.mark.looptime
@pytest.mark.parametrize("source", ["file", "stdin"])
async def test_wait_resumes_a_ticket(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, tmp_path: Path, source: str
) -> None:
    content = await shown(
        monkeypatch, io.StringIO(), "create", "C0FFEE", "--operation-id", "a", "--expires-in", "30", "--json"
    )
    if source == "file":
        name = str(tmp_path / "ticket.json")
        (tmp_path / "ticket.json").write_text(content)
    else:
        name = "-"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    later(5, service.approve, "a")
    text = await shown(monkeypatch, io.StringIO(), "wait", "--ticket", name)
    assert re.match(r"  Operation  a\n  User       C0FFEE\n  Time       (29|30) s at most\n", text)
    assert "Approved" in text


@pytest.mark.looptime
async def test_wait_for_a_ticket_checks_user_and_payload(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, tmp_path: Path
) -> None:
    file = tmp_path / "ticket.json"
    file.write_text(await shown(monkeypatch, io.StringIO(), "create", "C0FFEE", "--operation-id", "a", "--json"))
    service.approve("a")
    service.tamper("a", operation_payload="Pay 9000 to Mallory")
    with pytest.raises(OperationMismatchError):
        await cli.app.run_async(["wait", "--ticket", str(file)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the ticket FILE (No such file or directory)"),
        (b"", "FILE: not a valid approval ticket"),
        (b"{}\x1b[2J", "FILE: not a valid approval ticket"),
        (b"\xff\xfe", "FILE: not a valid approval ticket"),
        (b'{"version": 2}', "FILE: ticket version 2 is not known here"),
    ],
    ids=repr,
)
def test_a_bad_ticket_is_one_line_that_says_how_to_have_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "ticket.json"
    if content is not None:
        file.write_bytes(content)
    assert cli.run(["wait", "--ticket", str(file)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"aiokeyless: {message.replace('FILE', str(file))}")
    assert err.endswith("; make one: aiokeyless create USER_ID --json > FILE\n")
    assert err.removesuffix("\n").isprintable()


def test_a_ticket_has_a_name_that_can_be_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.run(["wait", "--ticket", str(tmp_path)]) == 1
    assert "(Is a directory)" in capsys.readouterr().err
    assert cli.run(["wait", "--ticket", "a\0b"]) == 1
    assert r"cannot read the ticket a\x00b (embedded null byte)" in capsys.readouterr().err


def test_a_wait_is_for_an_id_or_for_a_ticket_and_not_for_both(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = (
        '{"operation_id": "a", "user_id": "C0FFEE", "created_at": "2026-01-01T00:00:00Z", '
        f'"expires_at": "2026-01-01T00:00:00Z", "version": 1, "payload_sha256": "{"0" * 64}"}}'
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(ticket.encode())))
    assert cli.run(["wait", "a", "--ticket", "-"]) == 2
    assert "either OPERATION_ID or --ticket FILE. See aiokeyless wait --help.\n" in capsys.readouterr().err


# -- sandbox


@contextlib.asynccontextmanager
async def serving(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> AsyncIterator[Pipe]:
    """`aiokeyless sandbox` in the test's loop, until SIGTERM."""
    stream = Pipe()
    monkeypatch.setattr(sys, "stdout", stream)
    command = asyncio.create_task(cli.app.run_async(["sandbox", "--port", "0", *arguments]))
    await stream.until(r"\n$")
    yield stream
    signal.raise_signal(signal.SIGTERM)
    assert await command == cli.Exit.DONE


@pytest.mark.looptime
async def test_the_sandbox_prints_the_phone_and_the_environment_of_its_clients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving(monkeypatch, "--api-key", "it's a key") as stdout:
        url = (await stdout.until(r"Phone +(http://127\.0\.0\.1:\d+)/ "))[1]
        await stdout.until(
            rf"""\n  export KEYLESS_BASE_URL={url} KEYLESS_API_KEY='it'"'"'s a key'\n""",
        )
        assert "User" not in stdout.getvalue()
        assert "Listens" not in stdout.getvalue()
        async with KeylessClient("it's a key", base_url=url) as client:
            assert await client.get_pending_operations("C0FFEE") == []


@pytest.mark.looptime
async def test_the_sandbox_as_json_prints_one_object_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch, "--json") as stdout:
        [data] = lines_of_json(stdout.getvalue())
        url = data["url"]
        assert data == {
            "url": url,
            "api_key": "sandbox-key",
            "environment": {"KEYLESS_BASE_URL": url, "KEYLESS_API_KEY": "sandbox-key"},
        }
    assert stdout.getvalue().count("\n") == 1


@pytest.mark.looptime
async def test_the_sandboxs_user_approves_by_itself_when_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch, "--auto-approve", "2.5") as stdout:
        assert "approves each operation after 2.5 s" in stdout.getvalue()
        url = (await stdout.until(r"KEYLESS_BASE_URL=(\S+)"))[1]
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with KeylessClient("sandbox-key", base_url=url) as client:
            await client.request_approval("C0FFEE")
        assert loop.time() - began >= 2.5


@pytest.mark.looptime
async def test_the_sandbox_says_so_where_others_can_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch, "--host", "0.0.0.0") as stdout:  # noqa: S104  # for a moment
        assert "on 0.0.0.0: whoever reaches that can approve" in stdout.getvalue()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.EADDRINUSE, "error while attempting to bind"),
            "port 3223 is taken; end what listens there, or choose another: aiokeyless sandbox --port 0",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            "port 3223 is not for every user; choose another: aiokeyless sandbox --port 0",
        ),
        (
            OSError(-2, "Name or service not known"),
            "cannot listen on 127.0.0.1 port 3223 (Name or service not known); choose another --host or --port",
        ),
    ],
    ids=repr,
)
def test_a_sandbox_that_cannot_listen_says_what_to_choose(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: OSError, message: str
) -> None:
    async def fail(_self: Sandbox) -> None:
        raise error

    monkeypatch.setattr(Sandbox, "start", fail)
    assert cli.run(["sandbox"]) == 1
    assert capsys.readouterr() == ("", f"aiokeyless: {message}\n")


# -- another process serves, on the machine's own clock


def environment(**more: str) -> Mapping[str, str]:
    return {**os.environ, "PYTHONWARNINGS": "error", **more}


#: Whoever starts the tests may have had SIGINT ignored, which processes inherit.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from aiokeyless.__main__ import main
sys.exit(main())
"""


def start(*arguments: str, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-c", PROGRAM, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**more),
    )


def done(*arguments: str, **more: str) -> str:
    """What a command prints that ends well and complains of nothing."""
    command = [sys.executable, "-m", "aiokeyless", *arguments]
    process = subprocess.run(command, capture_output=True, text=True, env=environment(**more), check=False)
    assert (process.returncode, process.stderr) == (0, "")
    return process.stdout


@pytest.fixture(scope="module")
def other_terminal() -> Iterator[dict[str, str]]:
    """The environment that an `aiokeyless sandbox` in another terminal says to export."""
    with start("sandbox", "--port", "0", "--json", "--auto-approve", "0.3") as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["environment"]
        process.send_signal(signal.SIGTERM)
        assert process.communicate() == ("", "")
    assert process.returncode == 0


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch, other_terminal: dict[str, str]) -> dict[str, str]:
    for name, value in other_terminal.items():
        monkeypatch.setenv(name, value)
    return other_terminal


@pytest.mark.usefixtures("exported")
def test_the_wrong_key_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYLESS_API_KEY", "wrong-key")
    for command in (["get", "a"], ["pending", "C0FFEE"], ["create", "C0FFEE"]):
        assert cli.run(command) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(r"aiokeyless: .* answered 401: .*check KEYLESS_API_KEY.*\n", err)
        assert "wrong-key" not in err


@pytest.mark.usefixtures("exported")
def test_an_unknown_operation_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("get", "wait"):
        assert cli.run([command, "nope"]) == 1
        assert re.fullmatch(r"aiokeyless: .*nope answered 404: .*check the id.*\n", capsys.readouterr().err)


@pytest.mark.usefixtures("exported")
def test_a_taken_id_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["create", "C0FFEE", "--operation-id", "taken"]
    assert cli.run(arguments) == 0
    capsys.readouterr()
    assert cli.run(arguments) == 1
    assert re.fullmatch(r"aiokeyless: .* answered 409: .*--operation-id.*\n", capsys.readouterr().err)


def test_a_refused_connection_is_one_line_that_names_where_to(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEYLESS_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("KEYLESS_API_KEY", "key")
    assert cli.run(["get", "a"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(
        r"aiokeyless: .* got no answer .*KEYLESS_BASE_URL is http://127\.0\.0\.1:1: is that right, .*\n", err
    )


def test_a_taken_port_is_one_line(capsys: pytest.CaptureFixture[str], exported: dict[str, str]) -> None:
    port = exported["KEYLESS_BASE_URL"].rpartition(":")[2]
    assert cli.run(["sandbox", "--port", port]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"aiokeyless: port {port} is taken; ")


@pytest.mark.usefixtures("exported")
def test_a_payload_beyond_the_encoding_of_stdout_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.run(["create", "C0FFEE", "--operation-id", "euro", "--payload", "Pay 40 \u20ac \u00e9"]) == 0
    content = io.BytesIO()
    with io.TextIOWrapper(content, encoding="latin-1") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.run(["get", "euro"]) == 0
        assert b"Pay 40 \\u20ac \xe9\n" in content.getvalue()


# -- demo


@pytest.mark.looptime
async def test_the_demo_measures_from_the_approval_by_the_loops_clock() -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    result = await cli.demo.run_demo(7.5, Display())
    assert result.approved_after == pytest.approx(7.5, abs=0.05)
    assert result.approved_after + result.lateness == pytest.approx(loop.time() - began, abs=0.3)
    assert result.operation.is_approved
    assert result.requests == result.polls + 1


@pytest.mark.looptime
async def test_by_default_the_demo_takes_well_under_20_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    await shown(monkeypatch, io.StringIO(), "demo")
    assert loop.time() - began < 16


@pytest.mark.looptime
@pytest.mark.parametrize("after", [0.0, 3600.0])
async def test_any_time_that_may_be_asked_for_is_waited_for(after: float) -> None:
    result = await cli.demo.run_demo(after, Display())
    assert result.approved_after == pytest.approx(after, abs=0.05)


@pytest.mark.looptime
async def test_a_demo_that_is_cancelled_leaves_no_task() -> None:
    demo = asyncio.create_task(cli.demo.run_demo(7.5, Display()))
    await asyncio.sleep(5)
    demo.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await demo
    assert demo.cancelled()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.looptime
@pytest.mark.parametrize(
    ("approved_after", "polls", "lateness"),
    [(0.0, 1, 0.0), (0.001, 2, 0.999), (1.0, 2, 0.0), (7.5, 9, 0.5), (8.001, 10, 0.999)],
)
async def test_the_fixed_loop_looks_every_second_from_the_creation_on(
    approved_after: float, polls: int, lateness: float
) -> None:
    async with Sandbox() as sandbox:
        operation = sandbox.approve("txn-1", user_id="C0FFEE")
    result = cli.demo.DemoResult(operation=operation, requests=4, polls=3, approved_after=approved_after, lateness=1.0)
    assert result.fixed_polls == polls
    assert result.fixed_requests == polls + 1
    assert result.fixed_lateness == pytest.approx(lateness)


@pytest.mark.looptime
async def test_without_a_terminal_each_poll_is_a_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    text = await shown(monkeypatch, io.StringIO(), "demo")
    assert ESCAPE not in text
    assert "\r" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"\n +\d\.\d\d s  poll 1: pending, next in \d\.\d\d s\n", text)
    assert re.search(r"\n +7\.5\d s  the user approves\n +\d+\.\d\d s  poll \d+: approved\n\n", text)


@pytest.mark.looptime
async def test_the_summary_names_operation_payload_requests_lateness_and_the_fixed_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = await shown(monkeypatch, io.StringIO(), "demo")
    assert re.search(r"Operation +[0-9a-f-]{36}\n", text)
    assert re.search(r"Payload +Approve wire transfer of \$500 to account 1234\n", text)
    assert re.search(r"Approved +7\.5\d s after it was created\n", text)
    assert re.search(r"Noticed +\d\.\d\d s after the approval\n", text)
    assert re.search(r"Requests +\d+: 1 to create it, \d+ polls\n", text)
    assert "would have made about 10 requests\n  and noticed about 0.5" in text


@pytest.mark.looptime
async def test_on_a_terminal_one_line_tells_elapsed_polls_and_next_look(monkeypatch: pytest.MonkeyPatch) -> None:
    text = await shown(monkeypatch, Terminal(), "demo")
    assert re.search(r"Waiting for the user\W.*0\.\d s.*0 polls", text)
    assert re.search(r"Waiting for the user\W.*\d\.\d s.*1 poll\W.*next in \d\.\d s", text)
    assert re.search(r"Approved, not noticed\W.*\d+\.\d s.*polls", text)
    assert "poll 1: pending" not in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is back"


@pytest.mark.looptime
async def test_colours_stay_out_where_no_color_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = await shown(monkeypatch, Terminal(), "demo")
    codes = [code for codes in re.findall(r"\x1b\[([\d;]*)m", text) for code in codes.split(";")]
    assert not [code for code in codes if 30 <= int(code or 0) < 100]


@pytest.mark.looptime
async def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert ESCAPE not in await shown(monkeypatch, Terminal(), "demo")


@pytest.mark.looptime
async def test_forced_colours_do_not_make_a_terminal_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "poll 1: pending" in await shown(monkeypatch, io.StringIO(), "demo")


@pytest.mark.looptime
async def test_json_is_one_object_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    text = await shown(monkeypatch, io.StringIO(), "demo", "--json", "--after", "7.5")
    assert text.count("\n") == 1
    result = json.loads(text)
    assert result == {
        "operation_id": result["operation_id"],
        "operation_payload": "Approve wire transfer of $500 to account 1234",
        "user_id": "C0FFEE",
        "auth_type": "biom",
        "approved_after": pytest.approx(7.5, abs=0.05),
        "lateness": pytest.approx(3, abs=3),
        "requests": result["polls"] + 1,
        "polls": result["polls"],
        "fixed_loop": {"interval": 1.0, "lateness": pytest.approx(0.5, abs=0.05), "requests": 10, "polls": 9},
    }


@pytest.mark.looptime
async def test_a_poll_that_got_no_answer_says_so() -> None:
    stream = io.StringIO()
    error = ServerError(status=503, method="GET", path="/v2/operations/a")
    update = ApprovalUpdate(operation=None, error=error, polls=2, elapsed=1.0, next_poll_in=0.5)
    PlainLines(Console(file=stream)).poll(Progress(), update)
    assert stream.getvalue() == "    0.00 s  poll 2: no answer (ServerError), next in 0.50 s\n"


@pytest.mark.looptime
async def test_with_the_phone_the_demo_prints_its_url_and_waits_for_a_click(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = Pipe()
    monkeypatch.setattr(sys, "stdout", stdout)
    command = asyncio.create_task(cli.app.run_async(["demo", "--phone"]))
    url = (await stdout.until(r"Phone +(http://127\.0\.0\.1:\d+)/\n"))[1]
    await asyncio.sleep(5)
    assert not command.done()
    await click(url)
    assert await command == cli.Exit.DONE
    assert "the user is you" in stdout.getvalue()
    assert re.search(r"\n +[56]\.\d\d s  the user approves\n", stdout.getvalue())
    assert re.search(r"Approved +[56]\.\d\d s after it was created\n", stdout.getvalue())
    requests = re.search(r"Requests +(\d+): 1 to create it, (\d+) polls\n", stdout.getvalue())
    assert requests is not None
    assert int(requests[1]) == int(requests[2]) + 1, "the phone's own requests are not the client's"


@pytest.mark.looptime
async def test_with_the_phone_json_on_stdout_has_the_url_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = Pipe()
    monkeypatch.setattr(sys, "stderr", stderr)
    command = asyncio.create_task(cli.app.run_async(["demo", "--phone", "--json"]))
    url = (await stderr.until(r"^aiokeyless: open (http://\S+)/ and approve\n$"))[1]
    await click(url)
    assert await command == cli.Exit.DONE
    [result] = lines_of_json(capsys.readouterr().out)
    assert result["requests"] == result["polls"] + 1


@pytest.mark.looptime
async def test_a_person_has_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.demo, "_GLANCE", 30)
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(ApprovalTimeoutError):
        await cli.demo.run_demo(None, Display())
    assert loop.time() - began == pytest.approx(600, abs=1)


@pytest.mark.looptime
async def test_an_approval_that_is_noticed_before_the_next_glance_at_the_phone_counts_as_noticed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli.demo, "_GLANCE", 1e6)
    monkeypatch.setattr(Sandbox, "start", started_with_an_approval(Sandbox.start))
    result = await cli.demo.run_demo(None, Display())
    assert result.lateness == 0.0


def started_with_an_approval(start: Callable[[Sandbox], Awaitable[None]]) -> Callable[[Sandbox], Awaitable[None]]:
    async def started(self: Sandbox) -> None:
        await start(self)
        later(3, lambda: self.approve(next(iter(self.operations))))

    return started


async def click(url: str) -> None:
    """Approve the first operation that the phone shows, as its button does."""
    async with aiohttp.ClientSession(url, headers={"Origin": url}) as page:
        async with page.get("/sandbox/events") as events:
            await events.content.readuntil(b"data: ")
            [phone] = json.loads(await events.content.readline())["phones"]
        approval = {"user": phone["user"], "key": phone["pending"][0]["key"], "authType": "biom"}
        async with page.post("/sandbox/approve", json=approval) as response:
            assert response.status == 200


# -- as a process


def test_a_process_without_a_terminal_prints_plain_lines_and_exits_0() -> None:
    text = done("demo", "--after", "0.3")
    assert "the user approves" in text
    assert ESCAPE not in text


def test_terminals_that_share_a_sandbox_need_nothing_but_its_environment(
    other_terminal: dict[str, str], tmp_path: Path
) -> None:
    ticket = tmp_path / "ticket.json"
    ticket.write_text(done("create", "C0FFEE", "--payload", "Pay 40 to Alice", "--json", **other_terminal))
    text = done("wait", "--ticket", str(ticket), "--json", **other_terminal)
    outcome = lines_of_json(text)[-1]
    assert outcome["outcome"] == "approved"
    assert outcome["operation"]["operation_payload"] == "Pay 40 to Alice"


def test_a_process_on_a_terminal_draws_its_line() -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "aiokeyless", "demo", "--after", "0.3"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment()) as process:
        os.close(theirs)
        text = b""
        with contextlib.suppress(OSError), os.fdopen(ours, "rb", buffering=0) as terminal:  # its end is an error here
            while chunk := terminal.read(4096):
                text += chunk
    assert process.returncode == 0
    assert b"Waiting for the user" in text
    assert b"Noticed" in text


@pytest.mark.parametrize(
    ("arguments", "sign"),
    [
        (["demo", "--after", "60"], "poll 1"),
        (["sandbox", "--port", "0"], "Ctrl-C"),
        (["wait", "yet-to-come", "--if-missing", "wait"], "poll 1"),
    ],
    ids=repr,
)
def test_ctrl_c_is_one_line_and_exit_code_130(other_terminal: dict[str, str], arguments: list[str], sign: str) -> None:
    with start(*arguments, **other_terminal) as process:
        assert process.stdout is not None
        while sign not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert (process.returncode, err) == (130, "aiokeyless: interrupted\n")


def test_ctrl_c_ends_the_reading_of_a_ticket_too(other_terminal: dict[str, str]) -> None:
    program = PROGRAM.replace("sys.exit", "sys.stdout.write('ready\\n'); sys.exit")
    command = [sys.executable, "-u", "-c", program, "wait", "--ticket", "-"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**other_terminal),
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        err = process.stderr.read()
    assert (process.returncode, err) == (130, "aiokeyless: interrupted\n")


def test_a_reader_that_leaves_early_is_no_traceback() -> None:
    with start("demo", "--after", "0.3") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (1, "")
