"""The same in Django: the request is in the transaction that saves the order."""

from typing import Protocol

from django.db import connection, transaction

from aiokeyless.worker import approval_request


class Order(Protocol):
    """What is needed of a model."""

    id: str
    user_id: str
    text: str

    def save(self) -> None:
        """Store it."""


@transaction.atomic  # type: ignore[untyped-decorator]  # Django has no types
def place(order: Order) -> None:
    """Store an order, and have its customer asked."""
    request = approval_request(order.user_id, operation_id=order.id, operation_payload=order.text)
    order.save()
    with connection.cursor() as cursor:
        cursor.execute("SELECT keyless.submit(%s)", [request])
