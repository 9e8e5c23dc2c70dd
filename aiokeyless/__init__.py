"""aiokeyless: an asyncio client for the Keyless (PingOne Recognize) Operations API that waits for a human, correctly.

This module exports all names of the client. `aiokeyless.sandbox` has the sandbox, `aiokeyless.worker` the worker.
"""

from . import _interruption as _interruption  # first: the others take long

# isort: split
import logging

from ._version import __version__
from .client import IfExists, IfMissing, KeylessClient, OnCreated, OnPoll
from .errors import (
    AlreadyApprovedError,
    AmbiguousUserError,
    ApprovalError,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    AuthenticationError,
    BadRequestError,
    BrokerError,
    CachedAnswerError,
    ClientClosedError,
    ConfigurationError,
    ConflictError,
    ConflictStatusError,
    DecodeError,
    InconsistentOperationError,
    InvalidIdentifierError,
    InvalidRequestError,
    KeylessError,
    NotAcceptableError,
    NotFoundError,
    NotJsonError,
    OperationMismatchError,
    PermissionDeniedError,
    RateLimitError,
    RequestTimeoutError,
    ServerError,
    SignatureError,
    SignatureReason,
    StatusError,
    TransportError,
    UnsupportedMediaTypeError,
)
from .events import Listener
from .models import (
    Authentication,
    Authentications,
    AuthType,
    Device,
    ExternalUser,
    Operation,
    OperationState,
    PendingOperation,
    Region,
    Secret,
    StartedBy,
    User,
)
from .reports import ApprovalOutcome, ApprovalUpdate, Approved, ClientStatistics, NotApproved
from .schedule import wait_adaptive
from .ticket import ApprovalTicket, DefaultTimeout, WaitTimeout

# Without it, Python prints warnings of a library to stderr if the application has set up no log.
logging.getLogger("aiokeyless").addHandler(logging.NullHandler())

__all__ = [
    "AlreadyApprovedError",
    "AmbiguousUserError",
    "ApprovalError",
    "ApprovalOutcome",
    "ApprovalTicket",
    "ApprovalTimeoutError",
    "ApprovalUnknownError",
    "ApprovalUpdate",
    "Approved",
    "AuthType",
    "Authentication",
    "AuthenticationError",
    "Authentications",
    "BadRequestError",
    "BrokerError",
    "CachedAnswerError",
    "ClientClosedError",
    "ClientStatistics",
    "ConfigurationError",
    "ConflictError",
    "ConflictStatusError",
    "DecodeError",
    "DefaultTimeout",
    "Device",
    "ExternalUser",
    "IfExists",
    "IfMissing",
    "InconsistentOperationError",
    "InvalidIdentifierError",
    "InvalidRequestError",
    "KeylessClient",
    "KeylessError",
    "Listener",
    "NotAcceptableError",
    "NotApproved",
    "NotFoundError",
    "NotJsonError",
    "OnCreated",
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
    "SignatureError",
    "SignatureReason",
    "StartedBy",
    "StatusError",
    "TransportError",
    "UnsupportedMediaTypeError",
    "User",
    "WaitTimeout",
    "__version__",
    "wait_adaptive",
]
