"""What the README and the pages of docs/ say runs, runs, and prints what they show."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import json
import re
import shlex
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import looptime
import msgspec
import pytest
from cyclopts import CycloptsError
from factors import ApprovingSandbox
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, Sum
from tenacity import wait_fixed

import aiokeyless.events
import aiokeyless.sandbox
import aiokeyless.worker
from aiokeyless import KeylessClient, Operation, OperationMismatchError, Region, wait_adaptive
from aiokeyless.cli.app import app
from aiokeyless.events import (
    ClientEvent,
    DeliveryEnded,
    Event,
    Inspection,
    OperationCreated,
    OutcomePublished,
    PollEnded,
    PollResult,
    RequestEnded,
    ServiceChanged,
    WaitEnded,
    WaitOutcome,
    WaitStarted,
    WorkerInspected,
)
from aiokeyless.otel import OpenTelemetryListener
from aiokeyless.sandbox import Sandbox
from aiokeyless.worker import ApprovalWorker
from aiokeyless.worker.nats.event_keys import VARIABLE
from benchmarks.approval_times import EAGER, TYPICAL, seeded_random
from benchmarks.polling import TIMEOUT, Cost, cost, poll_times, simulate_waits

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from benchmarks.approval_times import ApprovalTimes

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
#: A program that stands in a page only: docs/pages.py writes the others below a comment that names their file.
FENCE = re.compile(
    r"(?<! -->\n)^```python\n(?P<code>.*?)^```\n(?:\s*^```text\n(?P<output>.*?)^```$)?", re.DOTALL | re.MULTILINE
)
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


#: What is public, exceptions aside, which have a module and a page of their own.
MODULES = (aiokeyless, aiokeyless.events, aiokeyless.sandbox, aiokeyless.worker)


class Block(NamedTuple):
    page: str
    code: str
    output: str | None

    def __str__(self) -> str:
        """Return the page, for the name of a test."""
        return self.page


def blocks(page: str) -> list[Block]:
    """Return the Python blocks of a page, each with the output that is shown below it."""
    return [Block(page, found["code"], found["output"]) for found in FENCE.finditer((DOCS / page).read_text())]


LOOP, *FAILURES = blocks("why-not-a-loop.md")
#: tests/examples/test_tutorial.py follows the tutorial.
OTHERS = [
    block for page in ("../README.md", *PAGES) if page not in {LOOP.page, "tutorial.md"} for block in blocks(page)
]
TESTS = [block for block in OTHERS if "def test_" in block.code]
#: Programs beside a worker, which need a broker.
APPLICATIONS = [
    block
    for block in OTHERS
    if "next_outcome" in block.code and block.page in {"howto/running-workers.md", "howto/sync.md"}
]
QUICKSTART = (ROOT / "examples" / "quickstart.py").read_text()
PUSHED = "push to the phone of 0123456789ABCDEF\n"
PROGRAMS = [
    *(block for block in OTHERS if block not in TESTS + APPLICATIONS),
    Block("howto/paid-once.md", (ROOT / "examples" / "paid_once.py").read_text(), "paid, once\n"),
    Block("quickstart", QUICKSTART, f"{PUSHED}Approved (biom): pay.\n"),
]
#: Programs that do more with an approval than to show how one waits for it.
PAYING = [block for block in PROGRAMS if re.search(r"\bpay\b|\bpaid\b|Delete", block.code, re.IGNORECASE)]


Run = Callable[..., list[str]]


@pytest.fixture
def outputs_of_two_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a program twice in one folder, beside a service whose users approve after two seconds of a moved clock."""
    programs: list[Coroutine[object, object, object]] = []
    outputs: list[str] = []

    async def beside_a_service(factor: str) -> None:
        def approve(operation: Operation) -> None:
            approval = functools.partial(sandbox.approve, operation.operation_id, auth_type=factor)
            asyncio.get_running_loop().call_later(2, approval)

        async with Sandbox(auto_approve=approve) as sandbox:
            monkeypatch.setenv("KEYLESS_BASE_URL", sandbox.url)
            monkeypatch.setenv("KEYLESS_API_KEY", sandbox.api_key)
            for program in programs:
                with (
                    contextlib.nullcontext()
                    if factor == "biom"
                    else contextlib.suppress(OperationMismatchError, AssertionError)
                ):
                    await program
                outputs.append(capsys.readouterr().out)

    def run_twice(code: str, factor: str = "biom") -> list[str]:
        for _ in range(2):
            exec(compile(code, "program.py", "exec"), {"__name__": "__main__"})  # noqa: S102  # our own pages
            if not programs:  # it has no event loop
                outputs.append(capsys.readouterr().out)
        with asyncio.Runner(loop_factory=looptime.new_event_loop) as runner:
            runner.run(beside_a_service(factor))
        return outputs

    # From Python 3.12 on, a runner gives the threads that resolved names five minutes to end: a moved clock's five.
    monkeypatch.setattr("asyncio.constants.THREAD_JOIN_TIMEOUT", None, raising=False)
    monkeypatch.setattr(asyncio, "run", programs.append)
    monkeypatch.chdir(tmp_path)
    return run_twice


