"""The command line: what it prints, where, and the exit codes. Time moves by the loop's clock unless a process runs."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import json
import os
import pty
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from aiokeyless import ApprovalTimeoutError, ApprovalUpdate, ConfigurationError, ServerError, __version__, cli
from aiokeyless.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Mapping

ESCAPE = "\x1b"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TERM", "xterm")


async def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, *arguments: str) -> str:
    """What a command writes to such a stdout, when it ends well."""
    monkeypatch.setattr(sys, "stdout", stream)
    assert await cli.app.run_async(arguments) == cli.Exit.DONE
    return stream.getvalue()


# -- words


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"]])
def test_help_has_an_example(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli.run(arguments) == 0
    assert re.search(r"Example.*:\n  aiokeyless demo", capsys.readouterr().out)


def test_no_words_at_all_print_the_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["aiokeyless"])
    assert cli.run() == 0
    assert "Usage: aiokeyless COMMAND" in capsys.readouterr().out


def test_the_version_is_the_librarys(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"aiokeyless {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dmeo"], 'Unknown command "dmeo". Did you mean "demo"? Available commands: demo. See aiokeyless --help.'),
        (["--nope"], 'Unknown command "--nope". Available commands: demo. See aiokeyless --help.'),
        (["demo", "--nope"], "Unknown option: --nope. See aiokeyless demo --help."),
        (["demo", "more"], "Unused Tokens: ['more']. See aiokeyless demo --help."),
        (["demo", "--after"], 'Command "demo" parameter --after requires an argument. See aiokeyless demo --help.'),
        (
            ["demo", "--after", "soon"],
            'Invalid value for --after: unable to convert "soon" into float. See aiokeyless demo --help.',
        ),
        *(
            (
                ["demo", "--after", value],
                f'Invalid value "{value}" for --after. Must be from 0 to 3600 seconds. See aiokeyless demo --help.',
            )
            for value in ("-1.0", "3601.0", "nan", "inf", "-inf")
        ),
        (["no\nsuch\x1b[2J"], 'Unknown command "no such [2J". Available commands: demo. See aiokeyless --help.'),
    ],
    ids=repr,
)
def test_wrong_words_are_one_line_on_stderr_and_exit_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.run(arguments) == 2
    assert capsys.readouterr() == ("", f"aiokeyless: {message}\n")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigurationError("api_key is missing"), 1, "api_key is missing"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "[Errno 28] No space left on device"),
        (ApprovalTimeoutError("not approved in time", operation_id="a"), 3, "not approved in time"),
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

    monkeypatch.setattr(cli, "run_demo", fail)
    assert cli.run(["demo", "--json"]) == code
    assert capsys.readouterr() == ("", f"aiokeyless: {message}\n")


# -- demo


@pytest.mark.looptime
async def test_the_demo_measures_from_the_approval_by_the_loops_clock() -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    result = await cli.run_demo(7.5, cli._Display())
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
    result = await cli.run_demo(after, cli._Display())
    assert result.approved_after == pytest.approx(after, abs=0.05)


@pytest.mark.looptime
async def test_a_demo_that_is_cancelled_leaves_no_task() -> None:
    demo = asyncio.create_task(cli.run_demo(7.5, cli._Display()))
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
    result = cli.DemoResult(operation=operation, requests=4, polls=3, approved_after=approved_after, lateness=1.0)
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
    assert re.search(r"\n +7\.5\d s  the simulated user approves\n +\d+\.\d\d s  poll \d+: approved\n\n", text)


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
    assert re.search(r"Approved, not noticed yet\W.*\d+\.\d s.*polls", text)
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
    cli._PlainLines(Console(file=stream)).poll(cli._Progress(), update)
    assert stream.getvalue() == "    0.00 s  poll 2: no answer (ServerError), next in 0.50 s\n"


# -- as a process


def environment(**more: str) -> Mapping[str, str]:
    return {**os.environ, "PYTHONWARNINGS": "error", **more}


def test_a_process_without_a_terminal_prints_plain_lines_and_exits_0() -> None:
    command = [sys.executable, "-m", "aiokeyless", "demo", "--after", "0.3"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "the simulated user approves" in done.stdout
    assert ESCAPE not in done.stdout


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


def test_ctrl_c_is_one_line_and_exit_code_130() -> None:
    # Whoever starts the tests may have had SIGINT ignored, which processes inherit.
    program = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from aiokeyless.__main__ import main
sys.argv[1:] = ["demo", "--after", "60"]
sys.exit(main())
"""
    command = [sys.executable, "-u", "-c", program]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout is not None
        while "poll 1" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(2)
        _, err = process.communicate()
    assert (process.returncode, err) == (130, "aiokeyless: interrupted\n")


def test_a_reader_that_leaves_early_is_no_traceback() -> None:
    command = [sys.executable, "-m", "aiokeyless", "demo", "--after", "0.3"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (1, "")
