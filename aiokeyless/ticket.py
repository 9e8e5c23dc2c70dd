"""`ApprovalTicket`: the data needed to resume a wait, also in another process.

Nothing here does I/O, and a ticket contains no secret.
"""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Final, TypeAlias

import msgspec

from ._base_errors import ConfigurationError
from ._validation import (
    check_auth_type,
    check_choice,
    check_operation_id,
    check_text,
    check_user_id,
    finite_seconds,
    is_traceparent,
)
from .models import Private, StartedBy

__all__ = ["ApprovalTicket", "DefaultTimeout", "WaitTimeout"]

TICKET_VERSION: Final = 1
#: Seconds that a user has to approve, unless the application says otherwise.
DEFAULT_LIFETIME: Final = 120.0


class DefaultTimeout(Enum):
    """The default of a wait's ``timeout``. A function of your own that waits can have the same default."""

    FROM_TARGET = "from_target"
    """For a ticket, the time until its ``expires_at``; for an operation id, 120 seconds."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}.{self.name}"  # as in a program: help() shows it


WaitTimeout: TypeAlias = float | DefaultTimeout | None
"""Seconds for a whole wait, None for no limit, or the default."""

_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)


def payload_digest(payload: str | None) -> str:
    """Return the SHA-256 of a payload's UTF-8, in hex; an absent payload and an empty one are the same."""
    # surrogatepass: a hostile answer may contain a lone surrogate, and comparing must not raise
    return hashlib.sha256((payload or "").encode("utf-8", "surrogatepass")).hexdigest()


class ApprovalTicket(Private, msgspec.Struct, frozen=True, kw_only=True):
    """The data needed to resume a wait for an operation, also in another process.

    It contains no secret, and only a hash of the payload. `KeylessClient.create_operation` returns one;
    `ApprovalTicket.for_operation` creates one for an operation that exists already or that the phone will start.

    It is not signed. An attacker who can write to your store of tickets can make a wait accept the approval of another
    operation. So compare the operation, the user and the payload with your own record. A payload that can be guessed
    ("Log in?", an amount) can be found from its hash. So protect a ticket like the payload itself.

    Attributes:
        operation_id: The customer's id of the operation.
        user_id: The user, in upper-case hex.
        external_user_id: The customer's own id of the user, or None.
        payload_sha256: SHA-256 of the payload's UTF-8, in hex; of the empty text if there is no payload.
        created_at: When the service confirmed the operation, or, if the phone starts it, when the wait's time began:
            aware, UTC, by this machine's clock.
        expires_at: When a wait for the ticket ends by default: aware, UTC.
        require_auth_type: The factor that an approval must have, see `AuthType`; None for any.
        started_by: ``"backend"`` if a create starts the operation. ``"phone"`` if the app does: there is no operation
            until the user has authenticated, so a wait for the ticket takes a 404 for pending.
        reconciled: True if the POST of this call was not confirmed, and a GET found the operation under its id with
            this content. It may belong to an earlier or a concurrent request.
        traceparent: The position in the trace that created it (W3C Trace Context); None without a trace.
        version: Version of the ticket's format, 1.

    Raises:
        ConfigurationError: A field is not valid.
    """

    operation_id: str
    user_id: str
    external_user_id: str | None = None
    payload_sha256: str
    created_at: datetime
    expires_at: datetime
    require_auth_type: str | None = None
    started_by: StartedBy = "backend"
    reconciled: bool = False
    traceparent: str | None = None
    version: int = TICKET_VERSION

    def __post_init__(self) -> None:
        # A wait compares each answer with these: a value that can never match is refused now, not after an approval.
        check_operation_id(self.operation_id)
        msgspec.structs.force_setattr(self, "user_id", check_user_id(self.user_id))
        check_text(self.external_user_id, "external_user_id")
        msgspec.structs.force_setattr(self, "require_auth_type", check_auth_type(self.require_auth_type))
        check_choice(self.started_by, StartedBy, "started_by")
        digest: object = self.payload_sha256
        if not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
            raise ConfigurationError(
                "payload_sha256 of a ticket must be 64 lower-case hex digits", argument="payload_sha256"
            )
        if self.traceparent is not None and not is_traceparent(self.traceparent):
            raise ConfigurationError(
                "traceparent of a ticket must be one of W3C Trace Context, or None", argument="traceparent"
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
        expires_in: float = DEFAULT_LIFETIME,
        require_auth_type: str | None = None,
        started_by: StartedBy = "backend",
    ) -> ApprovalTicket:
        """Create a ticket for an operation that exists already, or that the phone will start.

        It binds a wait to a user and a payload: an approval of the same id by another user, or of another payload, is
        then refused.

        Args:
            operation_id: The customer's id of the operation.
            user_id: The user, in hex of either case.
            operation_payload: What the user is asked to approve. Default: none.
            external_user_id: Your own id of the user, compared if it is given. Default: not compared.
            created_at: When the operation was created, aware. Default: now.
            expires_in: Seconds from `created_at` until a wait for the ticket ends by default. Default: 120.
            require_auth_type: The factor that an approval must have: ``"biom"`` for a face, or ``"pin"``. Default:
                any.
            started_by: ``"phone"`` for an operation that the app starts, with the id that you gave to it. Default:
                ``"backend"``.

        Returns:
            The ticket to wait for.

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
            expires_at=created_at + check_lifetime(expires_in, created_at),
            require_auth_type=require_auth_type,
            started_by=started_by,
        )

    def remaining(self, now: datetime | None = None) -> float:
        """Return the seconds until `expires_at`; 0.0 once it has passed.

        Args:
            now: The instant to count from, aware. Default: this machine's clock.

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
        """Read a ticket from the JSON that `to_json` returned.

        Args:
            text: The JSON.

        Returns:
            The ticket.

        Raises:
            ConfigurationError: The text is not a valid ticket, or its version is unknown to this release.
        """
        if not isinstance(text, str | bytes):
            raise ConfigurationError(
                f"text must be what ApprovalTicket.to_json() returned, not {type(text).__name__}; if a column of JSON "
                "decoded it, pass json.dumps(...) of it",
                argument="text",
            )
        try:
            version = msgspec.json.decode(text, type=_TicketVersion).version
            if version != TICKET_VERSION:
                raise ConfigurationError(
                    f"ticket version {version} is unknown, only {TICKET_VERSION} is supported: another release of "
                    "aiokeyless wrote it; upgrade this one",
                    argument="text",
                )
            return msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
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
    except OverflowError:  # a moment on the first or last day of the calendar that is outside it in UTC
        raise ConfigurationError(f"{name} of a ticket must be in the years 1 to 9999, UTC", argument=name) from None


def check_lifetime(expires_in: float, since: datetime) -> timedelta:
    """Return the time from the creation of an operation until a wait for it ends by default."""
    try:
        lifetime = timedelta(seconds=finite_seconds(expires_in, "expires_in"))
        _ = since + lifetime
    except OverflowError:
        raise ConfigurationError(
            f"expires_in must end before the year 10000, not be {expires_in!r} seconds", argument="expires_in"
        ) from None
    return lifetime


class _TicketVersion(msgspec.Struct):
    """The field of a ticket that is read first: another version may have other fields."""

    version: int
