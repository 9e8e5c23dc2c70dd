"""A real database: a PostgreSQL cluster of one's own, which can be killed and started again where it was.

The tests use it too, so this module needs only the standard library.
"""

# ruff: noqa: S603  # the programs are the server's

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any, Final

_DEBIAN: Final = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/usr/local/bin"))
#: Where the server's programs are: Debian has a folder for each version, and none of them on the PATH.
PROGRAMS: Final = Path(os.environ.get("POSTGRES_PROGRAMS", _DEBIAN))
_START_WITHIN: Final = 60.0  # seconds
_SETTINGS: Final = {
    "listen_addresses": "",
    "fsync": "off",  # who uses it kills the server, and not the machine
    "max_connections": "200",
    "shared_buffers": "64MB",
    "autovacuum_naptime": "5s",
    "log_min_messages": "warning",
}


class PostgresServer:
    """One cluster, which listens on a socket in its folder.

    The server refuses to run as root: for root, it runs as the user ``postgres``.

    Args:
        primary: What the cluster is a copy of, and follows as a standby, asynchronously; None for an empty cluster.
        home: Where its folder is made. Default: the user's home, or the place for temporary files.
        settings: Of the server, beyond those of every server here.

    Raises:
        FileNotFoundError: PostgreSQL is not installed.
    """

    def __init__(self, primary: PostgresServer | None = None, home: Path | None = None, **settings: str) -> None:
        if not is_installed():
            raise FileNotFoundError(f"PostgreSQL is not installed: there is no {PROGRAMS / 'initdb'}")
        self._user = pwd.getpwnam("postgres") if os.geteuid() == 0 else None
        # At home, if it is another user: root's temporary folders are closed to it.
        usual = None if self._user is None else self._user.pw_dir
        self.folder = Path(tempfile.mkdtemp(prefix="aiokeyless-", dir=home or usual))
        """Where the socket and the log are."""
        self._data = self.folder / "data"
        if self._user is not None:
            os.chown(self.folder, self._user.pw_uid, self._user.pw_gid)
        self._settings = {**_SETTINGS, "unix_socket_directories": str(self.folder), **settings}
        self._process: subprocess.Popen[bytes] | None = None
        self._databases = count(1)
        try:
            self._create(primary)
            self.start()
        except BaseException:
            self.close()
            raise

    def _create(self, primary: PostgresServer | None) -> None:
        if primary is None:
            self.run(
                "initdb", "--pgdata", self._data, "--username=postgres", "--auth=trust", "--encoding=UTF8",
                "--no-locale", "--no-sync",
            )  # fmt: skip
        else:
            source = "--dbname", primary.url("postgres")
            self.run("pg_basebackup", "--pgdata", self._data, *source, "--checkpoint=fast", "--no-sync")
            self.follow(primary)

    @property
    def pid(self) -> int:
        """The process id of the server, whose other processes are its children."""
        return self._running.pid

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the server was not started")
        return self._process

    def new_folder(self, name: str) -> Path:
        """Make a folder that goes with the server, for a program that runs as the server does."""
        folder = Path(tempfile.mkdtemp(prefix=name, dir=self.folder))
        if self._user is not None:
            os.chown(folder, self._user.pw_uid, self._user.pw_gid)
        return folder

    def url(self, database: str, user: str = "postgres") -> str:
        """Return the URL of a database."""
        return f"postgresql://{user}@/{database}?host={self.folder}"

    def new_database(self, template: str = "template1") -> str:
        """Make a database, as a copy of another that nobody uses; return its name."""
        name = f"test_{next(self._databases)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def execute(self, statement: str, database: str = "postgres", user: str = "postgres") -> list[list[str]]:
        """Execute a statement by psql; return its rows as texts."""
        output = self.run(
            "psql", "--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--field-separator=\t",
            "--set=ON_ERROR_STOP=1", "--command", statement, self.url(database, user),
        )  # fmt: skip
        return [line.split("\t") for line in output.splitlines()]

    def run(self, program: str, *arguments: str | Path) -> str:
        """Run one of the programs that come with the server, as its user; return what it prints."""
        done = subprocess.run(
            [PROGRAMS / program, *arguments], check=False, capture_output=True, text=True, **self.identity()
        )
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stderr}")
        return str(done.stdout)

    def start(self) -> None:
        """Start the server, and return when it accepts clients."""
        options = [f"--{name.replace('_', '-')}={value}" for name, value in self._settings.items()]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [PROGRAMS / "postgres", "-D", self._data, *options], stderr=log, **self.identity()
            )
        deadline = time.monotonic() + _START_WITHIN
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.folder / "log").read_text()[-2000:])
            time.sleep(0.02)

    def start_again(self) -> bool:
        """Start the server if it has ended by itself, and return whether it had."""
        has_ended = self._running.poll() is not None
        if has_ended:
            self.start()
        return has_ended

    def promote(self) -> None:
        """Make a standby the primary, and return when it is."""
        self.execute("SELECT pg_promote()")

    def follow(self, primary: PostgresServer) -> None:
        """Make it a standby of another server, whose copy it is, or which took over from it; it does not run now."""
        self._settings["primary_conninfo"] = primary.url("postgres")
        (self._data / "standby.signal").touch()

    def kill(self) -> None:
        """End it at once, as a power cut does, with all its processes."""
        self._end(signal.SIGQUIT)

    def stop(self) -> None:
        """Shut it down, and its clients out; it may be started again."""
        self._end(signal.SIGINT)

    def close(self) -> None:
        """Stop it, and remove its files."""
        if self._process is not None:
            self._end(signal.SIGQUIT)
        shutil.rmtree(self.folder)

    def _end(self, number: signal.Signals) -> None:
        self._running.send_signal(number)
        self._running.wait()
        self._process = None

    def _is_ready(self) -> bool:
        ready = subprocess.run([PROGRAMS / "pg_isready", "-q", "-h", self.folder], check=False)
        return ready.returncode == 0

    def identity(self) -> dict[str, Any]:
        """Return as whom a program of the server's runs, for `subprocess`."""
        if self._user is None:
            return {}
        return {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": [], "cwd": self.folder}


def is_installed() -> bool:
    """Return whether there are the server's programs."""
    return (PROGRAMS / "initdb").exists()
