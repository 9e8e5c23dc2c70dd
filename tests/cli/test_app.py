"""Arguments, help, exit codes, and one line on stderr for each error."""

from __future__ import annotations

import errno
import io
import re
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from aiokeyless import ApprovalTicket, ApprovalTimeoutError, ApprovalUnknownError, ConfigurationError, __version__
from aiokeyless.cli import operations, run
from aiokeyless.cli.app import CommandError
from aiokeyless.cli.error_messages import describe
from aiokeyless.sandbox.control import ENDPOINTS

if TYPE_CHECKING:
    from .terminal import Fail

TICKET = ApprovalTicket.for_operation("a", user_id="AB", created_at=datetime(2026, 1, 1, tzinfo=UTC)).to_json()
TIMED_OUT = ApprovalTimeoutError("", operation_id="a b", polls=1, elapsed=2)
UNKNOWN = ApprovalUnknownError("", operation_id="a", polls=1, elapsed=2)
COMMANDS = ["create", "demo", "get", "pending", "sandbox", "wait", "worker"]


@pytest.mark.parametrize("command", ["", *COMMANDS, *(f"sandbox {name}" for name in ENDPOINTS)])
def test_help_of_each_command_has_an_example_and_80_columns(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert run([*command.split(), "--help"]) == 0
    out, err = capsys.readouterr()
    assert re.search(rf"Example.*:\n.*aiokeyless {command}", out)
    assert max(map(len, out.splitlines())) <= 80
    assert err == ""


def test_no_arguments_print_the_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["aiokeyless"])
    assert run() == 0
    out, _ = capsys.readouterr()
    assert "Usage: aiokeyless COMMAND" in out
    assert all(command in out for command in COMMANDS)


