"""The operations of a sandbox: pending when created, approved at most once, removed by `forget`.

They are encoded as the service's documentation shows. attempts.py keeps the attempts to approve them. Nothing here
depends on HTTP or on the event loop.
"""

from __future__ import annotations

import time
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import msgspec

from aiokeyless._validation import check_operation_id, check_text, check_user_id, whole_number
from aiokeyless.errors import ConfigurationError
from aiokeyless.models import Authentication, AuthType, Operation, OperationState, Secret

from .attempts import CANCELLED, LOCKED_OUT, MISMATCH, AttemptLog, telemetry_json
from .fields import timestamp
from .users import Users

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SDK_API_KEY: Final = "sandbox-sdk-key"
"""The SDK key in every operation. It differs from the API key, so that a test notices a leak of either."""

# Copied from the documentation, not derived from models.py: a misspelt name there must make the tests fail.
_WIRE_NAMES: Final = {
    "id": "id",
    "timestamp": "timestamp",
    "node_id": "nodeId",
    "user_id": "userId",
    "api_key": "apiKey",
    "external_user_id": "externalUserId",
    "operation_id": "operationId",
    "operation_payload": "operationPayload",
    "result": "result",
    "auth_type": "authType",
    "state": "state",
}

# The documentation's examples have two, three and nine digits.
_FRACTION_DIGITS: Final = (2, 3, 9)


