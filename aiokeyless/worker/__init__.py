"""Waits that survive restarts and outgrow one machine: a worker on NATS JetStream (extra ``nats``).

An application publishes a request with `submit_approval`; any number of workers see to it, one poll a delivery, with
nothing in their memory; the outcome is read with `approval_outcomes`. When one process is enough, a
`aiokeyless.KeylessClient` is simpler.
"""

from .applications import Submission, approval_outcomes, is_outcome, submit_approval
from .healthz import serve_health
from .messages import ApprovalEvent, ApprovalRequest, BrokerError, FailureReason, InvalidRequestError, Outcome
from .service import ApprovalWorker, WorkerStatistics
from .streams import StreamSettings

__all__ = [
    "ApprovalEvent",
    "ApprovalRequest",
    "ApprovalWorker",
    "BrokerError",
    "FailureReason",
    "InvalidRequestError",
    "Outcome",
    "StreamSettings",
    "Submission",
    "WorkerStatistics",
    "approval_outcomes",
    "is_outcome",
    "serve_health",
    "submit_approval",
]
