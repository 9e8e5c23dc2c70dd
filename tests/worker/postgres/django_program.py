"""A program with Django's database layer, in a process of its own: its settings are those of a process.

Arguments: the folder of the server's socket, the database, and what to do.
"""

from __future__ import annotations

import json
import sys

import django
from django.conf import settings
from django.db import connection, transaction

from aiokeyless.worker import approval_request


def submit(operation_id: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO payment VALUES (%s)", [operation_id])
        cursor.execute("SELECT keyless.submit(%s)", [approval_request("C0FFEE", operation_id=operation_id)])


def main(folder: str, database: str, act: str) -> None:
    settings.configure(
        DATABASES={
            "default": {"ENGINE": "django.db.backends.postgresql", "NAME": database, "HOST": folder, "USER": "postgres"}
        }
    )
    django.setup()
    if act == "submit":
        with transaction.atomic():
            submit("committed")
        with transaction.atomic():
            submit("rolled-back")
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
