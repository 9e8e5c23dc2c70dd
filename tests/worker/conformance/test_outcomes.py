from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from waiting import until

from aiokeyless.worker.broker import outcome_pause

from ..reading import now  # noqa: TID252
from .brokers import decide_all, none_comes, operation_decided, read, those

if TYPE_CHECKING:
    from aiokeyless.events import Inspection
    from aiokeyless.worker.broker import Broker

    from .brokers import Opened, Storage


async def is_unread(broker: Broker, counts: dict[str, int]) -> Inspection:
    """Wait until so many are unread; some brokers count a moment later."""
    found: list[Inspection] = []

    async def is_counted() -> bool:
        found.append(await broker.inspect())
        return found[-1].unread == counts

    await until(is_counted)
    return found[-1]


async def test_a_reader_waits_for_what_is_decided_meanwhile(opened: Opened) -> None:
    worker, application = await opened(), await opened()
    reading = asyncio.create_task(application.next_outcome("shop"))
    await asyncio.sleep(0.1)
    assert not reading.done()
    await decide_all(worker, "a")
    outcome = await reading
    assert operation_decided(outcome) == "a"
    await outcome.mark_handled()


async def test_each_reader_gets_each_outcome(broker: Broker, storage: Storage) -> None:
    await decide_all(broker, "a")
    assert await read(broker, "shop", 1) == {"a"}
    assert await read(broker, "ledger", 1) == {"a"}
    await decide_all(broker, "b")
    assert await read(broker, "shop", 1) == await read(broker, "ledger", 1) == {"b"}
    assert await none_comes(broker, "shop", storage.quiet)


async def test_processes_of_one_reader_share_the_outcomes(opened: Opened, storage: Storage) -> None:
    first, second = await opened(), await opened()
    expected = {f"payment-{number}" for number in range(10)}
    await decide_all(first, *expected)
    one, other = await asyncio.gather(read(first, "shop", 5), read(second, "shop", 5))
    assert one | other == expected
    assert await none_comes(first, "shop", storage.quiet)


async def test_an_outcome_that_is_put_off_comes_again_later_and_holds_up_no_other(
    broker: Broker, storage: Storage
) -> None:
    await decide_all(broker, "a", "b", "c")
    refused = await broker.next_outcome("shop")
    began = now()
    await refused.put_off()
    others = {"a", "b", "c"} - {operation_decided(refused)}
    assert await read(broker, "shop", 2) == others
    again = await broker.next_outcome("shop")
    assert operation_decided(again) == operation_decided(refused)
    assert 0.9 <= now() - began < 2.5 + storage.slack
    await again.put_off(0.05)
    assert await read(broker, "shop", 1) == {operation_decided(refused)}
    assert await none_comes(broker, "shop", storage.quiet)


@those(slow=lambda storage: not storage.moves_clock)
async def test_an_outcome_that_is_put_off_again_and_again_is_so_for_longer_each_time(
    broker: Broker, storage: Storage
) -> None:
    await decide_all(broker, "a")
    outcome = await broker.next_outcome("shop")
    for deliveries in range(1, 12 if storage.moves_clock else 3):
        began, pause = now(), outcome_pause(deliveries)
        await outcome.put_off()
        outcome = await broker.next_outcome("shop")
        assert pause * 0.9 <= now() - began < pause + 1.5 + storage.slack
    await outcome.mark_handled()


@those(slow=lambda storage: not storage.moves_clock)  # half a minute
async def test_an_outcome_that_kills_its_process_comes_again_and_holds_up_no_other(
    broker: Broker, storage: Storage
) -> None:
    await decide_all(broker, "a", "b", "c")
    handled, killed_at = set(), now()
    for _ in range(100):  # their order may be random
        async with storage.broker() as process:
            outcome = await process.next_outcome("shop")
            if operation_decided(outcome) == "a":
                killed_at = now()
                continue
            handled.add(operation_decided(outcome))
            await outcome.mark_handled()
        if len(handled) == 2:
            break
    assert handled == {"b", "c"}
    assert await read(broker, "shop", 1) == {"a"}
    assert now() - killed_at < 31.0 + storage.slack
    assert await none_comes(broker, "shop", storage.quiet)


async def test_a_reader_that_is_cancelled_while_it_waits_loses_nothing(broker: Broker) -> None:
    assert await none_comes(broker, "shop", 0.1)
    await decide_all(broker, "a")
    assert await read(broker, "shop", 1) == {"a"}


async def test_what_a_reader_has_not_handled_is_counted_with_its_age_and_stays_unread(
    broker: Broker, storage: Storage
) -> None:
    assert (await broker.inspect()).unread == {}
    await decide_all(broker, "a")
    assert await read(broker, "ledger", 1) == await read(broker, "shop", 1) == {"a"}
    assert [*await broker.list_unread(10)] == []
    await asyncio.sleep(0.1)
    began = now()
    await decide_all(broker, "b")
    await (await broker.next_outcome("shop")).put_off(100)
    await asyncio.sleep(0.1)
    await decide_all(broker, "c")
    told = await is_unread(broker, {"ledger": 2, "shop": 2})
    assert all(0.09 < age < now() - began + 0.05 for age in told.oldest_unread_age.values())
    assert told.problems == ()
    assert await read(broker, "ledger", 2) == {"b", "c"}
    told = await is_unread(broker, {"ledger": 0, "shop": 2})
    assert told.oldest_unread_age["ledger"] == 0 < told.oldest_unread_age["shop"]
    assert await read(broker, "shop", 1) == {"c"}
    assert await none_comes(broker, "shop", min(storage.quiet, 50.0))
    await is_unread(broker, {"ledger": 0, "shop": 1})


@those(which=lambda storage: storage.has_rows)
async def test_the_oldest_unread_outcomes_are_listed_with_their_failures(broker: Broker, storage: Storage) -> None:
    await decide_all(broker, "read")
    assert await read(broker, "ledger", 1) == await read(broker, "shop", 1) == {"read"}
    await decide_all(broker, "a")
    await (await broker.next_outcome("shop")).put_off(100)
    for earlier, operation_id in (("a", "b"), ("b", "c")):
        assert await read(broker, "ledger", 1) == {earlier}
        await asyncio.sleep(0.01)
        await decide_all(broker, operation_id)
    await asyncio.sleep(0.01)
    found = await broker.list_unread(3)
    assert [(reader, operation_id, failures) for reader, operation_id, _, failures in found] == [
        ("shop", "a", 1),
        ("shop", "b", 0),
        ("ledger", "c", 0),
    ]
    assert len(await broker.list_unread(10)) == 4
    ages = [outcome.age for outcome in found]
    assert ages == sorted(ages, reverse=True)
    assert 0 < ages[-1] < ages[0] < 5 + storage.slack
