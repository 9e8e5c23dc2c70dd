"""Settings of gunicorn: `gunicorn -c gunicorn_conf.py flask_app:app`. A worker that ends closes its client first."""

import signal
import threading
from types import FrameType
from typing import Any

workers = 2  # they share the record of the payments
threads = 32  # each wait occupies one


def close() -> None:
    """Close the client of this worker. In Django, import it from your views."""
    from flask_app import keyless  # noqa: PLC0415  # gunicorn's master reads this file, too

    keyless.close()


def post_worker_init(worker: Any) -> None:
    """At SIGTERM, end the open waits. Otherwise gunicorn would wait for them."""

    def stop(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=close).start()
        worker.handle_exit(number, frame)

    signal.signal(signal.SIGTERM, stop)


def post_request(worker: Any, _request: object, _environ: object, _response: object) -> None:
    """Do the same in a worker that ends after `max_requests`: it gets no signal."""
    if not worker.alive:
        close()
