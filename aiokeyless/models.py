"""What the service sends and takes, as frozen msgspec structs, and `Secret`.

Names are snake_case here and camelCase on the wire; unknown fields are ignored, so that a newer service does not
break an older client. Nothing here does I/O, and no ``repr`` shows a key or a payload.
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


class Model(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
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


class Operation(Model, frozen=True, kw_only=True):
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


class PendingOperation(Model, frozen=True, kw_only=True):
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
