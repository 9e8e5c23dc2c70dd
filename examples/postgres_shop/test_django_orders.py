"""A test of `django_orders.py`, with pytest-django; `order` is a fixture of yours."""

import time
from urllib.parse import urlencode

import pytest
from django.db import connection
from django_orders import Order, place

from aiokeyless.sandbox import Sandbox
from aiokeyless.sync import next_outcome
from aiokeyless.worker import ApprovalWorker


@pytest.fixture
def keyless_broker_url(transactional_db: None) -> str:  # the worker sees only what is committed
    """Return the URL of the database of Django's tests."""
    database = connection.settings_dict
    names = ("HOST", "PORT", "USER", "PASSWORD")
    return f"postgresql:///{database['NAME']}?" + urlencode({n.lower(): database[n] for n in names if database[n]})


def test_an_approved_order_is_paid(order: Order, keyless_worker: ApprovalWorker, keyless_sandbox: Sandbox) -> None:
    """The worker asks what was committed, and the outcome comes in a transaction."""
    place(order)
    while order.id not in keyless_sandbox.operations:  # until the worker has asked
        time.sleep(0.01)
    keyless_sandbox.approve(order.id)
    with next_outcome(connection, "shop") as event:
        assert (event.operation_id, event.outcome) == (order.id, "approved")
    assert keyless_worker.statistics.approved == 1
