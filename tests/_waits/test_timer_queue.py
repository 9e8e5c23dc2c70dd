"""The queue of what is due when, against a model too slow to be wrong; and that it forgets what was taken back."""

from __future__ import annotations

import math
import random
import weakref

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from aiokeyless._waits.timer_queue import Entry, Scheduled, TimerQueue

# What a queue may hold beyond three times its live entries: the slack, and what is on its way during a sweep.
SLACK = 200


class Item(Scheduled):
    """Something to schedule."""

    __slots__ = ("__weakref__", "entry", "name", "origin")

    def __init__(self, name: int) -> None:
        self.name = name
        self.origin = float(name)
        self.entry: Entry | None = None

    @property
    def scheduled_at(self) -> float | None:
        return None if self.entry is None else self.entry.when


def entries(queue: TimerQueue[Item]) -> int:
    """Count the entries in memory, stale ones too."""
    return len(queue._heap) + len(queue._old)  # its memory is what is promised, and has no public face


def drain(queue: TimerQueue[Item], now: float = 1e9) -> list[int]:
    names = []
    while (item := queue.pop_due(now)) is not None:
        names.append(item.name)
    return names


class Naive:
    """The model: a dict from item to time, searched in full."""

    def __init__(self) -> None:
        self.entries: dict[Item, float] = {}

    def schedule(self, item: Item, when: float) -> None:
        self.entries[item] = when

    def remove(self, item: Item) -> None:
        self.entries.pop(item, None)

    def next_due(self) -> float:
        return min(self.entries.values(), default=math.inf)

    def agrees(self, taken: Item | None, now: float) -> bool:
        """Whether this may have been taken then: of equal times, any of them; and take it."""
        first = self.next_due()
        if taken is None:
            return first > now
        return first <= now and self.entries.pop(taken) == first


def test_of_equal_times_the_items_decide() -> None:
    queue: TimerQueue[Item] = TimerQueue()
    for name in reversed(range(500)):
        queue.schedule(Item(name), 1.0)
    assert drain(queue) == list(range(500))


def test_an_entry_that_comes_back_to_the_very_time_it_had_is_taken_once() -> None:
    queue: TimerQueue[Item] = TimerQueue()
    item = Item(1)
    when, later = 1.0, 2.0
    queue.schedule(item, when)
    queue.schedule(item, when)
    queue.schedule(item, later)
    queue.schedule(item, when)  # while the stale entry of before is there
    assert len(queue) == 1
    assert drain(queue) == [1]
    assert len(queue) == 0


def test_what_was_removed_does_not_come_and_can_be_scheduled_again() -> None:
    queue: TimerQueue[Item] = TimerQueue()
    item = Item(1)
    queue.schedule(item, 1.0)
    queue.remove(item)
    queue.remove(item)
    assert (len(queue), queue.next_due(), queue.pop_due(1e9)) == (0, math.inf, None)
    queue.schedule(item, 2.0)
    assert (len(queue), queue.next_due()) == (1, 2.0)
    assert queue.pop_due(1e9) is item


def test_what_was_removed_or_taken_is_not_kept() -> None:
    queue: TimerQueue[Item] = TimerQueue()
    queue.schedule(standing := Item(0), 1.0)
    removed, moved = Item(1), Item(2)
    queue.schedule(removed, 2.0)
    queue.schedule(moved, 2.0)
    queue.schedule(moved, 3.0)
    queue.remove(removed)
    queue.remove(moved)
    assert (queue.pop_due(1.0), entries(queue)) == (standing, 3)  # else there is nothing that could keep them
    kept = [weakref.ref(item) for item in (standing, removed, moved)]
    del standing, removed, moved
    assert [reference() for reference in kept] == [None, None, None]


def test_memory_follows_what_is_live_when_all_is_taken_back() -> None:
    queue: TimerQueue[Item] = TimerQueue()
    items = [Item(name) for name in range(20_000)]
    for item in items:
        queue.schedule(item, float(-item.name))
    for item in items:
        queue.remove(item)
        assert entries(queue) <= 3 * len(queue) + SLACK
    assert len(queue) == 0


def test_memory_follows_what_is_live_when_the_rest_is_taken() -> None:
    queue: TimerQueue[Item] = TimerQueue()
    items = [Item(name) for name in range(1000)]
    for item in items:
        queue.schedule(item, float(item.name))
    for item in items[520:]:  # the last ones, which no poll at the front would come upon
        queue.remove(item)
    while queue.pop_due(1e9) is not None:
        assert entries(queue) <= 3 * len(queue) + SLACK


def test_memory_stays_small_where_waits_are_moved_without_end() -> None:
    queue: TimerQueue[Item] = TimerQueue()
    items = [Item(name) for name in range(100)]
    dice = random.Random(1)  # noqa: S311
    most = 0
    for step in range(30_000):
        queue.schedule(dice.choice(items), step + 100 * dice.random())
        most = max(most, entries(queue))
    assert len(queue) == 100
    assert most <= 3 * 100 + SLACK


