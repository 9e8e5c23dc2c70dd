"""The scenes of the demo: what is measured, on a moved clock and over real HTTP. No number depends on the machine."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from aiokeyless import ApprovalTimeoutError
from aiokeyless.cli import scenes
from aiokeyless.cli.scenes import INTERVAL, Stage, play_approval, play_mismatch, play_outage, play_phone
from aiokeyless.sandbox import Sandbox

from .terminal import later

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokeyless.cli.scenes import Ending, SceneResult

pytestmark = pytest.mark.looptime


@pytest.fixture
def sandboxes(monkeypatch: pytest.MonkeyPatch) -> list[Sandbox]:
    """The sandboxes that the scenes start."""
    started: list[Sandbox] = []
    on_start(monkeypatch, started.append)
    return started


def on_start(monkeypatch: pytest.MonkeyPatch, then: Callable[[Sandbox], object]) -> None:
    start = Sandbox.start

    async def started(self: Sandbox) -> None:
        await start(self)
        then(self)

    monkeypatch.setattr(Sandbox, "start", started)


def ways(ending: Ending) -> tuple[str, str | None]:
    return ending.outcome, ending.error


async def test_both_return_after_the_approval_of_the_simulated_user() -> None:
    result = await play_approval(7.5, Stage())
    assert result.approved_after is not None
    assert result.approved_after >= 7.5
    for ending in (result.aiokeyless, result.loop):
        assert ways(ending) == ("approved", None)
        assert ending.after >= result.approved_after
        assert ending.failed_polls == 0
    assert (result.outage_after, result.recovered_after) == (None, None)


async def test_the_loop_polls_at_once_and_then_once_a_second() -> None:
    result = await play_approval(7.5, Stage())
    assert 1 < result.loop.polls <= 1 + result.loop.after / INTERVAL


async def test_an_outage_ends_the_loop_and_not_the_library() -> None:
    result = await play_outage(Stage())
    assert result.outage_after is not None
    assert result.approved_after is not None
    assert result.recovered_after is not None
    assert result.outage_after < result.approved_after < result.recovered_after
    assert ways(result.loop) == ("failed", "ClientResponseError")
    assert result.loop.after >= result.outage_after
    assert result.loop.failed_polls == 1
    assert ways(result.aiokeyless) == ("approved", None)
    assert result.aiokeyless.after >= result.recovered_after
    assert 0 < result.aiokeyless.failed_polls < result.aiokeyless.polls


async def test_an_answer_about_something_else_deceives_the_loop_and_not_the_library() -> None:
    result = await play_mismatch(Stage())
    assert result.approved_after is None
    assert ways(result.loop) == ("approved", None)
    assert ways(result.aiokeyless) == ("refused", "OperationMismatchError")
    assert result.aiokeyless.polls > 0


@pytest.mark.parametrize("play", [lambda stage: play_approval(5, stage), play_outage, play_mismatch])
async def test_the_polls_that_are_reported_are_those_that_the_sandbox_received(
    sandboxes: list[Sandbox], play: Callable[[Stage], asyncio.Future[SceneResult]]
) -> None:
    result = await play(Stage())
    [sandbox] = sandboxes
    paths = [request.path for request in sandbox.requests if request.method == "GET"]
    assert paths == [f"/v2/operations/{result.operation_id}"] * (result.aiokeyless.polls + result.loop.polls)
    failed = [request.status for request in sandbox.requests].count(503)
    assert failed == result.aiokeyless.failed_polls + result.loop.failed_polls


@pytest.mark.parametrize("after", [0.0, 60.0])
async def test_the_user_approves_after_any_time(after: float) -> None:
    result = await play_approval(after, Stage())
    assert result.approved_after is not None
    assert result.approved_after >= after


async def test_a_person_has_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "_CHECK_INTERVAL", 30)
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(ApprovalTimeoutError):
        await play_phone(Stage())
    assert loop.time() - began == pytest.approx(600, abs=30)


async def test_an_approval_that_is_noticed_before_the_next_check_of_the_phone_counts_as_noticed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scenes, "_CHECK_INTERVAL", 1e6)
    on_start(monkeypatch, lambda sandbox: later(3, lambda: sandbox.approve(next(iter(sandbox.operations)))))
    result = await play_phone(Stage())
    assert result.approved_after is not None
    assert result.approved_after <= min(result.aiokeyless.after, result.loop.after) <= result.approved_after + 0.001


async def test_a_scene_that_is_cancelled_leaves_no_task() -> None:
    task = asyncio.create_task(play_approval(7.5, Stage()))
    await asyncio.sleep(5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_script_that_fails_ends_its_scene_and_leaves_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise LookupError("no such operation")

    monkeypatch.setattr(Sandbox, "approve", fail)
    with pytest.raises(LookupError):
        await play_approval(3, Stage())
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
