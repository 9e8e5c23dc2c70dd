"""The scenes of the demo: what is measured, on a moved clock and over real HTTP. No number depends on the machine."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

import pytest

from aiokeyless._rules.budget import PER_SECOND, PER_WAIT
from aiokeyless.cli import scenes
from aiokeyless.cli.scenes import INTERVAL, OUTAGE, PEOPLE, play_mismatch, play_outage, play_people
from aiokeyless.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiokeyless.cli.scenes import Draw, Scene

pytestmark = pytest.mark.looptime


def draw_seldom(_scene: Scene) -> float:
    return 60


async def test_both_notice_every_approval_and_the_library_sooner_on_average() -> None:
    scene = await play_people(draw_seldom)
    for side in (scene.aiokeyless, scene.loop):
        assert (len(side.approved_at), side.refused, side.requests_in_outage) == (PEOPLE, 0, 0)
        assert len(side.lateness) == PEOPLE
        assert min(side.lateness) >= 0
    assert max(scene.loop.lateness) < 2 * INTERVAL
    assert fmean(scene.aiokeyless.lateness) < fmean(scene.loop.lateness)


async def test_both_survive_an_outage_into_which_the_library_sends_what_its_budget_holds() -> None:
    scene = await play_outage(draw_seldom)
    for side in (scene.aiokeyless, scene.loop):
        assert (len(side.approved_at), side.refused) == (PEOPLE, 0)
        assert min(side.lateness) >= 0
    assert max(scene.loop.lateness) < 2 * INTERVAL, "counted from the end of the outage"
    seconds = OUTAGE[1] - OUTAGE[0]
    assert scene.loop.requests_in_outage == pytest.approx(PEOPLE * seconds / INTERVAL, rel=0.1)
    assert scene.aiokeyless.requests_in_outage <= PER_WAIT * PEOPLE + PER_SECOND * seconds


async def test_an_outage_begins_once_everybody_was_asked_however_slow_the_machine_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scenes, "PEOPLE", 5)
    start = Sandbox.start

    async def slow(self: Sandbox) -> None:
        await start(self)
        self.latency = 0.5

    monkeypatch.setattr(Sandbox, "start", slow)
    scene = await play_outage(draw_seldom)
    assert len(scene.aiokeyless.approved_at) == len(scene.loop.approved_at) == 5


async def test_an_answer_about_something_else_deceives_the_loop_and_not_the_library() -> None:
    scene = await play_mismatch(draw_seldom)
    assert (len(scene.aiokeyless.approved_at), scene.aiokeyless.refused) == (0, PEOPLE)
    assert (len(scene.loop.approved_at), scene.loop.refused) == (PEOPLE, 0)
    assert scene.aiokeyless.lateness == scene.loop.lateness == []


@pytest.mark.parametrize("play", [play_people, play_outage, play_mismatch])
async def test_the_polls_that_are_reported_are_those_that_the_sandbox_received(
    play: Callable[[Draw], Awaitable[Scene]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sandboxes: list[Sandbox] = []
    start = Sandbox.start

    async def noted(self: Sandbox) -> None:
        await start(self)
        sandboxes.append(self)

    monkeypatch.setattr(Sandbox, "start", noted)
    few = 5
    monkeypatch.setattr(scenes, "PEOPLE", few)
    scene = await play(draw_seldom)
    [sandbox] = sandboxes
    assert sandbox.request_count - few == scene.aiokeyless.requests() + scene.loop.requests()
