"""The NATS configurations in examples/nats/: what each user needs is permitted, and nothing else is."""

from __future__ import annotations

import asyncio
import re
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
import nats
import nats.errors
import pytest
from nats.js.api import ConsumerConfig
from nats_server import CLAIMS, OUTCOMES, PATIENCE, REQUESTS, NatsServer, prepare, until
from tenacity import wait_fixed

from aiokeyless.errors import BrokerError
from aiokeyless.worker import (
    ApprovalEvent,
    ApprovalWorker,
    EventKeys,
    FailureReason,
    Fleet,
    Outcome,
    StreamSettings,
    approval_outcomes,
    submit_approval,
)
from aiokeyless.worker.event_keys import SIGNATURE
from aiokeyless.worker.messages import MESSAGE_ID, request_name

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox

EXAMPLES: Final = Path(__file__).parents[3] / "examples" / "nats"
ONE_ACCOUNT: Final = (EXAMPLES / "one-account.conf").read_text()
ACCOUNTS: Final = (EXAMPLES / "accounts.conf").read_text()
NOW: Final = datetime(2026, 11, 27, 6, tzinfo=UTC)
PASSWORD: Final = "of-every-user"
KEYS: Final = EventKeys("a-key-of-the-workers-and-readers-only")
IMPORTED: Final = Fleet(prefix="keyless.api")
CREATE_READER: Final = "$JS.API.CONSUMER.DURABLE.CREATE.KEYLESS_OUTCOMES.shop"


@asynccontextmanager
async def serving(folder: Path, configuration: str) -> AsyncGenerator[NatsServer]:
    file = folder / "nats.conf"
    file.write_text(configuration)
    server = NatsServer(folder, "-c", str(file))
    await server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(autouse=True)
def _passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    for user in ("OPERATOR", "WORKER", "SHOP_ASKER", "SHOP_READER", "SHOP"):
        monkeypatch.setenv(f"{user}_PASSWORD", PASSWORD)


@pytest.fixture
async def one_account(tmp_path: Path) -> AsyncGenerator[NatsServer]:
    async with serving(tmp_path, ONE_ACCOUNT) as server:
        yield server


@pytest.fixture
async def accounts(tmp_path: Path) -> AsyncGenerator[NatsServer]:
    async with serving(tmp_path, ACCOUNTS) as server:
        yield server


@asynccontextmanager
async def connected(server: NatsServer, user: str, errors: list[str] | None = None) -> AsyncGenerator[Client]:
    async def on_error(error: Exception) -> None:
        assert errors is not None, error
        errors.append(str(error))

    options = {"user": user, "password": PASSWORD, "inbox_prefix": f"_INBOX_{user}"}
    async with await nats.connect(server.url, error_cb=on_error, **options) as connection:
        yield connection


def new_worker(client: KeylessClient, server: NatsServer, **options: object) -> ApprovalWorker:
    given = {"user": "worker", "password": PASSWORD, "inbox_prefix": "_INBOX_worker", **options}
    return ApprovalWorker(client, server.url, schedule=wait_fixed(0.05), event_keys=KEYS, connect_options=given)


async def approve(sandbox: Sandbox, operation_id: str) -> None:
    """Approve an operation once a worker has created it."""
    await until(lambda: operation_id in sandbox.operations)
    sandbox.approve(operation_id)


async def approved(connection: Client, fleet: Fleet, count: int) -> list[str | None]:
    """Return the operations of the first outcomes, all approved."""
    async with (
        asyncio.timeout(PATIENCE),
        aclosing(approval_outcomes(connection, "shop", fleet=fleet, event_keys=KEYS)) as events,
    ):
        found = [await anext(events) for _ in range(count)]
    assert {event.outcome for event in found} == {Outcome.APPROVED}
    return [event.operation_id for event in found]


async def forge_what_the_name_of_a_request_bears(operator: Client, operation_id: str) -> None:
    """Store an event that no worker signed where the worker will store its own."""
    name = request_name(
        operation_id=operation_id,
        user_id="C0",
        operation_payload=None,
        external_user_id=None,
        expires_in=120.0,
        context=msgspec.Raw(b"null"),
    )
    await operator.jetstream().publish("keyless.approvals.approved", b"{}", headers={MESSAGE_ID: name})


