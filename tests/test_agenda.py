"""The queue of what is due when, against a model too slow to be wrong; and that it forgets what was taken back."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from aiokeyless.agenda import Agenda

# What an agenda may hold beyond three times its live entries: the slack, and what is on its way during a sweep.
SLACK = 200


class Item:
    """Something to book."""

    __slots__ = ("booking", "name")

    def __init__(self, name: int) -> None:
        self.name = name
        self.booking = 0


def held(agenda: Agenda[Item]) -> int:
    """Count the entries in memory, stale ones too."""
    return len(agenda._heap) + len(agenda._old)  # its memory is what is promised, and has no public face


def drain(agenda: Agenda[Item], now: float = 1e9) -> list[int]:
    names = []
    while (item := agenda.take(now)) is not None:
        names.append(item.name)
    return names


class Naive:
    """The model: a dict from item to (time, number of the booking), searched in full."""

    def __init__(self) -> None:
        self.entries: dict[Item, tuple[float, int]] = {}
        self.number = 0

    def book(self, item: Item, when: float) -> None:
        self.number += 1
        self.entries[item] = (when, self.number)

    def cancel(self, item: Item) -> None:
        self.entries.pop(item, None)

    def first(self) -> float | None:
        return min(self.entries.values())[0] if self.entries else None

    def take(self, now: float) -> Item | None:
        if not self.entries:
            return None
        item = min(self.entries, key=self.entries.__getitem__)
        if self.entries[item][0] > now:
            return None
        del self.entries[item]
        return item


def test_an_empty_agenda_has_nothing() -> None:
    agenda: Agenda[Item] = Agenda()
    assert (len(agenda), agenda.first(), agenda.take(1e9)) == (0, None, None)
    agenda.cancel(Item(1))
    assert len(agenda) == 0


def test_what_is_not_due_is_not_taken() -> None:
    agenda: Agenda[Item] = Agenda()
    agenda.book(item := Item(1), 5.0)
    assert agenda.take(4.999) is None
    assert (len(agenda), agenda.first(), bool(item.booking)) == (1, 5.0, True)
    assert agenda.take(5.0) is item
    assert (len(agenda), agenda.first(), item.booking) == (0, None, 0)


def test_of_equal_times_the_one_booked_first_comes_first() -> None:
    agenda: Agenda[Item] = Agenda()
    items = [Item(name) for name in range(500)]
    for item in items:
        agenda.book(item, 1.0)
    assert drain(agenda) == list(range(500))


def test_an_entry_that_was_moved_comes_after_what_was_booked_for_that_time_before() -> None:
    agenda: Agenda[Item] = Agenda()
    first, second = Item(1), Item(2)
    agenda.book(first, 1.0)
    agenda.book(second, 1.0)
    agenda.book(first, 1.0)
    assert len(agenda) == 2
    assert drain(agenda) == [2, 1]


def test_an_entry_can_move_both_ways_and_is_taken_once() -> None:
    agenda: Agenda[Item] = Agenda()
    item, other = Item(1), Item(2)
    agenda.book(other, 5.0)
    for when in (9.0, 1.0, 7.0):
        agenda.book(item, when)
        assert agenda.first() == min(when, 5.0)
    assert drain(agenda) == [2, 1]


def test_what_was_taken_back_does_not_come_and_can_be_booked_again() -> None:
    agenda: Agenda[Item] = Agenda()
    item = Item(1)
    agenda.book(item, 1.0)
    agenda.cancel(item)
    agenda.cancel(item)
    assert (len(agenda), agenda.first(), agenda.take(1e9)) == (0, None, None)
    agenda.book(item, 2.0)
    assert (len(agenda), agenda.first()) == (1, 2.0)
    assert agenda.take(1e9) is item


def test_a_sweep_in_the_middle_changes_no_order() -> None:
    agenda: Agenda[Item] = Agenda()
    items = [Item(name) for name in range(1000)]
    for item in items:
        agenda.book(item, float(item.name % 7))
    for item in items:
        if item.name % 3:
            agenda.cancel(item)
    assert agenda._old  # else this test tests nothing: a sweep must be under way
    expected = sorted((name for name in range(0, 1000, 3)), key=lambda name: (name % 7, name))
    assert len(agenda) == len(expected)
    assert drain(agenda) == expected


def test_memory_follows_what_is_live_when_all_is_taken_back() -> None:
    agenda: Agenda[Item] = Agenda()
    items = [Item(name) for name in range(20_000)]
    for item in items:
        agenda.book(item, float(-item.name))
    for item in items:
        agenda.cancel(item)
        assert held(agenda) <= 3 * len(agenda) + SLACK
    assert len(agenda) == 0


def test_memory_follows_what_is_live_when_the_rest_is_taken() -> None:
    agenda: Agenda[Item] = Agenda()
    items = [Item(name) for name in range(1000)]
    for item in items:
        agenda.book(item, float(item.name))
    for item in items[520:]:  # the last ones, which no look at the front would come upon
        agenda.cancel(item)
    while agenda.take(1e9) is not None:
        assert held(agenda) <= 3 * len(agenda) + SLACK


def test_memory_stays_small_where_waits_are_moved_without_end() -> None:
    agenda: Agenda[Item] = Agenda()
    items = [Item(name) for name in range(100)]
    dice = random.Random(1)  # noqa: S311
    most = 0
    for step in range(30_000):
        agenda.book(dice.choice(items), step + 100 * dice.random())
        most = max(most, held(agenda))
    assert len(agenda) == 100
    assert most <= 3 * 100 + SLACK


def test_memory_stays_small_where_every_wait_is_cancelled_before_it_is_due() -> None:
    agenda: Agenda[Item] = Agenda()
    standing = [Item(name) for name in range(10)]
    for item in standing:
        agenda.book(item, 1e9)
    most = 0
    for name in range(30_000):
        item = Item(name)
        agenda.book(item, 120.0 + name)
        agenda.cancel(item)
        most = max(most, held(agenda))
    assert most <= 3 * 10 + SLACK
    assert drain(agenda) == list(range(10))


NAMES = 40
times = st.integers(0, 9).map(float)


class AgendaMachine(RuleBasedStateMachine):
    """Any order of calls, in bursts large enough for sweeps to begin, run and end."""

    def __init__(self) -> None:
        super().__init__()
        self.items = [Item(name) for name in range(NAMES)]
        self.agenda: Agenda[Item] = Agenda()
        self.naive = Naive()

    @rule(name=st.integers(0, NAMES - 1), when=times)
    def book_or_move(self, name: int, when: float) -> None:
        self.agenda.book(self.items[name], when)
        self.naive.book(self.items[name], when)

    @rule(start=st.integers(0, NAMES - 1), count=st.integers(1, 2 * NAMES), step=st.integers(1, 7), when=times)
    def book_many(self, start: int, count: int, step: int, when: float) -> None:
        for name in range(start, start + count * step, step):
            self.book_or_move(name % NAMES, (when + name) % 10)

    @rule(name=st.integers(0, NAMES - 1))
    def cancel(self, name: int) -> None:
        self.agenda.cancel(self.items[name])
        self.naive.cancel(self.items[name])

    @rule(start=st.integers(0, NAMES - 1), count=st.integers(1, NAMES), step=st.integers(1, 7))
    def cancel_many(self, start: int, count: int, step: int) -> None:
        for name in range(start, start + count * step, step):
            self.cancel(name % NAMES)

    @rule(now=times)
    def take(self, now: float) -> None:
        assert self.agenda.take(now) is self.naive.take(now)

    @rule(now=times)
    def take_all(self, now: float) -> None:
        while (item := self.naive.take(now)) is not None:
            assert self.agenda.take(now) is item
        assert self.agenda.take(now) is None

    @invariant()
    def agrees(self) -> None:
        assert len(self.agenda) == len(self.naive.entries)
        assert self.agenda.first() == self.naive.first()
        assert all(bool(item.booking) is (item in self.naive.entries) for item in self.items)
        assert held(self.agenda) <= 3 * len(self.agenda) + SLACK


AgendaMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_any_order_of_calls_agrees_with_the_model = AgendaMachine.TestCase


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.5, 0.8, 0.95]))
def test_a_long_life_with_many_cancellations_agrees_with_the_model(seed: int, cancelled: float) -> None:
    dice = random.Random(seed)  # noqa: S311
    agenda: Agenda[Item] = Agenda()
    naive = Naive()
    sweeps = 0
    now = 0.0
    for name in range(600):
        item = Item(name)
        when = now + dice.randrange(50)
        agenda.book(item, when)
        naive.book(item, when)
        if name > 200 and dice.random() < cancelled:
            for victim in dice.sample(list(naive.entries), min(3, len(naive.entries))):
                agenda.cancel(victim)
                naive.cancel(victim)
        if dice.random() < 0.1:
            now += 1.0
            while (due := naive.take(now)) is not None:
                assert agenda.take(now) is due
            assert agenda.take(now) is None
        assert (len(agenda), agenda.first()) == (len(naive.entries), naive.first())
        sweeps += bool(agenda._old)
    assert sweeps
