"""The three brokers as a benchmark has them: each is on this machine, and says what it used."""

from __future__ import annotations

from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, ClassVar, Final

import psutil  # type: ignore[import-untyped]  # it has no type hints

from aiokeyless.worker import BrokerError
from aiokeyless.worker.broker import Broker
from aiokeyless.worker.brokers import broker_for
from aiokeyless.worker.nats import NatsBroker, StreamSettings
from aiokeyless.worker.nats.streams import ACK_WAIT

from .broker import NAMES, NatsCluster
from .postgres import PostgresServer
from .programs import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Self

_LEADS_WITHIN: Final = 60.0  # seconds in which a cluster finds a leader
_BLOCK: Final = 512  # bytes: the unit of st_blocks, independent of the block size of the disk


class Storage:
    """What stores requests and outcomes, in a folder of its own; an async context manager.

    By itself it is a SQLite file, which has no server.
    """

    name: ClassVar[str] = "SQLite"

    async def __aenter__(self) -> Self:
        with ExitStack() as stack:
            self._folder = Path(stack.enter_context(TemporaryDirectory(prefix="aiokeyless-")))
            await self._start(stack)
            self._started = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._started.close()

    @property
    def url(self) -> str:
        """The broker's URL."""
        return f"sqlite:{self._folder / 'keyless.db'}"

    def broker(self) -> Broker:
        """Return a broker, as one more process has it."""
        broker = broker_for(self.url)
        assert isinstance(broker, Broker)  # noqa: S101  # a URL is a broker's
        return broker

    async def _start(self, stack: ExitStack) -> None:
        """Start the server, if there is one, and let the stack stop it."""

    def processes(self) -> list[psutil.Process]:
        """Return the server's processes; none where there is no server."""
        return []

    def logged(self, worker: psutil.Process) -> float:
        """Return the bytes written so far to the log that survives a crash; here to files, but not to sockets."""
        return float(worker.io_counters().write_chars)

    def on_disk(self) -> float:
        """Return the bytes on disk of what is stored."""
        return sum(_BLOCK * path.stat().st_blocks for path in self._folder.rglob("*") if path.is_file())


class PostgresStorage(Storage):
    """A PostgreSQL server that makes its promises: it waits for the disk."""

    name = "PostgreSQL"
    _server: PostgresServer

    @property
    def url(self) -> str:
        return self._server.url(self._database)

    async def _start(self, stack: ExitStack) -> None:
        self._server = stack.enter_context(closing(PostgresServer(fsync="on", shared_buffers="128MB")))
        self._database = self._server.new_database()

    def processes(self) -> list[psutil.Process]:
        postmaster = psutil.Process(self._server.pid)
        return [postmaster, *postmaster.children()]

    def logged(self, worker: psutil.Process) -> float:  # noqa: ARG002  # it writes nothing
        return float(self._server.execute("SELECT pg_current_wal_insert_lsn() - '0/0'")[0][0])

    def on_disk(self) -> float:
        # Its log is not in it: that has a size of its own, and is used again.
        return float(self._server.execute(f"SELECT pg_database_size('{self._database}')")[0][0])  # ours


class NatsStorage(Storage):
    """A cluster of three servers that make their promises: each message is on two disks before it is acknowledged."""

    name = "NATS"
    _cluster: NatsCluster

    @property
    def url(self) -> str:
        return self._cluster.urls

    async def _start(self, stack: ExitStack) -> None:
        self._cluster = NatsCluster(self._folder)
        stack.callback(self._cluster.kill)
        await self._cluster.start()
        async with NatsBroker(self.url, settings=StreamSettings(replicas=len(NAMES))) as broker:
            await until(partial(is_prepared, broker), within=_LEADS_WITHIN)

    def processes(self) -> list[psutil.Process]:
        return [psutil.Process(server.pid) for server in self._cluster.servers.values()]

    def logged(self, worker: psutil.Process) -> float:  # noqa: ARG002  # it writes nothing
        # By pages, since what goes to a socket counts as written, too.
        return float(sum(process.io_counters().write_bytes for process in self.processes()))


async def is_prepared(broker: NatsBroker) -> bool:
    """Make the streams, unless the cluster has no leader yet."""
    with suppress(BrokerError):
        await broker.prepare(lease=ACK_WAIT, service="")
        return True
    return False


STORAGES: Final[tuple[type[Storage], ...]] = (Storage, PostgresStorage, NatsStorage)


def total(processes: Iterable[psutil.Process], of: Callable[[psutil.Process], float]) -> float:
    """Return a sum over processes. One that has ended meanwhile, as those of a server that clean up, has no share."""
    shares = 0.0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            shares += of(process)
    return shares


def cpu(process: psutil.Process) -> float:
    """Return the CPU seconds of a process so far, with those of its children that have ended."""
    times = process.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def resident(process: psutil.Process) -> float:
    """Return the memory of a process in bytes; what several share is divided among them."""
    return float(process.memory_full_info().pss)
