"""What a schedule has learned, in a file: kept across restarts, replaced as a whole, and never overwritten blindly."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest
from nats_server import PATIENCE, until

from aiokeyless import ConfigurationError, wait_adaptive
from aiokeyless.worker import ApprovalWorker, MemoryBroker, learned, submit_approval
from aiokeyless.worker.learned import LearnedFile

if TYPE_CHECKING:
    from pathlib import Path

    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox

STATE = wait_adaptive().to_json()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "learned.json"


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def read(path: Path) -> str:
    return path.read_bytes().decode(errors="surrogateescape")


def is_there(path: Path) -> bool:
    return path.exists()


def is_link(path: Path) -> bool:
    return path.is_symlink()


def remove(path: Path) -> None:
    path.unlink()


def beside(path: Path) -> list[Path]:
    return [*path.parent.iterdir()]


def taught(*approvals: float) -> wait_adaptive:
    schedule = wait_adaptive()
    for approval in approvals:
        schedule.observe(0.0, approval)
    return schedule


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a saved schedule"),
        (STATE.encode()[:-9], "not a saved schedule"),
        (b"\xff\xfe", "not a saved schedule"),
        (b'{"order": 7}', "not a saved schedule"),
        (b"[" * 100_000, "not a saved schedule"),
        (STATE.replace('"version":2', '"version":1').encode(), "the saved schedule has version 1, and only 2 is supp"),
    ],
    ids=["empty", "torn", "no text", "foreign", "endless", "version 1"],
)
async def test_a_file_of_something_else_is_refused_and_left_as_it_is(
    client: KeylessClient, path: Path, content: bytes, reason: str
) -> None:
    write(path, content)
    with pytest.raises(ConfigurationError) as caught:
        ApprovalWorker(client, learned=path)
    message = str(caught.value)
    assert message.startswith(f"{path} holds something else: {reason}")
    assert message.endswith("; move it away to start anew")
    assert "\n" not in message
    assert read(path) == content.decode(errors="surrogateescape")


async def test_a_file_that_cannot_be_read_is_refused(client: KeylessClient, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^what was learned cannot be read from .*: Is a directory$"):
        ApprovalWorker(client, learned=tmp_path)


async def test_a_file_that_cannot_be_written_is_found_before_anything_is_taken(
    client: KeylessClient, tmp_path: Path
) -> None:
    worker = ApprovalWorker(client, MemoryBroker(), learned=tmp_path / "no folder" / "learned.json")
    with pytest.raises(ConfigurationError, match=r"^what is learned cannot be saved to .*: No such file or directory$"):
        await worker.run()


async def test_a_schedule_of_ones_own_is_kept_by_oneself(client: KeylessClient, path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^learned and schedule must not both be given$"):
        ApprovalWorker(client, schedule=wait_adaptive(), learned=path)
    assert not is_there(path)


async def test_a_worker_that_is_started_again_knows_what_the_one_before_had_learned(
    client: KeylessClient, sandbox: Sandbox, path: Path
) -> None:
    broker = MemoryBroker()
    async with ApprovalWorker(client, broker, learned=path) as worker:
        assert read(path) == f"{STATE}\n"  # from the start: a path that is wrong is found at once
        operation_id = (await submit_approval(broker, "C0FFEE")).operation_id
        await until(lambda: operation_id in sandbox.operations)
        sandbox.approve(operation_id)
        await until(lambda: worker.statistics.approved == 1)
    saved = read(path)
    assert saved != f"{STATE}\n"
    async with ApprovalWorker(client, broker, learned=str(path)):
        pass
    assert read(path) == saved
    assert beside(path) == [path]


async def test_it_is_saved_as_it_goes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "_EVERY", 0.01)
    schedule = taught()
    async with LearnedFile(path).keeping(schedule):
        for approval in (1.0, 20.0):
            schedule.observe(0.0, approval)
            await until(lambda: read(path) == f"{schedule.to_json()}\n")


async def test_what_has_not_changed_is_not_written_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "_EVERY", 0.001)
    async with LearnedFile(path).keeping(taught(1.0)):
        remove(path)
        for _ in range(20):
            await asyncio.sleep(0.001)
    assert not is_there(path)


async def test_a_save_that_fails_leaves_the_file_before_it_and_is_logged_and_tried_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(learned, "_EVERY", 0.01)
    schedule = taught(1.0)
    failures: list[int] = []

    def fail(descriptor: int) -> None:
        failures.append(descriptor)
        raise OSError(28, "No space left on device")

    async with LearnedFile(path).keeping(schedule):
        before = read(path)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fail)
            schedule.observe(0.0, 20.0)
            await until(lambda: len(failures) > 1)
            assert read(path) == before
        await until(lambda: read(path) != before)
    assert 'error="No space left on device"' in caplog.text
    assert beside(path) == [path]


async def test_the_last_save_is_not_overtaken_by_one_under_way(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "_EVERY", 0.01)
    schedule = taught()
    loop = asyncio.get_running_loop()
    started, go_on = asyncio.Event(), asyncio.Event()
    replace = learned._replace

    def replace_slowly(path: Path, text: str) -> None:
        loop.call_soon_threadsafe(started.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(PATIENCE)
        replace(path, text)

    async with LearnedFile(path).keeping(schedule):
        monkeypatch.setattr(learned, "_replace", replace_slowly)
        schedule.observe(0.0, 1.0)
        await started.wait()
        schedule.observe(0.0, 20.0)
        loop.call_soon(go_on.set)
    assert read(path) == f"{schedule.to_json()}\n"


async def test_a_link_stays_a_link(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(path)
    async with LearnedFile(link).keeping(taught(1.0)):
        pass
    assert is_link(link)
    assert is_there(path)
