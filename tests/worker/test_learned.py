"""What a schedule has learned, in a file: kept across restarts, replaced as a whole, and never overwritten blindly."""

from __future__ import annotations

import asyncio
import os
import stat
from typing import TYPE_CHECKING

import pytest
from waiting import PATIENCE, until

from aiokeyless import ConfigurationError, wait_adaptive
from aiokeyless.worker import ApprovalWorker, learned, submit_approval
from aiokeyless.worker.learned import LearnedFile

if TYPE_CHECKING:
    from pathlib import Path

    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox
    from aiokeyless.worker.sqlite import SqliteBroker

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


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def beside(path: Path) -> list[Path]:
    return [*path.parent.iterdir()]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a saved schedule"),
        (STATE.encode()[:-9], "not a saved schedule"),
        (b"\xff\xfe", "not a saved schedule"),
        (b'{"order": 7}', "not a saved schedule"),
        (b"[" * 100_000, "not a saved schedule"),
        (STATE.replace('"version":1', '"version":2').encode(), "the saved schedule has version 2, and only 1 is supp"),
    ],
    ids=["empty", "torn", "no text", "foreign", "endless", "version 2"],
)
async def test_a_file_of_something_else_is_refused_and_left_as_it_is(
    client: KeylessClient, path: Path, content: bytes, reason: str
) -> None:
    write(path, content)
    with pytest.raises(ConfigurationError) as caught:
        ApprovalWorker(client, "sqlite::memory:", learned=path)
    message = str(caught.value)
    assert message.startswith(f"{path} holds something else: {reason}")
    assert message.endswith("; move it away to start anew")
    assert "\n" not in message
    assert read(path) == content.decode(errors="surrogateescape")


async def test_a_file_that_cannot_be_read_is_refused(client: KeylessClient, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^what was learned cannot be read from .*: Is a directory$"):
        ApprovalWorker(client, "sqlite::memory:", learned=tmp_path)


async def test_a_file_that_cannot_be_written_is_found_before_anything_is_taken(
    client: KeylessClient, tmp_path: Path
) -> None:
    worker = ApprovalWorker(client, "sqlite::memory:", learned=tmp_path / "no folder" / "learned.json")
    with pytest.raises(ConfigurationError, match=r"^what is learned cannot be saved to .*: No such file or directory$"):
        await worker.run()


async def test_a_schedule_of_ones_own_is_kept_by_oneself(client: KeylessClient, path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^learned and schedule must not both be given$"):
        ApprovalWorker(client, "sqlite::memory:", schedule=wait_adaptive(), learned=path)
    assert not is_there(path)


async def test_a_worker_that_is_started_again_knows_what_the_one_before_had_learned(
    client: KeylessClient, sandbox: Sandbox, path: Path, memory: SqliteBroker
) -> None:
    broker = memory
    async with ApprovalWorker(client, broker, learned=path) as worker:
        assert read(path) == f"{STATE}\n"  # from the start: a path that is wrong is found at once
        await submit_approval(broker, "C0FFEE", operation_id="txn-1")
        await until(lambda: "txn-1" in sandbox.operations)
        sandbox.approve("txn-1")
        await until(lambda: worker.statistics.approved == 1)
    saved = read(path)
    assert saved != f"{STATE}\n"
    async with ApprovalWorker(client, broker, learned=str(path)):
        pass
    assert read(path) == saved
    assert beside(path) == [path]


async def test_it_is_saved_as_it_goes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "_EVERY", 0.01)
    file = LearnedFile(path)
    async with file.keeping():
        for approval in (1.0, 20.0):
            file.schedule.observe(0.0, approval)
            await until(lambda: read(path) == f"{file.schedule.to_json()}\n")


async def test_what_has_not_changed_is_not_written_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "_EVERY", 0.001)
    async with LearnedFile(path).keeping():
        remove(path)
        for _ in range(20):
            await asyncio.sleep(0.001)
    assert not is_there(path)


async def test_a_save_that_fails_leaves_the_file_before_it_and_is_logged_and_tried_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(learned, "_EVERY", 0.01)
    file = LearnedFile(path)
    failures: list[int] = []

    def fail(descriptor: int) -> None:
        failures.append(descriptor)
        raise OSError(28, "No space left on device")

    async with file.keeping():
        before = read(path)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fail)
            file.schedule.observe(0.0, 20.0)
            await until(lambda: len(failures) > 1)
            assert read(path) == before
        await until(lambda: read(path) != before)
    assert "learned.not_saved" in caplog.text
    assert "No space left on device" in caplog.text
    assert beside(path) == [path]


async def test_a_save_that_fails_in_a_way_that_nobody_expected_is_logged_whole_and_tried_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(learned, "_EVERY", 0.01)
    file = LearnedFile(path)

    def fail(*_: object) -> None:
        raise LookupError("no such thing")

    async with file.keeping():
        before = read(path)
        with monkeypatch.context() as patched:
            patched.setattr(learned, "_replace", fail)
            file.schedule.observe(0.0, 20.0)
            await until(lambda: caplog.text.count("learned.not_saved") > 1)
        await until(lambda: read(path) != before)
    for record in (record for record in caplog.records if record.name == "aiokeyless.worker"):
        assert record.getMessage() == 'learned.not_saved error="LookupError: no such thing"'
        assert record.levelname == "ERROR"
        assert record.exc_info is not None


async def test_the_last_save_is_not_overtaken_by_one_under_way(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "_EVERY", 0.01)
    file = LearnedFile(path)
    loop = asyncio.get_running_loop()
    started, go_on = asyncio.Event(), asyncio.Event()
    replace = learned._replace

    def replace_slowly(path: Path, text: str) -> None:
        loop.call_soon_threadsafe(started.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(PATIENCE)
        replace(path, text)

    async with file.keeping():
        monkeypatch.setattr(learned, "_replace", replace_slowly)
        file.schedule.observe(0.0, 1.0)
        await started.wait()
        file.schedule.observe(0.0, 20.0)
        loop.call_soon(go_on.set)
    assert read(path) == f"{file.schedule.to_json()}\n"


async def test_no_other_user_of_the_machine_can_foresee_or_read_what_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder of several users, a file of a known name may be there already, as a link to another one."""
    written: list[tuple[str, int]] = []

    def note(_: int) -> None:
        [file] = {*beside(path)} - {path}
        written.append((file.name, mode(file)))

    monkeypatch.setattr(os, "fsync", note)
    keeper = LearnedFile(path)
    umask = os.umask(0)
    try:
        for _ in range(2):
            keeper.schedule.observe(5.0, 6.0)
            async with keeper.keeping():
                pass
    finally:
        os.umask(umask)
    names, modes = zip(*written, strict=True)
    assert len({*names}) == 2
    assert {*modes, mode(path)} == {0o600}


async def test_a_link_stays_a_link(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(path)
    async with LearnedFile(link).keeping():
        pass
    assert is_link(link)
    assert is_there(path)
