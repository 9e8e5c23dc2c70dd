"""The service's requests and answers as frozen msgspec structs, their enums, and `Secret`.

Names are snake_case here and camelCase on the wire. Unknown fields are ignored, so that a newer service does not break
an older client. Nothing here does I/O, and no ``repr`` shows a key or a payload.
"""

from __future__ import annotations

import hmac
import re
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, ClassVar, Final, Literal, TypeAlias

import msgspec

__all__ = [
    "AuthType",
    "Authentication",
    "Authentications",
    "Device",
    "ExternalUser",
    "Operation",
    "OperationState",
    "PendingOperation",
    "Region",
    "Secret",
    "StartedBy",
    "User",
]

StartedBy: TypeAlias = Literal["backend", "phone"]
"""Who starts an operation: your backend creates it, or your app authenticates under an id that your backend gave it."""


class Region(StrEnum):
    """The regions of the service."""

    EU = "eu"
    US = "us"
    LATAM = "latam"
    SG = "sg"


class OperationState(StrEnum):
    """The documented values of `Operation.state`, which may have any other."""

    PENDING = "pending"
    APPROVED = "approved"


class AuthType(StrEnum):
    """The documented values of ``auth_type``, which may have any other."""

    BIOMETRIC = "biom"
    PIN = "pin"


class Secret:
    """A text that ``repr``, ``str`` and ``format`` do not show.

    Pickling drops the text: an unpickled secret reveals ``""``.

    Args:
        text: The secret.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the text; the caller must protect it."""
        return self._text

    def __repr__(self) -> str:
        return "Secret('***')"

    def __str__(self) -> str:
        return "***"

    def __format__(self, _spec: str) -> str:
        # Without the width and the precision, which would reveal the length.
        return "***"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        # surrogatepass, so that it does not raise: a key from a hostile answer may contain lone surrogates.
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


#: A payload is confidential, an external user id may be personal data, and a digest confirms a guess of the payload.
_PRIVATE: Final = frozenset(
    {
        *("operation_payload", "transaction_data", "payload_sha256", "signed_sha256", "digest"),
        *("external_user_id", "context", "body", "data", "raw", "claims", "text"),
    }
)


class Private:
    """Base of all that holds private data: a ``repr``, also that of rich, shows at most its length."""

    __slots__ = ()
    __struct_fields__: ClassVar[tuple[str, ...]]

    def __rich_repr__(self) -> Any:  # as msgspec has it
        for name in self.__struct_fields__:
            value = getattr(self, name)
            yield name, _Redacted(value) if name in _PRIVATE and value is not None else value

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"


class _Redacted:
    """Placeholder for private data in a ``repr``. It is not a string, since rich would quote that."""

    __slots__ = ("_shown",)

    def __init__(self, value: object) -> None:
        match value:
            case str():
                self._shown = f"<{len(value)} characters>"
            case bytes() | msgspec.Raw():
                self._shown = f"<{len(value)} bytes>"
            case _:
                self._shown = "<...>"

    def __repr__(self) -> str:
        return self._shown


def _plain(value: object) -> object:
    """Return a field's value as data that any encoder takes: an error is its type and message."""
    match value:
        case Model():
            return value.to_dict()
        case msgspec.Struct():
            return msgspec.structs.asdict(value)
        case tuple():
            return [_plain(each) for each in value]
        case datetime():
            return value.isoformat()
        case Exception():
            return f"{type(value).__name__}: {value}"
    return value


