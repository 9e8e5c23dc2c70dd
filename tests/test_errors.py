"""What every exception promises: its place in the tree, its facts, a message of one line, a life after pickling."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

import aiokeyless
from aiokeyless import KeylessClient, errors, wait_adaptive
from aiokeyless._validation import check_operation_id, check_text, check_user_id
from aiokeyless.errors import (
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
from aiokeyless.models import Operation, Secret
from aiokeyless.sandbox import Sandbox
from aiokeyless.schedule import next_delay
from aiokeyless.ticket import ApprovalTicket, payload_digest

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
    CachedAnswerError: (TransportError,),
    DecodeError: (KeylessError,),
    NotJsonError: (DecodeError,),
    StatusError: (KeylessError,),
    BadRequestError: (StatusError,),
    AuthenticationError: (StatusError,),
    PermissionDeniedError: (StatusError,),
    NotFoundError: (StatusError,),
    NotAcceptableError: (StatusError,),
    ConflictError: (KeylessError,),
    ConflictStatusError: (ConflictError, StatusError),
    UnsupportedMediaTypeError: (StatusError,),
    AlreadyApprovedError: (ConflictStatusError,),
    RateLimitError: (StatusError,),
    ServerError: (StatusError,),
    ApprovalError: (KeylessError,),
    ApprovalTimeoutError: (ApprovalError, TimeoutError),
    ApprovalUnknownError: (ApprovalTimeoutError,),
    OperationMismatchError: (ApprovalError,),
    InconsistentOperationError: (ApprovalError,),
    AmbiguousUserError: (KeylessError,),
    SignatureError: (KeylessError,),
    BrokerError: (KeylessError,),
    InvalidRequestError: (KeylessError,),
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
    if isinstance(error, AlreadyApprovedError):
        error.ticket = ticket()
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
    if issubclass(kind, AmbiguousUserError):
        return kind("two users", user_ids=("AB", "CD"))
    if issubclass(kind, SignatureError):
        return kind(SignatureReason.WRONG_DATA)
    if issubclass(kind, ConfigurationError):
        return kind("what happened; what to do", argument="user_id")
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


def test_each_reason_to_refuse_a_signature_has_words_of_its_own() -> None:
    messages = {str(SignatureError(reason)) for reason in SignatureReason}
    assert len(messages) == len(SignatureReason)


def test_no_two_status_errors_give_the_same_advice() -> None:
    advice = [kind.advice for kind in TREE if issubclass(kind, StatusError)]
    assert len(set(advice)) == len(advice)


def test_advice_for_this_one_status_wins_over_the_class_own() -> None:
    error = StatusError(status=302, method="GET", path=PATH, advice="a redirect")
    assert str(error) == f"GET {PATH} answered 302: a redirect"
    assert error.advice == "a redirect"


def test_a_request_about_users_gets_no_advice_about_operations() -> None:
    missing = NotFoundError(status=404, method="GET", path="/v2/external-users/a/users")
    assert str(missing).endswith("answered 404: no such user, external user id or device; check the id")
    taken = ConflictStatusError(status=409, method="POST", path="/v2/users/AB/external-user")
    assert str(taken).endswith("linked already; to change the link: update_external_user")


# -- facts


def test_facts_that_were_not_given_are_absent_not_invented() -> None:
    assert facts(ConfigurationError("m")) == {"argument": None}
    assert facts(TransportError("m", method="GET", path=PATH)) == {"method": "GET", "path": PATH, "sent": True}
    assert facts(DecodeError("m", status=200, method="GET", path=PATH))["request_id"] is None
    assert facts(StatusError(status=302, method="GET", path=PATH)) == {
        "status": 302,
        "method": "GET",
        "path": PATH,
        "request_id": None,
        "retry_after": None,
        "detail": None,
        "advice": StatusError.advice,
    }
    assert facts(ApprovalError("m", operation_id="txn-1")) == {
        "operation_id": "txn-1",
        "last_operation": None,
        "last_error": None,
        "polls": 0,
        "elapsed": 0.0,
        "ticket": None,
    }


# -- what is transient: rule 4


@every_class
def test_without_a_status_it_is_transient_if_no_usable_answer_came(kind: type[KeylessError]) -> None:
    if not issubclass(kind, StatusError):
        assert example(kind).is_transient is (issubclass(kind, TransportError) or kind is NotJsonError)


def test_a_signature_can_be_verified_later_if_the_keys_were_unavailable() -> None:
    for reason in SignatureReason:
        assert SignatureError(reason).is_transient is (reason is SignatureReason.KEYS_UNAVAILABLE)


# -- the argument that is wrong


def client(**options: Any) -> KeylessClient:
    return KeylessClient(**{"api_key": "key", **options})


def stored() -> Sandbox:
    sandbox = Sandbox()
    sandbox.approve("txn-1", user_id="AB")
    return sandbox


def strategy_that_fails(_: object) -> float:
    raise ZeroDivisionError


wrong: Any = object()
broken_strategies: Any = (strategy_that_fails, lambda _: wrong)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        *(("operation_id", partial(check_operation_id, value)) for value in (wrong, "", "..", "a\nb")),
        *(("user_id", partial(check_user_id, value)) for value in (wrong, "xyz")),
        *(("external_user_id", partial(check_text, value, "external_user_id")) for value in (wrong, "\ud800")),
        *(("api_key", partial(client, api_key=value)) for value in (None, wrong, " ", "k\u00e9y", "a\nb", "a\0b")),
        *(("region", partial(client, region=value)) for value in ("mars", "")),
        *(("base_url", partial(client, base_url=value)) for value in (wrong, "", "https://a b", "http://example.com")),
        ("session", lambda: client(session=wrong)),
        *(("request_timeout", partial(client, request_timeout=value)) for value in (wrong, 10**400, 0, math.inf)),
        *(("max_attempts", partial(client, max_attempts=value)) for value in (0, 2.5, True)),
        ("max_in_flight", lambda: client(max_in_flight=0)),
        *(
            ("max_polls_per_second", partial(client, max_polls_per_second=value))
            for value in (0, -1, math.nan, math.inf, 10**400, True, "10")
        ),
        *(("schedule", partial(client, schedule=value)) for value in (wrong, wait_adaptive)),
        ("target", lambda: client().watch_approval(wrong)),
        ("operation_id", lambda: client().watch_approval("")),
        ("targets", lambda: client().wait_for_approvals("txn-1")),
        ("timeout", lambda: client().watch_approval("txn-1", timeout=0)),
        ("if_missing", lambda: client().watch_approval("txn-1", if_missing=wrong)),
        ("poll_cost", lambda: wait_adaptive(poll_cost=0)),
        *(
            ("schedule", partial(next_delay, strategy, attempt_number=1, since_start=0.0))
            for strategy in broken_strategies
        ),
        ("operation_id", lambda: Sandbox().approve("nope")),
        ("operation_id", lambda: Sandbox().forget("nope")),
        ("user_id", lambda: Sandbox().enroll("xyz")),
        ("operation_id", lambda: Sandbox().approve("", user_id="AB")),
        ("operation_payload", lambda: Sandbox().approve("txn-1", user_id="AB", operation_payload="\ud800")),
        ("auth_type", lambda: stored().approve("txn-1", auth_type="voice")),
        *(("user_id", partial(stored().approve, "txn-1", user_id=value)) for value in ("xyz", "AC")),
        ("colour", lambda: stored().tamper("txn-1", colour="red")),
        (None, lambda: client(region="eu", base_url="https://example.com")),
        (None, lambda: stored().tamper("txn-1", result=wrong)),
        (None, lambda: stored().url),
    ],
)
def test_a_configuration_error_names_the_wrong_argument(argument: str | None, call: Callable[[], object]) -> None:
    with pytest.raises(ConfigurationError) as error:
        call()
    assert error.value.argument == argument


async def test_a_configuration_error_of_a_call_names_its_argument() -> None:
    async with client() as some:
        for argument, call in (
            ("if_exists", some.create_operation("AB", if_exists=wrong)),
            ("expires_in", some.create_operation("AB", expires_in=1e12)),
            ("on_poll", some.wait_for_approval("txn-1", on_poll=wrong)),
            ("seconds", some.hold_for_approval("txn-1", seconds=0)),
            ("target", some.hold_for_approval(wrong, seconds=1)),
        ):
            with pytest.raises(ConfigurationError) as error:
                await call
            assert error.value.argument == argument


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


def test_reprs_and_messages_show_neither_key_nor_payload() -> None:
    for kind in TREE:
        error = example(kind)
        assert KEY not in f"{error!r} {error} {facts(error)!r}"
        assert PAYLOAD not in f"{error!r} {error} {facts(error)!r}"
