"""What every exception promises: its place in the tree, its facts, a message of one line, a life after pickling."""

from __future__ import annotations

import copy
import inspect
import pickle
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

import aiokeyless
from aiokeyless import errors
from aiokeyless.errors import (
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
from aiokeyless.models import ApprovalTicket, Operation, Secret, payload_digest

if TYPE_CHECKING:
    from collections.abc import Callable

KEY = "sdk-key-0123456789"
PAYLOAD = "Approve wire transfer of $500"
PATH = "/v2/operations/txn-1"

# Each class with the classes it stands directly under: the tree of the design, builtin bases included.
TREE: dict[type[KeylessError], tuple[type[BaseException], ...]] = {
    KeylessError: (Exception,),
    ConfigurationError: (KeylessError, ValueError),
    InvalidIdentifierError: (ConfigurationError,),
    ClientClosedError: (KeylessError, RuntimeError),
    TransportError: (KeylessError,),
    RequestTimeoutError: (TransportError, TimeoutError),
    DecodeError: (KeylessError,),
    NotJsonError: (DecodeError,),
    StatusError: (KeylessError,),
    BadRequestError: (StatusError,),
    AuthenticationError: (StatusError,),
    PermissionDeniedError: (StatusError,),
    NotFoundError: (StatusError,),
    NotAcceptableError: (StatusError,),
    ConflictError: (StatusError,),
    UnsupportedMediaTypeError: (StatusError,),
    AlreadyApprovedError: (ConflictError,),
    RateLimitError: (StatusError,),
    ServerError: (StatusError,),
    ApprovalError: (KeylessError,),
    ApprovalTimeoutError: (ApprovalError, TimeoutError),
    ApprovalUnknownError: (ApprovalTimeoutError,),
    OperationMismatchError: (ApprovalError,),
    InconsistentOperationError: (ApprovalError,),
}
every_class = pytest.mark.parametrize("kind", list(TREE), ids=lambda kind: kind.__name__)


def operation() -> Operation:
    return Operation(
        id=1,
        timestamp="2020-01-02T03:04:05.68",
        node_id="node",
        user_id="AB",
        api_key=Secret(KEY),
        operation_id="txn-1",
        operation_payload=PAYLOAD,
        result=False,
        state="pending",
    )


def ticket() -> ApprovalTicket:
    return ApprovalTicket(
        operation_id="txn-1",
        user_id="AB",
        payload_sha256=payload_digest(PAYLOAD),
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        expires_at=datetime(2026, 1, 1, 0, 2, tzinfo=UTC),
    )


def of_a_call(kind: type[StatusError | TransportError | DecodeError]) -> KeylessError:
    error: StatusError | TransportError | DecodeError
    if issubclass(kind, StatusError):
        error = kind(
            status=599,
            method="GET",
            path=PATH,
            request_id="req-1",
            retry_after=1.5,
            detail="the body said so",
            advice="advice of the moment",
        )
    elif issubclass(kind, TransportError):
        error = kind("cut off", method="POST", path=PATH, sent=False)
    else:
        error = kind("wrong shape", status=200, method="GET", path=PATH, request_id="req-1")
    error.operation_id = "txn-1"
    return error


def example(kind: type[KeylessError]) -> KeylessError:
    """Make an exception with every fact filled in, none of them a default."""
    if issubclass(kind, StatusError | TransportError | DecodeError):
        return of_a_call(kind)
    if issubclass(kind, ApprovalError):
        return kind(
            "no approval",
            operation_id="txn-1",
            last_operation=operation(),
            last_error=ServerError(status=503, method="GET", path=PATH, retry_after=2.0),
            polls=7,
            elapsed=120.5,
            ticket=ticket(),
        )
    return kind("what happened; what to do")


def facts(error: BaseException) -> dict[str, object]:
    """Return the attributes, nested errors unfolded, since exceptions compare by identity."""
    return {
        name: (type(value), facts(value)) if isinstance(value, BaseException) else value
        for name, value in vars(error).items()
    }


def pickled(error: KeylessError) -> KeylessError:
    again = pickle.loads(pickle.dumps(error))  # noqa: S301  # our own bytes
    assert isinstance(again, KeylessError)
    return again


# -- the tree


def test_no_exception_is_missing_from_the_tree_and_none_is_extra() -> None:
    classes = {value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, BaseException)}
    assert classes == set(TREE)


@every_class
def test_a_class_stands_where_the_design_puts_it(kind: type[KeylessError]) -> None:
    assert kind.__bases__ == TREE[kind]


@every_class
def test_every_exception_is_a_public_name(kind: type[KeylessError]) -> None:
    assert kind.__name__ in errors.__all__
    assert getattr(aiokeyless, kind.__name__) is kind
    assert kind.__name__ in aiokeyless.__all__