async def use_everything(server: NatsServer, client: KeylessClient, sandbox: Sandbox) -> None:
    """Run what needs each permission: two starts of a worker, a forged event, a request for a taken operation id."""
    async with connected(server, "operator") as operator, connected(server, "shop_asker") as asker:
        async with new_worker(client, server):
            await forge_what_the_name_of_a_request_bears(operator, "txn-1")
            for operation_id in ("txn-1", "txn-2"):
                await submit_approval(asker, "C0", operation_id=operation_id)
                await approve(sandbox, operation_id)
            async with connected(server, "shop_reader") as reader:
                assert sorted(await approved(reader, Fleet(), 2), key=str) == ["txn-1", "txn-2"]
        async with new_worker(client, server), connected(server, "shop_reader") as reader:
            await submit_approval(asker, "C0", operation_id="txn-1", operation_payload="of another request")
            await submit_approval(asker, "C0", operation_id="txn-3", expires_in=0.1)
            wanted = {("txn-1", Outcome.FAILED), ("txn-3", Outcome.EXPIRED)}
            async with (
                asyncio.timeout(PATIENCE),
                aclosing(approval_outcomes(reader, "shop", event_keys=KEYS)) as events,
            ):
                while wanted:  # an approval that was not acknowledged may come again
                    event = await anext(events)
                    wanted.discard((event.operation_id, event.outcome))


def granted(configuration: str) -> list[str]:
    """Return the subjects that users may publish to."""
    lists = re.findall(r"publish: \{ allow: \[(.*?)\] \}", re.sub("#.*", "", configuration), re.DOTALL)
    return [subject for allowed in lists for subject in re.findall(r'"([^"]+)"', allowed)]


#: All that any user may publish to.
ALLOWED: Final = granted(ONE_ACCOUNT)


async def test_a_worker_an_asker_and_a_reader_can_do_what_they_do_and_no_permission_is_idle(
    tmp_path: Path, client: KeylessClient, sandbox: Sandbox
) -> None:
    configuration = ONE_ACCOUNT.replace("users: [", f"users: [\n{{ user: auditor, password: {PASSWORD} }}")
    idle = {subject: re.compile(re.escape(subject).replace(r"\*", r"[^.]+").replace(">", ".+")) for subject in ALLOWED}

    async def note(message: Msg) -> None:
        for subject in [subject for subject, pattern in idle.items() if pattern.fullmatch(message.subject)]:
            del idle[subject]

    assert len(idle) == 21
    async with serving(tmp_path, configuration) as server, connected(server, "auditor") as auditor:
        for subject in ("$JS.API.>", "$JS.ACK.>", "keyless.>"):
            await auditor.subscribe(subject, cb=note)
        await auditor.flush()
        await use_everything(server, client, sandbox)
        await until(lambda: not idle)


USERS: Final = {
    name.lower(): granted(rest)
    for name, rest in re.findall(r"^([A-Z_]+): \{\n(.*?)^\}", ONE_ACCOUNT, re.MULTILINE | re.DOTALL)
}
#: What no user of the examples needs, and each would like.
MORE: Final = [
    *(f"$JS.API.STREAM.{verb}.KEYLESS_{stream}" for verb in ("DELETE", "PURGE", "UPDATE", "MSG.DELETE", "SNAPSHOT")
      for stream in ("REQUESTS", "OUTCOMES", "CLAIMS")),
    "$JS.API.STREAM.MSG.GET.KEYLESS_REQUESTS",
    "$JS.API.DIRECT.GET.KEYLESS_REQUESTS",
    "$JS.API.STREAM.CREATE.MINE",
    "$JS.API.STREAM.LIST",
    "$JS.API.STREAM.NAMES",
    "$JS.API.INFO",
    "$JS.API.CONSUMER.LIST.KEYLESS_REQUESTS",
    "$JS.API.CONSUMER.CREATE.KEYLESS_REQUESTS.mine",
    "$JS.API.CONSUMER.CREATE.KEYLESS_OUTCOMES.mine",
    "$JS.API.CONSUMER.DELETE.KEYLESS_OUTCOMES.shop",
    "$JS.API.CONSUMER.MSG.NEXT.KEYLESS_OUTCOMES.bank",
    "$JS.ACK.KEYLESS_OUTCOMES.bank.1.1.1.1.0",
    "staging.approvals.request",
    "staging.approvals.approved",
    "staging.claims.x",
    "$JS.API.STREAM.INFO.STAGING_REQUESTS",
    "$JS.API.CONSUMER.MSG.NEXT.STAGING_REQUESTS.staging-approvals",
    "$JS.ACK.STAGING_REQUESTS.staging-approvals.1.1.1.1.0",
    "_INBOX_worker.x",
    "_INBOX_shop_asker.x",
    "_INBOX_shop_reader.x",
    "anything",
]  # fmt: skip