def test_stdout_need_not_be_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run(["--version"]) == 0
    assert stdout.getvalue() == f"aiokeyless {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "named", "help_of"),
    [
        (["dmeo"], ["dmeo", "demo"], ""),
        (["--nope"], ["--nope"], ""),
        (["demo", "--nope"], ["--nope"], "demo "),
        (["demo", "more"], ["more"], "demo "),
        *((["sandbox", "--port", value], ["--port", "65535"], "sandbox ") for value in ("-1", "65536")),
        *((["sandbox", "--auto-approve", value], ["at least 0"], "sandbox ") for value in ("-1", "nan", "inf")),
        (["create"], ["USER_ID"], "create "),
        (["create", "C0FFEE", "Pay 40"], ["--payload 'Pay 40'"], "create "),
        (["get", "a", "b"], ['"b"'], "get "),
        (["users", "fnid", "a"], ["fnid", "find"], "users "),
        (["create", "C0FFEE", "--region", "us"], ["--region", "KEYLESS_REGION"], "create "),
        (["create", "C0FFEE", "--api-key=x"], ["--api-key", "KEYLESS_API_KEY"], "create "),
        (["create", "C0FFEE", "--paylod", "x"], ["--paylod", "mean", "--payload"], "create "),
        (["create", "C0FFEE", "--who", "x"], ["--who", "--operation-id, --payload, "], "create "),
        (["create", "xyz"], ["USER_ID", "hex"], "create "),
        (["create", "C0FFEE", "--operation-id", ".."], ["--operation-id", '".."'], "create "),
        (["create", "C0FFEE", "--payload", "--json"], ["--payload"], "create "),
        *(
            (["create", "C0FFEE", "--expires-in", value], ["--expires-in", "more than 0"], "create ")
            for value in ("0", "nan", "inf")
        ),
        *(
            (
                [*command, "--require-auth-type", "face"],
                ["--require-auth-type", "face", "biom", "pin"],
                f"{command[0]} ",
            )
            for command in (["create", "C0FFEE"], ["wait", "a"])
        ),
        (["get"], ["OPERATION_ID"], "get "),
        (["get", "a\nb"], ["OPERATION_ID", r"a\nb", "control characters"], "get "),
        (["pending", "0x1"], ["USER_ID", "hex"], "pending "),
        (["wait"], ["OPERATION_ID", "--ticket"], "wait "),
        (["wait", ""], ["1 to 512"], "wait "),
        (["wait", TICKET], ["an id, not the text of a ticket"], "wait "),
        (["wait", "a", "--if-missing", "hope"], ["--if-missing", "hope", "raise", "wait"], "wait "),
        *((["wait", "a", "--timeout", value], ["--timeout", "more than 0"], "wait ") for value in ("0", "-1", "nan")),
        (["no\nsuch\x1b[2J"], [r"no\nsuch\x1b[2J"], ""),
        (["worker", "--replicas", "0"], ["--replicas", "at least 1"], "worker "),
        (["worker", "--replicas", "many"], ["--replicas", "many"], "worker "),
        *((["worker", "--health-port", value], ["--health-port", "65535"], "worker ") for value in ("-1", "65536")),
        (["worker", "--broker"], ["--broker"], "worker "),
        (["sandbox", "aprove", "a"], ["aprove", "approve"], "sandbox "),
        (["sandbox", "approve"], ["OPERATION_ID"], "sandbox approve "),
        (["sandbox", "approve", "a", "--auth-type", "voice"], ["--auth-type", "biom"], "sandbox approve "),
        (["sandbox", "approve", "a", "--user", "Alice"], ["--user", "hex"], "sandbox approve "),
        (["sandbox", "decline"], ["OPERATION_ID", "--user"], "sandbox decline "),
        (["sandbox", "decline", "a", "--code", "0"], ["--code", "at least 1"], "sandbox decline "),
        (["sandbox", "fail", "--status", "600"], ["--status", "599"], "sandbox fail "),
        (["sandbox", "fail", "--times", "0"], ["--times", "at least 1"], "sandbox fail "),
        (["sandbox", "fail", "--retry-after", "-1"], ["--retry-after", "at least 0"], "sandbox fail "),
        (["sandbox", "fail", "--method", "get"], ["--method", "GET"], "sandbox fail "),
        (["sandbox", "unlock", "Alice"], ["USER_ID", "hex"], "sandbox unlock "),
        (["sandbox", "list", "--state", "denied"], ["--state", "pending"], "sandbox list "),
        (["schema"], ["MESSAGE"], "schema "),
        (["schema", "nothing"], ["nothing"], "schema "),
    ],
)
def test_wrong_arguments_are_one_line_on_stderr_that_names_them_and_exit_2(
    fail: Fail, arguments: list[str], named: list[str], help_of: str
) -> None:
    # The rest is cyclopts' wording, which changes.
    err = fail(*arguments, code=2)
    assert re.fullmatch(rf"[ -~]+[.?] See aiokeyless {help_of}--help\.", err)
    assert [name for name in named if name not in err] == []


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigurationError("no such loop"), 1, "no such loop"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "[Errno 28] No space left on device"),
        (CommandError("cannot: fix it"), 1, "cannot: fix it"),
        (ConfigurationError("two\nlines\x1b[2J"), 1, r"two\nlines\x1b[2J"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (TIMED_OUT, 3, describe(TIMED_OUT)),
        (UNKNOWN, 4, "time is up after 2.0 s and 1 poll, and the outcome is unknown; check it: aiokeyless get a"),
    ],
)
def test_what_a_command_raises_is_one_line_on_stderr_and_an_exit_code(
    fail: Fail, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def open_client(**_: object) -> None:
        raise error

    monkeypatch.setattr(operations, "open_client", open_client)
    assert fail("get", "a", code=code) == message


@pytest.mark.parametrize(
    ("command", "variables", "message"),
    [
        ("create C0FFEE", {}, "no API key: export KEYLESS_API_KEY=... with the server key of your tenant "),
        ("worker --broker sqlite::memory:", {}, "no API key: export KEYLESS_API_KEY=..."),
        ("get a", {"KEYLESS_API_KEY": " \t"}, "no API key: export KEYLESS_API_KEY=..."),
        ("pending C0FFEE", {"KEYLESS_API_KEY": "k\u00e9y"}, "$KEYLESS_API_KEY is wrong: "),
        (
            "wait a",
            {"KEYLESS_API_KEY": "a", "KEYLESS_REGION": "mars"},
            "$KEYLESS_REGION is wrong: ",
        ),
        (
            "get a",
            {"KEYLESS_API_KEY": "a", "KEYLESS_BASE_URL": "http://a.com"},
            "$KEYLESS_BASE_URL is wrong: base_url must be https",
        ),
    ],
)
def test_a_wrong_environment_is_one_line_that_names_the_variable(
    fail: Fail, monkeypatch: pytest.MonkeyPatch, command: str, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    err = fail(*command.split())
    assert err.startswith(message)
    assert "k\u00e9y" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", "C0FFEE", "--payload", "\udcff"], "--payload must be text that UTF-8 can encode"),
        (["create", "C0FFEE", "--external-user-id", "\udcff"], "--external-user-id must be text that UTF-8 can encode"),
        (
            ["create", "C0FFEE", "--expires-in", "1e12"],
            "--expires-in must end before the year 10000",
        ),
        (["sandbox", "--api-key", " key"], "--api-key must be a text of printable ASCII"),
        (["sandbox", "--host", ""], "--host must be a text of printable ASCII"),
    ],
)
def test_a_value_that_the_library_refuses_is_one_line_that_names_the_option(
    fail: Fail, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setenv("KEYLESS_API_KEY", "key")
    monkeypatch.setenv("KEYLESS_BASE_URL", "http://127.0.0.1:1")
    assert fail(*arguments).startswith(message)
