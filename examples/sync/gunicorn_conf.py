"""Settings of gunicorn: `gunicorn -c gunicorn_conf.py flask_app:app`. A worker that ends closes its client first."""

import signal
import sys
import threading
from types import FrameType
from typing import Any

workers = 2  # one answers while the other one is recycled
threads = 32  # each wait occupies one


def post_worker_init(worker: Any) -> None:
    """At SIGTERM, end the open waits. Otherwise gunicorn would wait for them."""

    def stop(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=sys.modules["flask_app"].keyless.close).start()
        worker.handle_exit(number, frame)

    signal.signal(signal.SIGTERM, stop)


def post_request(worker: Any, _request: object, _environ: object, _response: object) -> None:
    """Do the same in a worker that ends after `max_requests`: it gets no signal."""
    if not worker.alive:
        sys.modules["flask_app"].keyless.close()
