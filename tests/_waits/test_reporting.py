"""The log lines that concern all waits of a client: few, and each tells what an operator asks."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import pytest
from tenacity.wait import wait_fixed

from aiokeyless._rules.budget import Budget
from aiokeyless._waits.reporting import Reporter
from aiokeyless.errors import ServerError
from aiokeyless.events import PollEnded, PollResult, ServiceChanged

if TYPE_CHECKING:
    from aiokeyless.events import Event
    from aiokeyless.sandbox import Sandbox

USER = "C0FFEE"
FAILURE = ServerError(status=503, method="GET", path="/v2/operations/op")


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records if record.levelno >= logging.INFO]


@pytest.fixture
def reporter(caplog: pytest.LogCaptureFixture) -> Reporter:
    caplog.set_level(logging.INFO, "aiokeyless")
    return Reporter(None)


@pytest.fixture
def budget() -> Budget:
    budget = Budget()
    budget.waits = 7
    return budget


def fail(reporter: Reporter, budget: Budget, now: float) -> None:
    """Let the service fail for ten seconds until then."""
    budget.record_failure(now, started_at=now - 10.0)
    reporter.notice_service(budget, FAILURE, now)


def answer(reporter: Reporter, budget: Budget, now: float) -> None:
    budget.record_success(now)
    reporter.notice_service(budget, None, now)


def test_an_outage_is_two_lines(reporter: Reporter, budget: Budget, caplog: pytest.LogCaptureFixture) -> None:
    for now in (11.0, 12.0):
        fail(reporter, budget, now)
    for now in (15.0, 16.0):
        answer(reporter, budget, now)
    assert lines(caplog) == [
        ("WARNING", f"Keyless fails (last: {FAILURE}): 7 waits go on, with few polls"),
        ("INFO", "Keyless answers again, 14.0 s after the first failure"),
    ]


def test_the_lines_of_a_client_begin_with_its_name(budget: Budget, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "aiokeyless")
    reporter = Reporter(None, "100 %s")
    fail(reporter, budget, 11.0)
    answer(reporter, budget, 15.0)
    reporter.report_unexpected(FAILURE, 15.0)
    for now in (15.0, 21.0):
        reporter.report_lag(2.0, now, waiting=7)
    assert len(lines(caplog)) == 4
    assert all(line.startswith("client '100 %s': ") for _, line in lines(caplog))


def test_a_service_that_comes_and_goes_is_a_pair_of_lines_a_minute(
    reporter: Reporter, budget: Budget, caplog: pytest.LogCaptureFixture
) -> None:
    for now in range(100, 220, 20):
        fail(reporter, budget, float(now))
        answer(reporter, budget, now + 1.0)
    assert [level for level, _ in lines(caplog)] == ["WARNING", "INFO"] * 2
    for later in (205.0, 215.0, 220.0, 230.0):  # and now it stays away
        fail(reporter, budget, later)
    assert len(lines(caplog)) == 5


def test_a_client_that_is_closed_in_an_outage_logs_no_end_of_it(
    reporter: Reporter, budget: Budget, caplog: pytest.LogCaptureFixture
) -> None:
    fail(reporter, budget, 11.0)
    reporter.report_end(budget, 12.0)
    assert len(lines(caplog)) == 1


def test_polls_that_are_late_for_a_while_are_one_line(reporter: Reporter, caplog: pytest.LogCaptureFixture) -> None:
    for tenth in range(200):
        reporter.report_lag(6.5, tenth / 10, waiting=90_000)
    [(level, message)] = lines(caplog)
    assert level == "WARNING"
    assert "90000 waits" in message
    assert "6.5 s" in message
    assert "max_in_flight" in message


def test_polls_that_are_late_again_are_a_line_a_minute(reporter: Reporter, caplog: pytest.LogCaptureFixture) -> None:
    for now, lag in ((0, 2.0), (6, 2.0), (7, 0.0), (8, 2.0), (14, 2.0), (65.9, 2.0), (66, 2.0)):
        reporter.report_lag(lag, float(now), waiting=1)
    assert len(lines(caplog)) == 2


def test_a_moment_is_not_a_line(reporter: Reporter, caplog: pytest.LogCaptureFixture) -> None:
    for now, lag in ((0, 20.0), (4.9, 20.0), (5.0, 0.5), (5.1, 20.0), (10.0, 20.0)):
        reporter.report_lag(lag, float(now), waiting=1)
    assert lines(caplog) == []


def test_polls_are_late_on_purpose_while_a_service_fails(
    reporter: Reporter, budget: Budget, caplog: pytest.LogCaptureFixture
) -> None:
    fail(reporter, budget, 0.0)
    caplog.clear()
    for now in range(20):
        reporter.report_lag(9.0, float(now), waiting=1)
    assert lines(caplog) == []


def test_unexpected_failures_are_a_line_a_minute(reporter: Reporter, caplog: pytest.LogCaptureFixture) -> None:
    for now in (1.0, 60.9, 61.0):
        reporter.report_unexpected(FAILURE, now)
    assert [(level, str(FAILURE) in message) for level, message in lines(caplog)] == [("WARNING", True)] * 2


@pytest.mark.looptime
@pytest.mark.parametrize("operations", [1, 20])
async def test_a_client_logs_an_outage_and_at_the_first_good_answer_its_end(
    sandbox: Sandbox, caplog: pytest.LogCaptureFixture, operations: int
) -> None:
    caplog.set_level(logging.INFO, "aiokeyless")
    told: list[Event] = []
    async with sandbox.client(schedule=wait_fixed(1), listeners=[told.append]) as client, asyncio.TaskGroup() as tasks:
        for number in range(operations):
            await client.create_operation(USER, operation_id=f"op-{number}")
            tasks.create_task(client.wait_for_approval(f"op-{number}", timeout=300))
        await asyncio.sleep(5)
        sandbox.fail_next(503, times=None)
        await asyncio.sleep(20)
        assert [level for level, _ in lines(caplog)] == ["WARNING"]
        sandbox.recover()
        await asyncio.sleep(20)
        for number in range(operations):
            sandbox.approve(f"op-{number}")
    opened, closed = lines(caplog)
    assert f"{operations} waits" in opened[1]
    assert closed[0] == "INFO"
    began, ended = (number for number, event in enumerate(told) if isinstance(event, ServiceChanged))
    meanwhile = [event.result for event in told[began:ended] if isinstance(event, PollEnded)]
    assert meanwhile == [*[PollResult.FAILED] * (len(meanwhile) - 1), PollResult.PENDING]
    assert sandbox.api_key not in opened[1] + closed[1]


@pytest.mark.looptime
async def test_a_client_logs_a_limit_of_its_rate(sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "aiokeyless")
    async with sandbox.client(schedule=wait_fixed(1)) as client, asyncio.TaskGroup() as tasks:
        for number in range(30):
            await client.create_operation(USER, operation_id=f"op-{number}")
            tasks.create_task(client.wait_for_approval(f"op-{number}", timeout=300))
        await asyncio.sleep(5)
        sandbox.fail_next(429, times=14, retry_after=40)  # so many that it is the tenant's
        await asyncio.sleep(1.5)
        for number in range(30):
            sandbox.approve(f"op-{number}")
    [(level, message)] = [line for line in lines(caplog) if "polls have been late" not in line[1]]
    assert level == "WARNING"
    assert message.startswith("polls do not get through, and go on: GET /v2/operations/op-")
    assert " answered 429 (Retry-After: 40 s): too many requests" in message
