"""What is printed for a terminal, a pipe and a file; texts of others are printed as plain characters."""

from __future__ import annotations

import io
import json
import re
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from aiokeyless import ApprovalUpdate, Authentication, ServerError
from aiokeyless.cli import scenes
from aiokeyless.cli.render import PlainLines, escape, print_table

from .terminal import ESCAPE, Terminal, create, drawn_by, output_of

if TYPE_CHECKING:
    from aiokeyless.sandbox import Sandbox

#: Control sequences, line breaks, rich's markup, and a change of the writing direction.
HOSTILE = "\x1b[2J\x9b1m\r\n\x07[bold red]Pay 1[/] :smile: \u202eecila"
HARMLESS = r"\x1b[2J\x9b1m\r\n\x07[bold red]Pay 1[/] :smile: \u202eecila"


@pytest.mark.parametrize(
    ("text", "harmless"),
    [
        ("Pay 40 \u20ac to \u00c9ve \U0001f600", "Pay 40 \u20ac to \u00c9ve \U0001f600"),
        (HOSTILE, HARMLESS),
        ("\x00\x7f\x85\u2028\ud800\U000e0001", r"\x00\x7f\x85\u2028\ud800\U000e0001"),
        (r"C:\new", r"C:\new"),
        ("", ""),
    ],
)
def test_only_what_is_not_printable_is_escaped(text: str, harmless: str) -> None:
    assert escape(text) == harmless
    assert escape(text).isprintable()


@pytest.mark.looptime
@pytest.mark.parametrize("is_terminal", [False, True])
@pytest.mark.parametrize("command", ["get", "pending"])
async def test_a_text_of_the_service_is_printed_and_never_interpreted(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, command: str, *, is_terminal: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    await create(service, "[red]a", operation_payload=HOSTILE, external_user_id=HOSTILE)
    arguments = command, "[red]a" if command == "get" else "C0FFEE"
    text = await (drawn_by if is_terminal else output_of)(*arguments)
    assert text.count(HARMLESS) == 2
    assert "[red]a" in text
    assert text.replace("\n", "").isprintable()


@pytest.mark.looptime
@pytest.mark.parametrize("command", ["get", "pending"])
async def test_json_carries_a_text_of_the_service_whole_and_in_printable_ascii(service: Sandbox, command: str) -> None:
    await create(service, "a", operation_payload=HOSTILE + "\x7f\u00e9")
    text = await output_of(command, "a" if command == "get" else "C0FFEE", "--json")
    assert re.fullmatch(r"[ -~]+\n", text)
    data = json.loads(text)
    assert (data if command == "get" else data["pending"][0])["operation_payload"] == HOSTILE + "\x7f\u00e9"


@pytest.mark.looptime
async def test_a_payload_is_one_line_in_a_file_and_folded_on_a_terminal(service: Sandbox) -> None:
    payload = ("Pay 40 to Alice. " * 12).strip()
    service.approve("txn-1", user_id="C0FFEE", operation_payload=payload)
    assert payload in await output_of("get", "txn-1")
    lines = (await drawn_by("get", "txn-1")).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line[:13] for line in lines].count(" " * 13) == 2


@pytest.mark.parametrize("width", [24, 80])
@pytest.mark.parametrize("operation_id", ["7ab9c0de-0000-4000-8000-00000000beef", "x" * 512, "\u6f22" * 36])
def test_a_table_loses_nothing_in_a_narrow_terminal(operation_id: str, width: int) -> None:
    stream = io.StringIO()
    texts = {"Operation": operation_id, "Payload": "y" * 200, "External user": "z" * 50, "By": None}
    print_table(Console(file=stream, width=width), [texts])
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= width
    content = text.partition("user")[2] if width == 80 else text
    for character, count in (("y", 200), ("z", 50), (operation_id[0], operation_id.count(operation_id[0]))):
        assert content.count(character) >= count
    assert (operation_id in text) is (width == 80 and len(operation_id) == 36 and operation_id.isascii())


@pytest.mark.looptime
async def test_a_row_of_a_table_is_one_line_in_a_file(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    monkeypatch.setenv("COLUMNS", "24")
    await create(service, operation_payload="Pay 40 to Alice. " * 1000)
    text = await output_of("pending", "C0FFEE")
    assert [line.split()[0] for line in text.splitlines()] == ["Operation", "txn-1"]


@pytest.mark.looptime
async def test_the_line_stays_one_line_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    service.approve("txn-1", user_id="C0FFEE")
    text = await drawn_by("wait", "txn-1")
    assert text.count("\x1b[1A") == 1, "only the end removes a line"


@pytest.mark.looptime
async def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(scenes, "PEOPLE", 5)
    assert ESCAPE not in await output_of("demo", stream=Terminal())


@pytest.mark.looptime
async def test_forced_colours_do_not_make_a_file_a_terminal(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    service.approve("txn-1", user_id="C0FFEE")
    assert "poll 1: approved" in await output_of("wait", "txn-1")


@pytest.mark.looptime
async def test_a_poll_without_an_answer_is_a_line_that_names_the_error() -> None:
    stream = io.StringIO()
    error = ServerError(status=503, method="GET", path="/v2/operations/a")
    update = ApprovalUpdate(operation=None, error=error, polls=2, elapsed=1.0, next_poll_in=0.5)
    PlainLines(Console(file=stream)).show_poll(update)
    assert stream.getvalue() == "    0.00 s  poll 2: no answer (ServerError), next in 0.50 s\n"


@pytest.mark.parametrize(
    ("attempt", "shown"),
    [
        (Authentication(result=HOSTILE, error_code=30003), "1 attempt failed: the user left the scan (30003)"),
        (Authentication(result="APPROVED", error_code=0), ""),
    ],
    ids=["failed", "not failed"],
)
async def test_an_attempt_is_a_line_where_it_failed(attempt: Authentication, shown: str) -> None:
    stream = io.StringIO()
    PlainLines(Console(file=stream)).show_attempt(attempt)
    assert stream.getvalue().partition(" s  ")[2].rstrip("\n") == shown
