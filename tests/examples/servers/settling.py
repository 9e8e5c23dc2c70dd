"""What Celery runs in `test_servers.py`: the program of the examples, which settles one payment."""

from __future__ import annotations

from celery.signals import worker_ready
from celery_tasks import app, ask, settle

app.conf.broker_transport_options = {"polling_interval": 0.05}


@worker_ready.connect  # type: ignore[untyped-decorator]
def submit(**_: object) -> None:
    """Ask for a payment, and submit the task that waits for it."""
    settle.delay(ask("C0FFEE"))
