"""A test of `django_orders.py`, with pytest-django; `order` is a fixture of yours."""

from typing import Any
from urllib.parse import urlencode

import pytest
from django.db import connection
from django_orders import Order, place

from aiokeyless.sync import next_outcome
from aiokeyless.worker import ApprovalWorker


@pytest.fixture
def keyless_broker_url(transactional_db: None) -> str:  # noqa: ARG001  # the worker sees only what is committed
    """Return the URL of the database of Django's tests."""
    database = connection.settings_dict
    names = ("HOST", "PORT", "USER", "PASSWORD")
    return f"postgresql:///{database['NAME']}?" + urlencode({n.lower(): database[n] for n in names if database[n]})


@pytest.fixture
def keyless_sandbox_options() -> dict[str, Any]:
    """Let the user approve at once."""
    return {"auto_approve": 0}


def test_an_approved_order_is_paid(order: Order, keyless_worker: ApprovalWorker) -> None:
    """The worker asks what was committed, and the outcome comes in a transaction."""
    place(order)  # pyright: ignore[reportArgumentType]  # Django has no types
    with next_outcome(connection, "shop") as event:
        assert (event.operation_id, event.outcome) == (order.id, "approved")
    assert keyless_worker.statistics.approved == 1
