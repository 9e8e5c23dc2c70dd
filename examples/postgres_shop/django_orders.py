"""The same in Django: the request is in the transaction that saves the order, the outcome in that of the payment."""

import logging
import time
from collections.abc import Callable
from typing import Protocol

from django.db import connection, transaction

from aiokeyless import BrokerError
from aiokeyless.sync import next_outcome, submit_approval
from aiokeyless.worker import ApprovalEvent

log = logging.getLogger("settle")


class Order(Protocol):
    """What is needed of a model."""

    id: str
    user_id: str
    text: str

    def save(self) -> None:
        """Store it."""


@transaction.atomic
def place(order: Order) -> None:
    """Store an order, and have its customer asked."""
    order.save()
    submit_approval(
        connection, order.user_id, operation_id=order.id, operation_payload=order.text, require_auth_type="biom"
    )


def read(settle: Callable[[ApprovalEvent], None]) -> None:
    """Settle orders as their outcomes come, in a process of its own, such as a management command."""
    quiet_until = 0.0
    while True:
        try:
            with next_outcome(connection, "shop") as event:  # and in a transaction of its own
                settle(event)
        except BrokerError as error:  # the database is away, or has no schema: say so once a minute
            if time.monotonic() > quiet_until:
                log.warning("%s", error)
                quiet_until = time.monotonic() + 60
            time.sleep(1)
