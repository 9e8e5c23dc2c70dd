"""Commands as processes of their own, on the real clock, beside an ``aiokeyless sandbox`` of another process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]  # it has no type hints
import pytest

from aiokeyless.cli import run

from .terminal import ESCAPE, lines_of_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from .terminal import Fail

pytestmark = pytest.mark.slow


def environment(**more: str) -> Mapping[str, str]:
    return {**os.environ, "PYTHONWARNINGS": "error", **more}


#: The shell that runs the tests may ignore SIGINT, and processes inherit that.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from aiokeyless.__main__ import main
sys.exit(main())
"""


def start(*arguments: str, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-c", PROGRAM, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**more),
    )


def output(*arguments: str, **more: str) -> str:
    """Return the stdout of a command that exits with 0 and prints nothing on stderr."""
    command = [sys.executable, "-m", "aiokeyless", *arguments]
    process = subprocess.run(command, capture_output=True, text=True, env=environment(**more), check=False)
    assert (process.returncode, process.stderr) == (0, "")
    return process.stdout


@pytest.fixture(scope="module")
def other_terminal() -> Iterator[dict[str, str]]:
    """The environment that an `aiokeyless sandbox` in another process prints."""
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


def test_a_taken_port_is_one_line(fail: Fail, exported: dict[str, str]) -> None:
    port = exported["KEYLESS_BASE_URL"].rpartition(":")[2]
    assert fail("sandbox", "--port", port).startswith(f"port {port} is in use; ")


@pytest.mark.usefixtures("exported")
def test_a_payload_beyond_the_encoding_of_stdout_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(["create", "C0FFEE", "--operation-id", "euro", "--payload", "Pay 40 \u20ac \u00e9"]) == 0
    content = io.BytesIO()
    with io.TextIOWrapper(content, encoding="latin-1") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert run(["get", "euro"]) == 0
        assert b"Pay 40 \\u20ac \xe9\n" in content.getvalue()


def test_the_demo_runs_on_the_real_clock() -> None:
    text = output("demo")
    assert "Fewer requests during it: aiokeyless, by " in text
    assert re.search(r"aiokeyless +0 +30\n +the loop +30 +0\n", text)
    assert ESCAPE not in text


def test_terminals_share_a_sandbox_by_its_environment_alone(other_terminal: dict[str, str], tmp_path: Path) -> None:
    ticket = tmp_path / "ticket.json"
    ticket.write_text(output("create", "C0FFEE", "--payload", "Pay 40 to Alice", "--json", **other_terminal))
    text = output("wait", "--ticket", str(ticket), "--json", **other_terminal)
    outcome = lines_of_json(text)[-1]
    assert outcome["outcome"] == "approved"
    assert outcome["operation"]["operation_payload"] == "Pay 40 to Alice"


def test_a_process_on_a_terminal_draws_a_line(other_terminal: dict[str, str]) -> None:
    output("create", "C0FFEE", "--operation-id", "drawn", **other_terminal)
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "aiokeyless", "wait", "drawn"]
    environ = environment(**other_terminal)
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environ) as process:
        os.close(slave)
        text = b""
        # A terminal that was closed is an OSError.
        with contextlib.suppress(OSError), os.fdopen(master, "rb", buffering=0) as terminal:
            while chunk := terminal.read(4096):
                text += chunk
    assert process.returncode == 0
    assert b"Waiting for the user" in text
    assert b"Approved" in text


@pytest.mark.parametrize(
    ("arguments", "sign", "message"),
    [
        (["demo"], "1. ", "interrupted"),
        (
            ["wait", "yet to come", "--if-missing", "wait"],
            "poll 1",
            "interrupted; to resume, run the same command again",
        ),
    ],
)
def test_ctrl_c_is_one_line_and_exit_code_130(
    other_terminal: dict[str, str], arguments: list[str], sign: str, message: str
) -> None:
    with start(*arguments, **other_terminal) as process:
        assert process.stdout is not None
        while sign not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert (process.returncode, err) == (130, f"aiokeyless: {message}\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_are_the_normal_end_of_a_sandbox(number: signal.Signals) -> None:
    with start("sandbox", "--port", "0") as process:
        assert process.stdout is not None
        while "Ctrl-C" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(number)
        _, err = process.communicate()
    assert (process.returncode, err) == (0, "")


def test_ctrl_c_interrupts_the_reading_of_a_ticket(other_terminal: dict[str, str]) -> None:
    with start("wait", "--ticket", "-", **other_terminal) as process:
        assert process.stdin is not None
        # More than a pipe holds: once it is written, the command reads, and then sleeps only to wait for more.
        process.stdin.write(" " * 500_000)
        process.stdin.flush()
        while psutil.Process(process.pid).status() != psutil.STATUS_SLEEPING:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        err = process.stderr.read()
    assert (process.returncode, err) == (130, "aiokeyless: interrupted\n")


def test_a_closed_stdout_is_no_traceback(other_terminal: dict[str, str]) -> None:
    with start("wait", "never-to-come", "--if-missing", "wait", **other_terminal) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (1, "")
