"""A RabbitMQ node of a test's own; where there is no RabbitMQ, the test is skipped."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from ports import own_port
from waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Where the node's programs are. Those on Debian's PATH change the user, the folder and the environment.
PROGRAMS: Final = Path(os.environ.get("RABBITMQ_PROGRAMS", "/usr/lib/rabbitmq/bin"))


class RabbitServer:
    """One node, which keeps its ports and what it stored when it is started again.

    It is reached from this machine only, and needs no service of it: epmd, which tells nodes of each other, is its own.

    Args:
        folder: Directory of its files.
        settings: Of the application "rabbit", those too for which rabbitmq.conf has no name.
    """

    def __init__(self, folder: Path, **settings: int) -> None:
        if not (PROGRAMS / "rabbitmq-server").exists() or shutil.which("epmd") is None:
            pytest.skip("RabbitMQ is not installed (Debian: apt-get install rabbitmq-server)")
        self._port = own_port()
        self._folder = folder / "rabbitmq"
        self._folder.mkdir()
        (self._folder / "plugins").write_text("[].")
        (self._folder / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{self._port}")
        options = ["-kernel inet_dist_use_interface {127,0,0,1}"]
        options += [f"-rabbit {name} {value}" for name, value in settings.items()]
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self._folder),  # where Erlang's cookie is
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(own_port()),
            "RABBITMQ_ALLOW_INPUT": "1",  # no shell around the node
            "RABBITMQ_CONFIG_FILE": str(self._folder / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": os.devnull,  # not the machine's
            "RABBITMQ_DIST_PORT": str(own_port()),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._folder / "plugins"),
            "RABBITMQ_LOG_BASE": str(self._folder / "log"),
            "RABBITMQ_MNESIA_BASE": str(self._folder / "data"),
            "RABBITMQ_NODENAME": "test@localhost",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": " ".join(options),
            "RABBITMQ_SERVER_START_ARGS": "-noinput",
        }
        self._node: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self._port}/"

    def start(self) -> None:
        """Start the node, and return when it accepts clients."""
        with (self._folder / "output").open("ab") as output:
            self._node = subprocess.Popen(
                PROGRAMS / "rabbitmq-server",
                env=self._environment,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        deadline = time.monotonic() + PATIENCE
        while not self._accepts_clients():
            if self._node.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self._folder / "output").read_text())
            time.sleep(0.05)

    def _accepts_clients(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self._port)).close()
        except ConnectionRefusedError:
            return False
        return True

    def end(self, number: signal.Signals) -> None:
        """Shut it down by SIGTERM, or end it at once by SIGKILL, as a power cut does."""
        assert self._node is not None
        self._node.send_signal(number)
        self._node.wait()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the node, and what tells its programs where it is, until the end of the block."""
        names = subprocess.Popen(["epmd"], env=self._environment)  # noqa: S607  # the PATH is the machine's
        try:
            self.start()
            yield
        finally:
            self.end(signal.SIGKILL)
            names.terminate()
            names.wait()
