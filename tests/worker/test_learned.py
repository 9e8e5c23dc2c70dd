"""What a schedule has learned, in a file: kept across restarts, replaced as a whole, and never overwritten blindly."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from typing import TYPE_CHECKING

import pytest
from nats_server import PATIENCE, until

from aiokeyless import ConfigurationError, wait_adaptive
from aiokeyless.worker import ApprovalWorker, BrokerError, MemoryBroker, learned, submit_approval
from aiokeyless.worker.engine import EngineError, RefusedError
from aiokeyless.worker.learned import LearnedBucket, LearnedFile
from aiokeyless.worker.memory import MemoryEngine

if TYPE_CHECKING:
    from pathlib import Path

    from nats.aio.client import Client
    from nats_server import NatsServer

    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox
    from aiokeyless.worker.engine import Engine, Learned

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


@pytest.fixture
async def engine() -> Engine:
    return MemoryBroker().engine()


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


async def test_it_is_saved_as_it_goes(path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "_EVERY", 0.01)
    file = LearnedFile(path)
    async with file.keeping(engine):
        for approval in (1.0, 20.0):
            file.schedule.observe(0.0, approval)
            await until(lambda: read(path) == f"{file.schedule.to_json()}\n")


async def test_what_has_not_changed_is_not_written_again(
    path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned, "_EVERY", 0.001)
    async with LearnedFile(path).keeping(engine):
        remove(path)
        for _ in range(20):
            await asyncio.sleep(0.001)
    assert not is_there(path)


async def test_a_save_that_fails_leaves_the_file_before_it_and_is_logged_and_tried_again(
    path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(learned, "_EVERY", 0.01)
    file = LearnedFile(path)
    failures: list[int] = []

    def fail(descriptor: int) -> None:
        failures.append(descriptor)
        raise OSError(28, "No space left on device")

    async with file.keeping(engine):
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
    path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(learned, "_EVERY", 0.01)
    file = LearnedFile(path)

    def fail(*_: object) -> None:
        raise LookupError("no such thing")

    async with file.keeping(engine):
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


async def test_the_last_save_is_not_overtaken_by_one_under_way(
    path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned, "_EVERY", 0.01)
    file = LearnedFile(path)
    loop = asyncio.get_running_loop()
    started, go_on = asyncio.Event(), asyncio.Event()
    replace = learned._replace

    def replace_slowly(path: Path, text: str) -> None:
        loop.call_soon_threadsafe(started.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(PATIENCE)
        replace(path, text)

    async with file.keeping(engine):
        monkeypatch.setattr(learned, "_replace", replace_slowly)
        file.schedule.observe(0.0, 1.0)
        await started.wait()
        file.schedule.observe(0.0, 20.0)
        loop.call_soon(go_on.set)
    assert read(path) == f"{file.schedule.to_json()}\n"


async def test_no_other_user_of_the_machine_can_foresee_or_read_what_is_written(
    path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
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
            async with keeper.keeping(engine):
                pass
    finally:
        os.umask(umask)
    names, modes = zip(*written, strict=True)
    assert len({*names}) == 2
    assert {*modes, mode(path)} == {0o600}


async def test_a_link_stays_a_link(path: Path, tmp_path: Path, engine: Engine) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(path)
    async with LearnedFile(link).keeping(engine):
        pass
    assert is_link(link)
    assert is_there(path)


# -- a bucket that a fleet shares


def kept(engine: Engine) -> wait_adaptive:
    """Return what the fleet has learned."""
    assert isinstance(engine, MemoryEngine)
    state = engine._store.learned["shared"].state
    assert state is not None
    return wait_adaptive.from_json(state)


def figures(schedule: wait_adaptive) -> list[float]:
    """Return what a schedule has learned; numbers are rounded each time that they are written."""
    state = json.loads(schedule.to_json())
    return [*state["approved"], *state["pending"]]


@pytest.mark.parametrize("bucket", ["", "a.b", "a b", "a/b", "*", "\u00e9", "x" * 129], ids=ascii)
async def test_a_bucket_that_cannot_be_is_refused(client: KeylessClient, bucket: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^kv:// must name a bucket: 1 to 128 letters, digits, '-' and '_'"):
        ApprovalWorker(client, learned=f"kv://{bucket}")


async def test_a_fleet_learns_as_one_schedule_would(engine: Engine) -> None:
    one, another, alone = LearnedBucket("shared"), LearnedBucket("shared"), wait_adaptive()
    for number in range(1, 7):
        (one if number % 2 else another).schedule.observe(number / 2, number)
        await (one if number % 2 else another)._save(engine)
        alone.observe(number / 2, number)
    await one._save(engine)
    for schedule in (kept(engine), one.schedule, another.schedule):
        assert figures(schedule) == pytest.approx(figures(alone))


async def test_what_another_worker_wrote_meanwhile_is_not_lost(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    one, another, alone = LearnedBucket("shared"), LearnedBucket("shared"), wait_adaptive()
    another.schedule.observe(0.0, 30.0)
    one.schedule.observe(0.0, 2.0)
    read_learned = engine.read_learned

    async def be_overtaken(bucket: str) -> Learned:
        state = await read_learned(bucket)
        monkeypatch.undo()
        await another._save(engine)
        return state

    monkeypatch.setattr(engine, "read_learned", be_overtaken)
    await one._save(engine)
    for approval in (30.0, 2.0):
        alone.observe(0.0, approval)
    assert kept(engine).to_json() == one.schedule.to_json()
    assert figures(one.schedule) == pytest.approx(figures(alone))


async def test_what_is_observed_while_it_is_written_is_written_the_next_time(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, alone = LearnedBucket("shared"), wait_adaptive()
    one.schedule.observe(0.0, 2.0)
    write_learned = engine.write_learned

    async def observe_meanwhile(bucket: str, state: bytes, revision: int) -> bool:
        monkeypatch.undo()
        one.schedule.observe(0.0, 30.0)
        return await write_learned(bucket, state, revision)

    monkeypatch.setattr(engine, "write_learned", observe_meanwhile)
    await one._save(engine)
    alone.observe(0.0, 2.0)
    assert figures(kept(engine)) == pytest.approx(figures(alone))
    alone.observe(0.0, 30.0)
    assert figures(one.schedule) == pytest.approx(figures(alone))
    await one._save(engine)
    assert figures(kept(engine)) == pytest.approx(figures(alone))


@pytest.mark.looptime
async def test_workers_that_save_at_the_same_moment_keep_what_each_of_them_has_observed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_learned, delays = engine.write_learned, iter(range(1, 100))

    async def write_slowly(bucket: str, state: bytes, revision: int) -> bool:
        await asyncio.sleep(0.001)
        return await write_learned(bucket, state, revision)

    monkeypatch.setattr(engine, "write_learned", write_slowly)
    monkeypatch.setattr(learned, "error_delay", lambda _attempt: next(delays))
    fleet, alone = [LearnedBucket("shared") for _ in range(12)], wait_adaptive()
    for worker in fleet:
        worker.schedule.observe(0.0, 2.0)
        alone.observe(0.0, 2.0)
    await asyncio.gather(*(worker._save(engine) for worker in fleet))
    assert figures(kept(engine)) == pytest.approx(figures(alone))


@pytest.mark.looptime
async def test_where_others_keep_writing_it_is_kept_for_the_next_time(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = LearnedBucket("shared")
    one.schedule.observe(0.0, 2.0)

    async def be_late(*_: object) -> bool:
        return False

    with monkeypatch.context() as patched:
        patched.setattr(engine, "write_learned", be_late)
        with pytest.raises(BrokerError, match=r"^what the fleet learns was not kept in the bucket shared: others kept"):
            await one._save(engine)
    await one._save(engine)
    assert kept(engine).to_json() == one.schedule.to_json()


@pytest.mark.parametrize("overtaken", [False, True])
@pytest.mark.parametrize(
    ("stored", "error"), [(True, EngineError), (False, EngineError), (False, RefusedError)], ids=str
)
async def test_what_was_written_without_an_answer_is_counted_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, *, stored: bool, error: type[EngineError], overtaken: bool
) -> None:
    one, another, alone = LearnedBucket("shared"), LearnedBucket("shared"), wait_adaptive()
    write_learned = engine.write_learned

    async def lose_the_answer(bucket: str, state: bytes, revision: int) -> bool:
        monkeypatch.undo()
        if stored:
            await write_learned(bucket, state, revision)
        raise error("nats: timeout")

    monkeypatch.setattr(engine, "write_learned", lose_the_answer)
    one.schedule.observe(0.0, 2.0)
    with pytest.raises(BrokerError, match=r"^what the fleet learns cannot be kept in the bucket shared: nats: timeout"):
        await one._save(engine)
    if overtaken:
        another.schedule.observe(0.0, 8.0)
        await another._save(engine)
    one.schedule.observe(0.0, 30.0)
    await one._save(engine)
    await one._save(engine)
    is_written_again = not stored and (error is RefusedError or not overtaken)  # or it is lost
    for approval in [2.0] * stored + [8.0] * overtaken + [2.0] * is_written_again + [30.0]:
        alone.observe(0.0, approval)
    assert figures(kept(engine)) == pytest.approx(figures(alone))
    assert figures(one.schedule) == pytest.approx(figures(alone))


async def test_while_the_broker_is_away_not_everything_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "_MOST_FRESH", 3)
    one = LearnedBucket("shared")
    for approval in range(1, 9):
        one.schedule.observe(0.0, approval)
    assert len(one._recording.fresh) == 3


async def test_a_bucket_that_holds_something_else_is_refused_and_left_as_it_is(engine: Engine) -> None:
    await engine.write_learned("shared", b'{"order": 7}', 0)
    with pytest.raises(ConfigurationError) as caught:
        await LearnedBucket("shared")._save(engine)
    message = str(caught.value)
    assert message.startswith("the bucket shared holds something else under keyless: not a saved schedule")
    assert message.endswith("; delete that key to start anew")
    assert (await engine.read_learned("shared")).state == b'{"order": 7}'


async def test_workers_of_a_fleet_share_what_they_learn_in_a_bucket_of_the_broker(
    client: KeylessClient, broker: NatsServer, connection: Client, sandbox: Sandbox
) -> None:
    bucket = await connection.jetstream().create_key_value(bucket="shared")
    async with ApprovalWorker(client, broker.url, learned="kv://shared") as worker:
        operation_id = (await submit_approval(connection, "C0FFEE")).operation_id
        await until(lambda: operation_id in sandbox.operations)
        sandbox.approve(operation_id)
        await until(lambda: worker.statistics.approved == 1)
    state = (await bucket.get("keyless")).value
    assert state is not None
    assert state.decode() != STATE
    async with ApprovalWorker(client, broker.url, learned="kv://shared") as restarted:
        assert isinstance(restarted._schedule, wait_adaptive)
        assert restarted._schedule.to_json() == state.decode()


async def test_a_bucket_that_is_missing_is_one_line(client: KeylessClient, broker: NatsServer) -> None:
    with pytest.raises(BrokerError) as caught:
        await ApprovalWorker(client, broker.url, learned="kv://shared").run()
    assert str(caught.value) == (
        "what the fleet learns cannot be kept in the bucket shared: there is no such bucket; nats kv add makes one"
    )