@pytest.mark.parametrize("user", ["worker", "shop_asker", "shop_reader"])
async def test_a_user_may_publish_nothing_that_is_only_for_others(one_account: NatsServer, user: str) -> None:
    """Among all else, a worker of one fleet touches nothing of another, and a reader publishes no outcome."""
    everything = {subject.replace(".>", ".1.1.1.1.0").replace("*", "x") for name in USERS for subject in USERS[name]}
    own = {subject.replace(".>", ".1.1.1.1.0").replace("*", "x") for subject in USERS[user]}
    refused = [*sorted(everything - own), *MORE]
    errors: list[str] = []
    async with connected(one_account, user, errors) as connection:
        for subject in refused:
            await connection.publish(subject, b"")
        await until(lambda: len(errors) >= len(refused))
    denied = {re.findall(r'publish to "([^"]+)"', error.lower())[0] for error in errors}
    assert denied == {subject.lower() for subject in refused}


@pytest.mark.parametrize("user", ["worker", "shop_asker", "shop_reader"])
async def test_a_user_hears_nothing_but_its_own_inbox(one_account: NatsServer, user: str) -> None:
    inboxes = {f"_INBOX_{name}.>" for name in USERS} - {f"_INBOX_{user}.>"}
    refused = [">", "_INBOX.>", "keyless.>", "keyless.approvals.request", "$JS.API.>", "$JS.ACK.>", *sorted(inboxes)]
    errors: list[str] = []
    async with connected(one_account, user, errors) as connection:
        for subject in refused:
            await connection.subscribe(subject)
        await until(lambda: len(errors) >= len(refused))
    assert all("permissions violation for subscription" in error.lower() for error in errors)


