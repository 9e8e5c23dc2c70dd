"""Waits that survive restarts and outgrow one process: workers at a broker.

An application stores a request with `submit_approval`, and reads the outcome with `next_outcome`. In between, any
number of workers process the request. They poll once for each delivery, and keep no wait in memory. The brokers are in
`aiokeyless.worker.sqlite` and its siblings. If one process is enough, `aiokeyless.KeylessClient` is simpler.
"""

from aiokeyless.errors import BrokerError, ConflictError, InvalidRequestError
from aiokeyless.events import Inspection

from .applications import Submission, next_outcome, request_to_json, submit_approval
from .approval_worker import ApprovalWorker
from .broker import Broker
from .healthz import serve_health
from .messages import ApprovalEvent, ApprovalRequest, FailureReason, Outcome, read_event
from .monitoring import WorkerStatistics

__all__ = [
    "ApprovalEvent",
    "ApprovalRequest",
    "ApprovalWorker",
    "Broker",
    "BrokerError",
    "ConflictError",
    "FailureReason",
    "Inspection",
    "InvalidRequestError",
    "Outcome",
    "Submission",
    "WorkerStatistics",
    "next_outcome",
    "read_event",
    "request_to_json",
    "serve_health",
    "submit_approval",
]