class Counting(Item):
    """An item that counts comparisons: with equal times, each step of a heap makes one or more."""

    __slots__ = ()
    comparisons = 0

    def __lt__(self, other: Scheduled) -> bool:
        Counting.comparisons += 1
        return super().__lt__(other)


def test_very_many_stale_entries_at_the_front_are_dropped_in_many_calls_and_none_is_long() -> None:
    queue: TimerQueue[Item] = TimerQueue()
    gone, kept = [Counting(name) for name in range(9_900)], [Counting(name) for name in range(10_100)]
    for item in gone:
        queue.schedule(item, 1.0)
    for item in kept:
        queue.schedule(item, 2.0)
    for item in reversed(gone):  # the front is live to the last, so nothing is dropped meanwhile
        queue.remove(item)
    calls = 0
    taken = None
    while taken is None:
        Counting.comparisons = 0
        assert queue.next_due() in {1.0, 2.0}  # something may be due: the caller comes back for it
        taken = queue.pop_due(2.0)
        assert Counting.comparisons < 20_000  # of 300 000 for all of them
        calls += 1
    assert taken in kept
    assert 1 < calls < 100
    assert sorted([taken.name, *drain(queue)]) == list(range(10_100))


def test_a_queue_of_nothing_but_stale_entries_has_nothing_due() -> None:
    queue: TimerQueue[Item] = TimerQueue()
    items = [Item(name) for name in range(1_000)]
    for item in items:
        queue.schedule(item, 1.0)
    for item in reversed(items):
        queue.remove(item)
    assert queue.next_due() == math.inf
    assert queue.pop_due(2.0) is None


NAMES = 40
times = st.integers(0, 9).map(float)


class TimerQueueMachine(RuleBasedStateMachine):
    """Any order of calls, in bursts large enough for sweeps to begin, run and end."""

    def __init__(self) -> None:
        super().__init__()
        self.items = [Item(name) for name in range(NAMES)]
        self.queue: TimerQueue[Item] = TimerQueue()
        self.naive = Naive()

    @rule(name=st.integers(0, NAMES - 1), when=times)
    def book_or_move(self, name: int, when: float) -> None:
        self.queue.schedule(self.items[name], when)
        self.naive.schedule(self.items[name], when)

    @rule(start=st.integers(0, NAMES - 1), count=st.integers(1, 2 * NAMES), step=st.integers(1, 7), when=times)
    def book_many(self, start: int, count: int, step: int, when: float) -> None:
        for name in range(start, start + count * step, step):
            self.book_or_move(name % NAMES, (when + name) % 10)

    @rule(name=st.integers(0, NAMES - 1))
    def remove(self, name: int) -> None:
        self.queue.remove(self.items[name])
        self.naive.remove(self.items[name])

    @rule(start=st.integers(0, NAMES - 1), count=st.integers(1, NAMES), step=st.integers(1, 7))
    def cancel_many(self, start: int, count: int, step: int) -> None:
        for name in range(start, start + count * step, step):
            self.remove(name % NAMES)

    @rule(now=times)
    def pop_due(self, now: float) -> None:
        assert self.naive.agrees(self.queue.pop_due(now), now)

    @rule(now=times)
    def take_all(self, now: float) -> None:
        while (item := self.queue.pop_due(now)) is not None:
            assert self.naive.agrees(item, now)
        assert self.naive.agrees(None, now)

    @invariant()
    def agrees(self) -> None:
        assert len(self.queue) == len(self.naive.entries)
        assert self.queue.next_due() == self.naive.next_due()
        assert all(item.scheduled_at == self.naive.entries.get(item) for item in self.items)
        assert entries(self.queue) <= 3 * len(self.queue) + SLACK


TimerQueueMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_any_order_of_calls_agrees_with_the_model = TimerQueueMachine.TestCase


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.5, 0.8, 0.95]))
def test_a_long_life_with_many_cancellations_agrees_with_the_model(seed: int, cancelled: float) -> None:
    dice = random.Random(seed)  # noqa: S311
    queue: TimerQueue[Item] = TimerQueue()
    naive = Naive()
    sweeps = 0
    now = 0.0
    for name in range(600):
        item = Item(name)
        when = now + dice.randrange(50)
        queue.schedule(item, when)
        naive.schedule(item, when)
        if name > 200 and dice.random() < cancelled:
            for victim in dice.sample(list(naive.entries), min(3, len(naive.entries))):
                queue.remove(victim)
                naive.remove(victim)
        if dice.random() < 0.1:
            now += 1.0
            while (due := queue.pop_due(now)) is not None:
                assert naive.agrees(due, now)
            assert naive.agrees(None, now)
        assert (len(queue), queue.next_due()) == (len(naive.entries), naive.next_due())
        sweeps += bool(queue._old)
    assert sweeps