class Model(Private, msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Base of the structs: wire names in camelCase, and a ``repr`` that shows nothing private."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data under the attribute names, private texts too, without ``api_key``; times in ISO format."""
        return {name: _plain(getattr(self, name)) for name in self.__struct_fields__ if name != "api_key"}


#: The documented form, at most nine fractional digits, and a zone that is not documented.
_TIMESTAMP: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d(:?\d\d)?)?", re.ASCII)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Operation(Model, frozen=True, kw_only=True):
    """One operation, as returned by ``GET /v2/operations/{operationId}``.

    Attributes:
        id: The service's own number of the operation, as a number or a text; or None.
        timestamp: Creation time as the service wrote it, a text or a number; or None. See `created_at`.
        node_id: Name of the service that created it, as a text or a number; or None.
        user_id: The user, in hex.
        api_key: The customer's SDK API key; None if the answer does not contain it.
        external_user_id: The customer's own id of the user, or None.
        operation_id: The customer's id of the operation.
        operation_payload: The text for the user to approve, or None.
        result: "True if the operation is approved, false otherwise"; see `is_approved`.
        auth_type: How the user approved, see `AuthType`; or None.
        state: ``"pending"`` or ``"approved"``, see `OperationState`; any other text stays unchanged.

    Source: Keyless documentation, Server API / Operations, "Get operation".
    """

    # The first three decide nothing, so another form of them ends no wait.
    id: int | float | str | None = None
    timestamp: int | float | str | None = None
    node_id: int | float | str | None = None
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
        """Whether state is ``"approved"`` and result is true.

        It does not compare ids. Do that yourself, or use `wait_for_approval`.
        """
        return self.state == OperationState.APPROVED and self.result is True

    @property
    def created_at(self) -> datetime | None:
        """`timestamp` as an aware datetime in UTC, cut to microseconds; None if it cannot be read.

        The documented form has no zone, and is read as UTC. A zone counts, and a number is milliseconds since 1970.
        """
        try:
            match self.timestamp:
                case str() as text if _TIMESTAMP.fullmatch(text):
                    at = datetime.fromisoformat(text)
                    return at.astimezone(UTC) if at.tzinfo else at.replace(tzinfo=UTC)
                case int() | float() as milliseconds:
                    return _EPOCH + timedelta(milliseconds=milliseconds)
        # Such as the 31st of February, or a year after 9999.
        except (ValueError, OverflowError):
            pass
        return None


class PendingOperation(Model, frozen=True, kw_only=True):
    """One item of ``GET /v2/users/{userId}/operations/pending``.

    Attributes:
        operation_id: The customer's id of the operation.
        operation_payload: The text for the user to approve, or None.
        external_user_id: The customer's own id of the user, or None.
        auth_type: See `AuthType`; or None.

    An operation that is not in the list is not necessarily approved.

    Source: Keyless documentation, Server API / Operations, "Get pending operations".
    """

    operation_id: str
    operation_payload: str | None = None
    external_user_id: str | None = None
    auth_type: str | None = None


# "Many of these are predictions only" (the vendor's page "Error handling"), so the texts must not accuse anybody.
_REASONS: Final = {
    512: "the face did not match well enough",
    534: "the user is not known or not active",
    535: "the device is not known or not active",
    1131: "the user is not enrolled on this device",
    1167: "the user has set no PIN",
    20000: "the user is not enrolled",
    30000: "the face could not be checked",
    30003: "the user left the scan",
    30004: "the face did not match",
    30005: "the phone was offline",
    30007: "locked out for some minutes",
    30008: "the attempt was rejected",
    30009: "the app may not use the camera",
    40002: "the device could not be checked",
}


