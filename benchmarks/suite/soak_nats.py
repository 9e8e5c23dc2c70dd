"""Workers on a NATS cluster of three while leaders are killed, paused and cut off, and logins expire; nothing is lost.

An operator changes the consumers now and then. The reader corrects its own, and the workers' is deleted.

Once the power fails: all three servers are killed at the same time. They write each message to the disk before they
acknowledge it. Three workers ask Keyless, one of them is killed now and then. See `benchmarks.soak`.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import nats
import nats.errors
import psutil  # type: ignore[import-untyped]  # it has no type hints

from aiokeyless import KeylessError
from aiokeyless.worker import BrokerError, next_outcome, submit_approval
from aiokeyless.worker.nats import Fleet, NatsBroker, StreamSettings
from benchmarks.broker import NAMES, NatsCluster
from benchmarks.nats_logins import Operator
from benchmarks.programs import Program, keep_running, meanwhile, repeat, wholly
from benchmarks.report import Goal, Report
from benchmarks.soak.fleet import AGAIN, READER, USER, Told, keep_asking, payload_of
from benchmarks.soak.proxy import FaultyProxy
from benchmarks.storages import is_prepared

from .soak_fleet import Plan, Run, planned

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Coroutine
    from typing import Any

    from aiokeyless.worker import ApprovalEvent
    from benchmarks.bench import Bench

_FOREVER: Final = 1e6  # seconds


def broker_at(urls: str, login: Path) -> NatsBroker:
    """Return the broker as the programs use it."""
    options = {"user_credentials": str(login)}
    return NatsBroker(urls, settings=StreamSettings(replicas=len(NAMES)), connect_options=options)


def work(urls: str, login: Path, base_url: str, request_timeout: float) -> None:
    """Run a worker; it ends if the broker or the service is away at its start."""

    async def run() -> None:
        async with broker_at(urls, login) as broker:
            await keep_asking(broker, base_url, request_timeout)

    with suppress(KeylessError):
        asyncio.run(run())


class Cluster(NatsCluster):
    """A cluster whose servers' routes to each other can be cut."""

    def __init__(self, folder: Path, source: random.Random, configuration: str) -> None:
        super().__init__(folder, configuration)
        self._routes = {(a, b): FaultyProxy(source) for a in NAMES for b in NAMES if a != b}

    async def run(self, stack: AsyncExitStack) -> None:
        """Start all servers until the end of the stack."""
        for proxy in self._routes.values():
            await stack.enter_async_context(proxy)
        self.connect()
        for server in self.servers.values():
            stack.callback(server.kill)
        await self.start()

    def route(self, of: str, to: str) -> str:
        """Return the address of the proxy between two servers."""
        return self._routes[of, to].url.replace("http", "nats")

    def connect(self) -> None:
        """Let the servers reach each other."""
        for (_, to), proxy in self._routes.items():
            proxy.target = self._ports[to]

    def cut_off(self, name: str) -> None:
        """Cut a server off from the others, until `connect`; its clients still reach it."""
        for pair, proxy in self._routes.items():
            if name in pair:
                proxy.target = None
                proxy.reset_all()


