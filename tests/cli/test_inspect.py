"""``aiokeyless inspect``: what it says of a broker, and that it leaves everything there."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from worker.conformance.brokers import LEASE, decide_all, submit

from aiokeyless.cli.app import CommandError, Exit, app
from aiokeyless.events import Inspection
from aiokeyless.worker.broker import UnavailableError
from aiokeyless.worker.sqlite import SqliteBroker

from .terminal import json_of, output_of

if TYPE_CHECKING:
    from pathlib import Path

    from aiokeyless.worker import Broker

    from .terminal import Fail


async def leave_unread(broker: Broker) -> None:
    """Leave a request that waits, and two outcomes, one of which the reader has failed to handle."""
    await broker.prepare(lease=LEASE, service="")
    for operation_id in ("read", "order-1", "order-2"):
        await decide_all(broker, operation_id)
        if operation_id == "read":
            await (await broker.next_outcome("shop")).mark_handled()
        elif operation_id == "order-1":
            await (await broker.next_outcome("shop")).put_off(100)
            await asyncio.sleep(0.1)
    await submit(broker, "order-3")


async def test_it_says_what_waits_and_what_is_unread_and_consumes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = f"sqlite:{tmp_path / 'keyless.db'}"
    async with SqliteBroker(tmp_path / "keyless.db") as broker:
        await leave_unread(broker)
        found = await json_of("inspect", "--broker", url)
        monkeypatch.setenv("KEYLESS_BROKER", url)
        again = await json_of("inspect")
    ages = [found["oldest_age"], found["unread"]["shop"]["oldest_age"], *(old["age"] for old in found["oldest_unread"])]
    assert all(0 <= age < 60 for age in ages)
    assert found["unread"]["shop"]["oldest_age"] > 0.1
    for told in (found, again):
        for old in (told, told["unread"]["shop"]):
            del old["oldest_age"]
        for old in told["oldest_unread"]:
            del old["age"]
        assert told == {
            "waiting": 1,
            "unread": {"shop": {"count": 2}},
            "oldest_unread": [
                {"reader": "shop", "operation_id": "order-1", "failures": 1},
                {"reader": "shop", "operation_id": "order-2", "failures": 0},
            ],
            "problems": [],
        }


async def test_people_get_lines(tmp_path: Path) -> None:
    path = tmp_path / "keyless.db"

    async def printed() -> str:
        return await output_of("inspect", "--broker", f"sqlite:{path}")

    async with SqliteBroker(path) as broker:
        assert await printed() == "  Waiting    0\n"
        await leave_unread(broker)
        lines = [line.split() for line in (await printed()).splitlines()]
        assert lines[0][:5] == ["Waiting", "1,", "the", "oldest", "for"]
        assert lines[1][:6] == ["Unread", "shop:", "2,", "the", "oldest", "for"]
        assert lines[2:4] == [[], ["operation", "reader", "age", "failures"]]
        assert [(line[0], line[1], line[3]) for line in lines[4:]] == [
            ("order-1", "shop", "1"),
            ("order-2", "shop", "0"),
        ]
        assert lines[4][2].startswith("0:00:0")


async def test_a_problem_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def find_problem(_broker: SqliteBroker) -> Inspection:
        return Inspection(problems=("the disk is full",))

    path = tmp_path / "keyless.db"
    async with SqliteBroker(path):
        pass
    monkeypatch.setattr(SqliteBroker, "inspect", find_problem)
    printed = await output_of("inspect", "--broker", f"sqlite:{path}")
    assert printed.splitlines()[0] == "  Problem    the disk is full"


def test_a_file_that_is_not_there_is_not_made(fail: Fail, tmp_path: Path) -> None:
    path = tmp_path / "keyless.db"
    err = fail("inspect", "--broker", f"sqlite:{path}")
    assert err == f"--broker must name the broker's file, and there is none at {path}"
    assert not path.exists()


def test_a_database_that_cannot_be_reached_is_one_line(fail: Fail) -> None:
    assert fail("inspect", "--broker", "postgresql://127.0.0.1:1/shop").startswith("the database cannot be reached: ")


def test_without_a_broker_it_is_one_line_and_exit_2(fail: Fail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEYLESS_BROKER", raising=False)
    assert "--broker or KEYLESS_BROKER must name the broker" in fail("inspect", code=Exit.USAGE)


async def test_a_broker_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def fail(_broker: SqliteBroker) -> Inspection:
        raise UnavailableError("the disk is away")

    path = tmp_path / "keyless.db"
    async with SqliteBroker(path):
        pass
    monkeypatch.setattr(SqliteBroker, "inspect", fail)
    with pytest.raises(CommandError, match=r"^the broker does not answer: the disk is away$"):
        await app.run_async(["inspect", "--broker", f"sqlite:{path}"])
