"""What the result of a poll means for a wait, as one table of cases.

The pure function (tests/_rules/test_outcome.py), the poller over real HTTP (tests/_waits/test_outcome.py) and the
worker (tests/worker/test_outcome.py) run the same table. It names the cases as docs/rules.md does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import msgspec

from aiokeyless import (
    AuthenticationError,
    BadRequestError,
    CachedAnswerError,
    DecodeError,
    KeylessError,
    NotFoundError,
    NotJsonError,
    Operation,
    PermissionDeniedError,
    RateLimitError,
    ServerError,
    StartedBy,
    StatusError,
    TransportError,
)
from aiokeyless._rules.approval import Rejection
from aiokeyless.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Callable

OPERATION_ID: Final = "txn-1"
USER_ID: Final = "0123456789ABCDEF"
PAYLOAD: Final = "Pay 40"
AUTH_TYPE: Final = "biom"
EXTERNAL_USER_ID: Final = "ann@example.com"
_PATH: Final = f"/v2/operations/{OPERATION_ID}"


class Result(Enum):
    """What a poll comes to, in the words of docs/rules.md: a verdict, or its name at the deadline."""

    APPROVED = auto()
    PENDING = auto()
    TRANSIENT = auto()
    TIMED_OUT = auto()
    UNANSWERED = auto()
    REJECTED = auto()
    FAILED = auto()


#: What each case of docs/rules.md comes to: before the deadline, and by the final poll.
RESULTS: Final = {
    "O1": (Result.APPROVED, Result.APPROVED),
    "O2": (Result.REJECTED, Result.REJECTED),
    "O3": (Result.PENDING, Result.TIMED_OUT),
    "O4": (Result.TRANSIENT, Result.UNANSWERED),
    "O5": (Result.TRANSIENT, Result.UNANSWERED),
    "O6": (Result.PENDING, Result.TIMED_OUT),
    "O7": (Result.FAILED, Result.FAILED),
}


class WorkerDoes(Enum):
    """What a worker does where no result of a wait says it."""

    CREATE = auto()
    """It creates the operation."""
    END = auto()
    """It ends, and leaves the request to another worker."""


WorkerResult: TypeAlias = Result | WorkerDoes
#: Has a sandbox answer every poll of an operation in some way from now on.
Arrangement: TypeAlias = "Callable[[Sandbox, str], object]"


@dataclass(frozen=True)
class WorkerDiffers:
    """Where the worker does something else than the table says.

    Attributes:
        row: The first cell of the row of "Where the engines differ" in docs/rules.md that says why.
        before: What it does before the deadline.
        final: What it does after the final poll.
    """

    row: str
    before: WorkerResult
    final: WorkerResult


@dataclass(frozen=True, kw_only=True)
class OutcomeCase:
    """One case.

    Attributes:
        name: What the poll brings.
        rule: Number of the case in docs/rules.md.
        answer: The result of the poll.
        arrange: Has a sandbox answer every poll of the operation so from now on.
        rejection: Why the answer is rejected, where it is.
        was_seen: Whether an earlier poll found the operation.
        is_young: Whether the operation was created just now.
        if_missing: What a 404 means to the caller of a wait.
        started_by: Who starts the operation, as its ticket or its request says.
        worker: Where the worker must differ.
    """

    name: str
    rule: str
    answer: Operation | KeylessError
    arrange: Arrangement
    rejection: Rejection | None = None
    was_seen: bool = False
    is_young: bool = False
    if_missing: Literal["raise", "wait"] = "raise"
    started_by: StartedBy = "backend"
    worker: WorkerDiffers | None = None

    def __str__(self) -> str:
        return f"{self.rule}: {self.name}"

    @property
    def before(self) -> Result:
        """What a poll before the deadline means."""
        return RESULTS[self.rule][0]

    @property
    def final(self) -> Result:
        """What the final poll means."""
        return RESULTS[self.rule][1]

    @property
    def worker_before(self) -> WorkerResult:
        """What the worker does after a poll before the deadline."""
        return self.before if self.worker is None else self.worker.before

    @property
    def worker_final(self) -> WorkerResult:
        """What the worker does after the final poll."""
        return self.final if self.worker is None else self.worker.final


# -- what the sandbox is told


def _lie(**fields: object) -> Arrangement:
    return lambda sandbox, operation_id: sandbox.tamper(operation_id, **fields)


def _answer(status: int, **options: Any) -> Arrangement:
    return lambda sandbox, _: sandbox.fail_next(status, times=None, method="GET", **options)


def _answer_approval_with_two_results(sandbox: Sandbox, operation_id: str) -> None:
    body = msgspec.json.encode(APPROVED).replace(b'"result":true', b'"result":false,"result":true')
    _answer(200, body=body)(sandbox, operation_id)


# -- the cases

PENDING: Final = Operation(
    id=1,
    timestamp="2026-01-02T03:04:05.68",
    node_id="node",
    user_id=USER_ID,
    external_user_id=EXTERNAL_USER_ID,
    operation_id=OPERATION_ID,
    operation_payload=PAYLOAD,
    result=False,
    state="pending",
)

APPROVED: Final = msgspec.structs.replace(PENDING, state="approved", result=True, auth_type=AUTH_TYPE)


def _cached(name: str, status: int, age: int) -> OutcomeCase:
    """An answer that a cache stored so many seconds ago."""
    answer = CachedAnswerError("stored", method="GET", path=_PATH)
    body = msgspec.json.encode(PENDING) if status == 200 else None
    return _transient(f"{name}, from a cache", answer, _answer(status, body=body, headers={"Age": f"{age}"}))


def _rejected(name: str, rejection: Rejection, **fields: object) -> OutcomeCase:
    """An answer that claims an approval, but for what is named, and is none."""
    lie = {"state": "approved", "result": True, "auth_type": AUTH_TYPE, **fields}
    answer = msgspec.structs.replace(PENDING, **lie)
    return OutcomeCase(name=name, rule="O2", answer=answer, arrange=_lie(**lie), rejection=rejection)


def _transient(name: str, answer: KeylessError, arrange: Arrangement) -> OutcomeCase:
    return OutcomeCase(name=name, rule="O4", answer=answer, arrange=arrange)


def _odd(
    name: str, answer: KeylessError, arrange: Arrangement, worker: WorkerDiffers | None = None
) -> tuple[OutcomeCase, OutcomeCase]:
    """An answer that ends a wait, but not once the operation was seen."""
    odd = OutcomeCase(name=name, rule="O7", answer=answer, arrange=arrange, worker=worker or _CLAIMED)
    return replace(odd, name=f"{name}, once it was seen", rule="O5", was_seen=True, worker=worker), odd


def _status(kind: type[StatusError], status: int, *, retry_after: float | None = None) -> StatusError:
    return kind(status=status, method="GET", path=_PATH, retry_after=retry_after)


def _undecoded(kind: type[DecodeError]) -> DecodeError:
    return kind("cannot be decoded", status=200, method="GET", path=_PATH)


_CREATES: Final = WorkerDiffers("a 404 (O5, O6, O7)", WorkerDoes.CREATE, Result.UNANSWERED)
_ENDS: Final = WorkerDiffers("401 (O5, O7)", WorkerDoes.END, WorkerDoes.END)
_CLAIMED: Final = WorkerDiffers("another odd answer (O5, O7)", Result.TRANSIENT, Result.UNANSWERED)


def _missing(name: str, rule: str, *, worker: WorkerDiffers | None = _CREATES, **circumstances: Any) -> OutcomeCase:
    missing = _status(NotFoundError, 404)
    return OutcomeCase(name=name, rule=rule, answer=missing, arrange=Sandbox.forget, worker=worker, **circumstances)


CASES: Final = (
    OutcomeCase(
        name="approved",
        rule="O1",
        answer=APPROVED,
        arrange=Sandbox.approve,
    ),
    _rejected("approved, and result is false", Rejection.RESULT_IS_FALSE, result=False),
    _rejected("a state that is not documented", Rejection.UNKNOWN_STATE, state="denied"),
    _rejected("another operation", Rejection.OTHER_OPERATION, operation_id="txn-2"),
    _rejected("another user", Rejection.OTHER_USER, user_id="BAD"),
    _rejected("another payload", Rejection.OTHER_PAYLOAD, operation_payload="Pay 4000"),
    _rejected("another external user", Rejection.OTHER_EXTERNAL_USER, external_user_id="eve@example.com"),
    _rejected("pending, with another payload", Rejection.OTHER_PAYLOAD, state="pending", operation_payload="Pay 4000"),
    _rejected("approved by a PIN", Rejection.OTHER_AUTH_TYPE, auth_type="pin"),
    _rejected("approved by no factor", Rejection.OTHER_AUTH_TYPE, auth_type=None),
    _rejected("pending, with a PIN", Rejection.OTHER_AUTH_TYPE, state="pending", auth_type="pin"),
    OutcomeCase(name="pending", rule="O3", answer=PENDING, arrange=lambda *_: None),
    OutcomeCase(
        name="pending, and result is true",
        rule="O3",
        answer=msgspec.structs.replace(PENDING, result=True),
        arrange=_lie(result=True),
    ),
    _transient("500", _status(ServerError, 500), _answer(500)),
    _transient("503", _status(ServerError, 503), _answer(503)),
    _transient("503 with Retry-After", _status(ServerError, 503, retry_after=1.0), _answer(503, retry_after=1)),
    _transient("429 with Retry-After", _status(RateLimitError, 429, retry_after=1.0), _answer(429, retry_after=1)),
    _transient("408", _status(StatusError, 408), _answer(408)),
    _transient("425", _status(StatusError, 425), _answer(425)),
    _transient(
        "a dropped connection",
        TransportError("dropped", method="GET", path=_PATH),
        lambda sandbox, _: sandbox.drop_next(times=None, method="GET"),
    ),
    _transient(
        "a page of a gateway's, with 200",
        _undecoded(NotJsonError),
        _answer(200, body=b"<html>Welcome</html>", content_type="text/html"),
    ),
    _cached("pending", 200, 2),
    _cached("404", 404, 120),
    replace(_cached("pending that is a second old", 200, 1), rule="O3", answer=PENDING),
    OutcomeCase(
        name="approved, from a cache",
        rule="O1",
        answer=APPROVED,
        arrange=_answer(200, body=msgspec.json.encode(APPROVED), headers={"Age": "120"}),
    ),
    _missing("404, once the operation was seen", "O5", was_seen=True),
    _missing("404 of a young operation", "O6", is_young=True),
    _missing("404 that is to be waited for", "O6", if_missing="wait"),
    _missing("404 of what the phone will start", "O6", started_by="phone", worker=None),
    _missing("404 otherwise", "O7"),
    *_odd("401", _status(AuthenticationError, 401), _answer(401), _ENDS),
    *_odd("400", _status(BadRequestError, 400), _answer(400)),
    *_odd("403", _status(PermissionDeniedError, 403), _answer(403)),
    *_odd("a redirect", _status(StatusError, 302), _answer(302, headers={"Location": "/elsewhere"})),
    *_odd("204", _status(StatusError, 204), _answer(204, body=b"")),
    *_odd("JSON of the wrong shape", _undecoded(DecodeError), _lie(state=1)),
    *_odd("an approval with result false and result true", _undecoded(DecodeError), _answer_approval_with_two_results),
)