@pytest.mark.parametrize("block", PROGRAMS, ids=str)
def test_a_program_of_the_docs_runs_and_runs_again(block: Block, outputs_of_two_runs: Run) -> None:
    outputs = outputs_of_two_runs(block.code)
    assert block.output is None or outputs == [block.output] * 2


@pytest.mark.parametrize("block", PAYING, ids=str)
def test_no_program_of_the_docs_that_acts_on_an_approval_takes_a_pin(block: Block, outputs_of_two_runs: Run) -> None:
    for output in outputs_of_two_runs(block.code, "pin"):
        assert not re.search(r"^(.*: )?(pay|paid|approved|deleted|logged in)\b", output, re.IGNORECASE | re.MULTILINE)


def test_the_quickstart_reports_a_timeout(outputs_of_two_runs: Run) -> None:
    hasty = QUICKSTART.replace("expires_in=60", "expires_in=1")  # the same program, with less patience
    not_paid = "Not paid, and a later approval pays for nothing.\n"
    assert outputs_of_two_runs(hasty) == [f"{PUSHED}{not_paid}"] * 2


@pytest.mark.parametrize("block", FAILURES, ids=range(len(FAILURES)))
def test_loops_fail_and_waits_do_not(block: Block, monkeypatch: pytest.MonkeyPatch, outputs_of_two_runs: Run) -> None:
    loop = ModuleType("loop")
    exec(LOOP.code, vars(loop))  # noqa: S102
    monkeypatch.setitem(sys.modules, "loop", loop)
    assert outputs_of_two_runs(block.code) == [block.output] * 2


@pytest.mark.slow
def test_the_tests_of_the_docs_pass(tmp_path: Path) -> None:
    for number, block in enumerate(TESTS):
        (tmp_path / f"test_{number}.py").write_text(block.code)
    (tmp_path / "pytest.ini").touch()  # not our own configuration, if the folder is in this checkout, as in nox
    # Without what takes longer to import than pytest.
    left_out = (f"-pno:{plugin}" for plugin in ("cacheprovider", "django", "faker", "langsmith_plugin"))
    options = ("-q", *left_out, "-W", "error", "-o", "asyncio_default_fixture_loop_scope=function")
    command = (sys.executable, "-m", "pytest", *options)
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert f"{sum(block.code.count('def test_') for block in TESTS)} passed" in ended.stdout, ended.stdout
    assert ended.returncode == 0, ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "outcome"), [("biom", "approved"), ("pin", "failed")])
