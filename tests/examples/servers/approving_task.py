"""What Celery runs in `test_servers.py`: a client that was used before the pool forked, an approval in each task."""

from __future__ import annotations

import os

from approving import keyless
from celery import Celery
from celery.signals import worker_ready

app = Celery("approving", broker="memory://")
app.conf.broker_transport_options = {"polling_interval": 0.05}


@app.task  # type: ignore[untyped-decorator]  # Celery has no types
def approve() -> str:
    """Return the state of an approval and the number of the process, which Celery logs."""
    return f"{keyless.request_approval('C0FFEE').state} {os.getpid()}"


@worker_ready.connect  # type: ignore[untyped-decorator]
def submit(**_: object) -> None:
    """Submit some tasks."""
    for _number in range(6):
        approve.delay()
