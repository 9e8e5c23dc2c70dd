"""The judge of weather sees waits that are late or lost, and counts requests; some rows stay as good as loops."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import pytest

from . import weather
from .actors import Leg
from .faults import Outage
from .story import run
from .weather import CREATING, TABLE, UNAVAILABLE, Bad, Loops, Setting, Weather, judge, random_weather, run_beside

if TYPE_CHECKING:
    from pathlib import Path

FINE = Weather("fine", 20, ())
DOWN = Weather("down", 20, (Outage(10.0, 20.0, UNAVAILABLE),), within=5.0, since=10.0)


class Kept(NamedTuple):
    """What a row must keep to.

    Attributes:
        row: Its name.
        times: How many times as late as the loops, and half a second more.
        lost: The share of the waits that may be lost beyond what the loops lose.
        in_outages: The share of the loops' requests that outages may get.
    """

    row: str
    times: float = 1.5
    lost: float = 0.01
    in_outages: float = 1.0


#: Rows that are as good as loops; the bounds are generous, since one seed is a matter of chance.
KEPT = (
    Kept("flap 4/5 500, good 0-2s", times=1.2, in_outages=1.5),
    Kept("flap 7/10 refused", in_outages=0.95),
    Kept("flap 9/10 5xx", times=1.2),
    Kept("flap 18/20 5xx", times=1.2, in_outages=0.6),
    Kept("share 90% 100", times=1.2),
    Kept("share 80% 30"),
    Kept("share 50% 503 Retry-After 10"),
    Kept("outage 4s 30 5xx", in_outages=1.3),
    Kept("outage 30s 30 hangs"),
    Kept("outage 60s 200 refused", in_outages=0.1),
    Kept("hangs 30s 100"),
    Kept("recovery 30s 100 sheds", in_outages=0.3),
    Kept("recovery 30s 100 queues", in_outages=0.3),
    Kept("sheds over 20/s 100"),
    Kept("capacity 5/s 200", times=math.inf),
    Kept("429 5%"),
    Kept("429 20%"),
    Kept("429 own 20/s"),
    Kept("bad 20% 500 0.3s"),
    Kept("bad 20% hang"),
    Kept("bad 80% 500 0.9s"),
    Kept("moved 0s 4"),
    Kept("evolved: outage, 67% hang"),
    # These are worse than loops: what is left may not grow.
    Kept("evolved: flaps, 67% hang", times=20.0, lost=0.4),
    Kept("evolved: up for a round trip", times=12.0, in_outages=5.0),
    Kept("evolved: flaps, 30% fail", times=3.0),
)


@pytest.mark.slow
@pytest.mark.parametrize("kept", KEPT, ids=[kept.row for kept in KEPT])
def test_in_this_weather_waits_are_about_as_good_as_loops(kept: Kept) -> None:
    row = next(row for row in TABLE if row.name == kept.row)
    verdict = judge(row, 0)
    ours, loops = verdict.ours, verdict.loops
    assert ours.mean <= kept.times * loops.mean + 0.5
    assert ours.lost <= loops.lost + kept.lost * row.waits
    assert ours.in_outages <= kept.in_outages * loops.in_outages


def test_rows_have_names_of_their_own_and_users_who_all_approve_in_time() -> None:
    assert len({row.name for row in TABLE}) == len(TABLE)
    for row in (*TABLE, *map(random_weather, range(50))):
        if row.waits <= 30:
            people = [actor.person.approves_after for actor in row.story(1).actors]
            assert sum(after < row.lifetime - 1.0 for after in people) == row.waits
            assert len(people) == row.waits + row.bad


def test_loops_begin_when_the_waits_do_whatever_the_client_does() -> None:
    story = DOWN.story(1)
    history = run(story)
    at = {actor.payload: actor.at for actor in story.actors}
    for wait in history.waits:
        operation = history.operations[wait.operation_id]
        assert operation.payload is not None
        assert wait.started_at == pytest.approx(at[operation.payload] + CREATING)
        assert operation.created_at == pytest.approx(at[operation.payload] + CREATING / 2)


def test_a_late_wait_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not judge(FINE, 1).is_late
    monkeypatch.setattr(weather, "LEGS", (Leg(0.0, 0, every=10.0),))
    verdict = judge(FINE, 1)
    assert verdict.is_late
    assert not verdict.loses
    assert 3.0 < verdict.ours.mean < 7.0
    assert verdict.ours.p95 > 7.0
    assert 0.4 < verdict.loops.mean < 0.8


def test_a_lost_approval_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not judge(FINE, 1).loses
    monkeypatch.setattr(weather, "LEGS", (Leg(0.0, 0, timeout=0.01),))
    verdict = judge(FINE, 1)
    assert verdict.loses
    assert (verdict.ours.lost, verdict.loops.lost) == (20, 0)
    assert verdict.ours.mean == 0.0


def test_requests_are_counted() -> None:
    loops = run_beside(DOWN.story(1))
    assert loops.in_outages == pytest.approx(20 * 10.0 / 1.1, rel=0.1)
    assert 15 <= loops.peak <= 20
    assert loops.requests > loops.in_outages
    verdict = judge(DOWN, 1)
    assert verdict.loops == loops
    polls = [exchange.sent_at for exchange in run(DOWN.story(1)).exchanges if exchange.is_poll]
    assert verdict.ours.requests == len(polls)
    assert verdict.ours.in_outages == sum(10.0 <= at < 20.0 for at in polls) > 0
    assert verdict.ours.peak == max(sum(at - 1.0 < other <= at for other in polls) for at in polls)


def test_what_becomes_of_bad_operations_does_not_count() -> None:
    verdict = judge(replace(FINE, faults=(Bad(UNAVAILABLE),), bad=5), 1)
    assert len(verdict.ours.late) == len(verdict.loops.late) == 20
    assert verdict.loops.requests > judge(FINE, 1).loops.requests + 5 * 50


def test_runs_of_a_row_add_up() -> None:
    verdict = judge(FINE, 1)
    verdict.add(judge(FINE, 2))
    assert (verdict.runs, len(verdict.ours.late)) == (2, 40)
    assert verdict.to_dict()["ours"]["requests"] == verdict.ours.requests / 2
    assert str(verdict).startswith("fine ")


def test_the_loops_of_an_earlier_run_are_taken_from_a_file(tmp_path: Path) -> None:
    loops = Loops(tmp_path / "loops.json")
    job = loops.job(FINE, 1)
    assert job.loops is None
    key, verdict = job.run()
    loops.learn(key, verdict.loops)
    loops.save()
    assert Loops(tmp_path / "loops.json").job(FINE, 1).loops == verdict.loops
    assert Loops(tmp_path / "loops.json").job(FINE, 2).loops is None


def test_a_constant_is_set_where_it_is_imported_too(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ModuleType("aiokeyless_first"), ModuleType("aiokeyless_second")
    first.LIMIT = second.LIMIT = 3  # type: ignore[attr-defined]  # made here
    for module in (first, second):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    Setting.parse("aiokeyless_first:LIMIT=4.5").apply()
    assert (vars(first)["LIMIT"], vars(second)["LIMIT"]) == (4.5, 4.5)
    with pytest.raises(AttributeError):
        Setting.parse("aiokeyless_first:OTHER=1").apply()
