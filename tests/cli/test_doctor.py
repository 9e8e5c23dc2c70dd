"""``aiokeyless doctor``: what it finds, at a service that is as expected, at those that are not, and at none."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import re
import select
import ssl
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import ANY, AsyncMock

import pytest
from raw_server import RawServer, answer, refused

from aiokeyless import ConfigurationError, __version__
from aiokeyless._http.protocol import ADDRESSES
from aiokeyless.cli.app import CommandError, InterruptedCommandError, UsageError, app
from aiokeyless.cli.doctor import PlainRequests, UnansweredError, describe_connection
from aiokeyless.cli.findings import CHECKS
from aiokeyless.models import Region, Secret
from aiokeyless.sandbox.api import Answer

from .deviations import DEVIATIONS, Exchange, deviate
from .terminal import ESCAPE, Pipe, Terminal, later

if TYPE_CHECKING:
    from aiokeyless.sandbox import Sandbox

pytestmark = pytest.mark.looptime


@pytest.fixture
def person(service: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A person who approves what says so after twenty seconds; and the key of an app."""
    service.auto_approve = lambda operation: 20 if "please" in (operation.operation_payload or "") else None
    monkeypatch.setenv("KEYLESS_SDK_KEY", "app")


async def examine(monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the report."""
    monkeypatch.setattr(sys, "stdout", stdout := io.StringIO())
    code = await app.run_async(["doctor", "--json", *options])
    return code, json.loads(stdout.getvalue())


def with_status(report: dict[str, Any], status: str) -> set[str]:
    return {check["id"] for check in report["checks"] if check["status"] == status}


@pytest.mark.usefixtures("person")
async def test_a_sandbox_is_as_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    code, report = await examine(monkeypatch, "--user", "c0ffee", "--yes")
    assert [check["id"] for check in report["checks"]] == list(CHECKS)
    assert with_status(report, "skipped") == {"lateness", "phone_started", "remembered"}
    assert (code, with_status(report, "differs")) == (0, set())


@pytest.mark.usefixtures("person")
@pytest.mark.parametrize("name", DEVIATIONS)
async def test_exactly_what_deviates_differs(monkeypatch: pytest.MonkeyPatch, service: Sandbox, name: str) -> None:
    differing, make = DEVIATIONS[name]
    deviate(monkeypatch, service, make())
    code, report = await examine(monkeypatch, "--user", "C0FFEE", "--yes")
    assert (code, with_status(report, "differs")) == (1 if differing else 0, differing)


def test_each_check_has_a_deviation() -> None:
    # Those of the network and of a person have tests of their own below.
    others = {"connection", "proxy", "lateness", "phone_started", "remembered"}
    assert others.union(*(differing for differing, _ in DEVIATIONS.values())) == set(CHECKS)


async def test_without_a_user_it_only_reads(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    code, report = await examine(monkeypatch)
    assert code == 0
    assert {request.method for request in service.requests} == {"GET"}
    ways = {"connection", "proxy", "round_trip", "clock", "no_key", "wrong_key", "key", "unknown_operation"}
    assert with_status(report, "as_expected") == ways | {"users", "cache"}
    assert (report["version"], report["user"], report["operations"]) == (1, None, [])


async def test_a_report_says_of_each_check_what_was_expected_and_found(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox
) -> None:
    deviate(monkeypatch, service, lambda it: it.with_status(403) if it.key is None else None)
    _, report = await examine(monkeypatch)
    checks = {check["id"]: check for check in report["checks"]}
    assert checks["no_key"] == {
        "id": "no_key",
        "status": "differs",
        "documented": True,
        "sent": "a GET without a key",
        "needs": ["connection"],
        "expected": "401",
        "found": "answered with 403",
        "consequence": CHECKS["no_key"].consequence,
    }
    assert (checks["wrong_key"]["found"], checks["wrong_key"]["consequence"]) == ("answered with 401", None)
    assert (checks["created"]["found"], checks["created"]["consequence"]) == ("without --user", None)


@pytest.mark.usefixtures("person")
async def test_a_created_with_201_is_as_expected_and_said(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    deviate(monkeypatch, service, lambda it: it.with_status(201) if it.method == "POST" and it.is_good else None)
    code, report = await examine(monkeypatch, "--user", "C0FFEE", "--yes")
    [created] = [check for check in report["checks"] if check["id"] == "created"]
    assert (code, created["status"], created["found"]) == (0, "as_expected", "answered with 201")


@pytest.mark.usefixtures("person")
@pytest.mark.parametrize("user", [None, "c0ffee"])
async def test_a_report_has_the_same_fields_always(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, user: str | None
) -> None:
    _, report = await examine(monkeypatch, "--yes", *([] if user is None else ["--user", user]))
    date = datetime.fromisoformat(report.pop("date"))
    assert abs(date - datetime.now(UTC)) < timedelta(minutes=1)
    assert [len(report.pop(name)) for name in ("checks", "operations")] == [len(CHECKS), 3 if user else 0]
    assert report == {
        "version": 1,
        "host": service.url.removeprefix("http://"),
        "region": None,
        "library": __version__,
        "user": user and hashlib.sha256(b"C0FFEE").hexdigest(),
    }


async def test_a_report_names_the_region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYLESS_API_KEY", "key")
    monkeypatch.setenv("KEYLESS_REGION", "sg")
    monkeypatch.setattr(PlainRequests, "ask", AsyncMock(side_effect=UnansweredError("nothing")))
    _, report = await examine(monkeypatch)
    assert (report["region"], report["host"]) == ("sg", ADDRESSES[Region.SG].removeprefix("https://"))


async def test_if_nobody_approves_both_causes_are_said(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    code, report = await examine(monkeypatch, "--user", "C0FFEE", "--yes", "--seconds", "30")
    [approved] = [check for check in report["checks"] if check["id"] == "approved"]
    assert (code, approved["status"]) == (1, "differs")
    assert "still pending after 30" in approved["found"]
    assert "The phone was not told, or the app cannot approve what a backend created" in approved["consequence"]
    assert {"factor", "stays_approved", "unlisted", "id_taken_after"} <= with_status(report, "skipped")
    assert len(service.operations) == 3


@pytest.mark.usefixtures("person")
async def test_at_most_five_operations_are_created_and_one_is_to_be_approved(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox
) -> None:
    created: list[dict[str, Any]] = []

    def accept(it: Exchange) -> Any:
        if it.method == "POST":
            created.append(it.body)
            return it.with_status(200)
        return None

    deviate(monkeypatch, service, accept)
    _, report = await examine(monkeypatch, "--user", "C0FFEE", "--yes")
    assert len(created) == 5
    [to_approve] = [body for body in created if "please approve" in body["operationPayload"]]
    assert [body["operationId"] for body in created].count(to_approve["operationId"]) == 1
    assert all("aiokeyless doctor" in body["operationPayload"] for body in created)
    assert {body["operationId"] for body in created} == {made["operation_id"] for made in report["operations"]}


async def test_the_certificate_of_the_connection_is_shown(certificate: tuple[Path, Path]) -> None:
    server_tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_tls.load_cert_chain(*certificate)
    server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0, ssl=server_tls)
    async with server:
        port = server.sockets[0].getsockname()[1]
        tls = ssl.create_default_context(cafile=certificate[0])
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
        assert describe_connection(writer.transport) == "IPv4, TLSv1.3, certificate of broker for 2 more days"
        writer.close()


# On a screen, and in a pipe


@pytest.mark.usefixtures("person")
async def test_a_pipe_has_a_plain_line_a_check_and_progress_is_on_stderr(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    deviate(monkeypatch, service, lambda it: it.with_status(403) if it.key is None else None)
    assert await app.run_async(["doctor", "--user", "C0FFEE", "--yes"]) == 1
    out, err = capsys.readouterr()
    assert ESCAPE not in out + err
    words = r"answered with 403\n +sent: a GET without a key\n +documented by the vendor: 401\n +Something"
    assert re.search(rf"^✗  no_key +{words}", out, re.MULTILINE)
    assert re.search(r"^✓  approved +after \d\d s by face$", out, re.MULTILINE)
    assert re.search(r"^  Skipped +phone_started: without --phone-started$", out, re.MULTILINE)
    assert re.search(r"^  Found +29 as expected, 1 different$", out, re.MULTILINE)
    assert "poll 1: pending" in err
    assert "approve this on the phone" in err


@pytest.mark.usefixtures("person")
async def test_a_terminal_shows_all_on_one_screen(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    assert service.url
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", stdout := Terminal())
    assert await app.run_async(["doctor", "--user", "C0FFEE", "--yes"]) == 0
    text = re.sub(r"\x1b\[[\d;]*m", "", stdout.getvalue())
    for shown in ("✓  connection", "Keyless cannot withdraw", "approve this on the phone", "Waiting for the user"):
        assert shown in text


async def test_a_terminal_without_unicode_shows_ascii(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    assert service.url
    with io.TextIOWrapper(io.BytesIO(), encoding="ascii") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert await app.run_async(["doctor"]) == 0
        stdout.flush()
        assert b"+  key" in stdout.buffer.getvalue()


# What is not in a report


@pytest.mark.usefixtures("person")
@pytest.mark.parametrize("status", [None, 400, 500])
async def test_neither_key_nor_user_nor_payload_is_on_the_screen_or_in_the_report(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, capsys: pytest.CaptureFixture[str], status: int | None
) -> None:
    monkeypatch.setenv("KEYLESS_SDK_KEY", "the-key-of-the-app")
    if status is not None:
        deviate(monkeypatch, service, lambda it: echo(it, status) if "/users/" in it.path else None)
    _, report = await examine(monkeypatch, "--user", "C0FFEE0123", "--yes")
    text = json.dumps(report) + capsys.readouterr().err
    for secret in (service.api_key, "the-key-of-the-app", "C0FFEE0123", "c0ffee0123", "of another user"):
        assert secret not in text
    assert report["user"] == hashlib.sha256(b"C0FFEE0123").hexdigest()
    if status is None:
        payloads = {operation.operation_payload or "" for operation in service.operations.values()}
        assert {made["payload_sha256"] for made in report["operations"]} == {
            hashlib.sha256(payload.encode()).hexdigest() for payload in payloads
        }


def echo(it: Exchange, status: int) -> Any:
    return it.with_json({"error": f"{it.key} of C0FFEE0123, and a payload of another user"})._replace(status=status)


async def test_a_proxy_that_is_not_used_differs_and_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    assert service.url
    named = Secret("socks5://ann:pass-word@proxy.example:1080")
    monkeypatch.setattr("aiokeyless._http.proxies.read_environment", lambda _url: named)
    code, report = await examine(monkeypatch)
    assert (code, with_status(report, "differs")) == (1, {"proxy"})
    assert report["checks"][1]["found"] == "socks5://proxy.example:1080"
    assert len(caplog.records) == 1


async def test_a_proxy_is_used_and_its_password_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with RawServer(answer(status=b"502 Bad Gateway")) as proxy:
        named = Secret(proxy.url.replace("//", "//ann:pass-word@"))
        monkeypatch.setattr("aiokeyless._http.proxies.read_environment", lambda _url: named)
        report = await nothing_is_created(monkeypatch, "http://127.0.0.1:1")
        assert report["checks"][1]["found"] == proxy.url
        assert {head.split()[1].partition(b"/v2")[0] for head in proxy.heads} == {b"http://127.0.0.1:1"}
    assert "pass-word" not in capsys.readouterr().err + json.dumps(report)


@pytest.mark.parametrize("misspelt", ["http://ann:p@55-w0rd@{}", "ann:w0rd@{}", "http:/ann:w0rd@{}"])
async def test_no_misspelling_of_a_proxy_shows_its_password(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    misspelt: str,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("KEYLESS_BASE_URL", "https://keyless.example")
    monkeypatch.setenv("KEYLESS_API_KEY", "key-of-the-server")
    monkeypatch.setenv("HTTPS_PROXY", misspelt.format(refused().removeprefix("http://")))
    shown = []
    for options in ([], ["--json"], ["--report", str(tmp_path / "report")]):
        try:
            await app.run_async(["doctor", *options])
        except ConfigurationError as error:
            shown.append(str(error))
    shown += [*capsys.readouterr(), caplog.text, *(report.read_text() for report in tmp_path.iterdir())]
    assert "proxy" in "".join(shown)
    assert "w0rd" not in "".join(shown)


# If all goes wrong


async def nothing_is_created(monkeypatch: pytest.MonkeyPatch, url: str) -> dict[str, Any]:
    monkeypatch.setenv("KEYLESS_BASE_URL", url)
    monkeypatch.setenv("KEYLESS_API_KEY", "key-of-the-server")
    code, report = await examine(monkeypatch, "--user", "C0FFEE", "--yes")
    assert (code, report["operations"]) == (1, [])
    assert "created" in with_status(report, "skipped")
    return report


async def test_without_a_network_only_the_way_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    report = await nothing_is_created(monkeypatch, refused())
    assert (with_status(report, "unknown"), with_status(report, "as_expected")) == ({"connection"}, {"proxy"})
    assert "no answer" in report["checks"][0]["found"]


@pytest.mark.parametrize(
    ("answered", "differing", "unknown"),
    [
        (answer(b"<html>Log in to the hotel</html>"), "no_key", None),
        (answer(b"", b"Location: https://ann:secret@portal.example/?secret", status=b"302 Found"), None, "connection"),
        (answer(b"", b"Location: /secret", status=b"307 Temporary Redirect"), None, "connection"),
        (answer(status=b"401 Unauthorized"), "key", None),
        (answer(b"<html>blocked</html>", status=b"403 Forbidden"), "no_key", None),
        (answer(b"<html>oops</html>", status=b"500 Internal Server Error"), None, "connection"),
        (answer(b"", b"Retry-After: 31", status=b"429 Too Many Requests"), None, "connection"),
    ],
    ids=["a captive portal", "a redirect", "a redirect at the host", "401", "403", "500", "429"],
)
async def test_what_answers_everything_the_same_is_one_cause_and_nothing_is_created(
    monkeypatch: pytest.MonkeyPatch, answered: bytes, differing: str | None, unknown: str | None
) -> None:
    async with RawServer(answered) as server:
        report = await nothing_is_created(monkeypatch, server.url)
        shown = with_status(report, "differs") - {"round_trip"}, with_status(report, "unknown")
        assert shown == ({differing} - {None}, {unknown} - {None})
        assert ("answered with 302 to portal.example" in json.dumps(report)) is (b"302" in answered)
        assert "secret" not in json.dumps(report)
        assert all(head.startswith(b"GET ") for head in server.heads)
        assert b"x-api-key" not in server.heads[0].lower(), "anything may answer the first request"


@pytest.mark.usefixtures("person")
@pytest.mark.parametrize("number", range(0, 45, 8))
async def test_a_service_that_hangs_from_any_request_on_ends_it(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, number: int
) -> None:
    count = iter(range(1000))

    async def hang_from(_: Exchange) -> None:
        if next(count) >= number:
            await asyncio.sleep(1e6)

    deviate(monkeypatch, service, hang_from)
    code, report = await examine(monkeypatch, "--user", "C0FFEE", "--yes")
    assert code == (not {"key"} <= with_status(report, "as_expected"))
    assert with_status(report, "unknown")
    assert not with_status(report, "differs")


@pytest.mark.usefixtures("person")
@pytest.mark.parametrize("limit", [2, 0])
async def test_what_is_limited_or_away_for_the_whole_visit_raises_no_alarm(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, limit: int
) -> None:
    """Two requests a second, or no answer but 503."""
    take_effect, times = service._take_effect, list[float]()

    async def answer_some(request: Any) -> Answer:
        now = asyncio.get_running_loop().time()
        if sum(now - at < 1 for at in times) >= limit:
            return Answer(429 if limit else 503, b"{}")
        times.append(now)
        return await take_effect(request)

    monkeypatch.setattr(service, "_take_effect", answer_some)
    code, report = await examine(monkeypatch, "--user", "C0FFEE", "--yes")
    assert (code, with_status(report, "differs")) == (not limit, set())
    assert with_status(report, "unknown") == (set() if limit else {"connection"})


@pytest.mark.usefixtures("person")
async def test_a_create_whose_answer_was_lost_says_nothing_about_creates(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox
) -> None:
    service.drop_next(stored=True, method="POST")
    code, report = await examine(monkeypatch, "--user", "C0FFEE", "--yes")
    assert (code, with_status(report, "differs"), with_status(report, "unknown")) == (0, set(), {"created"})


@pytest.mark.usefixtures("person")
async def test_if_nobody_answers_at_the_deadline_that_says_nothing_about_approvals(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox
) -> None:
    later(25, service.fail_next, 503, None)
    service.auto_approve = None
    code, report = await examine(monkeypatch, "--user", "C0FFEE", "--yes", "--seconds", "30")
    assert (code, with_status(report, "differs"), with_status(report, "unknown")) == (0, set(), {"approved"})


async def test_a_person_may_approve_at_once(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    service.auto_approve = lambda operation: 0.5 if "please" in (operation.operation_payload or "") else None
    code, report = await examine(monkeypatch, "--user", "C0FFEE", "--yes")
    assert (code, with_status(report, "differs")) == (0, set())


@pytest.mark.usefixtures("person")
async def test_ten_visits_leave_nothing_that_differs(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    deviate(monkeypatch, service, lambda it: it.with_json(it.json[:5]) if it.path.endswith("/pending") else None)
    visits = [await examine(monkeypatch, "--user", "C0FFEE", "--yes") for _ in range(10)]
    assert [(code, with_status(report, "differs")) for code, report in visits] == [(0, set())] * 10
    assert with_status(visits[-1][1], "unknown") == {"listed"}


@pytest.mark.usefixtures("person")
@pytest.mark.parametrize("number", [0, 5, 20, 23, 25, 30])
async def test_ctrl_c_names_what_was_created_and_writes_the_report(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, tmp_path: Path, number: int
) -> None:
    count = iter(range(1000))
    hangs = asyncio.Event()

    async def hang_at(_: Exchange) -> None:
        if next(count) == number:
            hangs.set()
            await asyncio.sleep(1e6)

    deviate(monkeypatch, service, hang_at)
    file = tmp_path / "report.json"
    command = asyncio.create_task(examine(monkeypatch, "--user", "C0FFEE", "--yes", "--report", str(file)))
    await hangs.wait()
    command.cancel()
    with pytest.raises(InterruptedCommandError) as caught:
        await command
    report = json.loads(file.read_bytes())
    assert all(operation_id in str(caught.value) for operation_id in service.operations)
    assert {made["operation_id"] for made in report["operations"]} == set(service.operations)
    assert "interrupted" in {check["found"] for check in report["checks"]}


# Consent


async def test_without_a_terminal_and_without_yes_nothing_is_asked_at_all(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n"))
    with pytest.raises(UsageError, match="pass --yes"):
        await app.run_async(["doctor", "--user", "C0FFEE"])
    assert service.requests == []


async def test_the_phone_starts_something_for_a_user_only(service: Sandbox) -> None:
    with pytest.raises(UsageError, match="--phone-started needs --user"):
        await app.run_async(["doctor", "--phone-started", "--yes"])
    assert service.requests == []


@pytest.mark.usefixtures("person")
@pytest.mark.parametrize(("said", "count"), [("yes\n", 3), ("no\n", 0), ("y\n", 0), ("", 0)])
async def test_a_person_agrees_before_anything_is_created(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, capsys: pytest.CaptureFixture[str], said: str, count: int
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin := Terminal(said))
    monkeypatch.setattr(stdin, "isatty", iter([True, False]).__next__)
    code, report = await examine(monkeypatch, "--user", "C0FFEE")
    assert (code, len(service.operations)) == (count == 0, count)
    assert "Keyless cannot withdraw an operation" in capsys.readouterr().err
    assert ("declined" in {check["found"] for check in report["checks"]}) is (count == 0)


@pytest.mark.usefixtures("person")
async def test_for_no_seconds_nobody_is_asked_to_approve(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = await examine(monkeypatch, "--user", "C0FFEE", "--yes", "--phone-started", "--seconds", "0")
    assert code == 0
    assert {check["found"] for check in report["checks"] if check["id"] in {"approved", "factor", "phone_started"}} == {
        "without time to approve"
    }
    assert [operation.state for operation in service.operations.values()] == ["pending"] * 3
    assert not [each for each in service.operations.values() if "please" in (each.operation_payload or "")]
    assert "and asks nothing" in capsys.readouterr().err


# What a person does


def press(keyboard: int, keys: bytes) -> None:
    """Press keys at the other side of stdin. The kernel passes them on a little later than the clock may be moved."""
    os.write(keyboard, keys)
    select.select([sys.stdin], [], [])


@pytest.mark.usefixtures("person")
@pytest.mark.parametrize(
    ("keys", "after", "status", "found"),
    [
        (b"\n", 19, "as_expected", r"[0-3]\.\d s"),
        (b"\n\n", 19, "as_expected", r"[0-3]\.\d s"),
        (b"\n", 5, "differs", r"1\d\.\d s"),
        (b"\x04", 19, "skipped", "without Enter"),
    ],
    ids=["at the tap", "twice", "long before it is shown", "the end of stdin"],
)
async def test_lateness_is_from_enter_to_the_answer(
    monkeypatch: pytest.MonkeyPatch, keys: bytes, after: float, status: str, found: str
) -> None:
    keyboard, terminal = os.openpty()
    monkeypatch.setattr(sys, "stdin", os.fdopen(terminal))
    later(after, press, keyboard, keys)
    try:
        _, report = await examine(monkeypatch, "--user", "C0FFEE", "--yes")
    finally:
        sys.stdin.close()
        os.close(keyboard)
    [lateness] = [check for check in report["checks"] if check["id"] == "lateness"]
    assert lateness["status"] == status
    assert re.fullmatch(found, lateness["found"])


@pytest.mark.usefixtures("person")
@pytest.mark.parametrize("payload", ["the printed one", "another one"])
async def test_an_operation_that_the_app_starts_is_awaited(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, payload: str
) -> None:
    monkeypatch.setattr(sys, "stderr", stderr := Pipe())
    options = "--user", "C0FFEE", "--yes", "--phone-started"
    examining = asyncio.create_task(examine(monkeypatch, *options))
    started = await stderr.until(r"authenticate with this.*\n +Operation +(\S+)\n +Payload +(.+)\n")
    sent = started[2] if payload == "the printed one" else payload
    service.approve(started[1], user_id="C0FFEE", operation_payload=sent)
    code, report = await examining
    assert code == (sent != started[2])
    assert with_status(report, "differs") == ({"phone_started"} if code else set())


# Again


@pytest.mark.usefixtures("person")
@pytest.mark.parametrize("change", ["nothing", "state", "payload", "missing"])
async def test_again_compares_what_the_service_remembers(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, tmp_path: Path, change: str
) -> None:
    earlier, now = tmp_path / "earlier.json", tmp_path / "now.json"
    earlier.touch(0o644)
    _, first = await examine(monkeypatch, "--user", "C0FFEE", "--yes", "--report", str(earlier))
    assert json.loads(earlier.read_bytes()) == first
    assert os.name == "nt" or earlier.stat().st_mode & 0o777 == 0o600
    changed = first["operations"][1]["operation_id"]
    match change:
        case "state":
            service.approve(changed)
        case "payload":
            service.tamper(changed, operation_payload="another")
        case "missing":
            service.forget(changed)
    code, report = await examine(monkeypatch, "--again", str(earlier), "--report", str(now))
    assert with_status(report, "differs") == (set() if change == "nothing" else {"remembered"})
    assert code == (change != "nothing")
    assert report["operations"] == first["operations"], "to look again at any time"
    said = {"nothing": "", "state": "state is approved", "payload": "another operationPayload", "missing": "missing"}
    assert said[change] in report["checks"][-1]["found"]
    assert (changed in report["checks"][-1]["found"]) is (change != "nothing")


@pytest.mark.usefixtures("person")
async def test_again_says_what_is_new_and_its_exit_status_is_as_ever(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = str(tmp_path / "report.json")
    with monkeypatch.context() as patched:
        deviate(patched, service, lambda it: it.with_status(403) if it.key is None else None)
        code, first = await examine(monkeypatch, "--report", report)
        assert code == 1
        for expected in ("nothing", "no_key (differs, now as_expected)"):
            capsys.readouterr()
            assert await examine(monkeypatch, "--again", report) == (code, ANY)
            assert f"since {first['date']}: {expected}\n" in capsys.readouterr().err
            patched.undo()
            code = 0


async def test_an_operation_that_was_perhaps_not_created_need_not_be_remembered(
    monkeypatch: pytest.MonkeyPatch, service: Sandbox, tmp_path: Path
) -> None:
    earlier = tmp_path / "report.json"
    deviate(monkeypatch, service, lambda it: Answer(400, b"{}") if it.method == "POST" else None)
    service.fail_next(400, method="POST")
    _, report = await examine(monkeypatch, "--user", "C0FFEE", "--yes", "--report", str(earlier))
    assert with_status(report, "differs") == {"created"}
    code, _ = await examine(monkeypatch, "--again", str(earlier))
    assert code == 0


@pytest.mark.parametrize(
    "content", [None, b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"operations": [], "date": 1}']
)
async def test_what_is_no_report_is_one_line(service: Sandbox, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "report.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CommandError, match=re.escape(str(file))):
        await app.run_async(["doctor", "--again", str(file)])
    assert service.requests == []


async def test_a_report_that_cannot_be_written_is_found_out_first(service: Sandbox, tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        await app.run_async(["doctor", "--report", str(tmp_path)])
    assert service.requests == []


async def test_a_device_in_place_of_a_report_keeps_its_mode(monkeypatch: pytest.MonkeyPatch, service: Sandbox) -> None:
    assert service.url
    mode = Path(os.devnull).stat().st_mode
    await examine(monkeypatch, "--report", os.devnull)
    assert Path(os.devnull).stat().st_mode == mode
