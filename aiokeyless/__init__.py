"""aiokeyless: an asyncio client for the Keyless (PingOne Recognize) Operations API that waits for a human, correctly.

All names of the client are exported here; the sandbox is in `aiokeyless.sandbox`, the worker in `aiokeyless.worker`.
"""

from ._version import __version__
from .client import DefaultTimeout, IfExists, IfMissing, KeylessClient, OnPoll, WaitTimeout
from .errors import (
    AlreadyApprovedError,
    ApprovalError,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    AuthenticationError,
    BadRequestError,
    ClientClosedError,
    ConfigurationError,
    ConflictError,
    DecodeError,
    InconsistentOperationError,
    InvalidIdentifierError,
    KeylessError,
    NotAcceptableError,
    NotFoundError,
    NotJsonError,
    OperationMismatchError,
    PermissionDeniedError,
    RateLimitError,
    RequestTimeoutError,
    ServerError,
    StatusError,
    TransportError,
    UnsupportedMediaTypeError,
)
from .models import AuthType, Operation, OperationState, PendingOperation, Region, Secret
from .reports import ApprovalOutcome, ApprovalUpdate, Approved, ClientStatistics, NotApproved
from .schedule import wait_adaptive
from .ticket import ApprovalTicket

__all__ = [
    "AlreadyApprovedError",
    "ApprovalError",
    "ApprovalOutcome",
    "ApprovalTicket",
    "ApprovalTimeoutError",
    "ApprovalUnknownError",
    "ApprovalUpdate",
    "Approved",
    "AuthType",
    "AuthenticationError",
    "BadRequestError",
    "ClientClosedError",
    "ClientStatistics",
    "ConfigurationError",
    "ConflictError",
    "DecodeError",
    "DefaultTimeout",
    "IfExists",
    "IfMissing",
    "InconsistentOperationError",
    "InvalidIdentifierError",
    "KeylessClient",
    "KeylessError",
    "NotAcceptableError",
    "NotApproved",
    "NotFoundError",
    "NotJsonError",
    "OnPoll",
    "Operation",
    "OperationMismatchError",
    "OperationState",
    "PendingOperation",
    "PermissionDeniedError",
    "RateLimitError",
    "Region",
    "RequestTimeoutError",
    "Secret",
    "ServerError",
    "StatusError",
    "TransportError",
    "UnsupportedMediaTypeError",
    "WaitTimeout",
    "__version__",
    "wait_adaptive",
]
