from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from aiokeyless.errors import ConfigurationError
from aiokeyless.worker.broker import broker_for
from aiokeyless.worker.sqlite import SqliteBroker


def test_a_url_picks_the_broker() -> None:
    assert repr(broker_for("sqlite:keyless.db")) == "<SqliteBroker keyless.db>"
    assert repr(broker_for("SQLITE:/var/lib/keyless.db")) == "<SqliteBroker /var/lib/keyless.db>"
    assert repr(broker_for("sqlite::memory:")) == "<SqliteBroker :memory:>"


def test_a_broker_is_taken_as_it_is() -> None:
    broker = SqliteBroker(":memory:")
    assert broker_for(broker) is broker


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("redis://127.0.0.1", "a URL of the scheme 'redis'"),
        ("keyless.db", "not str"),
        (None, "not NoneType"),
        ("sqlite:", "must name a file"),
        ("sqlite:///keyless.db", "without //"),
    ],
)
def test_what_is_for_no_broker_is_refused_with_what_would_be(target: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        broker_for(target)


def test_an_applications_own_sqlite_connection_is_refused() -> None:
    with closing(sqlite3.connect(":memory:")) as connection, pytest.raises(ConfigurationError, match="of your own"):
        broker_for(connection)
