"""What the service sends and takes, and what a wait reports, as frozen msgspec structs; and `ApprovalTicket`.

Names are snake_case here and camelCase on the wire; unknown fields are ignored, so that a newer service does not
break an older client. Nothing here does I/O, and no ``repr`` shows a key or a payload.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

import msgspec

from ._validation import check_operation_id, check_text, check_user_id
from ._validation import finite_seconds as finite_seconds  # noqa: PLC0414
from ._validation import seconds as seconds  # noqa: PLC0414
from .errors import ConfigurationError, KeylessError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "ApprovalOutcome",
    "ApprovalTicket",
    "ApprovalUpdate",
    "AuthType",
    "ClientStatistics",
    "Operation",
    "OperationState",
    "PendingOperation",
    "Region",
    "Secret",
]


class Region(StrEnum):
    """The regions of the service; an API key belongs to one of them."""

    EU = "eu"
    US = "us"
    LATAM = "latam"
    SG = "sg"


class OperationState(StrEnum):
    """The documented values of `Operation.state`, which stays an open string."""

    PENDING = "pending"
    APPROVED = "approved"


class AuthType(StrEnum):
    """The documented values of ``auth_type``, which stays an open string."""

    BIOMETRIC = "biom"
    PIN = "pin"


class Secret:
    """A text that does not show itself: not in ``repr``, ``str``, ``format`` or a pickle.

    Pickled, it loses its text: what comes out of the pickle reveals ``""``.

    Args:
        text: The secret.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the text itself; the caller takes care of it from there."""
        return self._text

    def __repr__(self) -> str:
        return "Secret('***')"

    def __str__(self) -> str:
        return "***"

    def __format__(self, _spec: str) -> str:
        return "***"  # a width or a precision would betray the length

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        # surrogatepass: a key cut out of a hostile answer may hold anything, and comparing must not raise
        return hmac.compare_digest(
            self._text.encode("utf-8", "surrogatepass"), other._text.encode("utf-8", "surrogatepass")
        )

    def __hash__(self) -> int:
        return hash(self._text)

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, _memo: dict[int, object]) -> Secret:
        return self

    def __reduce__(self) -> tuple[type[Secret], tuple[str]]:
        return Secret, ("",)


class _Model(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The common manners of the structs: a ``repr`` that counts a payload's characters and does not show them."""

    def __rich_repr__(self) -> Iterator[tuple[str, object]]:  # type: ignore[override]  # msgspec's says Any
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if name == "operation_payload" and value is not None:
                yield name, _Redacted(value)
            else:
                yield name, value

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"{type(self).__name__}({fields})"


class _Redacted:
    """Stands for a payload in a ``repr``: an object of its own, since a string would be quoted by rich."""

    __slots__ = ("_length",)

    def __init__(self, payload: str) -> None:
        self._length = len(payload)

    def __repr__(self) -> str:
        return f"<{self._length} characters>"


# The documented form, digits as documented (nine at most), no zone.
_TIMESTAMP: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?", re.ASCII)


