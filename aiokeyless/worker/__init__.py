"""Waits that survive restarts and outgrow one process: workers at a broker.

An application stores a request with `submit_approval`; any number of workers process it, one poll a delivery, and keep
nothing of it in memory; the outcome is read with `next_outcome`. The brokers are in `aiokeyless.worker.sqlite` and its
siblings. If one process is enough, `aiokeyless.KeylessClient` is simpler.
"""

from aiokeyless.errors import BrokerError, InvalidRequestError
from aiokeyless.events import Inspection

from .applications import Submission, approval_request, next_outcome, submit_approval
from .broker import Broker
from .healthz import serve_health
from .messages import ApprovalEvent, ApprovalRequest, FailureReason, Outcome
from .reporting import WorkerStatistics
from .service import ApprovalWorker

__all__ = [
    "ApprovalEvent",
    "ApprovalRequest",
    "ApprovalWorker",
    "Broker",
    "BrokerError",
    "FailureReason",
    "Inspection",
    "InvalidRequestError",
    "Outcome",
    "Submission",
    "WorkerStatistics",
    "approval_request",
    "next_outcome",
    "serve_health",
    "submit_approval",
]
