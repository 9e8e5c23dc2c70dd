"""The service's requests and answers as frozen msgspec structs, their enums, and `Secret`.

Names are snake_case here and camelCase on the wire; unknown fields are ignored, so that a newer service does not
break an older client. Nothing here does I/O, and no ``repr`` of an answer shows a key or a payload.
"""

from __future__ import annotations

import hmac
import re
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "AuthType",
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
        return "***"  # a width or a precision would reveal the length

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        # surrogatepass: a key from a hostile answer may contain lone surrogates, and comparing must not raise
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


class Model(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Base of the structs: wire names in camelCase, and a ``repr`` that shows only the length of a payload."""

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
    """Placeholder for a payload in a ``repr``; not a string, since rich would quote that."""

    __slots__ = ("_length",)

    def __init__(self, payload: str) -> None:
        self._length = len(payload)

    def __repr__(self) -> str:
        return f"<{self._length} characters>"


# The documented form: at most nine fractional digits, no zone.
_TIMESTAMP: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?", re.ASCII)


class Operation(Model, frozen=True, kw_only=True):
    """One operation, as returned by ``GET /v2/operations/{operationId}``.

    Attributes:
        id: The service's own number of the operation; any JSON number.
        timestamp: Creation time as the service wrote it; its zone is not documented.
        node_id: Name of the service that created it.
        user_id: The user, in hex.
        api_key: The customer's SDK API key, which the answer contains; None if it does not.
        external_user_id: The customer's own id of the user, or None.
        operation_id: The customer's id of the operation.
        operation_payload: What the user is asked to approve, or None.
        result: "True if the operation is approved, false otherwise"; see `is_approved`.
        auth_type: How the user approved, see `AuthType`; or None.
        state: ``"pending"`` or ``"approved"``, see `OperationState`; any other text is kept unchanged.

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
        """Whether state is ``"approved"`` and result is true.

        It does not compare ids: do that yourself, or use `wait_for_approval`, which does.
        """
        return self.state == OperationState.APPROVED and self.result is True

    @property
    def created_at(self) -> datetime | None:
        """`timestamp` as a naive datetime, cut to microseconds; None if the text is not in the documented form."""
        if _TIMESTAMP.fullmatch(self.timestamp) is None:
            return None
        try:
            return datetime.fromisoformat(self.timestamp)  # naive, since no zone is documented
        except ValueError:  # such as the 31st of February
            return None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data under the attribute names, with the payload and without ``api_key``."""
        return {name: getattr(self, name) for name in self.__struct_fields__ if name != "api_key"}


class PendingOperation(Model, frozen=True, kw_only=True):
    """One item of ``GET /v2/users/{userId}/operations/pending``.

    Attributes:
        operation_id: The customer's id of the operation.
        operation_payload: What the user is asked to approve, or None.
        external_user_id: The customer's own id of the user, or None.
        auth_type: See `AuthType`; or None.

    An operation's absence from the list does not prove that it was approved.

    Source: Keyless documentation, Server API / Operations, "Get pending operations".
    """

    operation_id: str
    operation_payload: str | None = None
    external_user_id: str | None = None
    auth_type: str | None = None


class NewOperation(Model, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Body of ``POST /v2/users/{userId}/operations``; absent fields are left out, not null."""

    operation_id: str
    operation_payload: str | None = None
    external_user_id: str | None = None


class CreateAnswer(msgspec.Struct, frozen=True):
    """Answer to ``POST /v2/users/{userId}/operations``: ``success`` is documented as always true."""

    success: bool


def decode_hook(kind: type, value: object) -> object:
    """Turn a JSON string into a `Secret`, for msgspec decoders."""
    if kind is Secret and isinstance(value, str):
        return Secret(value)
    raise TypeError(f"Expected `str`, got `{type(value).__name__}`")  # msgspec adds the field's path