class Operation(_Model, frozen=True, kw_only=True):
    """One operation, as ``GET /v2/operations/{operationId}`` answers it.

    Attributes:
        id: The service's own number of the operation; any JSON number.
        timestamp: Creation time as the service wrote it; its zone is not documented.
        node_id: Name of the service that created it.
        user_id: The user, in hex.
        api_key: The customer's SDK API key, which the answer carries along; None where it does not.
        external_user_id: The customer's own id of the user, or None.
        operation_id: The customer's id of the operation.
        operation_payload: What the user is asked to approve, or None.
        result: True if the operation is approved, as the service says; see `is_approved`.
        auth_type: How the user approved, see `AuthType`; or None.
        state: ``"pending"`` or ``"approved"``, see `OperationState`; any other text is kept as it is.

    Source: Keyless documentation, Server API / Operations, "Get operation".
    """

    id: int | float
    timestamp: str
    node_id: str
    user_id: str
    api_key: Secret | None = None
    external_user_id: str | None = None
    operation_id: str
    operation_payload: str | None = None
    result: bool
    auth_type: str | None = None
    state: str

    @property
    def is_approved(self) -> bool:
        """Whether state and result both say so. Compare the ids yourself, or let `wait_for_approval` do it."""
        return self.state == OperationState.APPROVED and self.result is True

    @property
    def created_at(self) -> datetime | None:
        """`timestamp` as a naive datetime, cut to microseconds; None where the text is not in the documented form."""
        if _TIMESTAMP.fullmatch(self.timestamp) is None:
            return None
        try:
            return datetime.fromisoformat(self.timestamp)  # no zone is documented: none is invented
        except ValueError:  # the 31st of February
            return None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data by the names used here, payload included, ``api_key`` left out."""
        return {name: getattr(self, name) for name in self.__struct_fields__ if name != "api_key"}


_pack: Final = msgspec.json.Encoder().encode


def pack_pending(operation: Operation) -> bytes:
    """Return what only the answer tells of a pending operation: no names, no id and no state, which its wait knows."""
    values = (
        operation.id,
        operation.timestamp,
        operation.node_id,
        operation.user_id,
        None if operation.api_key is None else operation.api_key.reveal(),
        operation.external_user_id,
        operation.operation_payload,
        operation.result,
        operation.auth_type,
    )
    # Without the brackets, which makes it a copy: what msgspec returns has room behind its end, up to half of its size.
    return _pack(values)[1:-1]


def unpack_pending(packed: bytes, operation_id: str) -> Operation:
    """Return the operation that `pack_pending` was given."""
    number, timestamp, node_id, user_id, key, external_user_id, payload, result, auth_type = msgspec.json.decode(
        b"[%b]" % packed
    )
    return Operation(
        id=number,
        timestamp=timestamp,
        node_id=node_id,
        user_id=user_id,
        api_key=None if key is None else Secret(key),
        external_user_id=external_user_id,
        operation_id=operation_id,
        operation_payload=payload,
        result=result,
        auth_type=auth_type,
        state=OperationState.PENDING.value,
    )


class PendingOperation(_Model, frozen=True, kw_only=True):
    """One item of ``GET /v2/users/{userId}/operations/pending``.

    Attributes:
        operation_id: The customer's id of the operation.
        operation_payload: What the user is asked to approve, or None.
        external_user_id: The customer's own id of the user, or None.
        auth_type: See `AuthType`; or None.

    That an operation is absent from the list is no proof of its approval.

    Source: Keyless documentation, Server API / Operations, "Get pending operations".
    """

    operation_id: str
    operation_payload: str | None = None
    external_user_id: str | None = None
    auth_type: str | None = None


class ApprovalUpdate(_Model, frozen=True, kw_only=True):
    """What one poll of a wait showed.

    Attributes:
        operation: The operation as the service answered it; None where the poll failed or found none yet.
        error: The transient failure (or the 404 that counts as pending) of this poll, or None.
        polls: Polls sent on behalf of this wait so far.
        elapsed: Seconds since the wait began.
        next_poll_in: Seconds until the next poll is due, or None where this was the last one.
    """

    operation: Operation | None
    error: KeylessError | None
    polls: int
    elapsed: float
    next_poll_in: float | None


class ApprovalOutcome(_Model, frozen=True, kw_only=True):
    """How one of many waits ended: exactly one of `operation` and `error` is not None.

    Attributes:
        operation_id: The operation that was waited for.
        operation: The approved operation, or None.
        error: What `wait_for_approval` would have raised, or None.
    """

    operation_id: str
    operation: Operation | None
    error: KeylessError | None


class ClientStatistics(_Model, frozen=True, kw_only=True):
    """A client's waits at one instant, and its counts since it was made.

    Attributes:
        waiting: Waits under way.
        in_flight: Polls under way.
        polls: Polls sent.
        approvals: Waits that ended with an approval.
        timeouts: Waits that ended with `ApprovalTimeoutError`.
        transient_failures: Polls that failed for a passing reason.
        lag: Seconds by which the oldest due poll is late: over a second for long, and the client wants a larger
            ``max_in_flight`` or the process is too busy.
    """

    waiting: int
    in_flight: int
    polls: int
    approvals: int
    timeouts: int
    transient_failures: int
    lag: float


TICKET_VERSION: Final = 1
_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)


def payload_digest(payload: str | None) -> str:
    """SHA-256 of a payload's UTF-8 in hex; an absent payload and an empty one are the same."""
    # surrogatepass: a hostile answer may hold a lone surrogate, and comparing must not raise
    return hashlib.sha256((payload or "").encode("utf-8", "surrogatepass")).hexdigest()


