"""examples/four_eyes.py: two people approve a payment, and it is paid once."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox

PROGRAM = (Path(__file__).parents[1] / "examples" / "four_eyes.py").read_text()
PAYLOAD = "Pay 40000 EUR to Acme"

pytestmark = pytest.mark.looptime


class Treasury:
    """The program, without its last line, on a record of its own."""

    def __init__(self, record: sqlite3.Connection) -> None:
        self._names: dict[str, Any] = {"__name__": "treasury"}
        exec(PROGRAM.rpartition("asyncio.run(")[0], self._names)  # noqa: S102  # our own program
        for statement in re.findall(r'"(CREATE TABLE.*?)"', PROGRAM):
            record.execute(statement)
        self._record = record
        self.payment: str = self._names["prepare"](record, PAYLOAD, requested_by="dave")

    def operation(self, person: str) -> str:
        return f"{self.payment}-{person}"

    async def decide(self, client: KeylessClient) -> bool:
        paid: bool = await self._names["decide"](client, self._record, self.payment)
        return paid

    def prepare(self, requested_by: str) -> list[str]:
        """Prepare another payment, and return who is asked about it."""
        payment = self._names["prepare"](self._record, PAYLOAD, requested_by=requested_by)
        query = "SELECT person FROM questions WHERE payment = ?"
        return [person for (person,) in self._record.execute(query, (payment,))]

    def give_another_name(self, name: str, user: str) -> None:
        """Give a user a second name, under which they may approve, too."""
        self._names["STAFF"][name] = user
        self._names["APPROVERS"] += (name,)

    def payments(self) -> int:
        return len(self._record.execute("SELECT * FROM payments").fetchall())

    def question_again(self) -> None:
        self._record.execute("INSERT INTO questions SELECT * FROM questions LIMIT 1")


@pytest.fixture
def treasury(tmp_path: Path) -> Iterator[Treasury]:
    with closing(sqlite3.connect(tmp_path / "payments.sqlite3", isolation_level=None)) as record:
        yield Treasury(record)


async def approve(sandbox: Sandbox, treasury: Treasury, *people: str) -> None:
    """Approve as these people, once they are asked."""
    operations = [treasury.operation(person) for person in people]
    await until(lambda: sandbox.operations.keys() >= {*operations})
    for operation in operations:
        sandbox.approve(operation)


async def test_two_of_three_pay_and_the_late_third_does_not(
    sandbox: Sandbox, client: KeylessClient, treasury: Treasury
) -> None:
    taps = asyncio.create_task(approve(sandbox, treasury, "carol", "alice"))
    assert await treasury.decide(client)
    await taps
    assert client.statistics.waiting == 0, "nobody waits for the third"
    await approve(sandbox, treasury, "bob")
    assert not await treasury.decide(client)


async def test_one_is_not_enough_and_a_late_second_neither(
    sandbox: Sandbox, client: KeylessClient, treasury: Treasury
) -> None:
    taps = asyncio.create_task(approve(sandbox, treasury, "bob"))
    assert not await treasury.decide(client)
    await taps
    await approve(sandbox, treasury, "alice", "carol")
    assert not await treasury.decide(client)


def test_one_person_is_asked_once_and_who_asks_is_not(treasury: Treasury) -> None:
    assert treasury.prepare(requested_by="bob") == ["alice", "carol"]
    with pytest.raises(sqlite3.IntegrityError):
        treasury.question_again()


@pytest.mark.parametrize("requested_by", ["Alice", "alice ", " alice", "ALICE", "\u0430lice", "", "mallory"])
def test_nobody_requests_a_payment_under_a_name_that_is_not_on_the_list(treasury: Treasury, requested_by: str) -> None:
    with pytest.raises(PermissionError):
        treasury.prepare(requested_by)
    assert treasury.payments() == 1, "nothing is recorded"


@pytest.mark.parametrize("spelling", ["A11CE0", "a11ce0"])
def test_another_name_of_the_requester_approves_nothing(treasury: Treasury, spelling: str) -> None:
    treasury.give_another_name("alice.smith", spelling)
    assert treasury.prepare(requested_by="alice.smith") == ["bob", "carol"]
    assert treasury.prepare(requested_by="alice") == ["bob", "carol"]
    assert len(treasury.prepare(requested_by="dave")) == 3, "two names of one person are one voice"


@pytest.mark.parametrize("lie", [{"auth_type": "pin"}, {"user_id": "BAD"}], ids=["a pin", "another user"])
async def test_an_approval_by_a_pin_or_of_something_else_is_no_voice(
    sandbox: Sandbox, client: KeylessClient, treasury: Treasury, lie: dict[str, object]
) -> None:
    deciding = asyncio.create_task(treasury.decide(client))
    await approve(sandbox, treasury, "alice")
    await until(lambda: treasury.operation("bob") in sandbox.operations)
    sandbox.approve(treasury.operation("bob"))
    sandbox.tamper(treasury.operation("bob"), **lie)
    await asyncio.sleep(60)
    assert not deciding.done()
    await approve(sandbox, treasury, "carol")
    assert await deciding


async def test_after_a_process_that_stops_the_next_one_pays(
    sandbox: Sandbox, client: KeylessClient, treasury: Treasury
) -> None:
    deciding = asyncio.create_task(treasury.decide(client))
    await approve(sandbox, treasury, "alice")
    await until(lambda: len(sandbox.operations) == 3)
    await client.aclose()
    assert not await deciding
    await approve(sandbox, treasury, "bob")
    async with sandbox.client() as another:
        assert await treasury.decide(another)
        assert not await treasury.decide(another)
    assert len(sandbox.operations) == 3, "nobody was asked twice"


async def test_a_payment_decided_twice_at_once_is_paid_once(
    sandbox: Sandbox, client: KeylessClient, treasury: Treasury
) -> None:
    taps = asyncio.create_task(approve(sandbox, treasury, "alice", "bob"))
    assert sorted(await asyncio.gather(*[treasury.decide(client) for _ in range(3)])) == [False, False, True]
    await taps
    assert len(sandbox.operations) == 3, "nobody was asked twice"


async def test_an_outage_decides_nothing(
    sandbox: Sandbox, client: KeylessClient, treasury: Treasury, capsys: pytest.CaptureFixture[str]
) -> None:
    sandbox.fail_next(503, None)
    assert not await treasury.decide(client)
    assert capsys.readouterr().out.count("was not asked") == 3
    sandbox.recover()
    taps = asyncio.create_task(approve(sandbox, treasury, "alice", "bob"))
    assert await treasury.decide(client)
    await taps