@every_class
def test_a_docstring_says_what_the_caller_should_do(kind: type[KeylessError]) -> None:
    doc = vars(kind)["__doc__"]  # its own, not its parent's
    assert "What to do: " in doc


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (ConfigurationError, ValueError),
        (InvalidIdentifierError, ValueError),
        (ClientClosedError, RuntimeError),
        (RequestTimeoutError, TimeoutError),
        (ApprovalTimeoutError, TimeoutError),
        (ApprovalUnknownError, TimeoutError),
    ],
    ids=lambda kind: kind.__name__,
)
def test_code_that_knows_only_the_builtin_catches_it(kind: type[KeylessError], builtin: type[Exception]) -> None:
    with pytest.raises(builtin):
        raise example(kind)


# -- messages


@every_class
def test_a_message_is_one_line(kind: type[KeylessError]) -> None:
    message = str(example(kind))
    assert message.strip()
    assert message.isprintable()


@pytest.mark.parametrize("kind", [kind for kind in TREE if issubclass(kind, StatusError)], ids=lambda k: k.__name__)
def test_a_status_error_says_method_path_status_and_what_to_do_and_not_the_body(kind: type[StatusError]) -> None:
    error = kind(status=418, method="GET", path=PATH, detail="a quote of your payload")
    assert str(error) == f"GET {PATH} answered 418: {kind.advice}"
    assert error.advice.isprintable()
    assert "a quote of your payload" not in repr(error)


def test_no_two_status_errors_give_the_same_advice() -> None:
    advice = [kind.advice for kind in TREE if issubclass(kind, StatusError)]
    assert len(set(advice)) == len(advice)


def test_advice_for_this_one_status_wins_over_the_class_own() -> None:
    error = StatusError(status=302, method="GET", path=PATH, advice="a redirect")
    assert str(error) == f"GET {PATH} answered 302: a redirect"
    assert error.advice == StatusError.advice


# -- facts


def test_facts_that_nobody_gave_are_absent_not_invented() -> None:
    assert facts(TransportError("m", method="GET", path=PATH)) == {"method": "GET", "path": PATH, "sent": True}
    assert facts(DecodeError("m", status=200, method="GET", path=PATH))["request_id"] is None
    assert facts(StatusError(status=302, method="GET", path=PATH)) == {
        "status": 302,
        "method": "GET",
        "path": PATH,
        "request_id": None,
        "retry_after": None,
        "detail": None,
    }
    assert facts(ApprovalError("m", operation_id="txn-1")) == {
        "operation_id": "txn-1",
        "last_operation": None,
        "last_error": None,
        "polls": 0,
        "elapsed": 0.0,
        "ticket": None,
    }


# -- copies and pickles

again_by = pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickled], ids=["copy", "deepcopy", "pickle"])


@every_class
@again_by
def test_a_copy_has_the_class_the_message_and_every_fact(
    again: Callable[[KeylessError], KeylessError], kind: type[KeylessError]
) -> None:
    error = example(kind)
    expected = facts(error)
    if again is pickled and isinstance(error, ApprovalError):
        assert isinstance(error.last_operation, Operation)
        expected["last_operation"] = pickle.loads(pickle.dumps(error.last_operation))  # noqa: S301
    copied = again(error)
    assert type(copied) is kind
    assert copied.args == error.args
    assert str(copied) == str(error)
    assert repr(copied) == repr(error)
    assert facts(copied) == expected


@again_by
def test_notes_are_copied_too(again: Callable[[KeylessError], KeylessError]) -> None:
    error = example(RequestTimeoutError)
    error.add_note("in the nightly run")
    assert again(error).__notes__ == ["in the nightly run"]


@pytest.mark.parametrize("kind", [kind for kind in TREE if issubclass(kind, ApprovalError)], ids=lambda k: k.__name__)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_pickle_holds_the_key_of_the_last_operation(kind: type[ApprovalError], protocol: int) -> None:
    error = example(kind)
    assert isinstance(error, ApprovalError)
    data = pickle.dumps(error, protocol)
    assert KEY.encode() not in data
    again = pickle.loads(data)  # noqa: S301
    assert again.last_operation.api_key.reveal() == ""
    assert error.last_operation is not None
    assert error.last_operation.api_key == Secret(KEY)  # the original keeps it


def test_an_exception_raised_again_after_pickling_is_caught_as_what_it_was() -> None:
    with pytest.raises(TimeoutError, match="no approval") as caught:
        raise pickled(example(ApprovalUnknownError))
    assert isinstance(caught.value, ApprovalUnknownError)
    assert caught.value.last_error is not None


def test_reprs_and_messages_show_neither_key_nor_payload() -> None:
    for kind in TREE:
        error = example(kind)
        assert KEY not in f"{error!r} {error} {facts(error)!r}"
        assert PAYLOAD not in f"{error!r} {error} {facts(error)!r}"
