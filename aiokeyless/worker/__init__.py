"""Waits that survive restarts and outgrow one machine: a worker on NATS JetStream (extra ``nats``).

An application publishes a request with `submit_approval`; any number of workers process it, one poll a delivery, and
keep nothing of it in memory; the outcome is read with `approval_outcomes`. Where one process is enough,
`aiokeyless.KeylessClient` is simpler.
"""

from aiokeyless.errors import BrokerError, InvalidRequestError

from .applications import Submission, approval_outcomes, submit_approval
from .event_keys import EventKeys
from .healthz import serve_health
from .memory import MemoryBroker
from .messages import ApprovalEvent, ApprovalRequest, FailureReason, Outcome
from .nats.broker import is_outcome
from .nats.fleet import Fleet
from .nats.streams import StreamSettings
from .reporting import WorkerStatistics
from .service import ApprovalWorker

__all__ = [
    "ApprovalEvent",
    "ApprovalRequest",
    "ApprovalWorker",
    "BrokerError",
    "EventKeys",
    "FailureReason",
    "Fleet",
    "InvalidRequestError",
    "MemoryBroker",
    "Outcome",
    "StreamSettings",
    "Submission",
    "WorkerStatistics",
    "approval_outcomes",
    "is_outcome",
    "serve_health",
    "submit_approval",
]