class ApprovalTicket(msgspec.Struct, frozen=True, kw_only=True):
    """What must be remembered of a request for approval to resume the wait, in another process too.

    It holds no secret, and of the payload only its hash. `KeylessClient.create_operation` makes it, and
    `ApprovalTicket.for_operation` makes one for an operation that is known already.

    It is not signed: anyone who can write to the store that holds it can make a wait accept the approval of another
    operation, so compare the operation, the user and the payload with your own record. A payload that can be guessed
    ("Log in?", an amount) can be found from its hash, so protect a ticket like the payload itself.

    Attributes:
        operation_id: The customer's id of the operation.
        user_id: The user, in upper-case hex.
        external_user_id: The customer's own id of the user, or None.
        payload_sha256: SHA-256 of the payload's UTF-8, in hex; of nothing where there is no payload.
        created_at: When the service confirmed the operation: aware, UTC, by this machine's clock.
        expires_at: When waiting for it ends by default: aware, UTC.
        reconciled: True where the POST of this call was not confirmed, and the operation was found under its id with
            this content: it may be that of an earlier request, or of one that runs at the same time.
        version: Version of this form, 1.

    Raises:
        ConfigurationError: A field is not what it should be.
    """

    operation_id: str
    user_id: str
    external_user_id: str | None = None
    payload_sha256: str
    created_at: datetime
    expires_at: datetime
    reconciled: bool = False
    version: int = TICKET_VERSION

    def __post_init__(self) -> None:
        # A wait compares each answer with these: what can never agree is refused now, not after the user approved.
        check_operation_id(self.operation_id)
        msgspec.structs.force_setattr(self, "user_id", check_user_id(self.user_id))
        check_text(self.external_user_id, "external_user_id")
        digest: object = self.payload_sha256
        if not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
            raise ConfigurationError(
                "payload_sha256 of a ticket must be 64 lower-case hex digits", argument="payload_sha256"
            )
        for name in ("created_at", "expires_at"):
            msgspec.structs.force_setattr(self, name, _utc(getattr(self, name), name))

    @classmethod
    def for_operation(
        cls,
        operation_id: str,
        *,
        user_id: str,
        operation_payload: str | None = None,
        external_user_id: str | None = None,
        created_at: datetime | None = None,
        expires_in: float = 120.0,
    ) -> ApprovalTicket:
        """Make the ticket of an operation that is known, or that the phone will create.

        It binds a wait to a user and a payload: an approval of the same id by another user, or of another payload, is
        then refused. For an operation that the phone creates, wait for it with ``if_missing="wait"``.

        Args:
            operation_id: The customer's id of the operation.
            user_id: The user, in hex of either case.
            operation_payload: What the user is asked to approve. Default: nothing.
            external_user_id: Your own id of the user, compared where it is given. Default: not compared.
            created_at: When the operation was created, aware. Default: now.
            expires_in: Seconds from `created_at` until a wait for the ticket ends by default. Default: 120.

        Raises:
            ConfigurationError: An argument is wrong.
        """
        created_at = datetime.now(UTC) if created_at is None else _utc(created_at, "created_at")
        return cls(
            operation_id=operation_id,
            user_id=user_id,
            external_user_id=external_user_id,
            payload_sha256=payload_digest(check_text(operation_payload, "operation_payload")),
            created_at=created_at,
            expires_at=_later(created_at, expires_in),
        )

    def remaining(self, now: datetime | None = None) -> float:
        """Return the seconds left until `expires_at`, 0.0 once it has passed.

        Args:
            now: The instant to count from, aware; default: this machine's clock.

        Raises:
            ConfigurationError: `now` is naive.
        """
        if now is None:
            now = datetime.now(UTC)
        elif now.utcoffset() is None:
            raise ConfigurationError(
                "now must be an aware datetime, such as datetime.now(UTC); it has no zone", argument="now"
            )
        return max(0.0, (self.expires_at - now).total_seconds())

    def to_json(self) -> str:
        """Return the ticket as one line of JSON, for `from_json`."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> ApprovalTicket:
        """Read what `to_json` wrote.

        Args:
            text: The JSON.

        Raises:
            ConfigurationError: The text is not a valid ticket, or of a version that this library does not know.
        """
        try:
            version = msgspec.json.decode(text, type=_TicketVersion).version
            if version != TICKET_VERSION:
                raise ConfigurationError(
                    f"ticket version {version} is not known here, only {TICKET_VERSION}: it was written by another "
                    "release of aiokeyless; upgrade this one",
                    argument="text",
                )
            return msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, UnicodeError, RecursionError, TypeError) as error:
            raise ConfigurationError(
                f"not a valid approval ticket ({error}); pass what ApprovalTicket.to_json() returned", argument="text"
            ) from None


def _utc(moment: object, name: str) -> datetime:
    if not isinstance(moment, datetime):
        raise ConfigurationError(f"{name} of a ticket must be a datetime, not {type(moment).__name__}", argument=name)
    if moment.utcoffset() is None:
        raise ConfigurationError(
            f"{name} of a ticket must be an aware datetime, such as datetime.now(UTC)", argument=name
        )
    try:
        return moment.astimezone(UTC)
    except OverflowError:  # the first or the last day of the calendar, and another year in UTC
        raise ConfigurationError(f"{name} of a ticket must be in the years 1 to 9999, UTC", argument=name) from None


def _later(moment: datetime, expires_in: float) -> datetime:
    try:
        return moment + timedelta(seconds=finite_seconds(expires_in, "expires_in"))
    except OverflowError:
        raise ConfigurationError(
            f"expires_in must end before the year 10000, not be {expires_in!r} seconds", argument="expires_in"
        ) from None


class _TicketVersion(msgspec.Struct):
    """The part of a ticket that is read first: another version may have other fields."""

    version: int


class NewOperation(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Body of ``POST /v2/users/{userId}/operations``; what is absent is left out, not null."""

    operation_id: str
    operation_payload: str | None = None
    external_user_id: str | None = None


class CreateAnswer(msgspec.Struct, frozen=True):
    """Answer of ``POST /v2/users/{userId}/operations``: ``success`` is documented as always true."""

    success: bool


def decode_hook(kind: type, value: object) -> object:
    """Make a `Secret` of a JSON string, for msgspec decoders."""
    if kind is Secret and isinstance(value, str):
        return Secret(value)
    raise TypeError(f"Expected `str`, got `{type(value).__name__}`")  # msgspec adds the field's path