class OperationStore:
    """All operations of one sandbox.

    Args:
        clock: Returns nanoseconds since the epoch, for timestamps. Default: this machine's clock.
        timer: Returns seconds; its zero is arbitrary. It times the memory of attempts and the lockouts. Default: this
            machine's monotonic clock.
        on_attempt: Called with the user and the attempt, after each attempt.
    """

    def __init__(
        self,
        clock: Callable[[], int] = time.time_ns,
        timer: Callable[[], float] = time.monotonic,
        on_attempt: Callable[[str, Authentication], object] = lambda _user_id, _attempt: None,
    ) -> None:
        self._clock = clock
        self._on_attempt = on_attempt
        self._attempts = AttemptLog(timer)
        self.users: Users = Users(clock, self._attempts.has_user)
        self._operations: dict[str, Operation] = {}
        # By user, then by operation id. No user has an empty entry.
        self._pending: dict[str, dict[str, Operation]] = {}
        self._tampered: dict[str, dict[str, object]] = {}
        # Nanoseconds since the epoch.
        self._approved_at: dict[str, int] = {}
        self._last_id = 0

    @property
    def operations(self) -> Mapping[str, Operation]:
        """The operations by operation id, oldest first; a live, read-only view."""
        return MappingProxyType(self._operations)

    def create(
        self,
        user_id: str,
        operation_id: str,
        *,
        operation_payload: str | None = None,
        external_user_id: str | None = None,
    ) -> Operation | None:
        """Store a pending operation and return it, or return None if the operation id is taken."""
        if operation_id in self._operations:
            return None
        operation = self._make(user_id, operation_id, operation_payload, external_user_id)
        self._operations[operation_id] = operation
        self._attempts.add_user(user_id, external_user_id)
        self._pending.setdefault(user_id, {})[operation_id] = operation
        return operation

    def approve(
        self,
        operation_id: str,
        *,
        user_id: str | None = None,
        auth_type: str = AuthType.BIOMETRIC,
        external_user_id: str | None = None,
        operation_payload: str | None = None,
    ) -> Operation:
        """Approve a pending operation, or store an approved one; see `Sandbox.approve`."""
        how = _check_auth_type(auth_type)
        operation = self._resolve(operation_id, user_id, external_user_id, operation_payload)
        if operation.is_approved:
            return operation
        user = operation.user_id
        self._check_device(user)
        if left := self._attempts.locked_for(user):
            self._add_attempt(user, operation.external_user_id, operation_id, LOCKED_OUT, how)
            raise ConfigurationError(
                f"user {user} is locked out for {left:.0f} s more, after too many failed attempts: "
                f"operation {operation_id!r} cannot be approved until then; wait, or unlock the user",
                argument="operation_id",
            )
        if operation_id in self._operations:
            self._remove_pending(operation)
        operation = msgspec.structs.replace(operation, state=OperationState.APPROVED.value, result=True, auth_type=how)
        self._operations[operation_id] = operation
        self._approved_at[operation_id] = self._clock()
        self._add_attempt(user, operation.external_user_id, operation_id, 0, how)
        return operation

    def fail(
        self,
        operation_id: str | None = None,
        *,
        error_code: int = MISMATCH,
        user_id: str | None = None,
        auth_type: str = AuthType.BIOMETRIC,
        external_user_id: str | None = None,
    ) -> Authentication:
        """Let an attempt to authenticate fail; see `Sandbox.fail_authentication`."""
        how = _check_auth_type(auth_type)
        error_code = whole_number(error_code, "error_code")
        if operation_id is not None:
            operation = self._resolve(operation_id, user_id, external_user_id, None)
            if operation.is_approved:
                raise ConfigurationError(
                    f"operation {operation_id!r} is approved already: the phone no longer asks for it; use another one",
                    argument="operation_id",
                )
            user, external_user = operation.user_id, operation.external_user_id
        elif user_id is not None:
            user, external_user = check_user_id(user_id), check_text(external_user_id, "external_user_id")
        else:
            raise ConfigurationError(
                "operation_id or user_id must be given: an attempt without an operation needs its user",
                argument="operation_id",
            )
        self._check_device(user)
        if error_code != CANCELLED and self._attempts.locked_for(user):
            error_code = LOCKED_OUT
        return self._add_attempt(user, external_user, operation_id, error_code, how)

    def get_approved(self, operation_id: str) -> tuple[Operation, int]:
        """Return an approved operation, and when it was approved, in nanoseconds since the epoch.

        Raises:
            ConfigurationError: There is no such operation, or it is not approved.
        """
        operation = self._get(operation_id)
        approved_at = self._approved_at.get(operation_id)
        if approved_at is None:
            raise ConfigurationError(
                f"operation {operation_id!r} is not approved: the phone signs on approval; approve it first",
                argument="operation_id",
            )
        return operation, approved_at

    def forget(self, operation_id: str) -> None:
        """Remove an operation; see `Sandbox.forget`."""
        operation = self._get(operation_id)
        del self._operations[operation_id]
        self._tampered.pop(operation_id, None)
        self._approved_at.pop(operation_id, None)
        if not operation.is_approved:
            self._remove_pending(operation)

    def tamper(self, operation_id: str, fields: Mapping[str, object]) -> None:
        """Return false fields for an operation; see `Sandbox.tamper`."""
        self._get(operation_id)
        if unknown := fields.keys() - _WIRE_NAMES:
            raise ConfigurationError(
                f"an operation has no field {min(unknown)!r}; it has {', '.join(_WIRE_NAMES)} (to return another one, "
                "use fail_next(status=200, body=...))",
                argument=min(unknown),
            )
        false = {_WIRE_NAMES[name]: value for name, value in fields.items()}
        try:
            msgspec.json.encode({name: value for name, value in false.items() if value is not msgspec.UNSET})
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ConfigurationError(f"the fields must be JSON values: {error}") from None
        self._tampered[operation_id] = false

    def operation_json(self, operation_id: str) -> bytes | None:
        """Return the body of ``GET /v2/operations/{operationId}``, or None if there is no such operation."""
        operation = self._operations.get(operation_id)
        if operation is None:
            return None
        answer = {**operation_fields(operation), "apiKey": SDK_API_KEY}
        if false := self._tampered.get(operation_id):
            answer.update(false)
            answer = {name: value for name, value in answer.items() if value is not msgspec.UNSET}
        return msgspec.json.encode(answer)

    def pending(self, user_id: str) -> MappingProxyType[str, Operation]:
        """Return a user's pending operations by operation id, oldest first; a live view while there are any."""
        return MappingProxyType(self._pending.get(user_id, {}))

    def pending_json(self, user_id: str) -> bytes:
        """Return the body of ``GET /v2/users/{userId}/operations/pending``, oldest first."""
        items = []
        for operation in self.pending(user_id).values():
            item = {"operationId": operation.operation_id}
            if operation.operation_payload is not None:
                item["operationPayload"] = operation.operation_payload
            if operation.external_user_id is not None:
                item["externalUserId"] = operation.external_user_id
            items.append(item)
        return msgspec.json.encode(items)

    @property
    def authentications(self) -> list[Authentication]:
        """All users' attempts of the last ten minutes, oldest first."""
        return self._attempts.get_all()

    def locked_for(self, user_id: str) -> float:
        """Return the seconds for which a user is still locked out; 0.0 if they are not."""
        return self._attempts.locked_for(user_id)

    def unlock(self, user_id: str) -> None:
        """End a user's lockout; see `Sandbox.unlock`."""
        self._attempts.unlock(check_user_id(user_id))

    def authentications_json(self, user_id: str, operation_id: str | None) -> bytes | None:
        """Return the body of ``GET /v2/users/{userId}/authentications``, or None if there is no such user."""
        found = self._get_attempts(user_id)
        return None if found is None else telemetry_json({"userId": user_id}, found, operation_id)

    def external_authentications_json(self, external_user_id: str, operation_id: str | None) -> bytes | None:
        """Return the body of ``GET /v2/external-users/{externalUserId}/authentications``; None if there is no user."""
        owner = self.users.owner(external_user_id)
        found = self._attempts.get_by_external_user(external_user_id) if owner is None else self._get_attempts(owner)
        return None if found is None else telemetry_json({"externalUserId": external_user_id}, found, operation_id)

    def _get_attempts(self, user_id: str) -> list[Authentication] | None:
        found = self._attempts.get_by_user(user_id)
        return [] if found is None and self.users.exists(user_id) else found

    def _check_device(self, user_id: str) -> None:
        if not self.users.can_approve(user_id):
            raise ConfigurationError(
                f"user {user_id} has no device: enroll them again, or they cannot authenticate", argument="operation_id"
            )

    def _resolve(
        self, operation_id: str, user_id: str | None, external_user_id: str | None, operation_payload: str | None
    ) -> Operation:
        """Return the operation that an attempt is for. If there is none, make the one that the phone would create."""
        user = None if user_id is None else check_user_id(user_id)
        operation = self._operations.get(operation_id)
        if operation is not None:
            _check_same(operation, "user_id", user)
            _check_same(operation, "operation_payload", operation_payload)
            _check_same(operation, "external_user_id", external_user_id)
            return operation
        if user is None:
            raise ConfigurationError(
                f"there is no operation {operation_id!r} to approve; create it first (if a worker does, wait until it "
                "is in sandbox.operations), or pass user_id to store an approved one as the phone's operationInfo does",
                argument="operation_id",
            )
        return self._make(
            user,
            check_operation_id(operation_id),
            check_text(operation_payload, "operation_payload"),
            check_text(external_user_id, "external_user_id"),
        )

    def _add_attempt(
        self, user_id: str, external_user_id: str | None, operation_id: str | None, error_code: int, auth_type: str
    ) -> Authentication:
        """Add an attempt. The documentation names the result "APPROVED"; "FAILED" is the sandbox's own word."""
        attempt = Authentication(
            created_at=timestamp(self._clock()),
            result="FAILED" if error_code else "APPROVED",
            error_code=error_code,
            operation_id=operation_id,
            device_id="sandbox-phone",
            auth_type=auth_type,
        )
        self._attempts.add(user_id, external_user_id, attempt)
        self._on_attempt(user_id, attempt)
        return attempt

    def _make(
        self, user_id: str, operation_id: str, operation_payload: str | None, external_user_id: str | None
    ) -> Operation:
        self._last_id += 1
        digits = _FRACTION_DIGITS[self._last_id % len(_FRACTION_DIGITS)]
        return Operation(
            id=self._last_id,
            timestamp=timestamp(self._clock(), digits),
            node_id="sandbox",
            user_id=user_id,
            api_key=Secret(SDK_API_KEY),
            external_user_id=external_user_id,
            operation_id=operation_id,
            operation_payload=operation_payload,
            result=False,
            auth_type=None,
            state=OperationState.PENDING.value,
        )

    def _get(self, operation_id: str) -> Operation:
        try:
            return self._operations[operation_id]
        except KeyError:
            raise ConfigurationError(f"there is no operation {operation_id!r}", argument="operation_id") from None

    def _remove_pending(self, operation: Operation) -> None:
        of_user = self._pending[operation.user_id]
        del of_user[operation.operation_id]
        if not of_user:
            del self._pending[operation.user_id]


def operation_fields(operation: Operation) -> dict[str, object]:
    """Return an operation's fields, by their names on the wire, without the SDK key."""
    fields = {wire: getattr(operation, name) for name, wire in _WIRE_NAMES.items() if name != "api_key"}
    return {wire: value for wire, value in fields.items() if value is not None}


def _check_auth_type(value: str) -> str:
    try:
        return AuthType(value).value
    except ValueError:
        raise ConfigurationError(f"auth_type must be 'biom' or 'pin', not {value!r}", argument="auth_type") from None


def _check_same(operation: Operation, name: str, value: str | None) -> None:
    if value is not None and value != getattr(operation, name):
        raise ConfigurationError(
            f"operation {operation.operation_id!r} has another {name}; leave {name} out to approve it as it is",
            argument=name,
        )