@pytest.mark.parametrize("block", APPLICATIONS, ids=str)
async def test_an_application_of_the_docs_needs_no_server_and_handles_what_it_prints(
    block: Block, tmp_path: Path, factor: str, outcome: str
) -> None:
    (tmp_path / "program.py").write_text(block.code)
    async with (
        ApprovingSandbox(factor) as sandbox,
        sandbox.client(max_attempts=1) as client,
        ApprovalWorker(client, f"sqlite:{tmp_path / 'keyless.db'}"),
    ):
        program = await asyncio.create_subprocess_exec(
            *(sys.executable, "-u", "-W", "error", "program.py"), cwd=tmp_path, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await program.communicate()
    assert (program.returncode, output.decode()) == (0, f"{outcome} order-7\n")
    with closing(sqlite3.connect(tmp_path / "keyless.db")) as file:
        assert file.execute("SELECT count(*) FROM unread").fetchone() == (0,)


# The tables

ROWS = {
    "a whole poll of a wait": "aiokeyless, a whole poll of a wait",
    "its exchange alone": "aiokeyless, a poll's exchange alone",
    "`get_operation`": "aiokeyless",
    "aiohttp + pydantic": "aiohttp + pydantic",
    "httpx2 + msgspec": "httpx2 + msgspec",
    "niquests + msgspec": "niquests + msgspec",
    "httpx + msgspec": "httpx + msgspec",
}


@pytest.mark.parametrize(("column", "loop"), [(0, "asyncio's loop"), (1, "uvloop")])
def test_the_figures_of_the_table_are_those_of_the_committed_run(column: int, loop: str) -> None:
    page = (DOCS / "explanation" / "limits.md").read_text()
    [table] = [table for table in saved("request")["tables"] if table["title"] == f"{loop}, 16 in flight"]
    measured = {name: float(ratio.split()[0]) for name, _, ratio, *_ in table["rows"]}
    for row, name in ROWS.items():
        shown = re.findall(rf"^\| {re.escape(row)} \| (.*) \| (.*) \|$", page, re.MULTILINE)[0][column]
        decimals = len(shown.partition(".")[2])
        assert float(shown) == round(measured[name], decimals), (row, loop)


def test_the_versions_above_the_table_are_those_of_the_committed_run() -> None:
    page = (DOCS / "explanation" / "limits.md").read_text()
    [named] = re.findall(r"with aiohttp and msgspec \(([^)]*)\):", page)
    versions = saved("request")["machine"]["versions"]
    shown = dict(each.split() for each in named.split(","))
    assert shown.keys() == {"aiohttp", "httpx", "httpx2", "niquests"}
    assert shown.items() <= versions.items()


LATENESS = re.compile(
    r"^\| (?P<schedule>[^|]+) \| (?P<requests>[\d.]+) \| (?P<late>[\d.]+) s \| (?P<cost>[\d.]+) \|$", re.MULTILINE
)
LOG_NORMAL = "approval times: log-normal ({}); 1 in 5 waits is never approved"


def lateness(title: str) -> dict[str, list[str]]:
    """Return the rows of a table of the committed run, without their spreads."""
    [table] = [table for table in saved("lateness")["tables"] if table["title"].startswith(title)]
    return {name: [figure.split()[0] for figure in figures] for name, *figures in table["rows"]}


def test_what_the_page_about_the_schedule_says_was_measured() -> None:
    page = (DOCS / "explanation" / "schedule.md").read_text()
    measured = lateness(LOG_NORMAL.format("8 s, 0.8"))
    shown = [*LATENESS.finditer(page)]
    assert len(shown) == 6
    for row in shown:
        requests, late, _, _, cost = (float(figure) for figure in measured[row["schedule"]])
        assert row["requests"] == f"{requests:.1f}"
        assert row["late"] == f"{late:.2f}"
        assert row["cost"] == f"{cost:.2f}"
    page = " ".join(page.split())
    hasty = lateness(LOG_NORMAL.format("1.5 s, 0.6"))
    assert f"with {float(hasty['aiokeyless, untrained'][4]):.1f} times" in page
    assert f"after 100 waits it is {float(hasty['aiokeyless, after 100'][4]):.2f}" in page
    others = [lateness(LOG_NORMAL.format(name)) for name in ("8 s, 0.8", "25 s, 1.2")]
    others.append(lateness("approval times: 60% (4 s, 0.5) + 40% (40 s, 0.6); 1 in 5"))
    worst = max(float(rows["aiokeyless, untrained"][4]) for rows in others)
    assert f"at most {worst:.2f} times the optimum" in page
    change = lateness("the distribution changes after 1000 waits")
    first, fifth = (float(change[waits][0]) - 1 for waits in ("1 to 100", "401 to 500"))
    assert f"new optimum is {first:.0%} in the first hundred waits and {fifth:.1%} in the fifth" in page


FRONT = "approval times: log-normal (8 s, 0.8); the front"


def test_the_table_of_poll_costs_was_measured() -> None:
    page = (DOCS / "explanation" / "schedule.md").read_text()
    shown = re.findall(r"^\| ([\d.]+)(?:, the default)? \| ([\d.]+) \| ([\d.]+) s \|$", page, re.MULTILINE)
    assert len(shown) == 5
    measured = lateness(FRONT)
    for poll_cost, *figures in shown:
        for figure, exact in zip(figures, measured[poll_cost][:2], strict=True):
            assert float(figure) == round(float(exact), len(figure.partition(".")[2])), poll_cost


def test_the_costs_that_the_pages_name_were_measured() -> None:
    page = " ".join((DOCS / "explanation" / "limits.md").read_text().split())
    ten_thousand, hundred_thousand = (
        {name: float(longest.split()[0]) for name, longest, *_ in table["rows"]} for table in saved("herd")["tables"]
    )
    ours, semaphore, connector, unbounded = ten_thousand.values()
    assert f"ours {ours:.1f} ms, a semaphore {semaphore:.0f} ms, a connector" in page
    assert f"limit {connector:.0f} ms, unbounded {unbounded:.0f} ms" in page
    blocked = f"block the event loop for {round(ours)} ms"
    assert f"{blocked}, a hundred thousand for {round(hundred_thousand['aiokeyless'])}:" in page
    assert blocked in README
    alone, together = (int(size) / 1000 for _, size in saved("waits")["tables"][0]["rows"])
    assert f"sleeping wait takes {alone:.1f} KB" in page
    assert f"so a wait takes {alone - together:.1f} KB less" in page
    people = lateness(LOG_NORMAL.format("8 s, 0.8"))
    (requests, late, *_), (requests_of_loop, late_of_loop, *_) = people["aiokeyless, after 100"], people["every 1 s"]
    shown = round(float(requests)), round(float(requests_of_loop))
    assert "sends {} requests on average, and a loop of one poll a second {}.".format(*shown) in page
    assert float(late) == pytest.approx(float(late_of_loop), abs=0.05) == 0.5  # "half a second"


def test_what_the_schedule_saves_are_requests_about_users_who_never_approve() -> None:
    page = " ".join((DOCS / "explanation" / "schedule.md").read_text().split())
    loop = cost(poll_times(wait_fixed(1)), EAGER).polls
    sent: dict[ApprovalTimes, list[Cost]] = {TYPICAL: [], EAGER: []}
    about_others: list[int] = []
    for users, costs in sent.items():
        for seed in range(8):
            simulate_waits(schedule := wait_adaptive(jitter=0), users, 100, seeded_random(seed))
            costs.append(cost(polls := [*poll_times(schedule)], EAGER))
            about_others += [len(polls)] if users is TYPICAL else []
    typical, eager = (Cost(*map(statistics.fmean, zip(*costs, strict=True))) for costs in sent.values())
    loop_and_ours = f"{TIMEOUT:.0f} requests with a loop of one poll a second, and {statistics.fmean(about_others):.0f}"
    assert f"{loop_and_ours} with this schedule. A user who approves costs {loop:.0f} with both" in page
    assert typical.polls == pytest.approx(loop, abs=1)
    assert f"sends {eager.polls:.0f} requests, and notices after {eager.lateness:.2f} s" in page


def test_the_sizes_of_a_fleet_were_measured() -> None:
    page = (DOCS / "howto" / "operating-workers.md").read_text()
    nats = saved("distributed")["raw"]["NATS"]
    cpu = statistics.median(window["worker"] for window in nats["windows"])
    shown = re.search(r"one core for ([\d ]+) polls a second", page)
    assert shown is not None
    assert int(shown[1].replace(" ", "")) == pytest.approx(1 / cpu, rel=0.03)
    shown = re.search(r"100 000 requests that wait \| (\d+) MB of memory, (\d+) MB of disk", page)
    assert shown is not None
    held = nats["waiting"]["memory"] / 1e6, nats["waiting"]["on_disk"] / 1e6
    assert [int(size) for size in shown.groups()] == pytest.approx(held, abs=0.5)


def saved(name: str) -> dict[str, Any]:
    """Return what the committed run of a benchmark measured."""
    results: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    assert results["effort"] == "full"
    return results


def test_what_the_page_about_postgres_says_was_measured() -> None:
    postgres = saved("distributed")["raw"]["PostgreSQL"]
    thousand, ten_thousand = postgres["bursts"]
    assert thousand["size"] == 1000
    assert thousand["asked"] < 3
    assert (thousand["lost"], ten_thousand["lost"]) == (0, 0)
    assert postgres["waiting"]["waiting"] == 100_000
    assert statistics.median(postgres["waiting"]["take"]) < 0.005
    assert all(round(window["logged"]) <= 60 for window in postgres["windows"])


def test_what_the_page_of_limits_says_about_the_memory_over_days_was_measured() -> None:
    page = " ".join((DOCS / "explanation" / "limits.md").read_text().split())
    raw = saved("soak")["raw"]
    memory = [megabytes for at, megabytes in raw["memory"] if raw["seconds"] / 3 <= at < raw["seconds"]]
    assert f"was {memory[0]:.1f} MB after twenty minutes, and {memory[-1]:.1f} MB at the end" in page


def test_the_tables_of_the_page_of_limits_were_measured() -> None:
    page = (DOCS / "explanation" / "limits.md").read_text()
    distributed = saved("distributed")["tables"]
    polls = {row[0]: (row[2], row[3]) for row in distributed[0]["rows"]}
    bursts = {row[0]: (row[3], row[4]) for row in distributed[1]["rows"] if row[1] == "10000"}
    shown = re.findall(r"^\| (\w+) \| (\d+) us, (\d+) us \| ([\d.]+) s \| ([\d.]+) s \|$", page, re.MULTILINE)
    assert {name: tuple(figures) for name, *figures in shown} == {name: (*polls[name], *bursts[name]) for name in polls}
    of_one_process = (ROOT / "benchmarks" / "results" / "limits.txt").read_text()
    shown = re.findall(r" \| (\d+) \| (\d+%) \|$", page, re.MULTILINE)
    assert len(shown) == 3
    for sent, share in shown:
        assert re.search(rf" {sent} .* {share} ", of_one_process), sent


def test_what_the_benchmarks_say_about_the_memory_of_a_fleet_was_measured() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    results = saved("soak_fleet")
    [taken] = (table["rows"] for table in results["tables"] if table["title"] == "what it takes")
    shown = re.findall(r"^\| memory of .*\| ([\d.]+) MB; ([\d.]+) MB \|$", page, re.MULTILINE)
    assert shown == [(start, end) for name, start, end, _ in taken if name.startswith("memory of")]
    grown = {goal["what"]: goal["figure"] for goal in results["goals"]}
    growth = grown["growth of the worker's memory, an hour"]
    assert f"memory grew by {growth:.1f} MB an hour" in page
    assert grown["growth of the worker's objects, an hour"] < 1


def test_what_the_page_of_many_tenants_says_was_measured() -> None:
    page = (DOCS / "howto" / "many-tenants.md").read_text()
    costs, late = (table["rows"] for table in saved("tenants")["tables"])
    for _, memory, sockets, start, stop, _ in costs[:2]:
        assert f"| {memory} MB | {sockets} | {start} s | {stop} s |" in page
    assert {f"{float(row[1].split()[0]):.1f} s (p95)" in page for row in late} == {True}


def test_what_the_benchmarks_say_about_good_requests_was_measured() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    measured: dict[str, list[str]] = {}
    not_asked = []
    for bad, _, how_many, _, asked, approved in saved("fairness")["tables"][0]["rows"]:
        measured.setdefault(bad, []).append(f"{asked}; {approved}")
        if bad == "429":
            not_asked.append(200 - int(how_many.removesuffix(" of 200")))
    assert measured.pop("429") == ["inf; inf"] * 3
    assert not_asked == [133, 135, 140]
    assert "133 of the good ones were then not asked in time, on PostgreSQL 135,\nand on NATS 140." in page
    for bad, figures in measured.items():
        assert f"| {bad} | {' | '.join(figures)} |" in page


def test_what_contributing_says_was_tried_was_measured() -> None:
    page = re.sub(r"(?<=\d) (?=\d{3}\b)", "", (ROOT / "CONTRIBUTING.md").read_text())
    committed = sorted(path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json"))
    judged = [(name, goal) for name in committed for goal in saved(name)["goals"]]
    missed = [(name, goal) for name, goal in judged if goal["figure"] is None or goal["figure"] > goal["at_most"]]
    assert f"| {len(judged)} goals | {len(missed)} missed: " in page
    of_benchmarks = (ROOT / "benchmarks" / "README.md").read_text()
    for name, goal in missed:
        figures = f"{goal['at_most']:g}{goal['unit']} | {goal['figure']:.4g}{goal['unit']}"
        assert f"| `{name}` | {goal['what']} | {figures} |" in of_benchmarks
    for name in ("soak_failover", "soak_nats", "soak_pods"):
        results = saved(name)
        assert re.search(rf"{name}` \| .*\b{results['title'].split()[1]} orders", page), name
        assert all(goal["figure"] <= goal["at_most"] for goal in results["goals"])
    fleet = saved("soak_fleet")["raw"]
    restarts = fleet["happened"]["server stopped at once"] + fleet["happened"]["server shut down"]
    kills = fleet["happened"]["worker killed"] + fleet["happened"]["reader killed"]
    assert f"an hour: {fleet['orders']} orders, {restarts} restarts, {kills} kills," in page
    client = saved("soak")["raw"]
    assert f"soak --uvloop` | {client['verdicts']['right']} outcomes" in page
    for verdicts in (client["verdicts"], fleet["verdicts"]):
        assert (verdicts["lost"], verdicts["wrong"], verdicts["unexpected"]) == (0, 0, 0)


def test_every_exception_stands_in_the_table() -> None:
    table = (DOCS / "reference" / "exceptions.md").read_text().partition("```")[0]
    roots = {"KeylessError", "ApprovalError"}
    for name in aiokeyless.__all__:
        if name.endswith("Error") and name not in roots:
            assert f"`{name}`" in table, name


# The threat model

THREATS = (DOCS / "explanation" / "threat-model.md").read_text()


def test_each_line_of_the_threat_model_has_tests_and_they_exist() -> None:
    promises = re.findall(r"^- (.*?)(?=^- |^$|\Z)", THREATS.partition("## Between")[2], re.DOTALL | re.MULTILINE)
    lines = [re.sub(r"\[|\]\([^)]*\)|[*`]", "", " ".join(promise.split())) for promise in promises]
    tests = Path(__file__).parent
    rows = re.findall(r"^\| (.+) \| (`.+`) \|$", (tests / "threats.md").read_text(), re.MULTILINE)
    assert [line for line, (beginning, _) in zip(lines, rows, strict=True) if not line.startswith(beginning)] == []
    missing = [
        f"{file}::{name}"
        for _, names in rows
        for file, name in re.findall(r"`([\w/]+\.py)::(test_\w+)`", names)
        if not re.search(rf"^ *(async )?def {name}\(", (tests / file).read_text(), re.MULTILINE)
    ]
    assert missing == []


# The README


def test_the_readme_has_the_two_commands_that_were_agreed() -> None:
    assert 'python3 -m venv .venv && .venv/bin/pip install -q -e ".[cli]" && .venv/bin/aiokeyless demo\n' in README
    assert 'python3 -m venv .venv && .venv/bin/pip install -q -e ".[test]" && .venv/bin/pytest\n' in README


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_a_link_of_the_readme_leads_somewhere(link: str) -> None:
    if not link.startswith("https://"):
        assert (ROOT / link).exists()


def test_the_readme_takes_two_minutes() -> None:
    assert len(README.split()) <= 700


# The command lines

TEXTS = [ROOT / "README.md", *(DOCS / page for page in PAGES), *sorted((ROOT / "examples").rglob("README.md"))]
SHELL = re.compile(r"^```sh\n(?P<lines>.*?)^```$", re.DOTALL | re.MULTILINE)
OPERATORS = {"&&", "||", "|", ";", "&", ">", ">>", "<"}


def shell_commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command of the shell blocks, without comments and what follows an operator."""
    for block in SHELL.finditer(text):
        for line in block["lines"].replace("\\\n", " ").splitlines():
            words = shlex.shlex(line, posix=True, punctuation_chars=True)
            words.whitespace_split = True
            command: list[str] = []
            for word in words:
                if word in OPERATORS:
                    yield command
                    command = []
                else:
                    command.append(word)
            yield command


COMMANDS = [
    pytest.param(command, id=f"{text.relative_to(ROOT)}: {' '.join(command)}")
    for text in TEXTS
    for command in shell_commands(text.read_text())
    if command
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_docs_parses_and_the_files_that_it_names_exist(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ticket.json").write_text(aiokeyless.ApprovalTicket.for_operation("order-7", user_id="C0FFEE").to_json())
    for word in command:
        if re.match(r"(benchmarks|docs|examples|tests)/", word):
            assert (ROOT / word).exists(), word
    names = [Path(word).name for word in command]
    if "aiokeyless" in names and command[0] != "pip":
        app.parse_args(command[names.index("aiokeyless") + 1 :], exit_on_error=False, print_error=False)


def test_every_shell_block_is_valid() -> None:
    bash = shutil.which("bash")
    assert bash is not None
    for text in TEXTS:
        for block in SHELL.finditer(text.read_text()):
            checked = subprocess.run([bash, "-n"], input=block["lines"], capture_output=True, text=True, check=False)
            assert (checked.returncode, checked.stderr) == (0, ""), text


def test_the_shell_blocks_are_read() -> None:
    assert sum("aiokeyless" in str(command.values) for command in COMMANDS) > 10


def test_a_command_with_a_wrong_option_does_not_parse() -> None:
    with pytest.raises(CycloptsError):
        app.parse_args(["wait", "txn-1", "--nope"], exit_on_error=False, print_error=False)


FROM_AN_INDEX = re.compile(r"""install\b[^\n#]*[ "']aiokeyless(?=[\s"'\[=<>~])""")


def test_the_page_of_the_sandbox_shows_each_field_of_an_operation() -> None:
    [shown] = re.findall(r"```json\n(.*?)```", (DOCS / "reference" / "sandbox-api.md").read_text(), re.DOTALL)
    assert json.loads(shown).keys() == {field.encode_name for field in msgspec.structs.fields(Operation)}


def test_no_text_installs_the_package_from_an_index_on_which_it_is_not() -> None:
    """Anybody could register the name there."""
    assert FROM_AN_INDEX.search('pip install -q "aiokeyless[cli]"')
    suffixes = {".md", ".py", ".yml", ".yaml", ".toml", ".html", ""}
    paths = [path for folder in ("aiokeyless", "docs", "examples") for path in (ROOT / folder).rglob("*")]
    files = [path for path in (*paths, *ROOT.glob("*.md")) if path.is_file() and path.suffix in suffixes]
    assert ROOT / "examples" / "kubernetes" / "Dockerfile" in files
    assert {path: found[0] for path in files if (found := FROM_AN_INDEX.search(path.read_text()))} == {}


# The site


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = re.findall(r"^- \[.*\]\((.*)\)$", (DOCS / "index.md").read_text(), re.MULTILINE)
    assert sorted(listed) == [page for page in PAGES if page != "index.md"]


@pytest.mark.parametrize("page", PAGES)
def test_github_shows_no_page_with_the_source_of_a_directive(page: str) -> None:
    shown = re.sub(r"^<!-- site\n.*?^-->", "", (DOCS / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    assert re.findall(r"^ *(?:(?:```|:::)\{|\(.*\)=$|: ).*$", shown, re.MULTILINE) == []


def test_every_public_name_is_in_the_reference() -> None:
    reference = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    errors = {name for name in aiokeyless.__all__ if name.endswith("Error")}  # one directive for their whole module
    named = set(re.findall(r"^\.\. auto\w+:: (?:[\w.]+\.)?(\w+)$", reference, re.MULTILINE))
    public = {name for module in MODULES for name in module.__all__} - errors - {"__version__"}
    assert public - named - {"BrokerError", "InvalidRequestError"} == set()


def test_every_method_of_the_client_is_in_the_summary() -> None:
    reference = (DOCS / "reference" / "api.md").read_text()
    summary = re.findall(r"^ +KeylessClient\.(\w+)$", reference, re.MULTILINE)
    assert sorted(summary) == sorted(name for name in vars(aiokeyless.KeylessClient) if not name.startswith("_"))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param((DOCS / "reference" / "environment.md").read_text(), id="environment.md"),
        pytest.param(KeylessClient.__doc__, id="KeylessClient"),
    ],
)
def test_each_region_is_named_where_one_is_chosen(text: str) -> None:
    assert [region for region in Region if f"`{region}`" not in text] == []


def test_the_page_about_the_environment_names_each_variable() -> None:
    page = (DOCS / "reference" / "environment.md").read_text()
    shown = set(re.findall(r"^\| `([A-Z_]+)` \|", page, re.MULTILINE))
    ours = {"KEYLESS_API_KEY", "KEYLESS_REGION", "KEYLESS_BASE_URL", "KEYLESS_SDK_KEY", "KEYLESS_BROKER", VARIABLE}
    assert shown == ours | {"HTTPS_PROXY", "SSL_CERT_DIR", "SSL_CERT_FILE"}


# The pictures


def drawings() -> ModuleType:
    """Load the script that draws the diagrams."""
    spec = importlib.util.spec_from_file_location("draw", DOCS / "pictures" / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_diagrams_are_what_their_script_draws() -> None:
    for name, draw in drawings().PICTURES.items():
        assert (DOCS / "pictures" / name).read_text() == str(draw()), f"{name}: run docs/pictures/draw.py"


def test_the_picture_of_the_layers_is_the_import_contract() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        [layers, *_] = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    contract = [set(layer.split(" | ")) for layer in layers["layers"]]
    drawn = [set(modules) for modules, _ in drawings().LAYERS]
    assert [layer for layer in contract if not layer & {"__main__", "_version"}] == drawn


# The metrics

#: One of each kind.
EVENTS: tuple[Event, ...] = (
    WaitStarted(wait=1, operation_id="order-7", timeout=60, traceparent=None),
    PollEnded(
        waits=(1,),
        operation_id="order-7",
        result=PollResult.FAILED,
        error="ServerError",
        is_final=False,
        seconds=0.1,
        lag=0,
    ),
    RequestEnded(
        method="GET",
        route="/v2/operations/{operationId}",
        server="localhost",
        port=80,
        status=503,
        error="ServerError",
        seconds=0.1,
        attempt=1,
        request_id=None,
    ),
    OperationCreated(operation_id="order-7", user_id="C0FFEE"),
    ServiceChanged(is_failing=True, error="ServerError", waiting=1, seconds=1),
    WaitEnded(
        wait=1,
        operation_id="order-7",
        outcome=WaitOutcome.TIMED_OUT,
        error="ApprovalTimeoutError",
        seconds=60,
        polls=9,
        age=60,
    ),
    DeliveryEnded(system="nats", destination="keyless.approvals.request", number=1, error="BrokerError", seconds=0.1),
    OutcomePublished(
        system="nats",
        destination="keyless.approvals.request",
        operation_id="order-7",
        outcome=WaitOutcome.APPROVED,
        reason=None,
        deliveries=9,
        age=60,
        traceparent=None,
    ),
    WorkerInspected(
        worker=1,
        system="nats",
        destination="keyless.approvals.request",
        has_ended=False,
        is_ready=True,
        is_failing=False,
        in_flight=1,
        fleet=Inspection(waiting=9, oldest_age=60, unread={"shop": 1}, oldest_unread_age={"shop": 60}),
        lateness=0.1,
        duplicates=0,
        unsettled=0,
    ),
)


def test_each_kind_of_event_is_told_to_listeners_and_tried_here() -> None:
    own = [kind for kind in vars(aiokeyless.events).values() if getattr(kind, "__module__", "") == "aiokeyless.events"]
    kinds = {kind for kind in own if isinstance(kind, type) and ClientEvent in kind.__bases__}
    assert kinds == set(get_args(Event)) == {type(event) for event in EVENTS}
    assert all(json.loads(json.dumps(event.to_dict())).keys() == {*event.__struct_fields__} for event in EVENTS)
    assert {kind.__name__ for kind in own if isinstance(kind, type)} <= set(aiokeyless.events.__all__)


def test_each_figure_of_a_worker_is_a_metric() -> None:
    page = (DOCS / "reference" / "events.md").read_text()
    figures = {*WorkerInspected.__struct_fields__, *Inspection.__struct_fields__}
    figures -= {"worker", "system", "destination", "has_ended", "fleet", "problems", "client"}
    figures -= {"is_failing"}  # clients have it, too: `aiokeyless.service.failing`
    metrics = re.findall(r"^\| `aiokeyless\.worker\.(\w+)` \|", page, re.MULTILINE)
    assert {figure.removeprefix("is_") for figure in figures} == set(metrics)


def kind(data: object) -> str:
    """Return what the page calls a kind of metric."""
    match data:
        case Sum(is_monotonic=True):
            return "counter"
        case Sum():
            return "up-down counter"
    return type(data).__name__.lower()


def test_the_page_about_metrics_names_each_with_its_attributes() -> None:
    page = (DOCS / "reference" / "events.md").read_text()
    page = page.replace("*broker*", "`messaging.system` `messaging.destination.name`")
    rows = re.findall(r"^\| `([\w.]+)` \| ([\w-]+(?: counter)?) \| (\S+) \| ?(.*) ?\|$", page, re.MULTILINE)
    shown = {name: (type_, unit, set(re.findall("`([a-z_.]+)`", attributes))) for name, type_, unit, attributes in rows}
    reader = InMemoryMetricReader()
    listener = OpenTelemetryListener(meter_provider=MeterProvider([reader]))
    for event in EVENTS:
        listener(event)
    data = reader.get_metrics_data()
    assert data is not None
    made = {}
    for metric in data.resource_metrics[0].scope_metrics[0].metrics:
        named = {str(name) for point in metric.data.data_points for name in point.attributes or {}}
        made[metric.name] = kind(metric.data), metric.unit, named
    assert shown == made


# The changelog


def test_the_changelog_says_one_thing_once() -> None:
    """Two branches that change the list are easily merged into one that has everything twice."""
    text = (ROOT / "CHANGELOG.md").read_text()
    bullets = re.findall(r"^- .*$", text, re.MULTILINE)
    assert len(bullets) == len(set(bullets))
    for section in text.split("\n### ")[1:]:
        subjects = re.findall(r"^- [^`\n]{0,40}(`[^`]+`)", section, re.MULTILINE)
        repeated = {subject for subject in subjects if subjects.count(subject) > 1}
        assert not repeated, f"merge the lines about {repeated}"


def test_a_first_release_has_changed_nothing() -> None:
    """Nor does a merge bring back what was."""
    text = (ROOT / "CHANGELOG.md").read_text()
    if len(re.findall(r"^## ", text, re.MULTILINE)) == 1:
        assert re.findall(r"^### (.*)$", text, re.MULTILINE) == ["Added"]
