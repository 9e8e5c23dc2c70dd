"""Pulls: a delivery is handed on the moment it comes, and what was asked for is known or forgotten in time."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import nats.errors
import pytest
from nats.aio.msg import Msg
from nats_server import CONSUMER, REQUEST_SUBJECT, REQUESTS, change_consumer, jetstream, prepare
from waiting import PATIENCE, until

from aiokeyless._rules.order import Standing
from aiokeyless.worker.broker import ExchangeResult, UnavailableError
from aiokeyless.worker.nats import StreamSettings, intake
from aiokeyless.worker.nats.fleet import KEYLESS
from aiokeyless.worker.nats.intake import Intake, NatsMessage
from aiokeyless.worker.nats.load_shedding import LoadShedding

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.js.api import ConsumerInfo
    from nats_server import NatsServer

EXPIRES = 5.0
LEASE = 60.0


class Pulled(Intake):
    """An intake whose pulls are observed."""

    async def ask(self, count: int) -> None:
        self._pulls_from = self._now()
        await self._pull(len(self._arrived) + count)

    def forget(self) -> None:
        """Expect nothing more of the pull, as after a reconnection."""
        self._reconnects = -1

    def expected(self) -> int:
        return self._left if self._is_expecting() else 0


class Hand:
    """An intake, what came of it, and the clock that it reads."""

    def __init__(self, connection: Client, lease: float = LEASE) -> None:
        self.connection = connection
        self.ends = 0
        self.time = 0.0
        source = KEYLESS.prefix, REQUESTS, CONSUMER
        self.intake = Pulled(connection, *source, lease=lease, now=lambda: self.time, restore=self.restored)
        on_end = self.intake._on_end

        def count_end(raw: Msg) -> None:
            on_end(raw)
            self.ends += 1

        self.intake._on_end = count_end  # type: ignore[method-assign]  # to count them

    async def restored(self) -> None:
        """The consumer is not made again."""

    @property
    def messages(self) -> list[NatsMessage]:
        return self.intake._arrived

    @property
    def texts(self) -> list[str]:
        return [message.body.decode() for message in self.messages]

    async def publish(self, *texts: str) -> None:
        for text in texts:
            await jetstream(self.connection).publish(REQUEST_SUBJECT, text.encode())

    async def answer(self, status: str, **headers: str) -> None:
        """End a pull as the broker does."""
        await self.connection.publish(self.intake._reply, headers={"Status": status, **headers})

    async def consumer(self) -> ConsumerInfo:
        info: ConsumerInfo = await jetstream(self.connection).consumer_info(REQUESTS, CONSUMER)
        return info

    async def is_waited_for(self) -> bool:
        """Whether a pull waits at the consumer."""
        waiting = (await self.consumer()).num_waiting
        return waiting is not None and waiting > 0

    async def are_pending(self, count: int) -> None:
        """Wait until the consumer counts so many: a stream tells it a moment after it has stored them."""

        async def are_counted() -> bool:
            return (await self.consumer()).num_pending == count

        await until(are_counted)

    async def delivered(self, count: int) -> None:
        await until(lambda: len(self.messages) == count)


@pytest.fixture(autouse=True)
def _pulls_last_long_enough_to_be_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "EXPIRES", EXPIRES)


@pytest.fixture
async def hand(connection: Client) -> Hand:
    await prepare(jetstream(connection), StreamSettings(), ack_wait=30)
    hand = Hand(connection)
    await hand.intake.open()
    return hand


# -- deliveries


async def test_the_first_delivery_of_a_batch_is_handed_on_at_once(hand: Hand) -> None:
    await hand.intake.ask(64)
    await hand.publish("one")
    await hand.delivered(1)
    assert (hand.texts, hand.ends) == (["one"], 0)  # and not when the pull ends


async def test_while_a_pull_is_under_way_there_is_no_other_one(hand: Hand) -> None:
    assert hand.intake.expected() == 0
    await hand.intake.ask(3)
    await hand.publish("a", "b")
    await hand.delivered(2)
    await hand.intake.ask(5)
    assert hand.intake.expected() == 1
    await hand.publish("c")
    await hand.delivered(3)
    await hand.intake.ask(5)
    assert hand.intake.expected() == 5


async def test_a_pull_waits_at_the_consumer_and_not_longer_than_it_says(hand: Hand) -> None:
    subscription = await hand.connection.subscribe("$JS.API.CONSUMER.MSG.NEXT.>")
    for wanted in (7, 3):
        hand.intake.forget()
        await hand.intake.take(wanted, 0.0, untried=None)
        pull = await subscription.next_msg(PATIENCE)
        assert json.loads(pull.data) == {"batch": wanted, "expires": int(EXPIRES * 1e9)}
    await until(hand.is_waited_for)


@pytest.mark.parametrize(
    "reply",
    [
        "ack",
        "$JS.API.CONSUMER.MSG.NEXT.KEYLESS_REQUESTS.keyless-approvals",
        "$JS.ack.KEYLESS_REQUESTS.keyless-approvals.1.1.1.1.0",
    ],
)
async def test_what_others_send_to_the_inbox_is_ignored_and_logged_once(
    hand: Hand, caplog: pytest.LogCaptureFixture, reply: str
) -> None:
    await hand.intake.ask(2)
    for _ in range(3):
        await hand.connection.publish(hand.intake._reply, b"forged", reply=reply)
    await hand.publish("true")
    await hand.delivered(1)
    assert (hand.texts, hand.ends, hand.intake.expected()) == (["true"], 0, 1)
    assert ["broker.foreign_message" in line for line in caplog.messages] == [True]


# -- ends


async def test_a_pull_that_the_broker_ends_is_not_expected_any_more(
    hand: Hand, caplog: pytest.LogCaptureFixture
) -> None:
    await hand.intake.ask(4)
    await until(hand.is_waited_for)
    await jetstream(hand.connection).delete_consumer(REQUESTS, CONSUMER)
    await until(lambda: hand.ends == 1)
    assert (hand.intake.expected(), hand.messages) == (0, [])
    assert 'broker.refused reason="409 Consumer Deleted"' in caplog.text


async def test_where_there_is_no_consumer_the_end_of_a_pull_says_so(hand: Hand) -> None:
    await jetstream(hand.connection).delete_consumer(REQUESTS, CONSUMER)
    await hand.intake.ask(5)
    await until(lambda: hand.ends == 1)
    assert (hand.intake.expected(), hand.intake._refusals) == (0, 1)
    assert hand.intake._refusal == "503 the consumer has no leader, or is gone"


async def test_the_end_of_an_earlier_pull_is_not_that_of_the_present_one(hand: Hand) -> None:
    await hand.intake.ask(5)
    earlier = hand.intake._reply
    hand.intake.forget()
    await hand.intake.ask(3)
    await hand.connection.publish(earlier, headers={"Status": "408"})
    await hand.publish("a")
    await hand.delivered(1)
    assert (hand.ends, hand.intake.expected()) == (0, 2)


async def test_a_pull_whose_end_was_lost_is_forgotten_in_time(hand: Hand) -> None:
    await hand.intake.ask(5)
    hand.time = EXPIRES + 2
    assert hand.intake.expected() == 5
    hand.time += 0.001
    assert hand.intake.expected() == 0


# -- refusals


async def test_a_limit_of_a_pull_that_the_broker_names_is_obeyed(hand: Hand) -> None:
    await change_consumer(hand.connection, max_batch=2)
    await hand.publish(*"abc")
    await hand.intake.ask(512)
    await until(lambda: hand.ends == 1)
    await hand.intake.ask(512)
    await hand.delivered(2)
    await hand.intake.ask(512)
    await hand.delivered(3)
    assert hand.texts == ["a", "b", "c"]


async def test_a_broker_that_refuses_five_pulls_in_a_row_is_a_problem_until_it_takes_one(hand: Hand) -> None:
    await change_consumer(hand.connection, max_expires=1_000_000)
    for number in range(5):
        assert hand.intake.problem is None
        await hand.intake.ask(1)
        await until(lambda count=number + 1: hand.ends == count)  # type: ignore[misc]  # a default binds it
    assert hand.intake.problem == "the broker refuses each pull: 409 Exceeded MaxRequestExpires of 1ms"
    await change_consumer(hand.connection, max_expires=0)
    await hand.intake.ask(1)
    await hand.publish("a")
    await hand.delivered(1)
    assert hand.intake.problem is None


async def test_the_pull_after_a_refused_one_waits_for_no_answer_about_the_consumer(hand: Hand) -> None:
    answered = asyncio.Event()

    async def restored() -> None:
        await answered.wait()

    hand.intake._restore = restored
    await hand.intake.ask(1)
    await hand.answer("503")
    await until(lambda: hand.ends == 1)
    asking = asyncio.create_task(hand.intake.ask(1))
    await hand.publish("a")
    await hand.delivered(1)
    answered.set()
    await asking


async def test_a_broker_that_refuses_each_pull_for_long_fills_no_log(
    hand: Hand, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def restored() -> None:
        raise UnavailableError("JetStream is off")

    monkeypatch.setattr(hand.intake, "_restore", restored)
    for number in range(20):
        await hand.intake.ask(1)
        await hand.answer("503")
        await until(lambda count=number + 1: hand.ends == count)  # type: ignore[misc]  # a default binds it
    events = [record.getMessage().partition(" ")[0] for record in caplog.records]
    assert events == ["broker.refused", "broker.unsettled"]


# -- slow deliveries, and lost ones


async def test_a_delivery_is_extended_for_as_long_as_one_may_take(
    connection: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "ACK_WAIT", 0.4)
    await prepare(jetstream(connection), ack_wait=0.4)
    hand = Hand(connection, lease=1.2)
    hand.intake._now = asyncio.get_running_loop().time
    await hand.intake.open()
    await hand.publish("a")
    [first] = await hand.intake.take(1, PATIENCE, untried=None)
    [again] = await hand.intake.take(1, PATIENCE, untried=None)
    assert again.arrived_at - first.arrived_at >= 0.8  # its last extension came after 0.4 s
    await hand.intake.close()


async def test_a_delivery_that_is_settled_is_extended_no_more(
    connection: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "ACK_WAIT", 0.03)
    await prepare(jetstream(connection), ack_wait=30)
    hand = Hand(connection)
    hand.intake._now = asyncio.get_running_loop().time
    await hand.intake.open()
    await hand.publish("a", "b")
    await hand.intake.ask(2)
    await hand.delivered(2)
    extensions = await connection.subscribe("$JS.ACK.>")
    [settled, slow] = await hand.intake.take(2, PATIENCE, untried=None)
    await hand.intake.put_off(settled, 30.0)
    sent = [await extensions.next_msg(PATIENCE) for _ in range(4)]
    assert [message.data[:4] for message in sent if message.subject == settled.raw.reply] == [b"-NAK"]
    assert {message.data for message in sent if message.subject == slow.raw.reply} == {b"+WPI"}
    await hand.intake.close()


async def test_a_delivery_that_is_put_off_while_others_are_extended_is_not_extended(
    hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "ACK_WAIT", 0.03)
    hand.intake._now = asyncio.get_running_loop().time
    await hand.publish("a", "b")
    await hand.intake.ask(2)
    await hand.delivered(2)
    taken = await hand.intake.take(2, PATIENCE, untried=None)
    extended: list[str] = []

    async def in_progress(raw: Msg) -> None:
        extended.append(raw.reply)
        for message in taken:
            if message.raw is not raw:
                await hand.intake.put_off(message, 30.0)
        raise nats.errors.ConnectionClosedError  # which ends no extensions

    monkeypatch.setattr(Msg, "in_progress", in_progress)
    await until(lambda: len(extended) > 1)
    await hand.intake.close()
    assert len({*extended}) == 1


async def test_a_put_off_that_a_dying_broker_swallowed_is_repeated(hand: Hand, broker: NatsServer) -> None:
    hand.intake._now = asyncio.get_running_loop().time
    await jetstream(hand.connection).delete_consumer(REQUESTS, CONSUMER)
    await prepare(jetstream(hand.connection), ack_wait=1.0)
    await hand.publish("a")
    [message] = await hand.intake.take(1, PATIENCE, untried=None)
    broker.pause()
    await hand.intake.put_off(message, 3600.0)
    await until(lambda: hand.connection._pending_data_size == 0)  # the socket has it
    broker.kill()
    await broker.start()
    await until(lambda: hand.connection.is_connected)
    [again] = await hand.intake.take(1, PATIENCE, untried=None)
    assert again.body == b"a"  # as the first delivery or the second: a server that dies may not have counted the first


async def test_a_put_off_on_a_connection_that_is_closed_is_unsettled(hand: Hand) -> None:
    await hand.publish("a")
    await hand.intake.ask(1)
    await hand.delivered(1)
    await hand.connection.close()
    with pytest.raises(UnavailableError, match="connection closed"):
        await hand.intake.put_off(hand.messages[0], 1.0)


# -- what a worker takes


async def test_while_keyless_fails_the_best_of_what_was_pulled_is_taken_first(hand: Hand) -> None:
    hand.intake._now = asyncio.get_running_loop().time
    await hand.publish("bad", "worse", "proven", "new")
    hand.intake.failures.record(1, ExchangeResult.FAILED)
    for _ in range(2):
        hand.intake.failures.record(2, ExchangeResult.FAILED)
    hand.intake.failures.record(3, ExchangeResult.ANSWERED)
    await hand.intake.ask(4)
    await hand.delivered(4)
    await asyncio.sleep(0.2)  # better ones have had their time to come
    taken = [await hand.intake.take(1, 5.0, untried=0) for _ in range(4)]
    assert [message.body for [message] in taken] == [b"proven", b"new", b"bad", b"worse"]


async def test_of_those_that_are_taken_so_many_were_never_tried(hand: Hand) -> None:
    hand.intake._now = asyncio.get_running_loop().time
    await hand.publish("answered", "answered-later", "new", "newer", "newest")
    for number in (1, 2):
        hand.intake.failures.record(number, ExchangeResult.ANSWERED)
    await hand.intake.ask(5)
    await hand.delivered(5)
    taken = [await hand.intake.take(3, PATIENCE, untried=untried) for untried in (2, 1)]
    assert [[message.body for message in messages] for messages in taken] == [
        [b"newest", b"newer", b"answered"],
        [b"new", b"answered-later"],
    ]


async def test_one_that_failed_waits_a_moment_for_better_ones(hand: Hand) -> None:
    await hand.publish("bad")
    hand.intake._now = asyncio.get_running_loop().time
    hand.intake.failures.record(1, ExchangeResult.FAILED)
    taking = asyncio.create_task(hand.intake.take(1, 60.0, untried=0))
    await hand.delivered(1)
    await hand.publish("good")
    [message] = await taking
    assert message.body == b"good"


async def test_a_new_one_is_found_behind_more_bad_ones_than_are_pulled_at_once(
    hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "_CHOICE", 2)
    hand.intake._now = asyncio.get_running_loop().time
    await hand.publish("bad", "worse", "answered", "new")
    for number, result in ((1, ExchangeResult.FAILED), (2, ExchangeResult.FAILED), (3, ExchangeResult.ANSWERED)):
        hand.intake.failures.record(number, result)
    [message] = await hand.intake.take(1, PATIENCE, untried=1)
    assert message.body == b"new"
    [message] = await hand.intake.take(1, PATIENCE, untried=0)
    assert message.body == b"answered"


async def test_new_ones_come_while_others_are_here_that_are_good_enough(
    hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "_CHOICE", 2)
    await hand.publish(*"abcd")
    await hand.intake.ask(2)
    await hand.delivered(2)
    taken = await hand.intake.take(1, PATIENCE, untried=1)
    await hand.delivered(3)
    taken += await hand.intake.take(1, PATIENCE, untried=1)
    assert [message.body for message in taken] == [b"b", b"d"]


async def test_without_a_new_one_in_time_the_best_of_the_others_is_taken(hand: Hand) -> None:
    hand.intake._now = asyncio.get_running_loop().time
    await hand.publish("created")
    hand.intake.failures.record(1, ExchangeResult.CREATED)
    await hand.intake.ask(1)
    await hand.delivered(1)
    hand.intake._pending = 1  # another worker gets it
    [message] = await hand.intake.take(1, 0.3, untried=1)
    assert (message.body, message.is_untried) == (b"created", False)


async def test_only_what_is_a_request_and_past_its_deadline_is_overdue(hand: Hand) -> None:
    request = '{"version": 1, "user_id": "C0FFEE", "operation_id": "txn-1", "expires_in": %d}'
    await hand.publish("no request", request % 30, request % 7200, request % -1)
    await hand.intake.ask(4)
    await hand.delivered(4)
    taken = await hand.intake.take_overdue(4, datetime.now(UTC) + timedelta(hours=1))
    assert [message.body.decode() for message in taken] == [request % 30]


@pytest.mark.parametrize("was_polled", [True, False])
async def test_load_is_shed_by_what_is_polled_again_and_what_still_waits(
    hand: Hand, monkeypatch: pytest.MonkeyPatch, *, was_polled: bool
) -> None:
    seen: list[tuple[bool, int]] = []

    def on_delivery(_: LoadShedding, *, redelivered: bool, backlog: int) -> None:
        seen.append((redelivered, backlog))

    monkeypatch.setattr(LoadShedding, "on_delivery", on_delivery)
    hand.intake._now = asyncio.get_running_loop().time
    await hand.publish("a", "b")
    await hand.are_pending(2)
    for _ in range(3):
        [message] = await hand.intake.take(1, PATIENCE, untried=None)
        if was_polled:  # otherwise a worker that did not know its version may have given it back
            hand.intake.failures.record(message.id, ExchangeResult.ANSWERED)
        await hand.intake.put_off(message, 0.0)
    assert seen[0] == (False, 1)
    assert {redelivered for redelivered, _ in seen} == {False, was_polled}


async def test_what_is_of_a_later_version_takes_no_place_of_another(hand: Hand) -> None:
    hand.intake._newest = 1
    await hand.publish(*['{"version": 2}'] * 4, "a", "b")
    await hand.intake.ask(5)
    await until(lambda: hand.intake.expected() == 0)
    [message, *newer] = await hand.intake.take(1, PATIENCE, untried=None)
    assert (message.body, [each.version for each in newer]) == (b"a", [2])
    assert [each.version for each in await hand.intake.take_overdue(2, datetime.now(UTC))] == [2, 2]
    hand.intake.forget()
    hand.intake._passed = 4
    await hand.intake.ask(1)
    await hand.delivered(1)
    assert (hand.texts, hand.intake.expected()) == (["b"], 1)  # as many more as were of a later version, up to those
    hand.time += 2.0
    await hand.intake._hand_back_old()
    assert not hand.intake._newer


async def test_what_nobody_takes_goes_back(hand: Hand, connection: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    put_off, delays = hand.intake.put_off, dict[bytes, float]()

    async def noted(message: NatsMessage, delay: float) -> None:
        delays[message.body] = delay
        await put_off(message, delay)

    monkeypatch.setattr(hand.intake, "put_off", noted)
    await hand.publish("bad", "good")
    hand.intake.failures.record(1, ExchangeResult.FAILED)
    await hand.intake.ask(2)
    await hand.delivered(2)
    hand.time = 2.0
    await hand.intake._hand_back_old()
    hand.intake.forget()
    assert hand.messages == []
    other = Hand(connection)
    await other.intake.open()
    taken: list[bytes] = []
    while len(taken) < 2:
        taken += [message.body for message in await other.intake.take(2, 1.0, untried=None)]
    assert sorted(taken) == [b"bad", b"good"]
    assert delays == {b"bad": pytest.approx(0.5, abs=0.5), b"good": 1.0}


async def test_no_more_is_remembered_than_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "_REMEMBERED", 2)
    failures = intake.Failures()
    for number in (1, 2, 1, 3):
        failures.record(number, ExchangeResult.FAILED)
    assert [failures.of(number)[0] for number in (1, 2, 3)] == [2, 0, 1]
    failures.forget(1)
    assert failures.of(1) == failures.of(2) == (0, Standing.UNTRIED, 0)


async def test_what_comes_without_its_body_is_put_off_until_the_consumer_delivers_bodies_again(
    hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_off, delays, corrected = hand.intake.put_off, list[float](), list[str]()

    async def noted(message: NatsMessage, delay: float) -> None:
        delays.append(delay)
        await put_off(message, delay)

    async def restored() -> None:
        await change_consumer(hand.connection, headers_only=False)
        corrected.append(CONSUMER)

    hand.intake._now = asyncio.get_running_loop().time
    hand.intake._restore = restored
    monkeypatch.setattr(hand.intake, "put_off", noted)
    await change_consumer(hand.connection, headers_only=True)
    await hand.publish("a")
    [message] = await hand.intake.take(1, PATIENCE, untried=None)
    assert (message.body, message.number, len(corrected)) == (b"a", 2, 1)
    assert delays == [pytest.approx(0.375, abs=0.125)]


# -- the end


async def test_closing_waits_for_the_pulls_to_end_and_hands_back_what_they_bring(
    hand: Hand, connection: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "EXPIRES", 0.3)
    await hand.intake.ask(5)
    closing = asyncio.create_task(hand.intake.close())
    await hand.publish("late")
    await closing
    assert hand.ends == 1
    other = Hand(connection)
    await other.intake.open()
    await other.intake.ask(1)
    await other.delivered(1)
    assert other.texts == ["late"]


async def test_closing_does_not_wait_for_ever_for_a_broker_that_is_silent(
    hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "EXPIRES", 0.1)
    await hand.intake.ask(5)
    hand.intake._reply = ""  # its end is lost
    closing = asyncio.create_task(hand.intake.close())
    await asyncio.sleep(0.3)
    assert not closing.done()
    hand.time = 2.2
    await asyncio.wait_for(closing, 60)
    assert hand.ends == 0


async def test_closing_leaves_no_task_and_no_subscription(connection: Client) -> None:
    await connection.flush()
    tasks, subscriptions = asyncio.all_tasks(), len(connection._subs)
    hand = Hand(connection)
    await hand.intake.open()
    assert len(connection._subs) == subscriptions + 1
    await hand.intake.close()
    await until(lambda: asyncio.all_tasks() == tasks)
    assert len(connection._subs) == subscriptions