async def test_a_reader_without_permission_is_told_what_to_permit(
    one_account: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiokeyless.worker.nats.broker._ANSWER_WITHIN", 0.2)
    monkeypatch.setattr("aiokeyless.worker.nats.broker._ATTEMPTS", 2)
    async with connected(one_account, "shop_reader", []) as reader:
        with pytest.raises(
            BrokerError, match=r"may this user publish to \$JS\.API\.CONSUMER\.INFO\.KEYLESS_OUTCOMES\.bank "
        ):
            await anext(approval_outcomes(reader, "bank"))


@pytest.mark.slow
async def test_a_worker_of_another_fleet_does_not_start(one_account: NatsServer, client: KeylessClient) -> None:
    options = {"user": "worker", "password": PASSWORD, "inbox_prefix": "_INBOX_worker"}
    worker = ApprovalWorker(client, one_account.url, fleet=Fleet(name="staging"), connect_options=options)
    with pytest.raises(BrokerError, match=r"does not permit .*staging_requests"):
        await worker.run()


@pytest.mark.slow
async def test_a_worker_with_the_inbox_of_all_is_told_what_it_may_not(
    one_account: NatsServer, client: KeylessClient
) -> None:
    with pytest.raises(BrokerError, match=r"does not permit .*subscription to \"_inbox\."):
        await new_worker(client, one_account, inbox_prefix="_INBOX").run()


async def test_in_one_account_a_reply_subject_takes_an_operation_id_and_approves_nothing(
    one_account: NatsServer, client: KeylessClient, sandbox: Sandbox
) -> None:
    """What permissions do not keep out: the broker answers a publish wherever its sender asks it to."""
    claim = Fleet().claim_subject(sha256(b"txn-1").hexdigest())
    async with (
        new_worker(client, one_account),
        connected(one_account, "shop_asker") as asker,
        connected(one_account, "operator") as operator,
    ):
        await asker.publish("keyless.approvals.request", b"[]", reply="keyless.approvals.approved")
        await asker.publish("keyless.approvals.request", b"{}", reply=claim)

        async def is_taken() -> bool:
            return (await counts(operator))[CLAIMS] == 1

        await until(is_taken)
        await submit_approval(asker, "C0", operation_id="txn-1")
        async with (
            asyncio.timeout(PATIENCE),
            connected(one_account, "shop_reader") as reader,
            aclosing(approval_outcomes(reader, "shop", event_keys=KEYS)) as events,
        ):
            found = [await anext(events) for _ in range(3)]
    assert [event.outcome for event in found] == [Outcome.FAILED] * 3
    assert [event.reason for event in found if event.operation_id == "txn-1"] == [FailureReason.CONFLICT]
    assert "txn-1" not in sandbox.operations


async def test_in_one_account_a_reader_has_an_old_outcome_stored_again_and_a_reader_gets_it_twice(
    one_account: NatsServer,
) -> None:
    """What permissions do not keep out either, once the broker has forgotten the name of the outcome."""
    event = ApprovalEvent(version=1, outcome=Outcome.APPROVED, requested_at=NOW, decided_at=NOW, deliveries=1)
    data = msgspec.json.encode(event)
    headers = {MESSAGE_ID: "request-1", SIGNATURE: KEYS.sign(data, fleet="keyless")}
    async with connected(one_account, "operator") as operator, connected(one_account, "shop_reader") as reader:
        stream = operator.jetstream()
        await prepare(stream, StreamSettings(duplicate_window=0.5), ack_wait=30)
        await stream.publish("keyless.approvals.approved", data, headers=headers)
        await reader.jetstream().add_consumer(OUTCOMES, ConsumerConfig(durable_name="shop", ack_wait=0.2))

        # It is not acknowledged, so it is delivered there again and again.
        pull = b'{"batch": 50, "expires": 60000000000}'
        subject = "$JS.API.CONSUMER.MSG.NEXT.KEYLESS_OUTCOMES.shop"
        await reader.publish(subject, pull, reply="keyless.approvals.approved")
        async with (
            asyncio.timeout(PATIENCE),
            aclosing(approval_outcomes(operator, "bank", event_keys=KEYS)) as events,
        ):
            assert [await anext(events) for _ in range(2)] == [event] * 2


@pytest.mark.parametrize("configuration", [ONE_ACCOUNT, ACCOUNTS], ids=["one account", "accounts"])
async def test_a_reader_whose_consumer_an_operator_made_needs_no_permission_to_make_one(
    tmp_path: Path, configuration: str, client: KeylessClient, sandbox: Sandbox
) -> None:
    strict = "\n".join(line for line in configuration.splitlines() if f'"{CREATE_READER}"' not in line or "to:" in line)
    strict = re.sub(r"\{\s+to: [^}]*\}", "", strict)  # an import of what was removed
    assert CREATE_READER not in strict
    fleet, asks, reads, operates = (
        (Fleet(), "shop_asker", "shop_reader", "operator")
        if configuration is ONE_ACCOUNT
        else (IMPORTED, "shop", "shop", "worker")
    )
    async with serving(tmp_path, strict) as server, new_worker(client, server):
        async with connected(server, operates) as operator:
            place = ConsumerConfig(durable_name="shop", max_ack_pending=-1)
            await operator.jetstream().add_consumer(OUTCOMES, place)
        async with connected(server, asks) as asker, connected(server, reads) as reader:
            await submit_approval(asker, "C0", operation_id="txn-2", fleet=fleet)
            await approve(sandbox, "txn-2")
            assert await approved(reader, fleet, 1) == ["txn-2"]


# -- accounts


async def test_an_application_in_an_account_of_its_own_asks_and_reads(
    accounts: NatsServer, client: KeylessClient, sandbox: Sandbox
) -> None:
    async with new_worker(client, accounts), connected(accounts, "shop") as shop:
        for operation_id in ("txn-1", "txn-2"):
            await submit_approval(shop, "C0", operation_id=operation_id, fleet=IMPORTED)
            await approve(sandbox, operation_id)
        async with (
            connected(accounts, "worker") as worker,
            aclosing(approval_outcomes(shop, "shop", fleet=IMPORTED, event_keys=KEYS)) as events,
        ):
            assert {(await anext(events)).operation_id for _ in range(2)} == {"txn-1", "txn-2"}

            async def all_are_acknowledged() -> bool:
                place = await worker.jetstream().consumer_info(OUTCOMES, "shop")
                return place.ack_floor is not None and place.ack_floor.stream_seq == 2

            third = asyncio.ensure_future(anext(events))  # who asks for the next one has handled the one before
            await until(all_are_acknowledged)
            third.cancel()
            await asyncio.wait({third})


async def test_an_application_in_an_account_of_its_own_has_the_broker_publish_nothing_for_the_workers(
    accounts: NatsServer, client: KeylessClient, sandbox: Sandbox
) -> None:
    """A reply subject is of the account of who named it: what goes past permissions does not go past an account."""
    async with (
        new_worker(client, accounts),
        connected(accounts, "shop") as shop,
        connected(accounts, "worker") as worker,
    ):
        await submit_approval(shop, "C0", operation_id="txn-2", fleet=IMPORTED)
        await approve(sandbox, "txn-2")
        assert await approved(shop, IMPORTED, 1) == ["txn-2"]
        before = await counts(worker)
        pull = b'{"batch": 10, "expires": 200000000}'
        for reply in ("keyless.approvals.approved", "keyless.claims.x"):
            await shop.publish("keyless.approvals.request", b"{}", reply=reply)
            await shop.publish("keyless.api.CONSUMER.MSG.NEXT.KEYLESS_OUTCOMES.shop", pull, reply=reply)
            await shop.publish(reply, b"{}")
        for subject in ("$JS.API.STREAM.INFO.KEYLESS_OUTCOMES", "$JS.API.STREAM.DELETE.KEYLESS_OUTCOMES"):
            answer = await shop.request(subject, b"", timeout=PATIENCE)
            assert b"not enabled for account" in answer.data

        async def everything_is_over() -> bool:
            pulls = (await worker.jetstream().consumer_info(OUTCOMES, "shop")).num_waiting
            return not pulls and (await counts(worker))[OUTCOMES] >= before[OUTCOMES] + 2

        await until(everything_is_over)
        # Only the requests arrived, which were none: the outcome of each says so.
        assert await counts(worker) == {**before, OUTCOMES: before[OUTCOMES] + 2}


async def counts(connection: Client) -> dict[str, int]:
    stream = connection.jetstream()
    return {name: (await stream.stream_info(name)).state.messages for name in (OUTCOMES, CLAIMS)}


def imported(subject: str) -> str:
    """Return what a subject of the workers' account is called in an account that imports it."""
    return subject.replace("$JS.API.", "keyless.api.")


async def test_a_worker_in_another_account_than_the_streams_reaches_them_by_a_prefix(
    tmp_path: Path, client: KeylessClient, sandbox: Sandbox
) -> None:
    subjects = granted(ONE_ACCOUNT)
    exports = "".join(f'{{ service: "{subject}", response_type: stream }}\n' for subject in subjects)
    imports = "".join(
        f'{{ service: {{ account: KEYLESS, subject: "{subject}" }}, to: "{imported(subject)}" }}\n'
        for subject in subjects
    )
    streams = f"users: [{{ user: operator, password: {PASSWORD} }}], exports: [{exports}]"
    others = f"users: [{{ user: worker, password: {PASSWORD} }}], imports: [{imports}]"
    configuration = f"accounts: {{ KEYLESS: {{ jetstream: enabled, {streams} }}\n OTHERS: {{ {others} }} }}"
    async with serving(tmp_path, configuration) as server:
        options = {"user": "worker", "password": PASSWORD}
        worker = ApprovalWorker(client, server.url, fleet=IMPORTED, event_keys=KEYS, connect_options=options)
        async with worker, connected(server, "worker") as shop:
            await submit_approval(shop, "C0", operation_id="txn-1", fleet=IMPORTED)
            await approve(sandbox, "txn-1")
            assert await approved(shop, IMPORTED, 1) == ["txn-1"]
        async with connected(server, "operator") as operator:
            assert (await operator.jetstream().stream_info(REQUESTS)).state.messages == 0


# -- a leaf node

HUB: Final = """
jetstream: { domain: hub }
leafnodes: { listen: "127.0.0.1:-1" }
"""
LEAF: Final = """
jetstream: { domain: leaf }
leafnodes: { remotes: [{ url: "nats-leaf://127.0.0.1:%s" }] }
"""


async def test_a_worker_and_an_application_at_a_leaf_node_use_the_streams_of_the_hub(
    tmp_path: Path, client: KeylessClient, sandbox: Sandbox
) -> None:
    log = tmp_path / "hub.log"
    at_hub = Fleet(domain="hub")
    for folder in ("hub", "leaf"):
        (tmp_path / folder).mkdir()
    async with serving(tmp_path / "hub", f'log_file: "{log}"\n{HUB}') as hub:
        [port] = re.findall(r"leafnode connections on 127.0.0.1:(\d+)", log.read_text())
        async with serving(tmp_path / "leaf", LEAF % port) as leaf, await nats.connect(leaf.url) as shop:

            async def is_linked() -> bool:
                try:
                    await shop.jetstream(domain="hub", timeout=1).account_info()
                except nats.errors.Error:
                    return False
                return True

            await until(is_linked)
            async with ApprovalWorker(client, leaf.url, fleet=at_hub, event_keys=KEYS, schedule=wait_fixed(0.05)):
                await submit_approval(shop, "C0", operation_id="txn-1", fleet=at_hub)
                await approve(sandbox, "txn-1")
                assert await approved(shop, at_hub, 1) == ["txn-1"]
        async with await nats.connect(hub.url) as operator:
            assert (await operator.jetstream().stream_info(OUTCOMES)).state.messages == 1
