"""The users of a sandbox, their devices, and their external user ids. Nothing here depends on HTTP.

`Users.enroll` enrolls a user on a device. So does the first operation of an unknown user.

Source: Keyless documentation, Server API: External User ID, Users, Devices.
"""

from __future__ import annotations

import base64
import secrets
from typing import TYPE_CHECKING, Final

import msgspec

from aiokeyless._validation import check_external_user_id, check_user_id
from aiokeyless.errors import ConfigurationError
from aiokeyless.models import Device

from .fields import timestamp

if TYPE_CHECKING:
    from collections.abc import Callable

_CUSTOMER: Final = 1
#: Bytes of a public key on the curve P-256.
_KEY_SIZE: Final = 65


class _User(msgspec.Struct):
    """A user who is enrolled.

    `devices` are by public signing key. `linked_at` and `updated_at` are about the external user id.
    """

    user_id: str
    signing_key: str
    created_at: str
    devices: dict[str, Device]
    external_user_id: str | None = None
    linked_at: str = ""
    updated_at: str = ""


class Users:
    """The users of one sandbox.

    Args:
        clock: Returns nanoseconds since the epoch, for timestamps.
        has_operations: Returns whether the sandbox has ever had an operation of a user.
    """

    def __init__(self, clock: Callable[[], int], has_operations: Callable[[str], bool]) -> None:
        self._clock = clock
        self._has_operations = has_operations
        self._users: dict[str, _User] = {}
        self._deleted: set[str] = set()

    def enroll(self, user_id: str, external_user_id: str | None = None) -> Device:
        """Enroll a user on one more device; see `Sandbox.enroll`."""
        user_id = check_user_id(user_id)
        if external_user_id is not None:
            check_external_user_id(external_user_id)
            if any(owner != user_id for owner in self._owners(external_user_id)):
                raise ConfigurationError(
                    "external_user_id belongs to another user; use another one, or unlink it first",
                    argument="external_user_id",
                )
        self._deleted.discard(user_id)
        user = self._users.get(user_id) or self._add(user_id)
        device = self._add_device(user)
        if external_user_id is not None:
            self._link(user, external_user_id)
        return device

    def can_approve(self, user_id: str) -> bool:
        """Return whether the user has a device; an unknown user is enrolled by their first operation."""
        user = self._users.get(user_id)
        return user_id not in self._deleted if user is None else bool(user.devices)

    def external_id(self, user_id: str) -> str | None:
        """Return a user's external user id, or None."""
        user = self._users.get(user_id)
        return None if user is None else user.external_user_id

    def exists(self, user_id: str) -> bool:
        """Return whether there is such a user."""
        return self._find(user_id) is not None

    def link(self, user_id: str, external_user_id: str) -> bytes | None:
        """Give a user an external user id.

        Returns:
            The body of ``POST /v2/users/{userId}/external-user``; None if the user has one, or another user has this.
        """
        user = self._get(user_id)
        if user.external_user_id is not None or self._owners(external_user_id):
            return None
        return self._link(user, external_user_id)

    def relink(self, user_id: str, external_user_id: str) -> bytes:
        """Give a user another external user id. The documentation knows no conflict.

        Returns:
            The body of ``PATCH /v2/users/{userId}/external-user``.
        """
        return self._link(self._get(user_id), external_user_id)

    def unlink(self, external_user_id: str) -> None:
        """Remove an external user id, in its exact case."""
        for owner in self._owners(external_user_id):
            self._users[owner].external_user_id = None

    def owner(self, external_user_id: str) -> str | None:
        """Return the user with an external user id, in its exact case; None if there is no such user."""
        return next(iter(self._owners(external_user_id)), None)

    def search_json(self, external_user_id: str) -> bytes:
        """Return the body of ``GET /v2/external-users/{externalUserId}/users``, which ignores case."""
        wanted = external_user_id.casefold()
        return msgspec.json.encode(
            [
                {
                    "userId": user.user_id,
                    "biometricPublicSigningKey": user.signing_key,
                    "createdAt": user.linked_at,
                    "updatedAt": user.updated_at,
                }
                for user in self._users.values()
                if user.external_user_id is not None and user.external_user_id.casefold() == wanted
            ]
        )

    def delete(self, user_id: str) -> None:
        """Delete a user with their devices."""
        del self._users[self._get(user_id).user_id]
        self._deleted.add(user_id)

    def devices_json(self, user_id: str) -> bytes:
        """Return the body of ``GET /v2/users/{userId}/devices``, oldest first."""
        return msgspec.json.encode([device_fields(device) for device in self._get(user_id).devices.values()])

    def remove_device(self, user_id: str, public_signing_key: str) -> bool:
        """Remove a device; return whether there was one."""
        user = self._find(user_id)
        return user is not None and user.devices.pop(public_signing_key, None) is not None

    def _find(self, user_id: str) -> _User | None:
        user = self._users.get(user_id)
        if user is None and user_id not in self._deleted and self._has_operations(user_id):
            user = self._add(user_id)
            self._add_device(user)
        return user

    def _get(self, user_id: str) -> _User:
        user = self._find(user_id)
        assert user is not None  # noqa: S101  # the caller has checked that the user exists
        return user

    def _owners(self, external_user_id: str) -> list[str]:
        return [user.user_id for user in self._users.values() if user.external_user_id == external_user_id]

    def _link(self, user: _User, external_user_id: str) -> bytes:
        now = timestamp(self._clock())
        user.linked_at = user.linked_at if user.external_user_id is not None else now
        user.updated_at = now
        user.external_user_id = external_user_id
        return msgspec.json.encode(
            {
                "sdkCustomerId": _CUSTOMER,
                "userId": user.user_id,
                "externalUserId": external_user_id,
                "createdAt": user.linked_at,
                "updatedAt": user.updated_at,
            }
        )

    def _add(self, user_id: str) -> _User:
        user = self._users[user_id] = _User(user_id, _new_key(), timestamp(self._clock()), {})
        return user

    def _add_device(self, user: _User) -> Device:
        device = Device(
            user_id=user.user_id,
            sdk_customer_id=_CUSTOMER,
            public_signing_key=_new_key(),
            public_encryption_key=_new_key(),
            state="ACTIVE",
            created_at=timestamp(self._clock()),
            os_version="sandbox",
            sdk_version="sandbox",
        )
        user.devices[device.public_signing_key] = device
        return device


def device_fields(device: Device) -> dict[str, object]:
    """Return a device's fields, by their names on the wire."""
    # Spelt out, not derived from models.py: a misspelt name there must make the tests fail.
    return {
        "userId": device.user_id,
        "sdkCustomerId": device.sdk_customer_id,
        "publicSigningKey": device.public_signing_key,
        "publicEncryptionKey": device.public_encryption_key,
        "state": device.state,
        "createdAt": device.created_at,
        "osVersion": device.os_version,
        "sdkVersion": device.sdk_version,
    }


def _new_key() -> str:
    return base64.b64encode(secrets.token_bytes(_KEY_SIZE)).decode()
