"""``aiokeyless wait``."""

from __future__ import annotations

import asyncio
import io
import re
import sys
from typing import TYPE_CHECKING

import pytest

from aiokeyless import (
    ApprovalError,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    InconsistentOperationError,
    NotFoundError,
    OperationMismatchError,
    __version__,
)
from aiokeyless.cli.app import InterruptedCommandError, app
from aiokeyless.cli.error_messages import describe

from .terminal import ESCAPE, create, drawn_by, later, lines_of_json, output_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from aiokeyless.sandbox import Sandbox

    from .terminal import Fail

pytestmark = pytest.mark.looptime


async def test_wait_without_a_terminal_is_a_plain_line_a_poll(service: Sandbox) -> None:
    await create(service, operation_payload="Pay 40 to Alice")
    later(5, service.approve, "txn-1")
    text = await output_of("wait", "txn-1")
    assert ESCAPE not in text
    assert max(map(len, text.splitlines())) <= 80
    assert re.match(r"  Operation  txn-1\n  Time       120 s at most\n\n", text)
    assert re.search(r"\n +\d\.\d\d s  poll 1: pending, next in \d\.\d\d s\n", text)
    assert re.search(r"\n +\d\.\d\d s  poll \d: approved\n\n", text)
    assert re.search(r"Approved   by face, after [5-8]\.\d s and \d polls\n  User       C0FFEE\n$", text)
    assert "Pay 40" not in text, "a script's log must not have it"


