from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING

import pytest

from aiokeyless import worker
from aiokeyless.errors import ConfigurationError
from aiokeyless.worker import nats as nats_package
from aiokeyless.worker import postgres as postgres_package
from aiokeyless.worker import sqlite as sqlite_package
from aiokeyless.worker.brokers import broker_for
from aiokeyless.worker.nats import NatsBroker
from aiokeyless.worker.sqlite import SqliteBroker

from .conformance.brokers import STORAGES

if TYPE_CHECKING:
    from types import ModuleType

    from nats.aio.client import Client


DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("folder", [module.name for module in iter_modules(worker.__path__) if module.ispkg])
def test_each_broker_keeps_the_promises_of_all_and_has_its_place_in_the_pages(folder: str) -> None:
    package = import_module(f"aiokeyless.worker.{folder}")
    guide = (DOCS / "howto" / "running-workers.md").read_text()
    reference = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    places = {
        "the conformance suite": folder in {storage.name.partition(" ")[0] for storage in STORAGES},
        "the reference": f"aiokeyless.worker.{folder}" in reference,
        "the table of the guide": re.search(rf"^\| .*`{package.SCHEMES[0]}:", guide, re.MULTILINE) is not None,
    }
    assert [place for place, is_there in places.items() if not is_there] == []


@pytest.mark.parametrize(
    ("url", "picked"),
    [
        ("sqlite:keyless.db", "<SqliteBroker keyless.db>"),
        ("SQLITE:/var/lib/keyless.db", "<SqliteBroker /var/lib/keyless.db>"),
        ("sqlite::memory:", "<SqliteBroker :memory:>"),
        ("nats://127.0.0.1:4222", "<NatsBroker of the fleet 'keyless'>"),
        ("TLS://127.0.0.1:4222,tls://127.0.0.2:4222", "<NatsBroker of the fleet 'keyless'>"),
        ("postgresql://db/shop", "<PostgresBroker, schema 'keyless'>"),
        ("postgres://db/shop", "<PostgresBroker, schema 'keyless'>"),
        ("postgresql+psycopg://db/shop", "<PostgresBroker, schema 'keyless'>"),
        ("POSTGRESQL+asyncpg://db/shop", "<PostgresBroker, schema 'keyless'>"),
        ("postgresql://db/shop?host=/run&schema=staging&sslmode=disable", "<PostgresBroker, schema 'staging'>"),
        ("postgresql://db/shop?schema=a&schema=staging", "<PostgresBroker, schema 'staging'>"),  # that of --schema
    ],
)
def test_a_url_picks_the_broker(url: str, picked: str) -> None:
    assert repr(broker_for(url)) == picked


def test_a_broker_is_taken_as_it_is() -> None:
    broker = SqliteBroker(":memory:")
    assert broker_for(broker) is broker


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("redis://127.0.0.1", r"a URL \(nats:, .*, sqlite:\), not a URL of the scheme 'redis'"),
        ("keyless.db", "not a text without a scheme: a SQLite file is sqlite:PATH"),
        ("C:\\keyless.db", "a SQLite file is sqlite:PATH"),
        (None, "not NoneType"),
        ("sqlite:", "must name a file"),
        ("sqlite:///keyless.db", "without //"),
    ],
)
def test_what_is_for_no_broker_is_refused_with_what_would_be(target: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        broker_for(target)
    assert caught.value.argument == "broker"


def test_an_applications_own_sqlite_connection_is_refused() -> None:
    with closing(sqlite3.connect(":memory:")) as connection, pytest.raises(ConfigurationError, match="of your own"):
        broker_for(connection)


async def test_a_connection_picks_the_broker_and_keeps_it(connection: Client) -> None:
    broker = broker_for(connection)
    assert isinstance(broker, NatsBroker)
    assert broker_for(connection) is broker


def remove(monkeypatch: pytest.MonkeyPatch, library: str, package: ModuleType) -> None:
    """Let a library be missing; what a broker's package imports of it is forgotten."""
    for loaded in [loaded for loaded in sys.modules if loaded.startswith(f"{package.__name__}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, library, None)


@pytest.mark.parametrize(("folder", "library"), [("nats", "nats"), ("postgres", "asyncpg"), ("sqlite", "sqlite3")])
def test_a_broker_whose_library_is_missing_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, folder: str, library: str
) -> None:
    package = import_module(f"aiokeyless.worker.{folder}")
    remove(monkeypatch, library, package)
    message = rf"^broker needs {library}, which is not .*: {package.HINT}$"
    with pytest.raises(ConfigurationError, match=message) as caught:
        broker_for(f"{package.SCHEMES[0]}:somewhere")
    assert caught.value.argument == "broker"


@pytest.mark.parametrize(
    ("package", "name", "library"),
    [(nats_package, "NatsBroker", "nats"), (postgres_package, "PostgresBroker", "asyncpg")],
)
def test_importing_a_broker_whose_library_is_missing_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, package: ModuleType, name: str, library: str
) -> None:
    remove(monkeypatch, library, package)
    extra = package.__name__.rpartition(".")[2]
    with pytest.raises(ModuleNotFoundError, match=rf'needs {library}.*: install the extra "{extra}"'):
        getattr(package, name)


@pytest.mark.parametrize("package", [nats_package, postgres_package, sqlite_package])
def test_the_package_of_a_broker_has_no_other_names(package: ModuleType) -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        getattr(package, "Nothing")  # noqa: B009  # what a user writes who errs


def test_importing_the_package_loads_no_driver() -> None:
    program = """
import sys
before = set(sys.modules)  # coverage loads sqlite3
import aiokeyless.sync, aiokeyless.worker
loaded = sys.modules.keys() - before
print({"asyncpg", "django", "nats", "nkeys", "psycopg", "psycopg2", "sqlalchemy", "sqlite3"} & loaded)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_looking_up_a_broker_needs_no_other_brokers_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for library, package in (("nats", nats_package), ("nkeys", nats_package), ("asyncpg", postgres_package)):
        remove(monkeypatch, library, package)
    assert isinstance(broker_for("sqlite:keyless.db"), SqliteBroker)
