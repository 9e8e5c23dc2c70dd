"""A real broker: a nats-server with JetStream on a free port of this machine, or three, from the wheel of that name.

The tests use it too, so this module needs only the standard library.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import Final

_PROGRAM: Final = Path(sysconfig.get_path("scripts"), "nats-server")
_START_WITHIN: Final = 60.0  # seconds
NAMES: Final = ("a", "b", "c")  # of a cluster's servers


class NatsServer:
    """One server on a free port, which it keeps when it is restarted.

    Args:
        folder: Directory of its files; stored data survives a restart.
        options: More command line options; ``-c FILE`` for users and their permissions.
        jetstream: Whether JetStream is on.
    """

    def __init__(self, folder: Path, *options: str, jetstream: bool = True) -> None:
        self._folder = folder
        self._options = [*options, *(["-js", "-sd", str(folder / "store")] if jetstream else [])]
        self._port = -1
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The URL of the server."""
        return f"nats://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """The process id of the server."""
        return self._running.pid

    async def start(self) -> None:
        """Start the server, and return when it accepts clients."""
        ports = self._folder / "ports"
        ports.mkdir(parents=True, exist_ok=True)
        log = self._folder / "nats-server.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: ASYNC220, S603  # it returns at once, and the process outlives the loop
                [_PROGRAM, "-a", "127.0.0.1", "-p", str(self._port), "--ports_file_dir", ports, *self._options],
                stderr=output,
            )
        file = ports / f"nats-server_{self._process.pid}.ports"
        deadline = time.monotonic() + _START_WITHIN
        while (port := _port_in(file)) is None:
            if (code := self._process.poll()) is not None:
                raise RuntimeError(f"nats-server exited with {code}: {log.read_text()}")
            if time.monotonic() > deadline:
                self.stop()
                raise TimeoutError(f"nats-server did not start within {_START_WITHIN:g} s: {log.read_text()}")
            await asyncio.sleep(0.01)
        self._port = port

    def stop(self) -> None:
        """Shut the server down gracefully."""
        self._running.terminate()
        self._running.wait()

    def kill(self) -> None:
        """End it at once, as a power cut does, if it was started."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("nats-server was not started")
        return self._process


class NatsCluster:
    """Three servers that write each message to the disk before they acknowledge it, as the documentation demands.

    Args:
        folder: Directory of their files.
        configuration: More of each server's configuration, such as users and their permissions.
    """

    def __init__(self, folder: Path, configuration: str = "") -> None:
        self._folder = folder
        self._configuration = configuration
        self._ports = dict(zip(NAMES, _free_ports(len(NAMES)), strict=True))
        self.servers = {
            name: NatsServer(folder / name, "-c", str(folder / f"{name}.conf"), jetstream=False) for name in NAMES
        }

    @property
    def urls(self) -> str:
        """The addresses of all servers."""
        return ",".join(server.url for server in self.servers.values())

    def route(self, _of: str, to: str) -> str:
        """Return the address at which one server finds another."""
        return f"nats://127.0.0.1:{self._ports[to]}"

    async def start(self) -> None:
        """Start all servers, and return when they accept clients; the cluster may have no leader yet."""
        for name in NAMES:
            routes = [self.route(name, other) for other in NAMES if other != name]
            # Servers tell each other where others are, and would find a way past proxies.
            (self._folder / f"{name}.conf").write_text(
                f"{self._configuration}\nserver_name: {name}\n"
                f"jetstream: {{ store_dir: {json.dumps(str(self._folder / name / 'store'))}, sync_interval: always }}\n"
                f"cluster: {{ name: benchmark, listen: '127.0.0.1:{self._ports[name]}',"
                f" cluster_advertise: '127.0.0.1:1', no_advertise: true, routes: {json.dumps(routes)} }}\n"
            )
        await asyncio.gather(*(server.start() for server in self.servers.values()))

    def kill(self) -> None:
        """End all that run at once, as a power cut does."""
        for server in self.servers.values():
            server.kill()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _port_in(file: Path) -> int | None:
    """Return the port; None while the server does not accept clients yet."""
    try:
        return int(json.loads(file.read_text())["nats"][0].rpartition(":")[2])
    except (FileNotFoundError, json.JSONDecodeError):  # not written yet, or only half
        return None