async def test_wait_on_a_terminal_is_a_line_of_elapsed_polls_next_poll_and_time_left(service: Sandbox) -> None:
    await create(service)
    later(5, service.approve, "txn-1")
    text = await drawn_by("wait", "txn-1")
    assert re.search(r"Waiting for Keyless +0\.0 s  0 polls  120 s left", text)
    assert re.search(r"Waiting for the user +\d\.\d s  0 polls", text) is None
    assert re.search(r"Waiting for the user +2\.\d s  \d polls?  next in \d\.[1-9] s  11[78] s left", text)
    assert max(len(re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", line)) for line in re.split(r"[\r\n]", text)) < 80
    assert "poll 1: pending" not in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is back"
    assert re.search(r"Approved +by face, after [5-8]\.\d s", text)


@pytest.mark.parametrize(
    ("output", "no_answer", "missing"),
    [
        (drawn_by, "No answer, retrying ", "Not created yet "),
        (output_of, "poll 1: no answer (ServerError), next in", "not created yet, next in"),
    ],
)
async def test_wait_shows_that_there_is_no_answer_or_no_operation(
    service: Sandbox, output: Callable[..., Awaitable[str]], no_answer: str, missing: str
) -> None:
    service.fail_next()
    later(7, lambda: service.approve("txn-1", user_id="C0FFEE"))
    text = await output("wait", "txn-1", "--if-missing", "wait")
    assert no_answer in text
    assert missing in text


async def test_wait_can_have_no_time_limit(service: Sandbox) -> None:
    await create(service)
    later(130, service.approve, "txn-1")
    assert "no limit" in await output_of("wait", "txn-1", "--timeout", "inf")
    assert "left" not in await drawn_by("wait", "txn-1", "--timeout", "inf")


@pytest.mark.parametrize("arguments", [["--timeout", "3"], ["--timeout", "3", "--json"]])
async def test_wait_ends_at_its_timeout(service: Sandbox, arguments: list[str]) -> None:
    await create(service)
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(ApprovalTimeoutError) as end:
        await app.run_async(["wait", "txn-1", *arguments])
    assert loop.time() - began == pytest.approx(3, abs=0.1)
    assert "still pending after 3.0 s" in describe(end.value)


async def test_wait_as_json_is_a_line_a_poll_and_the_outcome(service: Sandbox) -> None:
    await create(service)
    service.fail_next()
    later(5, service.approve, "txn-1")
    text = await drawn_by("wait", "txn-1", "--json")
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


@pytest.mark.parametrize(
    ("lie", "error", "outcome"),
    [
        ({}, ApprovalTimeoutError, "timed_out"),
        ({"operation_id": "txn-2"}, OperationMismatchError, "mismatch"),
        ({"state": "denied"}, InconsistentOperationError, "inconsistent"),
        (None, NotFoundError, "error"),
        ("down", ApprovalUnknownError, "unknown"),
    ],
)
async def test_the_last_line_of_json_names_every_outcome(
    monkeypatch: pytest.MonkeyPatch,
    service: Sandbox,
    lie: dict[str, object] | str | None,
    error: type[ApprovalError],
    outcome: str,
) -> None:
    if lie is not None:
        await create(service)
    if lie == "down":
        service.fail_next(times=None)
    elif isinstance(lie, dict):
        service.tamper("txn-1", **lie)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(error) as end:
        await app.run_async(["wait", "txn-1", "--timeout", "2", "--json"])
    last = lines_of_json(stream.getvalue())[-1]
    assert (last["event"], last["outcome"], last["operation"]) == ("outcome", outcome, None)
    assert last["error"] == {"type": error.__name__, "message": describe(end.value)}


@pytest.mark.parametrize("options", [[], ["--json"]])
async def test_a_wait_that_is_interrupted_says_how_to_resume_it(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, options: list[str]
) -> None:
    await create(service)
    monkeypatch.setattr(sys, "stdout", stdout := io.StringIO())
    waiting = asyncio.create_task(app.run_async(["wait", "txn-1", *options]))
    await asyncio.sleep(30)
    waiting.cancel()  # as Ctrl-C does
    with pytest.raises(InterruptedCommandError, match=r"^to resume, run the same command again$"):
        await waiting
    if options:
        assert lines_of_json(stdout.getvalue())[-1]["outcome"] == "interrupted"
    assert service.operations["txn-1"].state == "pending"


@pytest.mark.parametrize("name", ["ticket.json", "-"])
async def test_wait_resumes_a_ticket(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, tmp_path: Path, name: str
) -> None:
    content = await output_of("create", "C0FFEE", "--operation-id", "a", "--expires-in", "30", "--json")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ticket.json").write_text(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    later(5, service.approve, "a")
    text = await output_of("wait", "--ticket", name)
    assert re.match(r"  Operation  a\n  User       C0FFEE\n  Time       (29|30) s at most\n", text)
    assert "Approved" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "FILE cannot be read (No such file or directory)"),
        (b"", "FILE is not a ticket that aiokeyless VERSION can read"),
        (b"{}\x1b[2J", "FILE is not a ticket that aiokeyless VERSION can read"),
        (b"\xff\xfe", "FILE is not a ticket that aiokeyless VERSION can read"),
        (b'{"version": 2}', "FILE is not a ticket that aiokeyless VERSION can read"),
    ],
)
def test_a_bad_ticket_is_one_line_that_says_how_to_create_one(
    fail: Fail, tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "ticket.json"
    if content is not None:
        file.write_bytes(content)
    err = fail("wait", "--ticket", str(file))
    assert err.startswith(f"--ticket: {message}".replace("FILE", str(file)).replace("VERSION", __version__))
    assert err.endswith("; to create one: aiokeyless create USER_ID --json > FILE")
    assert err.isprintable()


def test_a_wait_is_for_an_id_or_a_ticket_and_not_both(fail: Fail) -> None:
    err = fail("wait", "a", "--ticket", "-", code=2)
    assert err.endswith("either OPERATION_ID or --ticket FILE. See aiokeyless wait --help.")


def test_a_factor_is_compared_with_a_ticket_and_not_with_an_id(fail: Fail) -> None:
    assert "--require-auth-type needs --ticket FILE" in fail("wait", "a", "--require-auth-type", "biom", code=2)


@pytest.mark.parametrize("factor", ["biom", "pin"])
async def test_wait_takes_no_other_factor_than_the_required_one(service: Sandbox, tmp_path: Path, factor: str) -> None:
    async with service.client() as client:
        ticket = await client.create_operation("C0FFEE", operation_id="txn-1")
    (tmp_path / "ticket.json").write_text(ticket.to_json())
    service.approve("txn-1", auth_type=factor)
    command = "wait", "--ticket", str(tmp_path / "ticket.json"), "--require-auth-type", "biom"
    if factor == "biom":
        assert "Approved" in await output_of(*command)
    else:
        with pytest.raises(OperationMismatchError):
            await app.run_async(list(command))


async def test_wait_shows_attempts_that_failed(service: Sandbox) -> None:
    await create(service)
    for code in (30003, 30004):
        service.fail_authentication("txn-1", code)
    later(20, service.approve, "txn-1")
    text = await output_of("wait", "txn-1")
    assert re.search(r"\n +\d+\.\d\d s  1 attempt failed: the user left the scan \(30003\)\n", text)
    assert text.count("1 attempt failed: the face did not match (30004)") == 1
    assert text.count("attempt failed") == 2


async def test_wait_on_a_terminal_counts_attempts_that_failed(service: Sandbox) -> None:
    await create(service)
    service.fail_authentication("txn-1", 30003)
    later(20, service.approve, "txn-1")
    text = await drawn_by("wait", "txn-1")
    assert "1 attempt failed " in text


async def test_wait_as_json_is_a_line_an_attempt_too(service: Sandbox) -> None:
    await create(service)
    failed = service.fail_authentication("txn-1", 30003)
    later(20, service.approve, "txn-1")
    lines = lines_of_json(await output_of("wait", "txn-1", "--json"))
    [attempt] = [line for line in lines if line["event"] == "attempt"]
    assert attempt == {"event": "attempt", "elapsed": attempt["elapsed"], **failed.to_dict()}
    assert 5 < attempt["elapsed"] < 20


async def test_wait_that_times_out_says_what_failed(service: Sandbox) -> None:
    await create(service)
    service.fail_authentication("txn-1")
    with pytest.raises(ApprovalTimeoutError) as end:
        await app.run_async(["wait", "txn-1", "--timeout", "3"])
    assert "; 1 attempt failed: the face did not match (30004); a timeout is not a denial" in describe(end.value)
