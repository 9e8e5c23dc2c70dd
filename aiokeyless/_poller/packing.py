"""The last pending answer of a wait in a third of its size: there are a hundred thousand of them in a process."""

from __future__ import annotations

from typing import Final

import msgspec

from aiokeyless.models import Operation, OperationState, Secret

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
