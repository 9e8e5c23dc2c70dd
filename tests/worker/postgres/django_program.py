"""A program with Django's database layer, in a process of its own: its settings are those of a process.

Arguments: the folder of the server's socket, the database, and what to do.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import django
from django.conf import settings
from django.db import connection, transaction

sys.path.append(str(Path(__file__).parents[3] / "examples" / "postgres_shop"))


class Order:
    """What a model is: `save` is one statement."""

    user_id = "C0FFEE"
    text = "Pay 40 EUR"

    def __init__(self, id_: str) -> None:
        self.id = id_

    def save(self) -> None:
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO payment VALUES (%s)", [self.id])


def main(folder: str, database: str, act: str) -> None:
    settings.configure(
        DATABASES={
            "default": {"ENGINE": "django.db.backends.postgresql", "NAME": database, "HOST": folder, "USER": "postgres"}
        }
    )
    django.setup()
    if act == "submit":
        from django_orders import place

        place(Order("committed"))
        with transaction.atomic():
            place(Order("rolled-back"))
            transaction.set_rollback(True)
    else:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SELECT operation_id, outcome, event FROM keyless.next_outcome(%s)", ["shop"])
            operation_id, outcome, event = cursor.fetchone()
            cursor.execute(
                "INSERT INTO payment VALUES (%s)", [f"{operation_id} {outcome} {json.loads(event)['version']}"]
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
