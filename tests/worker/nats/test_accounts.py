"""The accounts of examples/nats/accounts.conf: an application asks and reads, and does nothing else to the workers'."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import nats
import nats.errors
import nats.js.errors
import pytest
from nats.js.api import ConsumerConfig
from nats_server import CLAIMS, CONSUMER, OUTCOMES, REQUEST_SUBJECT, REQUESTS, NatsServer, jetstream, prepare
from tenacity import wait_fixed
from waiting import PATIENCE, until

from aiokeyless.errors import BrokerError
from aiokeyless.worker import ApprovalWorker, Outcome, submit_approval
from aiokeyless.worker.nats import EventKeys, Fleet, NatsBroker

from ..reading import read, worker_on  # noqa: TID252

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from nats.aio.client import Client

    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox

ACCOUNTS: Final = (Path(__file__).parents[3] / "examples" / "nats" / "accounts.conf").read_text()
#: Acknowledgements with a domain and an account in front of the stream: the default from nats-server 2.16 on.
LONG_ACKS: Final = "feature_flags: { js_ack_fc_v2: true }\n"
PASSWORD: Final = "of-every-user"
KEYS: Final = EventKeys("a-key-of-the-workers-and-readers-only")
IMPORTED: Final = Fleet(prefix="keyless.api")

#: One account for all, where each user has no more permissions than it needs.
ONE_ACCOUNT: Final = """
accounts: { KEYLESS: {
  jetstream: enabled
  users: [
    { user: operator, password: $OPERATOR_PASSWORD }
    { user: shop, password: $SHOP_PASSWORD, permissions: {
      publish: [
        "keyless.approvals.request"
        "$JS.API.CONSUMER.INFO.KEYLESS_OUTCOMES.shop"
        "$JS.API.CONSUMER.MSG.NEXT.KEYLESS_OUTCOMES.shop"
        "$JS.ACK.KEYLESS_OUTCOMES.shop.>"
      ]
      subscribe: ["_INBOX_shop.>"]
    } }
  ]
} }
"""


@pytest.fixture(autouse=True)
def _passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    for user in ("OPERATOR", "WORKER", "SHOP"):
        monkeypatch.setenv(f"{user}_PASSWORD", PASSWORD)


@asynccontextmanager
async def connected(server: NatsServer, user: str) -> AsyncGenerator[Client]:
    async def on_error(error: Exception) -> None:
        raise AssertionError(error)

    options = {"user": user, "password": PASSWORD, "inbox_prefix": f"_INBOX_{user}"}
    async with await nats.connect(server.url, error_cb=on_error, **options) as connection:
        yield connection


def new_worker(client: KeylessClient, server: NatsServer, **options: object) -> ApprovalWorker:
    given = {"user": "worker", "password": PASSWORD, **options}
    return worker_on(client, NatsBroker(server.url, event_keys=KEYS, connect_options=given), schedule=wait_fixed(0.05))


async def make_consumer(operator: Client, reader: str = "shop") -> None:
    """Make the consumer of a reader, as the guide has it."""
    place = ConsumerConfig(durable_name=reader, max_ack_pending=-1)
    await jetstream(operator).add_consumer(OUTCOMES, place)


async def approve(sandbox: Sandbox, operation_id: str) -> None:
    """Approve an operation once a worker has created it."""
    await until(lambda: operation_id in sandbox.operations)
    sandbox.approve(operation_id)


async def ask_and_read(shop: Client, operator: Client, sandbox: Sandbox) -> None:
    """Ask for two approvals, read both, and see that the broker counts them and the requests as handled."""
    await make_consumer(operator)
    for operation_id in ("txn-1", "txn-2"):
        await submit_approval(NatsBroker(shop, fleet=IMPORTED), "C0", operation_id=operation_id)
        await approve(sandbox, operation_id)
    async with asyncio.timeout(PATIENCE):
        found = await read(NatsBroker(shop, fleet=IMPORTED, event_keys=KEYS), 2, "shop")
    assert {(event.operation_id, event.outcome) for event in found} == {
        ("txn-1", Outcome.APPROVED),
        ("txn-2", Outcome.APPROVED),
    }

    async def all_are_acknowledged() -> bool:
        place = await jetstream(operator).consumer_info(OUTCOMES, "shop")
        requests = (await jetstream(operator).stream_info(REQUESTS)).state.messages
        return place.ack_floor is not None and place.ack_floor.stream_seq >= 2 and requests == 0

    await until(all_are_acknowledged)


# -- what an application needs


@pytest.mark.parametrize("flags", ["", LONG_ACKS], ids=["short acks", "long acks"])
async def test_an_application_in_an_account_of_its_own_asks_and_reads(
    tmp_path: Path, client: KeylessClient, sandbox: Sandbox, flags: str
) -> None:
    async with (
        NatsServer(tmp_path, configuration=flags + ACCOUNTS) as server,
        new_worker(client, server),
        connected(server, "shop") as shop,
        connected(server, "operator") as operator,
    ):
        await ask_and_read(shop, operator, sandbox)


async def test_a_reader_whose_consumer_is_missing_is_told_who_makes_it(tmp_path: Path, client: KeylessClient) -> None:
    async with (
        NatsServer(tmp_path, configuration=ACCOUNTS) as server,
        new_worker(client, server),
        connected(server, "shop") as shop,
    ):
        refusal = r"the consumer shop of KEYLESS_OUTCOMES .* have an operator make it"
        with pytest.raises(BrokerError, match=refusal):
            await asyncio.wait_for(read(NatsBroker(shop, fleet=IMPORTED), reader="shop"), PATIENCE)


async def test_a_worker_in_another_account_than_the_streams_reaches_them_by_a_prefix(
    tmp_path: Path, client: KeylessClient, sandbox: Sandbox
) -> None:
    names = {"$JS.API.>": "keyless.api.>", "$JS.ACK.>": "$JS.ACK.>", "keyless.>": "keyless.>"}
    exports = "".join(f'{{ service: "{subject}", response_type: stream }}\n' for subject in names)
    imports = "".join(
        f'{{ service: {{ account: KEYLESS, subject: "{subject}" }}, to: "{name}" }}\n'
        for subject, name in names.items()
    )
    streams = f"users: [{{ user: operator, password: {PASSWORD} }}], exports: [{exports}]"
    others = f"users: [{{ user: worker, password: {PASSWORD} }}], imports: [{imports}]"
    configuration = f"accounts: {{ KEYLESS: {{ jetstream: enabled, {streams} }}\n OTHERS: {{ {others} }} }}"
    async with NatsServer(tmp_path, configuration=configuration) as server:
        options = {"user": "worker", "password": PASSWORD}
        worker = worker_on(client, NatsBroker(server.url, fleet=IMPORTED, event_keys=KEYS, connect_options=options))
        async with worker, connected(server, "worker") as shop, connected(server, "operator") as operator:
            await ask_and_read(shop, operator, sandbox)


# -- what a user has the broker do, past its permissions


class Attack(NamedTuple):
    """A message that the broker answers, and the subject that its sender asks it to answer to, whatever it may do."""

    subject: str
    data: bytes
    reply: str
    stored: int = 0  # requests that it stores, as any asker may

    def __str__(self) -> str:
        return f"{self.data.decode()!r} for {self.reply}"


PULL: Final = "$JS.API.CONSUMER.MSG.NEXT.KEYLESS_OUTCOMES.shop"
ATTACKS: Final = [
    *(Attack(PULL, b"{malformed", f"$JS.API.STREAM.DELETE.{stream}") for stream in (REQUESTS, OUTCOMES, CLAIMS)),
    Attack("$JS.ACK.KEYLESS_OUTCOMES.shop.1.1.1.1.0", b"+NXT {malformed", f"$JS.API.STREAM.DELETE.{REQUESTS}"),
    Attack(PULL, b"{malformed", f"$JS.API.STREAM.PURGE.{REQUESTS}"),
    Attack(PULL, b"{malformed", "keyless.claims.x"),
    Attack(PULL, b'{"batch": 1}', "keyless.approvals.approved"),
    Attack(REQUEST_SUBJECT, b"{}", "keyless.claims.x", stored=1),
]


async def counts(operator: Client) -> dict[str, int | None]:
    """Return how many messages each stream has, None for one that is gone."""
    stream = jetstream(operator)
    found = dict[str, int | None]()
    for name in (REQUESTS, OUTCOMES, CLAIMS):
        try:
            found[name] = (await stream.stream_info(name)).state.messages
        except nats.js.errors.NotFoundError:
            found[name] = None
    return found


@asynccontextmanager
async def with_messages(folder: Path, configuration: str) -> AsyncGenerator[tuple[NatsServer, Client]]:
    """Run a server whose streams have messages, and a consumer for the reader."""
    async with NatsServer(folder, configuration=configuration) as server, connected(server, "operator") as operator:
        stream = jetstream(operator)
        await prepare(stream, ack_wait=60)
        for subject in (REQUEST_SUBJECT, "keyless.approvals.approved", "keyless.claims.taken"):
            await stream.publish(subject, b"{}")
        await make_consumer(operator)
        yield server, operator


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
async def test_within_one_account_permissions_do_not_keep_a_user_from_the_streams(
    tmp_path: Path, attack: Attack
) -> None:
    """Why the account is the boundary: each of these works, though this user may do nothing but ask and read."""
    async with with_messages(tmp_path, ONE_ACCOUNT) as (server, operator), connected(server, "shop") as shop:
        before = await counts(operator)
        await shop.publish(attack.subject, attack.data, reply=attack.reply)

        async def something_else_happened() -> bool:
            return {**await counts(operator), REQUESTS: 0} != {**before, REQUESTS: 0}

        async def requests_are_gone() -> bool:
            return not (await counts(operator))[REQUESTS]

        await until(requests_are_gone if attack.reply.endswith(REQUESTS) else something_else_happened)


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
async def test_an_account_keeps_the_users_of_another_from_the_streams(tmp_path: Path, attack: Attack) -> None:
    """A reply subject is one of the account of its sender: the answer arrives there, and nowhere else."""
    async with with_messages(tmp_path, ACCOUNTS) as (server, operator), connected(server, "shop") as shop:
        before = await counts(operator)
        answers = await shop.subscribe(attack.reply)
        await shop.publish(attack.subject.replace("$JS.API", "keyless.api"), attack.data, reply=attack.reply)
        await answers.next_msg(timeout=PATIENCE)
        assert await counts(operator) == {**before, REQUESTS: 1 + attack.stored}


async def test_an_application_reaches_nothing_of_jetstream_but_its_own_consumer(tmp_path: Path) -> None:
    async with with_messages(tmp_path, ACCOUNTS) as (server, operator), connected(server, "shop") as shop:
        before = await counts(operator)
        await make_consumer(operator, "bank")
        for subject in (f"STREAM.DELETE.{REQUESTS}", f"STREAM.INFO.{REQUESTS}", f"STREAM.PURGE.{OUTCOMES}"):
            answer = await shop.request(f"$JS.API.{subject}", b"", timeout=PATIENCE)
            assert b"not enabled for account" in answer.data
        for subject in (
            f"keyless.api.STREAM.DELETE.{REQUESTS}",
            f"keyless.api.CONSUMER.MSG.NEXT.{OUTCOMES}.bank",
            f"keyless.api.CONSUMER.DURABLE.CREATE.{OUTCOMES}.shop",
            f"keyless.api.CONSUMER.CREATE.{OUTCOMES}.shop",
            f"$JS.ACK.{OUTCOMES}.bank.1.1.1.1.0",
            "keyless.approvals.approved",
            "keyless.claims.x",
        ):
            with pytest.raises(nats.errors.NoRespondersError):
                await shop.request(subject, b"{}", timeout=PATIENCE)
        assert await counts(operator) == before


@pytest.mark.parametrize("flags", ["", LONG_ACKS], ids=["short acks", "long acks"])
async def test_an_application_acknowledges_no_request_whatever_its_reader_is_called(tmp_path: Path, flags: str) -> None:
    """The long form of an acknowledgement can be read as a short one, the name of the reader as a sequence number."""
    configuration = flags + ACCOUNTS.replace(f"{OUTCOMES}.shop", f"{OUTCOMES}.1")
    async with with_messages(tmp_path, configuration) as (server, operator), connected(server, "shop") as shop:
        pulled = await jetstream(operator).pull_subscribe_bind(CONSUMER, REQUESTS)
        [request] = await pulled.fetch(1, timeout=PATIENCE)
        for subject in (request.reply, f"$JS.ACK.{REQUESTS}.{CONSUMER}.{OUTCOMES}.1.1.1.0"):
            with pytest.raises(nats.errors.NoRespondersError):
                await shop.request(subject, b"+ACK", timeout=PATIENCE)
        assert (await counts(operator))[REQUESTS] == 1


async def test_a_user_who_may_make_a_consumer_delivers_within_the_workers_account(tmp_path: Path) -> None:
    """Why `accounts.conf` does not export that: here events are delivered as requests, by an account of its own."""
    create = f"CONSUMER.DURABLE.CREATE.{OUTCOMES}.mine"
    configuration = ACCOUNTS.replace("exports: [", f'exports: [{{ service: "$JS.API.{create}" }}').replace(
        "imports: [", f'imports: [{{ service: {{ account: KEYLESS, subject: "$JS.API.{create}" }} }}'
    )
    consumer = {"durable_name": "mine", "ack_policy": "none", "deliver_subject": REQUEST_SUBJECT}
    wish = json.dumps({"stream_name": OUTCOMES, "config": consumer}).encode()
    async with with_messages(tmp_path, configuration) as (server, operator), connected(server, "shop") as shop:
        await shop.request(f"$JS.API.{create}", wish, timeout=PATIENCE)

        async def an_event_is_a_request() -> bool:
            return (await counts(operator))[REQUESTS] == 2

        await until(an_event_is_a_request)


# -- what a user of the workers' account that lacks a permission is told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prefix", "what"), [("_INBOX_shop", "keyless_requests"), ("_INBOX", r"subscription to \"_inbox\.")]
)
async def test_a_worker_without_a_permission_is_told_which(
    tmp_path: Path, client: KeylessClient, prefix: str, what: str
) -> None:
    async with NatsServer(tmp_path, configuration=ONE_ACCOUNT) as server:
        with pytest.raises(BrokerError, match=f"does not permit .*{what}"):
            await new_worker(client, server, user="shop", inbox_prefix=prefix).run()


# -- leaf nodes

LEAF_PORT: Final = 'leafnodes: {{ listen: "127.0.0.1:-1" }}\nlog_file: "{log}"\n'
#: A leaf node of the application, at which its user has no more permissions than the guide says.
SHOPS_LEAF: Final = """
leafnodes: { remotes: [{ url: "nats-leaf://shop:%s@127.0.0.1:%s", account: SHOP }] }
accounts: { SHOP: { users: [{ user: shop, password: $SHOP_PASSWORD, permissions: {
  publish: [
    "keyless.approvals.request"
    "keyless.api.CONSUMER.INFO.KEYLESS_OUTCOMES.shop"
    "keyless.api.CONSUMER.MSG.NEXT.KEYLESS_OUTCOMES.shop"
    "$JS.ACK.KEYLESS_OUTCOMES.shop.>"
    "$JS.ACK.*.*.KEYLESS_OUTCOMES.shop.*.*.*.*.>"
  ]
  subscribe: ["_INBOX_shop.>"]
} }] } }
"""


@asynccontextmanager
async def hub(folder: Path, configuration: str) -> AsyncGenerator[tuple[NatsServer, str]]:
    """Run a server to which leaf nodes connect; yields the port for them."""
    log = folder / "hub.log"
    async with NatsServer(folder / "hub", configuration=LEAF_PORT.format(log=log) + configuration) as server:
        [port] = re.findall(r"leafnode connections on 127.0.0.1:(\d+)", log.read_text())
        yield server, port


async def is_answered(connection: Client, subject: str) -> bool:
    """Return whether anybody answers, as the hub does once the leaf node has its interest."""
    try:
        await connection.request(subject, b"{}", timeout=PATIENCE)
    except nats.errors.NoRespondersError:
        return False
    return True


@pytest.mark.parametrize("flags", ["", LONG_ACKS], ids=["short acks", "long acks"])
async def test_an_application_at_a_leaf_node_asks_and_reads_by_its_account_at_the_hub(
    tmp_path: Path, client: KeylessClient, sandbox: Sandbox, flags: str
) -> None:
    async with (
        hub(tmp_path, flags + ACCOUNTS) as (server, port),
        NatsServer(tmp_path / "leaf", configuration=SHOPS_LEAF % (PASSWORD, port)) as leaf,
        new_worker(client, server),
        connected(leaf, "shop") as shop,
        connected(server, "operator") as operator,
    ):
        await until(lambda: is_answered(shop, f"keyless.api.CONSUMER.INFO.{OUTCOMES}.shop"))
        await ask_and_read(shop, operator, sandbox)


#: A leaf node of the account that the streams are in.
STREAMS_LEAF: Final = """
leafnodes: {{ remotes: [{{ url: "nats-leaf://127.0.0.1:{port}" }}] }}
authorization: {{ users: [{{ user: shop, password: $SHOP_PASSWORD, permissions: {{
  publish: ["keyless.approvals.request", {acks}]
  subscribe: ["_INBOX_shop.>"]
}} }}] }}
"""
OWN_ACKS: Final = '"$JS.ACK.KEYLESS_OUTCOMES.1.>", "$JS.ACK.*.*.KEYLESS_OUTCOMES.1.*.*.*.*.>"'


@pytest.mark.parametrize("flags", ["", LONG_ACKS], ids=["short acks", "long acks"])
@pytest.mark.parametrize(("acks", "left"), [('"$JS.ACK.>"', 0), (OWN_ACKS, 1)], ids=["all", "those of a reader"])
async def test_a_reader_at_a_leaf_node_removes_no_request_unless_it_may_acknowledge_everything(
    tmp_path: Path, flags: str, acks: str, left: int
) -> None:
    refused = list[Exception]()

    async def on_error(error: Exception) -> None:
        refused.append(error)

    options = {"user": "shop", "password": PASSWORD, "inbox_prefix": "_INBOX_shop", "error_cb": on_error}
    async with (
        hub(tmp_path, flags + "jetstream: enabled") as (server, port),
        await nats.connect(server.url) as operator,
        NatsServer(tmp_path / "leaf", configuration=STREAMS_LEAF.format(port=port, acks=acks), jetstream=False) as leaf,
        await nats.connect(leaf.url, **options) as shop,
    ):
        await prepare(jetstream(operator), ack_wait=60)
        await until(lambda: is_answered(shop, REQUEST_SUBJECT))
        pulled = await jetstream(operator).pull_subscribe_bind(CONSUMER, REQUESTS)
        [request] = await pulled.fetch(1, timeout=PATIENCE)
        await shop.request(REQUEST_SUBJECT, b"{}", timeout=PATIENCE)  # by now the leaf node knows of all subscriptions
        before = (await jetstream(operator).stream_info(REQUESTS)).state.messages
        await shop.publish(request.reply, b"+ACK")
        await shop.publish(f"$JS.ACK.{REQUESTS}.{CONSUMER}.{OUTCOMES}.1.1.1.0", b"+ACK")

        async def is_over() -> bool:
            removed = before - (await jetstream(operator).stream_info(REQUESTS)).state.messages
            return (removed, len(refused)) == (1 - left, 2 * left)

        await until(is_over)


async def test_a_worker_and_an_application_at_a_leaf_node_of_the_workers_account_use_the_streams_of_the_hub(
    tmp_path: Path, client: KeylessClient, sandbox: Sandbox
) -> None:
    at_hub = Fleet(prefix="$JS.hub.API")
    link = 'jetstream: {{ domain: leaf }}\nleafnodes: {{ remotes: [{{ url: "nats-leaf://127.0.0.1:{port}" }}] }}'
    async with (
        hub(tmp_path, "jetstream: { domain: hub }") as (server, port),
        NatsServer(tmp_path / "leaf", configuration=link.format(port=port)) as leaf,
        await nats.connect(leaf.url) as shop,
    ):

        async def is_linked() -> bool:
            try:
                await shop.jetstream(domain="hub", timeout=1).account_info()
            except nats.errors.Error:
                return False
            return True

        await until(is_linked)
        async with worker_on(client, NatsBroker(leaf.url, fleet=at_hub, event_keys=KEYS), schedule=wait_fixed(0.05)):
            await submit_approval(NatsBroker(shop, fleet=at_hub), "C0", operation_id="txn-1")
            await approve(sandbox, "txn-1")
            async with asyncio.timeout(PATIENCE):
                [event] = await read(NatsBroker(shop, fleet=at_hub, event_keys=KEYS), reader="shop")
            assert event.operation_id == "txn-1"
        async with await nats.connect(server.url) as operator:
            assert (await jetstream(operator).stream_info(OUTCOMES)).state.messages == 1
