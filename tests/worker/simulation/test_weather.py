"""The judge of workers in bad weather: what it counts, and the rows that are kept."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING

import pytest
from simulation.faults import Failure, Outage
from simulation.history import Exchange

from . import weather
from .weather import KEPT, QUICK, ROWS, Bad, Bound, DoubtfulCreates, Down, Figures, Result, Row

if TYPE_CHECKING:
    from collections.abc import Iterable

FEW = Row("few", (), 10, arrive_within=5.0)
ERROR = Failure("status", 503)


def test_without_weather_all_are_asked_and_all_approvals_found() -> None:
    for figures in (weather.run_workers(FEW, 1), weather.run_loops(FEW, 1)):
        assert (figures.requests, figures.missed, figures.lost, figures.undecided) == (10, 0, 0, 0)
        assert figures.posts == figures.told == figures.approvals == 10
        assert 0.0 < sum(figures.asked_after) / 10 < 0.5
        assert 0.0 < sum(figures.late) / 10 < 1.2
        assert figures.problems == []


def test_a_story_is_the_same_each_time() -> None:
    row = FEW._replace(faults=(Outage(0.0, math.inf, ERROR, share=0.5),), workers=2)
    first, again, other = (weather.run_workers(row, seed).summary() for seed in (1, 1, 2))
    assert first == again != other
    assert weather.run_loops(row, 1) == weather.run_loops(row, 1) != weather.run_loops(row, 2)


def test_who_was_never_asked_is_missed() -> None:
    row = FEW._replace(faults=(Down(0.0, math.inf, ERROR, 1.0, 1.0),), expires_in=5.0, during=(0.0, 3.0))
    for figures in (weather.run_workers(row, 1), weather.run_loops(row, 1)):
        assert (figures.missed, figures.approvals, figures.lost) == (10, 0, 0)
        assert 0 < figures.during < figures.sent
    assert weather.run_loops(row, 1).posts >= 30


def test_an_approval_that_is_not_found_is_lost() -> None:
    row = FEW._replace(faults=(Outage(0.0, math.inf, ERROR, methods="GET"),))
    figures = weather.run_loops(row, 1)
    assert figures.asked == figures.approvals == figures.lost == 10


def test_only_good_ones_are_measured() -> None:
    row = FEW._replace(faults=(Bad(ERROR, 0.1),), bad=5, expires_in=20.0)
    for figures in (weather.run_workers(row, 1), weather.run_loops(row, 1)):
        assert (figures.requests, figures.missed, figures.lost, figures.undecided) == (10, 0, 0, 0)
        assert figures.to_bad > 20
    created = row._replace(faults=(Bad(ERROR, 0.1, "GET", are_created=True),))
    assert weather.run_workers(created, 1).posts == 15


def test_a_second_create_is_counted_and_may_reset_an_approval() -> None:
    row = FEW._replace(faults=(DoubtfulCreates(),))
    keeps, resets = weather.run_loops(row, 1), weather.run_loops(row._replace(resets=True), 1)
    assert (keeps.posts, keeps.second, keeps.blind) == (resets.posts, resets.second, resets.blind) == (20, 10, 10)
    assert sum(resets.asked_after) == sum(keeps.asked_after)
    assert weather.run_workers(row._replace(resets=True), 1).second == 0
    service = weather._Service(row._replace(resets=True), 1, weather.make_asks(row, 1))
    for at in (0.0, 1.0, 100.0):
        weather._exchange(service, "POST", "good-1", at)
    assert [*service.second.values()] == [False, True]
    assert service.operations["good-1"].created_at > 100.0


@pytest.mark.parametrize(
    ("sent", "blind"),
    [
        ("GET 404, POST 503", []),
        ("POST 503, POST 200", [1, 2]),
        ("GET 404, POST 503, GET 404, POST 200", []),
        ("GET 404, POST 503, GET 503, POST 200", [4]),
        ("GET 404, POST 503, GET 200, POST 200", [4]),
    ],
)
def test_a_create_is_blind_without_a_poll_that_found_nothing_since_the_last(sent: str, blind: list[int]) -> None:
    assert [*weather._blind(_exchanges(sent))] == blind


def _exchanges(sent: str) -> Iterable[Exchange]:
    for number, (method, status) in enumerate((each.split() for each in sent.split(", ")), 1):
        yield Exchange(
            number=number,
            client="",
            method=method,
            operation_id="x",
            is_poll=False,
            sent_at=float(number),
            ended_at=number + 0.5,
            status=int(status),
        )


def test_a_peak_is_of_any_second() -> None:
    assert weather._peak([0.0, 0.5, 0.9, 1.4, 1.45, 1.5, 3.0]) == 4
    assert weather._peak([]) == 0


def test_a_bound_is_by_the_loop() -> None:
    ours = Figures(requests=100, asked=90, approvals=90, found=80, sent=300, late=[3.0], blind=1, undecided=1)
    loop = Figures(requests=100, asked=100, approvals=100, found=100, sent=100, late=[1.0])
    result = Result("x", ours, loop, 0.0)
    strict = Bound(missed=0.09, late=2.9, lost=0.11, requests=2.9)
    assert [breach.split(" ")[0] for breach in strict.breaches(result)] == [
        *("missed", "late", "lost", "requests", "blind", "undecided")
    ]
    ours.blind = ours.undecided = 0
    assert Bound(missed=0.1, late=3.0, lost=0.12, requests=3.0).breaches(result) == []


def test_a_constant_is_set_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weather, "PAUSE", weather.PAUSE)
    weather.change(f"{weather.__name__}:PAUSE=2.5")
    assert weather.PAUSE == 2.5
    monkeypatch.setattr(weather.Bad, "are_created", weather.Bad.are_created)
    weather.change(f"{weather.__name__}:Bad.are_created=True")
    assert weather.Bad.are_created
    with pytest.raises(AttributeError):
        weather.change(f"{weather.__name__}:PAUSES=2.5")


def test_the_command_prints_a_line_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(weather, "ROWS", (FEW, FEW._replace(name="many")))
    monkeypatch.setattr(weather, "KEPT", {"few": Bound(requests=0.1)})
    monkeypatch.setattr(sys, "argv", ["weather", "--rows", "f.w", "--seeds", "1"])
    assert weather.main() == 0
    heading, row, every = capsys.readouterr().out.splitlines()
    assert heading.startswith("workers, and a loop")
    assert row.startswith("few  ")
    assert every.startswith("all of these  ")
    monkeypatch.setattr(sys, "argv", ["weather", "--json", "--seeds", "1", "--check"])
    assert weather.main() == 1
    said = capsys.readouterr()
    few, many, both = map(json.loads, said.out.splitlines())
    assert (few["row"], few["ours"]["requests"], both["loop"]["requests"]) == ("few", 10, 20)
    assert many["ours"]["lost"] == 0
    assert said.err.startswith("few: requests ")


def test_each_kept_row_is_one() -> None:
    names = [row.name for row in ROWS]
    assert len({*names}) == len(names)
    assert {*KEPT, *QUICK} <= {*names}


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in ROWS if row.name in QUICK], ids=lambda row: row.name)
def test_a_row_is_kept(row: Row) -> None:
    assert KEPT.get(row.name, Bound()).breaches(weather.judge(row, 1)) == []
