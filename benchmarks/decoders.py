"""The service's answers, declared and decoded with other libraries than msgspec.

pydantic checks the types, as msgspec does. The dataclasses are filled field by field from the dicts that orjson
returns; only missing fields are noticed. The dicts of `json` are not checked at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import orjson
from pydantic import BaseModel, ConfigDict, TypeAdapter
from pydantic.alias_generators import to_camel

if TYPE_CHECKING:
    from collections.abc import Mapping


class _Model(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel)


class ModelOperation(_Model):
    """An operation, for pydantic."""

    id: int
    timestamp: str
    node_id: str
    user_id: str
    api_key: str
    operation_id: str
    result: bool
    state: str
    external_user_id: str | None = None
    operation_payload: str | None = None
    auth_type: str | None = None


class ModelPending(_Model):
    """A pending operation, for pydantic."""

    operation_id: str
    operation_payload: str | None = None
    external_user_id: str | None = None
    auth_type: str | None = None


pydantic_operation: Final = TypeAdapter(ModelOperation).validate_json
pydantic_pending: Final = TypeAdapter(list[ModelPending]).validate_json


@dataclass(slots=True)
class DataOperation:
    """An operation, as a dataclass."""

    id: int
    timestamp: str
    node_id: str
    user_id: str
    api_key: str
    operation_id: str
    result: bool
    state: str
    external_user_id: str | None
    operation_payload: str | None
    auth_type: str | None


@dataclass(slots=True)
class DataPending:
    """A pending operation, as a dataclass."""

    operation_id: str
    operation_payload: str | None
    external_user_id: str | None
    auth_type: str | None


def dataclass_operation(body: bytes) -> DataOperation:
    """Decode an operation with orjson."""
    data: Mapping[str, Any] = orjson.loads(body)
    return DataOperation(
        data["id"],
        data["timestamp"],
        data["nodeId"],
        data["userId"],
        data["apiKey"],
        data["operationId"],
        data["result"],
        data["state"],
        data.get("externalUserId"),
        data.get("operationPayload"),
        data.get("authType"),
    )


def dataclass_pending(body: bytes) -> list[DataPending]:
    """Decode a list of pending operations with orjson."""
    items: list[Mapping[str, Any]] = orjson.loads(body)
    return [
        DataPending(data["operationId"], data.get("operationPayload"), data.get("externalUserId"), data.get("authType"))
        for data in items
    ]
