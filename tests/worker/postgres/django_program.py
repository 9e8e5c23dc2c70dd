"""A program with Django's database layer, in a process of its own: its settings are those of a process.

Arguments: the folder of the server's socket, and the database.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import django
import pytest
from django.conf import settings
from django.db import connection, connections, transaction

from aiokeyless import BrokerError, ConfigurationError, ConflictError, sync

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokeyless.worker import ApprovalEvent

sys.path.append(str(Path(__file__).parents[3] / "examples" / "postgres_shop"))

import django_orders  # examples are programs, not a package


class Order:
    """What a model is: `save` is one statement."""

    user_id = "C0FFEE"
    text = "Pay 40 EUR"

    def __init__(self, id_: str) -> None:
        self.id = id_

    def save(self) -> None:
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO payment VALUES (%s)", [self.id])


def main(folder: str, database: str) -> None:
    settings.configure(
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.postgresql",
                "NAME": database,
                "HOST": folder,
                "USER": "postgres",
            },
            "other": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
            "away": {"ENGINE": "django.db.backends.postgresql", "NAME": database, "HOST": "/nowhere"},
        }
    )
    django.setup()
    complaining()
    blocking()


def complaining() -> None:
    """Read while the database is away for three seconds: it is said once."""
    pauses = iter(range(3))
    with (
        patch.object(django_orders, "connection", connections["away"]),
        patch("django_orders.time.sleep", lambda _seconds: next(pauses)),
        patch.object(django_orders.log, "warning") as warn,
        pytest.raises(StopIteration),
    ):
        django_orders.read(lambda _event: None)
    assert warn.call_count == 1


def blocking() -> None:
    """Submit an approval, and handle the outcome of another, on Django's connection."""
    django_orders.place(Order("committed"))
    with transaction.atomic():
        django_orders.place(Order("rolled-back"))
        transaction.set_rollback(True)
    with transaction.atomic():
        refused("in no transaction", lambda: sync.next_outcome(connection, "shop").__enter__())
    refused("in a transaction", lambda: sync.submit_approval(connection, "C0FFEE", operation_id="refused"))
    refused("SqliteBroker", lambda: sync.submit_approval(connections["other"], "C0FFEE", operation_id="refused"))
    with pytest.raises(BrokerError, match="cannot be read"):
        sync.next_outcome(connections["away"], "shop").__enter__()
    connection.connection.close()  # it breaks, and Django does not know
    with pytest.raises(BrokerError, match="cannot be read"):
        sync.next_outcome(connection, "shop").__enter__()
    connection.close()
    committed: list[str | None] = []

    def settle(event: ApprovalEvent) -> None:
        if committed:  # the second outcome
            raise SystemExit
        Order(str(event.operation_id)).save()
        transaction.on_commit(lambda: committed.append(event.operation_id))
        assert not committed

    with pytest.raises(SystemExit):
        django_orders.read(settle)
    assert len(committed) == 1
    connection.close()
    with transaction.atomic():
        Order("of a new connection").save()
        try:
            sync.submit_approval(connection, "BEEF", operation_id="committed")
        except ConflictError:
            transaction.set_rollback(True)


def refused(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ConfigurationError, match=message):
        call()


if __name__ == "__main__":
    main(*sys.argv[1:])