class Authentication(Model, frozen=True, kw_only=True):
    """One attempt of a user to authenticate, as Telemetry reports it. It is never an approval.

    Only an operation's own ``state`` and ``result`` approve. Any field may be None, since the documentation does not
    say which ones are optional.

    Attributes:
        created_at: Time of the attempt as the service wrote it, or None; its zone is not documented.
        result: ``"APPROVED"`` is the only documented value; any other text stays unchanged. Or None.
        error_code: 0 if nothing failed; or None. `reason` explains the known codes.
        operation_id: The operation id that the app passed to the SDK for this attempt, or None.
        device_id: The user's device, or None.
        auth_type: How the user authenticated, see `AuthType`; or None.

    Source: Keyless documentation, Server API / Telemetry, "User authentications".
    """

    created_at: str | None = None
    result: str | None = None
    error_code: int | None = None
    operation_id: str | None = None
    device_id: str | None = None
    auth_type: str | None = None

    @property
    def failed(self) -> bool:
        """Whether the error code is not 0, or the result is not ``"APPROVED"``. None does not count as a failure.

        An attempt that did not fail approves nothing. See `Operation.is_approved`.
        """
        return self.error_code not in {None, 0} or self.result not in {None, "APPROVED"}

    @property
    def reason(self) -> str | None:
        """The likely meaning of `error_code`, in words; None for 0 and for unknown codes.

        It is the meaning of the SDK's error code. That Telemetry uses the same codes is not documented, so show the
        number too. Codes from 30000 on are about the user, from 20000 on about the integration; others are internal.
        """
        return _REASONS.get(self.error_code or 0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data under the attribute names, with `reason`."""
        return {**super().to_dict(), "reason": self.reason}


class Authentications(Model, frozen=True, kw_only=True):
    """The attempts of the last ten minutes on Telemetry's first page.

    Attributes:
        attempts: The attempts, in the service's order, which is not documented.
        truncated: Whether there are more pages. How to request them is not documented. To get fewer attempts, request
            those of one operation.
    """

    attempts: tuple[Authentication, ...] = ()
    truncated: bool = False


class TelemetryPage(msgspec.Struct, frozen=True, rename="camel"):
    """The number of this page of Telemetry's answer, from 0, and the number of pages."""

    number: int | None = None
    total_pages: int | None = None


class UserAuthentications(msgspec.Struct, frozen=True):
    """The attempts of one user, whom the request named."""

    authentications: list[Authentication]


class TelemetryAnswer(msgspec.Struct, frozen=True):
    """Answer to ``GET /v2/users/{userId}/authentications``, and to the same of external users."""

    content: list[UserAuthentications]
    page: TelemetryPage | None = None

    @property
    def first_page(self) -> Authentications:
        """The attempts, in the order of the answer, and whether there are more pages."""
        page = self.page or TelemetryPage()
        return Authentications(
            attempts=tuple(attempt for user in self.content for attempt in user.authentications),
            truncated=(page.number or 0) + 1 < (page.total_pages or 0),
        )


class ExternalUser(Model, frozen=True, kw_only=True):
    """The link between a user and your own id of that user; a user has at most one.

    Attributes:
        sdk_customer_id: The service's number of the customer; None if the answer was lost and the client searched for
            the link.
        user_id: The user, in hex.
        external_user_id: Your own id of the user.
        created_at: Creation time as the service wrote it; its zone is not documented.
        updated_at: Time of the last change, likewise.

    Source: Keyless documentation, Server API / External User ID.
    """

    sdk_customer_id: int | None = None
    user_id: str
    external_user_id: str
    created_at: str
    updated_at: str


class User(Model, frozen=True, kw_only=True):
    """A user that `find_users` found by an external user id. The answer does not repeat that id.

    Attributes:
        user_id: The user, in hex.
        biometric_public_signing_key: The user's public key, base64.
        created_at: Creation time as the service wrote it; its zone is not documented.
        updated_at: Time of the last change, likewise.

    Source: Keyless documentation, Server API / External User ID, "Get users".
    """

    user_id: str
    biometric_public_signing_key: str
    created_at: str
    updated_at: str


class Device(Model, frozen=True, kw_only=True):
    """A device on which a user is enrolled.

    Attributes:
        user_id: The user, in hex.
        sdk_customer_id: The service's number of the customer.
        public_signing_key: The device's public key, base64; `KeylessClient.delete_device` takes it.
        public_encryption_key: The device's other public key, base64.
        state: ``"ACTIVE"`` is the only documented value; any other text stays unchanged.
        created_at: Time of the enrolment as the service wrote it; its zone is not documented.
        os_version: The device's operating system, or None.
        sdk_version: The version of the app's SDK, or None.
        deleted_at: When the device was removed, as the service wrote it, or None.

    Source: Keyless documentation, Server API / Devices.
    """

    user_id: str
    sdk_customer_id: int
    public_signing_key: str
    public_encryption_key: str
    state: str
    created_at: str
    os_version: str | None = None
    sdk_version: str | None = None
    deleted_at: str | None = None


class SignedTransaction(Model, frozen=True, kw_only=True):
    """What a verified token proves: this user signed this text at this time.

    Attributes:
        user_id: The user, in hex and upper case.
        external_user_id: Your own id of the user, as in the token; or None.
        transaction_data: The signed text.
        issued_at: When the user signed, by the phone's clock; aware, UTC.
        key_id: The ``kid`` of the key.
        version: The version of the token's form, or None.
        signed_sha256: SHA-256 of the signed part of the token, in hex. Store it under a unique index to accept a token
            once. The text of the token does not identify it, since one signature can be written in two ways.
    """

    user_id: str
    external_user_id: str | None
    transaction_data: str
    issued_at: datetime
    key_id: str
    version: str | None
    signed_sha256: str


class NewExternalUser(Model, frozen=True, kw_only=True):
    """Body of ``POST`` and ``PATCH /v2/users/{userId}/external-user``."""

    external_user_id: str


class NewOperation(Model, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Body of ``POST /v2/users/{userId}/operations``; a field that is None is left out."""

    operation_id: str
    operation_payload: str | None = None
    external_user_id: str | None = None


class SuccessAnswer(msgspec.Struct, frozen=True):
    """Answer to a create or a deletion; the documentation knows no other value than true."""

    success: bool


def decode_hook(kind: type, value: object) -> object:
    """Turn a JSON string into a `Secret`, for msgspec decoders."""
    if kind is Secret and isinstance(value, str):
        return Secret(value)
    # msgspec adds the field's path.
    raise TypeError(f"Expected `str`, got `{type(value).__name__}`")