class NatsSoak(Run):
    """One run."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        super().__init__(plan, folder)
        self._operator = Operator()
        self._cluster = Cluster(folder, self._source, self._operator.configuration)
        self._login = folder / "worker.creds"
        self._login_lasts = max(plan.every(20), 10.0)
        self._one_at_a_time = asyncio.Lock()
        self._outcomes: set[tuple[str, str]] = set()

    async def run(self) -> None:
        """Run for the planned time, and until all orders are settled."""
        await self._renew_login()
        own = self._folder / "own.creds"
        self._operator.write_login(own, lasts=_FOREVER)
        async with AsyncExitStack() as stack:
            await self._cluster.run(stack)
            await stack.enter_async_context(self.service)
            self._connection = await nats.connect(
                self._cluster.urls.split(","), user_credentials=str(own), max_reconnect_attempts=-1, error_cb=_ignore
            )
            stack.push_async_callback(self._connection.close)
            await self._until(self._has_leader)
            arguments = self._cluster.urls, self._login, self.service.network.url, self.plan.request_timeout
            self.lasting_workers = [Program(work, *arguments) for _ in range(2)]
            self._killed = Program(work, *arguments)
            programs = [*self.lasting_workers, self._killed]
            stack.callback(lambda: [program.kill() for program in programs])
            broker = await stack.enter_async_context(broker_at(self._cluster.urls, self._login))
            await stack.enter_async_context(meanwhile(repeat(self._login_lasts / 2, self._source, self._renew_login)))
            await self._until(partial(is_prepared, broker))
            async with meanwhile(keep_running(programs), self._read(broker)):
                await self._until(self._has_workers)
                self.service.network.rate = self.plan.faults
                async with meanwhile(*self._disturbances()):
                    await self._sell(broker)
                self.service.network.rate = 0.0
                await self._until(self._is_settled)
            await self._read_skipped(broker)
        self._judge()

    async def _sell(self, broker: NatsBroker) -> None:
        closes_at = time.monotonic() + self.plan.seconds
        async with asyncio.TaskGroup() as group:
            while time.monotonic() < closes_at:
                await asyncio.sleep(self._source.expovariate(self.plan.rate))
                group.create_task(self._place(broker, f"order-{len(self.shop.committed)}"))

    async def _place(self, broker: NatsBroker, order: str) -> None:
        self.shop.committed[order] = time.monotonic()
        while True:
            with suppress(BrokerError):
                await submit_approval(
                    broker,
                    USER,
                    operation_id=order,
                    operation_payload=payload_of(order),
                    expires_in=self.plan.expires_in,
                )
                return
            self._happen("submissions repeated")
            await asyncio.sleep(AGAIN)

    async def _read(self, broker: NatsBroker) -> NoReturn:
        while True:
            try:
                async with next_outcome(broker, READER) as event:
                    if not self._note(event):
                        self._happen("outcome read again")
            except BrokerError:
                await asyncio.sleep(AGAIN)

    async def _read_skipped(self, broker: NatsBroker) -> None:
        """Read all once under another name, as the runbook says: edits have limited the deliveries under the first."""
        for _ in range((await self._connection.jetstream().stream_info(Fleet().outcomes)).state.messages):
            async with next_outcome(broker, f"{READER}-again") as event:
                self._happen("outcome read under another name only", self._note(event))

    def _note(self, event: ApprovalEvent) -> bool:
        """Note an outcome, and pay if it is an approval. Return whether it is new."""
        told = Told(event, time.monotonic())
        if (told.order_id, event.outcome) in self._outcomes:
            return False
        self._outcomes.add((told.order_id, event.outcome))
        self.told.append(told)
        if event.outcome == "approved":
            self.paid[told.order_id] += 1
        return True

    # -- what is done to it

    def _disturbances(self) -> list[Coroutine[Any, Any, None]]:
        return [
            self._times(6, partial(self._disturb, "leader killed", self._kill_and_start)),
            self._times(6, partial(self._disturb, "leader paused", self._pause)),
            self._times(6, partial(self._disturb, "leader cut off from the others", self._cut_off)),
            self._times(2, partial(self._disturb, "all servers killed at once", self._cut_power)),
            self._times(6, partial(self._disturb, "consumer of the reader edited", self._edit_reader)),
            self._times(6, partial(self._disturb, "consumer of the workers edited, and deleted", self._edit_workers)),
            self._times(20, partial(self._kill, "worker killed", self._killed)),
            self._times(6, self._renew_late),
        ]

    async def _disturb(self, what: str, do: Callable[[str], Coroutine[Any, Any, None]]) -> None:
        async with self._one_at_a_time:
            self._happen(what)
            await wholly(do(await self._leader()))

    async def _kill_and_start(self, *names: str) -> None:
        for name in names:
            self._cluster.servers[name].kill()
        await asyncio.sleep(self.plan.down * self._source.uniform(0.2, 1.0))
        await asyncio.gather(*(self._cluster.servers[name].start() for name in names))

    async def _cut_power(self, _leader: str) -> None:
        await self._kill_and_start(*NAMES)

    async def _pause(self, name: str) -> None:
        process = psutil.Process(self._cluster.servers[name].pid)
        process.suspend()
        await asyncio.sleep(self.plan.hang)
        process.resume()

    async def _cut_off(self, name: str) -> None:
        self._cluster.cut_off(name)
        await asyncio.sleep(self.plan.hang)
        self._cluster.connect()

    async def _edit_reader(self, _leader: str) -> None:
        """Change what the reader corrects."""
        await self._edit(Fleet().outcomes, READER, max_deliver=3, headers_only=True, ack_wait=1.0)

    async def _edit_workers(self, _leader: str) -> None:
        """Change what a worker only reports, and do what the runbook says."""
        stream, consumer = Fleet().requests, Fleet().consumer
        await self._edit(stream, consumer, max_deliver=3, ack_wait=1.0)
        await asyncio.sleep(self.plan.hang)
        with suppress(nats.errors.Error):
            await self._connection.jetstream().delete_consumer(stream, consumer)

    async def _edit(self, stream: str, consumer: str, **settings: float) -> None:
        with suppress(nats.errors.Error):  # there is no leader just now
            found = (await self._connection.jetstream().consumer_info(stream, consumer)).config
            await self._connection.jetstream().add_consumer(stream, found, timeout=None, **settings)

    async def _renew_login(self) -> None:
        self._happen("logins renewed")
        self._operator.write_login(self._login, lasts=self._login_lasts)

    async def _renew_late(self) -> None:
        """Leave a login that has expired, until the next is written."""
        self._happen("logins renewed late")
        self._operator.write_login(self._login, lasts=0.0)

    # -- what is seen of it

    async def _leader(self) -> str:
        """Return the leader of the requests, or some server if there is none."""
        with suppress(nats.errors.Error):
            found = (await self._connection.jetstream().stream_info(Fleet().requests)).cluster
            if found is not None and found.leader:
                return found.leader
        return self._source.choice(NAMES)

    async def _has_leader(self) -> bool:
        with suppress(nats.errors.Error):
            return bool(await self._connection.jetstream(timeout=1).account_info())
        return False

    async def _has_workers(self) -> bool:
        with suppress(nats.errors.Error):
            waiting = (await self._connection.jetstream().consumer_info(Fleet().requests, Fleet().consumer)).num_waiting
            return (waiting or 0) > len(self.lasting_workers)
        return False

    async def _is_settled(self) -> bool:
        stream = self._connection.jetstream()
        with suppress(nats.errors.Error):
            readers = await stream.consumers_info(Fleet().outcomes)
            is_read = all(not reader.num_pending and not reader.num_ack_pending for reader in readers)
            return is_read and (await stream.stream_info(Fleet().requests)).state.messages == 0
        return False


async def _ignore(_error: Exception) -> None:
    """Take note of nothing: that servers are away is what is tried."""


def run(bench: Bench) -> Report:
    """Run it for an hour, or the minutes that were asked for."""
    with tempfile.TemporaryDirectory() as folder:
        soak = NatsSoak(planned(bench), Path(folder))
        asyncio.run(soak.run())
    report = soak.report("soak_nats")
    again = 100 * soak.happened["outcome read again"] / len(soak.shop.committed)
    report.goals.append(Goal("outcomes read again, of 100 orders", 1.0, again))
    return report
