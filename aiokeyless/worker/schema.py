"""JSON Schemas of the messages on the broker, for applications in other languages.

msgspec derives them from the structs that workers and readers decode. This module adds the limits that are checked
after decoding, and the descriptions in the docstrings. A worker checks more than a schema can.
"""

from __future__ import annotations

import inspect
import re
from typing import Annotated, Any, Final

import msgspec

from aiokeyless._validation import MAX_IDENTIFIER
from aiokeyless.models import AuthType

from .messages import EVENT_VERSION, REQUEST_VERSION, ApprovalEvent, ApprovalRequest

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_ATTRIBUTE: Final = re.compile(r"^    (\w+): (.*(?:\n      +.*)*)", re.MULTILINE)
_TIME: Final[dict[str, object]] = {"format": "date-time"}  # msgspec adds it only to times that must have a zone
_LIMITS: Final[dict[str, dict[str, object]]] = {
    "user_id": {"pattern": f"^[0-9A-Fa-f]{{1,{MAX_IDENTIFIER}}}$"},
    "operation_id": {"minLength": 1, "maxLength": MAX_IDENTIFIER},
    "expires_in": {"exclusiveMinimum": 0},
    "require_auth_type": {"enum": [*AuthType, None]},
    "created_at": _TIME,
    "requested_at": _TIME,
    "decided_at": _TIME,
}


def message_schema(message: type[ApprovalRequest | ApprovalEvent]) -> dict[str, Any]:
    """Return the JSON Schema of a kind of message, in the dialect of draft 2020-12."""
    newest = REQUEST_VERSION if message is ApprovalRequest else EVENT_VERSION
    limits: dict[str, dict[str, object]] = {"version": {"const": newest}, **_LIMITS}
    described = dict(_ATTRIBUTE.findall((inspect.getdoc(message) or "").replace("``", "`")))
    fields: list[Any] = []
    for field in msgspec.structs.fields(message):
        # A context is kept as the received bytes; in JSON it is any value.
        kind, default = (Any, None) if field.type is msgspec.Raw else (field.type, field.default)
        extra = {"description": " ".join(described.get(field.name, "").split()), **limits.get(field.name, {})}
        annotated = Annotated[kind, msgspec.Meta(extra_json_schema=extra)]  # type: ignore[valid-type]  # a run time type
        fields.append((field.name, annotated) if field.required else (field.name, annotated, default))
    strict = message.__struct_config__.forbid_unknown_fields
    shape = msgspec.defstruct(message.__name__, fields, kw_only=True, forbid_unknown_fields=strict)
    return {"$schema": _DIALECT, **msgspec.json.schema(shape)}
