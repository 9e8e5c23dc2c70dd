"""`KeylessClient`, the public entry point: it checks arguments and delegates.

Single calls go to the transport (`_http/`), waits to the poller (`_waits/`). This module decides no rule of a wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import math
import os
import uuid
import warnings
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from datetime import UTC, datetime
from types import TracebackType
from typing import Final, Literal, NamedTuple, NoReturn, Self, TypeAlias, TypeVar

import aiohttp
import anyio
from anyio.streams.memory import MemoryObjectSendStream
from tenacity.wait import wait_base

from ._http import protocol
from ._http.creation import ExternalUserCreation, OperationCreation, confirm_external_user
from ._http.deletion import delete
from ._http.keys import make_api_keys
from ._http.proxies import find_proxy
from ._http.transport import Transport
from ._listeners import DEFAULT_LISTENERS, Listeners
from ._tracing import current_traceparent
from ._validation import (
    check_auth_type,
    check_base_url,
    check_choice,
    check_external_user_id,
    check_flag,
    check_handler,
    check_listeners,
    check_name,
    check_operation_id,
    check_rate,
    check_region,
    check_requested_id,
    check_schedule,
    check_text,
    check_user_id,
    finite_seconds,
    seconds,
    whole_number,
)
from ._waits.holds import Holds
from ._waits.machine import BATCH
from ._waits.poller import FutureWait, Poller, WaitOptions
from ._waits.state import WaitResult
from ._waits.updates import NewestUpdate
from .errors import (
    AlreadyApprovedError,
    AmbiguousUserError,
    ClientClosedError,
    ConfigurationError,
    DecodeError,
    KeylessError,
    NotFoundError,
    StatusError,
    TransportError,
)
from .events import Listener, OperationCreated
from .models import (
    Authentications,
    Device,
    ExternalUser,
    NewOperation,
    Operation,
    PendingOperation,
    Region,
    StartedBy,
    User,
)
from .reports import ApprovalOutcome, ApprovalUpdate, Approved, ClientStatistics, NotApproved
from .schedule import wait_adaptive
from .ticket import DEFAULT_LIFETIME, ApprovalTicket, DefaultTimeout, WaitTimeout, check_lifetime, payload_digest

IfMissing: TypeAlias = Literal["raise", "wait"]
"""On a 404, a wait raises, or waits for the operation that the phone will create."""
IfExists: TypeAlias = Literal["raise", "resume"]
"""On a 409, a create raises, or resumes the operation if it has the same content and is pending."""
OnCreated: TypeAlias = Callable[[ApprovalTicket], Awaitable[object] | object]
"""Called with the ticket of an operation, to tell the phone: a plain function, or an async one."""
OnPoll: TypeAlias = Callable[[ApprovalUpdate], Awaitable[object] | object]
"""Called for each poll of a wait: a plain function, or an async one."""
T = TypeVar("T")

#: Seconds for which `request_approval` repeats a create that fails, as while a proxy restarts.
_LONGEST_CREATE: Final = 10.0
_OTHER_LOOP: Final = (
    "the client belongs to the event loop of its first use, and this is another one: create one client per event loop"
)


class _Opened(NamedTuple):
    """The parts of a client that belong to an event loop."""

    loop: asyncio.AbstractEventLoop
    listeners: Listeners | None
    transport: Transport
    poller: Poller
    holds: Holds


class KeylessClient:
    """A client for the Keyless Operations API.

    One client is enough for a process: its waits share polls, the limits on polling and the learned schedule. It can
    be created before an event loop runs; it belongs to the loop of its first use, and raises `ConfigurationError` in
    another one. Close it with ``async with`` or `aclose`; after that, each call raises `ClientClosedError`.

    Args:
        api_key: The API key, or a plain function that returns it, for keys that rotate. It is called for each HTTP
            exchange, so it must be quick. If it raises or returns no key, the call or the wait ends with
            `ConfigurationError`. Default: ``$KEYLESS_API_KEY``.
        region: Region of the tenant: ``eu``, ``us``, ``latam`` or ``sg``. Default: ``$KEYLESS_REGION``, else ``eu``.
        base_url: Base URL of the API, instead of a region's: https, or http to a loopback host. It cannot be combined
            with `region`. Default: ``$KEYLESS_BASE_URL``, which is ignored if `region` is given.
        session: An aiohttp session to use, for proxies, tracing or your own TLS settings; the client never closes it.
            Its default headers, cookies and middlewares apply; its timeouts, redirects and error handling do not. The
            client's name is appended to its ``User-Agent``.
        trust_env: Whether requests use the http proxy that ``$HTTPS_PROXY``, or else ``$ALL_PROXY``, names. Hosts in
            ``$NO_PROXY`` and loopback hosts are reached directly. It cannot be combined with `session`. Default: False.
        request_timeout: Seconds for one HTTP exchange, from connecting to the last byte. Default: 10.
        max_attempts: Attempts of one call on transient failures; 1 means no retry. If many calls fail, only some are
            retried, and the errors of the others say so. Default: 3.
        max_in_flight: Polls of all waits together that have been in flight for less than a second. Slower polls and
            final polls have room of their own. By default, all need 768 connections at most. Default: 256.
        max_polls_per_second: Polls that start in a second, of all waits together; None for as many as fit. If more are
            due, the one due longest goes first; ``statistics.lag`` shows how late polls are. Final polls count, but do
            not wait for it. If the service refuses polls with 429, the rate is halved, and recovers within about a
            minute. Default: 1000.
        schedule: When waits poll: a `wait_adaptive` or any other tenacity wait strategy. Default: a `wait_adaptive`
            that only this client uses.
        listeners: Functions that are called with each `Event` while it happens. A slow one delays polls and waits. If
            one raises, that is logged. Default: none.
        name: Tells this client's log lines, events, spans and metrics from those of others, such as one a tenant:
            1 to 64 printable characters. Clients of one name share their metrics. Default: none.

    Raises:
        ConfigurationError: An argument is wrong; the message names it and states the valid values.

    Example:
        >>> async with KeylessClient() as client:
        ...     operation = await client.request_approval("0123456789ABCDEF", operation_payload="Log in?")
    """

    # On the class, since __del__ reads them even if __init__ was called with an unknown argument.
    _opened: _Opened | None = None  # since the first use
    _closing: asyncio.Task[None] | None = None  # since `aclose`

    def __init__(
        self,
        api_key: str | Callable[[], str] | None = None,
        *,
        region: Region | str | None = None,
        base_url: str | None = None,
        session: aiohttp.ClientSession | None = None,
        trust_env: bool = False,
        request_timeout: float = 10.0,
        max_attempts: int = 3,
        max_in_flight: int = 256,
        max_polls_per_second: float | None = 1000.0,
        schedule: wait_base | None = None,
        listeners: Iterable[Listener] = (),
        name: str | None = None,
    ) -> None:
        self._region: Region | None = None
        self._base_url: str = ""
        self._name: str | None = None
        keys = make_api_keys(_from_environment(api_key, "KEYLESS_API_KEY"))
        if isinstance(keys, ConfigurationError):
            keys = _name_source(keys, api_key, "KEYLESS_API_KEY")
        del api_key  # before anything is raised: error reporters print local variables
        if isinstance(keys, ConfigurationError):
            raise keys
        self._api_keys = keys
        if session is not None and not isinstance(session, aiohttp.ClientSession):
            raise ConfigurationError(
                f"session must be an aiohttp.ClientSession, not {type(session).__name__}", argument="session"
            )
        self._region, self._base_url = _address(region, base_url)
        self._session = session
        check_flag(trust_env, "trust_env")
        if trust_env and session is not None:
            raise ConfigurationError(
                "trust_env must be False if session is given: make the session with trust_env=True",
                argument="trust_env",
            )
        self._proxy = find_proxy(self._base_url) if trust_env else None
        self._request_timeout = finite_seconds(request_timeout, "request_timeout")
        self._max_attempts = whole_number(max_attempts, "max_attempts")
        self._max_in_flight = whole_number(max_in_flight, "max_in_flight")
        self._max_polls_per_second = check_rate(max_polls_per_second, "max_polls_per_second")
        self._schedule = check_schedule(schedule) or wait_adaptive()
        self._listeners: tuple[Listener, ...] = (*check_listeners(listeners), *DEFAULT_LISTENERS)
        self._name = check_name(name)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a KeylessClient cannot be pickled or copied: create one where it is used")

    def __repr__(self) -> str:
        where = f"region={self._region.value!r}" if self._region is not None else f"base_url={self._base_url!r}"
        name = f"name={self._name!r} " if self._name is not None else ""
        return f"<KeylessClient {name}{where}{' closed' if self._closing is not None else ''}>"

    @property
    def name(self) -> str | None:
        """What tells it from other clients; None if it has no name."""
        return self._name

    @property
    def base_url(self) -> str:
        """Base URL of the API."""
        return self._base_url

    @property
    def request_timeout(self) -> float:
        """Seconds for one HTTP exchange."""
        return self._request_timeout

    @property
    def listeners(self) -> tuple[Listener, ...]:
        """All listeners for its events: its own, and those of instrumentations."""
        return self._listeners

    # -- opening and closing

    async def __aenter__(self) -> Self:
        self._open()
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the client; closing it again has no effect.

        Every call and every wait under way ends with `ClientClosedError`. A borrowed session stays open. Closing
        completes even if the caller is cancelled; a second call waits for the first.

        Raises:
            ConfigurationError: The client belongs to another event loop.
        """
        if self._closing is not None and self._closing.done():  # even if its loop is closed by now
            return
        loop = asyncio.get_running_loop()
        if self._opened is not None and self._opened.loop is not loop:
            raise ConfigurationError(_OTHER_LOOP)
        if self._closing is None:
            # A separate task, so that cancelling the caller does not cancel it; created without any task factory.
            self._closing = asyncio.Task(self._close(), loop=loop)
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        if self._opened is None:
            return
        try:
            self._opened.holds.close()
            await self._opened.poller.aclose()
        finally:
            await self._opened.transport.aclose()

    def __del__(self, warn: Callable[..., None] = warnings.warn) -> None:  # at exit, the module's own may be gone
        if self._opened is not None and self._closing is None:
            warn(f"unclosed {self!r}: use 'async with' or aclose()", ResourceWarning, source=self, stacklevel=2)

    def _open(self) -> _Opened:
        """Return the parts that belong to the running loop; made on first use."""
        if self._closing is not None:
            raise ClientClosedError("the client is closed; create a new one, or close it later")
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise ConfigurationError("the client runs on asyncio, whose event loop does not run here") from None
        if self._opened is None:
            listeners = Listeners(self._listeners, self._name) if self._listeners else None
            transport = Transport(
                self._base_url,
                self._api_keys,
                session=self._session,
                request_timeout=self._request_timeout,
                max_attempts=self._max_attempts,
                listeners=listeners,
                proxy=self._proxy,
            )
            poller = Poller(
                transport,
                schedule=self._schedule,
                max_in_flight=self._max_in_flight,
                max_polls_per_second=self._max_polls_per_second,
                listeners=listeners,
                name=self._name,
            )
            self._opened = _Opened(loop, listeners, transport, poller, Holds(poller))
        elif self._opened.loop is not loop:
            raise ConfigurationError(_OTHER_LOOP)
        return self._opened

    # -- single calls

    async def get_pending_operations(self, user_id: str) -> list[PendingOperation]:
        """Return the operations that are waiting for a user's approval.

        An operation's absence from the list does not prove that it was approved.

        Args:
            user_id: The user, in hex of either case.

        Raises:
            InvalidIdentifierError: The user id is not hex.
            KeylessError: Any other error of `get_operation`.

        Source: Keyless documentation, Server API / Operations, "Get pending operations".
        """
        return await self._open().transport.fetch(protocol.get_pending_operations(user_id))

    async def get_operation(self, operation_id: str) -> Operation:
        """Return an operation in its current state.

        `Operation.is_approved` is true if it is approved. Compare its ids, user and payload with yours, since this
        method does not.

        Args:
            operation_id: The customer's id of the operation: 1 to 512 characters, no control characters.

        Raises:
            InvalidIdentifierError: The id cannot be sent.
            NotFoundError: There is no such operation.
            StatusError: The service answered with another error status; see the subclasses.
            TransportError: No usable answer arrived in `max_attempts` attempts.
            DecodeError: The answer does not have the documented shape.

        Source: Keyless documentation, Server API / Operations, "Get operation".
        """
        return await self._open().transport.fetch(protocol.get_operation(operation_id))

    async def get_authentications(
        self, *, user_id: str | None = None, external_user_id: str | None = None, operation_id: str | None = None
    ) -> Authentications:
        """Return a user's attempts to authenticate of the last ten minutes, failed ones too (Telemetry).

        They explain why an operation is not approved: the user left the scan, the face did not match. An attempt is
        never an approval: only the operation itself says that it is approved.

        Args:
            user_id: The user, in hex of either case. Exactly one of `user_id` and `external_user_id` must be given.
            external_user_id: Your own id of the user; case matters.
            operation_id: Only the attempts under this id, which Telemetry knows only if the app passed it to the SDK.
                Default: all.

        Returns:
            The ``attempts`` on the first page, in the service's order, which is not documented. ``truncated`` is true
            if there are more pages; the API does not document how to get them.

        Raises:
            ConfigurationError: Neither or both of the two ids are given.
            InvalidIdentifierError: An id cannot be sent.
            NotFoundError: There is no such user.
            KeylessError: Any other error of `get_operation`.

        Source: Keyless documentation, Server API / Telemetry, "User authentications".
        """
        transport = self._open().transport
        if (user_id is None) == (external_user_id is None):
            raise ConfigurationError(
                "exactly one of user_id and external_user_id must be given: each names the user", argument="user_id"
            )
        if user_id is not None:
            request = protocol.get_authentications(user_id, operation_id)
        else:
            assert external_user_id is not None  # noqa: S101  # one of the two is given
            request = protocol.get_external_authentications(external_user_id, operation_id)
        return await transport.fetch(request)

    async def create_operation(
        self,
        user_id: str,
        *,
        operation_id: str | None = None,
        operation_payload: str | None = None,
        external_user_id: str | None = None,
        expires_in: float = DEFAULT_LIFETIME,
        if_exists: IfExists = "raise",
        require_auth_type: str | None = None,
    ) -> ApprovalTicket:
        """Create an operation for a user to approve, exactly once.

        After an ambiguous failure (a lost answer, 408, 5xx, a success that does not decode) the client checks whether
        the operation exists before it sends the request again. If you chose the id, the operation that it finds may
        belong to an earlier request. Then `ApprovalTicket.reconciled` is true. If the operation is approved already,
        the client raises `AlreadyApprovedError` instead. An operation id makes creating idempotent. It is not a lock on
        what you do with the approval: keep a record of your own that changes from asked to paid exactly once.

        Args:
            user_id: The user, in hex of either case.
            operation_id: The operation's id, unique in the tenant, without slashes and backslashes. Default: a UUID4.
            operation_payload: What the user is asked to approve. Default: none.
            external_user_id: Your own id of the user. Default: none.
            expires_in: Seconds after which a wait for the ticket ends by default. Default: 120. The service
                documents no expiry: the user may still approve later.
            if_exists: On a 409, ``"raise"`` raises an error. ``"resume"`` returns a ticket for the operation that has
                the id, if it has the same content and is pending; its deadline starts anew. Default: ``"raise"``.
            require_auth_type: The factor that an approval must have: ``"biom"`` for a face, or ``"pin"``. It is kept
                in the ticket and not sent; a wait for the ticket compares it. Default: any, so a PIN counts, too.

        Returns:
            The ticket to wait for, here or in another process. Notify the phone now.

        Raises:
            ConfigurationError: An argument is wrong; nothing was sent.
            AlreadyApprovedError: The id names an operation of the same content that is approved already, perhaps for an
                earlier request. One approval must not count twice. Its ``ticket`` is that of the operation.
            ConflictError: Another operation has the id. For an id that this call generated, the client compares first.
            KeylessError: Creating failed. If the request may have taken effect, the client checked for the operation,
                and either did not find it or could not check. The error's ``operation_id`` names the operation.

        Source: Keyless documentation, Server API / Operations, "Create operation".
        """
        return await self._begin(
            user_id,
            operation_id=operation_id,
            operation_payload=operation_payload,
            external_user_id=external_user_id,
            expires_in=expires_in,
            if_exists=if_exists,
            require_auth_type=require_auth_type,
            started_by="backend",
            longest=0.0,
        )

    async def _begin(
        self,
        user_id: str,
        *,
        operation_id: str | None,
        operation_payload: str | None,
        external_user_id: str | None,
        expires_in: float,
        if_exists: IfExists,
        require_auth_type: str | None,
        started_by: StartedBy,
        longest: float,
    ) -> ApprovalTicket:
        """Create an operation, or check the id with which the phone will start it; return its ticket.

        A create that fails transiently is tried again for a quarter of the lifetime, at most for `longest` seconds.
        """
        opened = self._open()
        check_choice(if_exists, IfExists, "if_exists")
        operation = NewOperation(
            operation_id=str(uuid.uuid4()) if operation_id is None else check_requested_id(operation_id, started_by),
            operation_payload=check_text(operation_payload, "operation_payload"),
            external_user_id=check_text(external_user_id, "external_user_id"),
        )
        user_id, require_auth_type = check_user_id(user_id), check_auth_type(require_auth_type)
        lifetime = check_lifetime(expires_in, datetime.now(UTC))
        creation = OperationCreation(
            opened.transport, user_id, operation, id_is_new=operation_id is None, resumes=if_exists == "resume"
        )

        def make_ticket(*, reconciled: bool) -> ApprovalTicket:
            created_at = datetime.now(UTC)
            return ApprovalTicket(
                operation_id=operation.operation_id,
                user_id=user_id,
                external_user_id=external_user_id,
                payload_sha256=payload_digest(operation_payload),
                created_at=created_at,
                expires_at=created_at + lifetime,
                require_auth_type=require_auth_type,
                started_by=started_by,
                reconciled=reconciled,
                traceparent=current_traceparent(),
            )

        try:
            if started_by == "backend":
                reconciled = await creation.run(lasts=min(longest, lifetime.total_seconds() / 4))
            else:  # nobody can have used an id that was generated just now
                reconciled = operation_id is not None and await creation.find()
            ticket = make_ticket(reconciled=reconciled)
        except (ClientClosedError, DecodeError, StatusError, TransportError) as error:
            error.operation_id = operation.operation_id
            if isinstance(error, AlreadyApprovedError):
                error.ticket = make_ticket(reconciled=True)
            raise
        if not ticket.reconciled:
            opened.poller.record_creation(ticket)
        if opened.listeners is not None and started_by == "backend":
            opened.listeners.tell(OperationCreated(operation_id=ticket.operation_id, user_id=user_id))
        return ticket

    # -- users and devices

    async def create_external_user(self, user_id: str, external_user_id: str) -> ExternalUser:
        """Give a user your own id of them, exactly once; a user has at most one.

        After an ambiguous failure (a lost answer, 408, 5xx, a success that does not decode) the client searches
        for the external user id before it sends the request again. If this user has it by then, that is a success.

        Args:
            user_id: The user, in hex of either case.
            external_user_id: Your own id of the user: 1 to 512 characters, no control characters. Keyless advises
                against personal data in it. Ids must differ in more than case, see `find_users`.

        Returns:
            The link; its ``sdk_customer_id`` is None if it was found after a lost answer.

        Raises:
            InvalidIdentifierError: An id cannot be sent.
            ConflictError: The user has an external user id already: `update_external_user` changes it. Or the id
                conflicts with another user's.
            NotFoundError: There is no such user.
            KeylessError: Creating failed. If the request may have taken effect, the client searched for the id,
                and either did not find it or could not search.

        Source: Keyless documentation, Server API / External User ID.
        """
        transport = self._open().transport
        user_id, external_user_id = check_user_id(user_id), check_external_user_id(external_user_id)
        return await ExternalUserCreation(transport, user_id, external_user_id).run()

    async def update_external_user(self, user_id: str, external_user_id: str) -> ExternalUser:
        """Give a user another external user id; it can be repeated.

        Args:
            user_id: The user, in hex of either case.
            external_user_id: Your own id of the user, as for `create_external_user`.

        Raises:
            InvalidIdentifierError: An id cannot be sent.
            NotFoundError: There is no such user.
            DecodeError: The answer is about another user, or does not have the documented shape.
            KeylessError: Any other error of `get_operation`.

        Source: Keyless documentation, Server API / External User ID.
        """
        transport = self._open().transport
        request = protocol.update_external_user(user_id, external_user_id)
        return confirm_external_user(await transport.fetch(request), request, user_id, external_user_id)

    async def find_users(self, external_user_id: str) -> list[User]:
        """Return the users who have an external user id; perhaps none, perhaps several.

        **The search ignores case, and its answer does not repeat the external user id.** So ``ALICE`` may return the
        user of ``alice``. Use ids that differ in more than case, and compare ``user_id`` with your own record before
        you trust a user that was found.

        Args:
            external_user_id: Your own id of the user.

        Raises:
            InvalidIdentifierError: The id cannot be sent.
            KeylessError: Any other error of `get_operation`.

        Source: Keyless documentation, Server API / External User ID, "Get users".
        """
        return await self._open().transport.fetch(protocol.find_users(external_user_id))

    async def get_user(self, external_user_id: str) -> User:
        """Return the one user who has an external user id.

        The search ignores case, like `find_users`. Compare ``user_id`` with your own record.

        Args:
            external_user_id: Your own id of the user.

        Raises:
            NotFoundError: No user has this id.
            AmbiguousUserError: Several users have it.
            KeylessError: As for `find_users`.
        """
        transport = self._open().transport
        request = protocol.find_users(external_user_id)
        users = await transport.fetch(request)
        if len(users) == 1:
            return users[0]
        if not users:
            raise NotFoundError(
                status=404, method="GET", path=request.shown_path, advice="no user has this external user id"
            )
        raise AmbiguousUserError(
            f"{len(users)} users have this external user id, in some case; choose by your own record of the user",
            user_ids=tuple(user.user_id for user in users),
        )

    async def delete_external_user(self, external_user_id: str) -> None:
        """Delete an external user id, here in its exact case; the user stays, and can get another one.

        Args:
            external_user_id: Your own id of the user. If it does not exist, that is no error.

        Raises:
            InvalidIdentifierError: The id cannot be sent.
            KeylessError: Deleting failed; it may have taken effect, and can be repeated.

        Source: Keyless documentation, Server API / External User ID.
        """
        await delete(self._open().transport, protocol.delete_external_user(external_user_id))

    async def delete_user(self, user_id: str) -> None:
        """Delete a user **permanently**, with their devices and their biometric enrolment. There is no way back.

        The SDK on their devices is not notified.

        A 404 after an ambiguous failure is a success: the lost request deleted the user.

        Args:
            user_id: The user, in hex of either case.

        Raises:
            InvalidIdentifierError: The user id is not hex.
            NotFoundError: There is no such user.
            KeylessError: Deleting failed; it may have taken effect, and can be repeated.

        Source: Keyless documentation, Server API / Users.
        """
        await delete(self._open().transport, protocol.delete_user(user_id))

    async def get_devices(self, user_id: str) -> list[Device]:
        """Return the devices of a user.

        Args:
            user_id: The user, in hex of either case.

        Raises:
            InvalidIdentifierError: The user id is not hex.
            NotFoundError: There is no such user.
            KeylessError: Any other error of `get_operation`.

        Source: Keyless documentation, Server API / Devices.
        """
        return await self._open().transport.fetch(protocol.get_devices(user_id))

    async def delete_device(self, user_id: str, public_signing_key: str) -> None:
        """Remove a device of a user, such as a lost phone. The SDK on it is not notified.

        A 404 after an ambiguous failure is a success: the lost request removed the device.

        Args:
            user_id: The user, in hex of either case.
            public_signing_key: `Device.public_signing_key`, as it is.

        Raises:
            InvalidIdentifierError: The user id is not hex, or the key cannot be sent.
            NotFoundError: There is no such device or user.
            KeylessError: Removing failed; it may have taken effect, and can be repeated.

        Source: Keyless documentation, Server API / Devices.
        """
        await delete(self._open().transport, protocol.delete_device(user_id, public_signing_key))

    # -- signed transactions

    async def get_key_set(self, tenant: str) -> bytes:
        """Return the public keys of a tenant as they are published, for `aiokeyless.signatures.TransactionVerifier`.

        They are fetched without the API key.

        Args:
            tenant: Name of the tenant, as in the address of its keys.

        Raises:
            InvalidIdentifierError: The name cannot be sent.
            StatusError: The service answered with an error status; see the subclasses.
            TransportError: No usable answer arrived in `max_attempts` attempts, or the key set is larger than 1 MiB.

        Source: Keyless documentation, "JWT verification best practice".
        """
        return await self._open().transport.fetch(protocol.get_key_set(tenant))

    # -- waits

    async def wait_for_approval(
        self,
        target: str | ApprovalTicket,
        *,
        timeout: WaitTimeout = DefaultTimeout.FROM_TARGET,  # noqa: ASYNC109  # the budget of a wait, kept by the poller for all of them
        schedule: wait_base | None = None,
        if_missing: IfMissing = "raise",
        on_poll: OnPoll | None = None,
        explain: bool = False,
    ) -> Operation:
        """Wait until the user approves this operation, and return only then.

        Args:
            target: An operation id, or an `ApprovalTicket`. With a ticket, the client also checks the user, the
                payload, the external user id and the factor of each answer.
            timeout: Seconds for the whole wait; None for no limit. Default: for a ticket, the time until its
                ``expires_at``; for an id, 120. A final poll starts at the deadline and may take 2 more seconds.
            schedule: When to poll. Default: the client's schedule.
            if_missing: On a 404, ``"raise"`` raises `NotFoundError`. ``"wait"`` waits for an operation that the phone
                will create, as a wait for a ticket with ``started_by="phone"`` always does. With a bare id, an approval
                by any user then counts. So use such a ticket, or compare user and payload yourself. Default:
                ``"raise"``.
            on_poll: Called with an `ApprovalUpdate` for each poll, in order, in this task; may be async. What it
                raises ends the wait and propagates. Default: none.
            explain: Whether to ask Telemetry for the user's attempts to authenticate under the operation's id, for the
                ``attempts`` of `ApprovalUpdate` and of `ApprovalTimeoutError`. The client asks while the operation is
                pending, at most once in 10 s per operation and 8 times at once. It asks for the last time at the
                deadline, so the wait may end up to 1 s later. Failures of Telemetry are ignored and logged at debug
                level. An attempt never approves and never ends the wait; raise in `on_poll` to end it. Default: False.

        Returns:
            The approved operation.

        Raises:
            ConfigurationError: An argument is wrong, or the schedule did not return a number.
            ApprovalTimeoutError: The deadline passed and the operation is pending. It can still be approved later.
            ApprovalUnknownError: The deadline passed and the final poll got no answer, or could not be sent, so the
                outcome is unknown. It is an `ApprovalTimeoutError` too.
            OperationMismatchError: An answer is about another operation, user or payload, or has another factor than
                the ticket requires.
            InconsistentOperationError: An answer contradicts itself, or its state is unknown.
            NotFoundError: There is no such operation, and the phone will not create it, as far as the wait knows. A
                ticket must be 5 s old for that, since a replica may lag.
            StatusError: 400, 401, 403, 406, 409, 415 or 3xx. Other failures are retried until the deadline.
            DecodeError: An answer is JSON that does not have the documented shape.
            ClientClosedError: The client was closed.

        Source: ``docs/rules.md``, "The rules of a wait".
        """
        check_flag(explain, "explain")
        options = self._options(target, timeout, schedule, if_missing)
        if on_poll is not None or explain:
            return await self._wait_reporting(options, on_poll, explain=explain)
        poller = self._open().poller
        wait = poller.start(**options)
        del options  # each waiting frame would hold them in memory
        try:
            return _result(await wait)
        finally:
            poller.leave(wait)
            del wait  # it has the error whose traceback has this frame

    async def hold_for_approval(
        self,
        target: str | ApprovalTicket,
        *,
        seconds: float,
        schedule: wait_base | None = None,
        if_missing: IfMissing = "raise",
        explain: bool = False,
    ) -> Operation | None:
        """Wait for one piece of a longer wait, as in an HTTP long poll, a tool call or a job that runs again.

        A hold is a lease on a wait. The wait goes on for 10 s after the last hold of its target has ended, also if that
        was interrupted. So a series of holds polls like a single wait, if the pauses between them are shorter. A later
        hold starts a new wait, with one poll at once. A hold that ends without an approval is no timeout, and makes no
        final poll.

        Args:
            target: See `wait_for_approval`.
            seconds: The length of this piece; above 0 and finite.
            schedule: When to poll; the first hold of a series sets it. Default: the client's schedule.
            if_missing: See `wait_for_approval`.
            explain: Whether to ask for the user's attempts when the ticket expires, for `ApprovalTimeoutError`: see
                `wait_for_approval`. The first hold of a series sets it. A hold that returns None does not ask; call
                `get_authentications` for the reasons so far. Default: False.

        Returns:
            The approved operation; None if the operation is pending after so many seconds. After a ticket's
            ``expires_at``, only a hold that joined a longer one returns None. An operation id does not expire, so give
            up after some time.

        Raises:
            ConfigurationError: An argument is wrong, or the schedule did not return a number.
            ApprovalTimeoutError: The ticket's ``expires_at`` passed during this hold, and a final poll found the
                operation pending. It can still be approved later.
            KeylessError: Any other error of `wait_for_approval`.

        Source: ``docs/rules.md``, "Holds".

        Example:
            >>> async def approved(client: KeylessClient, ticket: ApprovalTicket) -> bool:
            ...     return await client.hold_for_approval(ticket, seconds=25) is not None  # the browser asks again
        """
        check_flag(explain, "explain")
        options = self._options(target, DefaultTimeout.FROM_TARGET, schedule, if_missing)
        if options["ticket"] is None:
            options["timeout"] = None
        seconds = finite_seconds(seconds, "seconds")
        outcome = await self._open().holds.hold(options, seconds=seconds, explain=explain)
        try:
            return None if outcome is None else _result(outcome)
        finally:
            del outcome  # otherwise the error and this frame would reference each other

    async def request_approval(
        self,
        user_id: str,
        *,
        operation_id: str | None = None,
        operation_payload: str | None = None,
        external_user_id: str | None = None,
        expires_in: float = DEFAULT_LIFETIME,
        if_exists: IfExists = "raise",
        require_auth_type: str | None = None,
        started_by: StartedBy = "backend",
        schedule: wait_base | None = None,
        on_created: OnCreated | None = None,
        on_poll: OnPoll | None = None,
        explain: bool = False,
    ) -> Operation:
        """Create an operation, tell the phone, and wait until the user approves it.

        That is `create_operation`, `on_created` and `wait_for_approval`. But a create that fails transiently is
        repeated for 10 s, or a quarter of `expires_in` if that is less, unless ``max_attempts`` is 1. If the phone
        starts the operation, nothing is created: `on_created` hands the id to your app, whose authentication creates
        the operation.

        Args:
            user_id: The user, in hex of either case.
            operation_id: See `create_operation`. Default: a UUID4.
            operation_payload: What the user is asked to approve. Default: none.
            external_user_id: Your own id of the user. Default: none.
            expires_in: Seconds for the wait, from the create on. Default: 120.
            if_exists: See `create_operation`. Default: ``"raise"``.
            require_auth_type: See `create_operation`. Default: any.
            started_by: ``"phone"`` if your app starts the operation. A 404 then means that the user has not approved
                yet. An id that you chose is read once before `on_created`. Payload and external user id are what the
                app sends, so they are no independent check. Default: ``"backend"``.
            schedule: When to poll. Default: the client's schedule.
            on_created: Called with the `ApprovalTicket` before the wait, in this task; may be async. It sends your
                app's push notification, with the operation's id. It is also called for an operation that was found
                after a lost answer or by ``if_exists="resume"``. What it raises propagates, and the operation stays.
                Default: none.
            on_poll: See `wait_for_approval`. Default: none.
            explain: See `wait_for_approval`. Default: False.

        Returns:
            The approved operation.

        Raises:
            KeylessError: Any error of `create_operation` or `wait_for_approval`.
        """
        check_choice(started_by, StartedBy, "started_by")
        if started_by == "phone" and if_exists == "resume":
            raise ConfigurationError(
                "if_exists must be 'raise' if the phone starts the operation: nothing is created", argument="if_exists"
            )
        check_schedule(schedule)  # before anything is created
        check_handler(on_created, "on_created")
        check_handler(on_poll, "on_poll")
        check_flag(explain, "explain")
        ticket = await self._begin(
            user_id,
            operation_id=operation_id,
            operation_payload=operation_payload,
            external_user_id=external_user_id,
            expires_in=expires_in,
            if_exists=if_exists,
            require_auth_type=require_auth_type,
            started_by=started_by,
            longest=_LONGEST_CREATE,
        )
        if on_created is not None:
            await _call_back("on_created", on_created, ticket)
        return await self.wait_for_approval(ticket, schedule=schedule, on_poll=on_poll, explain=explain)

    def watch_approval(
        self,
        target: str | ApprovalTicket,
        *,
        timeout: WaitTimeout = DefaultTimeout.FROM_TARGET,
        schedule: wait_base | None = None,
        if_missing: IfMissing = "raise",
        explain: bool = False,
    ) -> AsyncGenerator[ApprovalUpdate, None]:
        """Wait as `wait_for_approval` does, and yield an update for each poll.

        Polling continues while the caller handles an update. The wait starts with the first iteration and ends when
        the iterator is exhausted, closed with ``aclose()``, or left by ``break``.

        Args:
            target: See `wait_for_approval`.
            timeout: See `wait_for_approval`.
            schedule: See `wait_for_approval`.
            if_missing: See `wait_for_approval`.
            explain: See `wait_for_approval`.

        Yields:
            One update per poll; the operation of the last one is approved.

        Raises:
            KeylessError: Any error of `wait_for_approval`; `ConfigurationError` at the call, before the iteration.
        """
        check_flag(explain, "explain")
        return self._updates(self._options(target, timeout, schedule, if_missing), explain=explain)

    def wait_for_approvals(
        self,
        targets: Iterable[str | ApprovalTicket],
        *,
        timeout: WaitTimeout = DefaultTimeout.FROM_TARGET,
        schedule: wait_base | None = None,
        if_missing: IfMissing = "raise",
    ) -> AsyncGenerator[ApprovalOutcome, None]:
        """Wait for many operations, and yield an outcome for each, in the order in which they end.

        A wait that fails does not end the others. A target that is given twice has two outcomes.

        Args:
            targets: Operation ids and tickets.
            timeout: Seconds for each wait; see `wait_for_approval`.
            schedule: See `wait_for_approval`.
            if_missing: See `wait_for_approval`.

        Yields:
            One outcome per target: its approved operation, or the error that `wait_for_approval` would have raised.

        Raises:
            ConfigurationError: An argument is wrong; raised at the call, before the iteration.
            ClientClosedError: The client was closed before the iteration started. If it is closed later, this error is
                the outcome of each remaining wait.
        """
        if isinstance(targets, str | bytes) or not isinstance(targets, Iterable):
            raise ConfigurationError(
                f"targets must be several operation ids or tickets, such as a list, not {type(targets).__name__}",
                argument="targets",
            )
        targets = list(targets)
        # At the call, as promised. There may be a hundred thousand targets, so shared arguments are checked once.
        check_schedule(schedule)
        check_choice(if_missing, IfMissing, "if_missing")
        _check_timeout(timeout, None)
        for target in targets:
            _read_target(target)
        return self._outcomes(targets, timeout, schedule, if_missing)

    @property
    def statistics(self) -> ClientStatistics:
        """The client's current waits, and its counts since it was created."""
        if self._opened is None:
            return ClientStatistics(rate_limit=self._max_polls_per_second)
        return self._opened.poller.statistics()

    def _options(
        self, target: str | ApprovalTicket, timeout: WaitTimeout, schedule: wait_base | None, if_missing: IfMissing
    ) -> WaitOptions:
        """Check the arguments of a wait."""
        operation_id, ticket = _read_target(target)
        return WaitOptions(
            operation_id=operation_id,
            ticket=ticket,
            timeout=_check_timeout(timeout, ticket),
            schedule=check_schedule(schedule),
            may_be_missing=check_choice(if_missing, IfMissing, "if_missing") == "wait",
        )

    async def _wait_reporting(self, options: WaitOptions, on_poll: OnPoll | None, *, explain: bool) -> Operation:
        check_handler(on_poll, "on_poll")
        operation: Operation | None = None
        updates = self._updates(options, explain=explain)
        try:
            async for update in updates:
                operation = update.operation
                if on_poll is not None:
                    await _call_back("on_poll", on_poll, update)
        finally:
            await updates.aclose()
        assert operation is not None  # noqa: S101  # where nothing was raised, the last update is the approval
        return operation

    async def _updates(self, options: WaitOptions, *, explain: bool) -> AsyncGenerator[ApprovalUpdate, None]:
        poller = self._open().poller
        newest = NewestUpdate()
        wait = poller.start(**options, updates=newest)
        if explain:
            poller.explainer.start(wait)
        try:
            async for update in newest:
                yield poller.explainer.add_to(update, wait) if explain else update
            if explain:
                await poller.explainer.complete(wait.result(), wait)
            _result(wait.result())
        finally:
            poller.leave(wait)
            if explain:
                poller.explainer.leave(wait)
            del wait  # it has the error whose traceback has this frame

    async def _outcomes(
        self,
        targets: list[str | ApprovalTicket],
        timeout: WaitTimeout,  # noqa: ASYNC109  # of each wait
        schedule: wait_base | None,
        if_missing: IfMissing,
    ) -> AsyncGenerator[ApprovalOutcome, None]:
        poller = self._open().poller
        send, receive = anyio.create_memory_object_stream[tuple[str, WaitResult]](math.inf)
        started: list[FutureWait] = []
        # Shared by all waits: there may be a hundred thousand, and asyncio would copy the context for each callback.
        report, context = functools.partial(_report, send), contextvars.copy_context()
        with send, receive:
            try:
                for count, target in enumerate(targets, 1):
                    options = self._options(target, timeout, schedule, if_missing)
                    try:
                        wait = poller.start(**options)
                    except KeylessError as error:
                        send.send_nowait((options["operation_id"], error))
                        continue
                    started.append(wait)
                    wait.add_done_callback(report, context=context)
                    if count % BATCH == 0:
                        await asyncio.sleep(0)
                for _ in targets:
                    yield _outcome(*await receive.receive())
            finally:
                poller.leave_all(started)


def transport_of(client: KeylessClient) -> Transport:
    """Return the transport of a client, for a worker, which retries by itself and keeps no waits in memory."""
    return client._open().transport  # noqa: SLF001  # of this module


def for_another_process(client: KeylessClient) -> KeylessClient:
    """Return a client with the same arguments for a child process. This one's event loop runs only in the parent."""
    its_own = KeylessClient.__new__(KeylessClient)
    its_own.__dict__.update(client.__dict__ | {"_opened": None, "_closing": None})
    return its_own


async def _call_back(name: str, function: Callable[[T], object], argument: T) -> None:
    """Call a function of the caller, a plain or an async one."""
    try:
        result = function(argument)
    except StopIteration as error:  # no coroutine can raise it: PEP 479
        raise RuntimeError(f"{name} raised StopIteration; catch it there, or give next() a default") from error
    if inspect.isawaitable(result):
        await result


def _result(outcome: WaitResult) -> Operation:
    try:
        if isinstance(outcome, Exception):
            raise outcome
        assert outcome is not None  # noqa: S101  # only a hold's can be
        return outcome
    finally:
        del outcome  # otherwise the error and this frame would reference each other


def _outcome(operation_id: str, outcome: WaitResult) -> ApprovalOutcome:
    """Return the outcome of one of many waits. Raise an error that is not of this library, such as a bug."""
    if isinstance(outcome, KeylessError):
        return NotApproved(operation_id=operation_id, error=outcome)
    return Approved(operation_id=operation_id, operation=_result(outcome))


def _report(send: MemoryObjectSendStream[tuple[str, WaitResult]], wait: FutureWait) -> None:
    if wait.cancelled():  # the iterator was closed, and has left its waits
        return
    with contextlib.suppress(anyio.ClosedResourceError):  # closed since the wait ended: there is no reader any more
        send.send_nowait((wait.polled.operation_id, wait.result()))


def _from_environment(value: T | None, variable: str) -> T | str | None:
    """Return an argument, or the environment variable if it is None; an empty variable counts as unset."""
    return value if value is not None else os.environ.get(variable) or None


def _name_source(error: ConfigurationError, value: object, variable: str) -> ConfigurationError:
    """Return the error about an argument. If the wrong value is the environment variable's, the error names that."""
    if value is not None or not os.environ.get(variable):
        return error
    return ConfigurationError(f"${variable} is wrong: {error}", argument=error.argument)


def _check_set(check: Callable[[str], T], value: str | None, variable: str) -> T | None:
    """Check an argument, or the environment variable if it is None; None if neither is set."""
    if (named := _from_environment(value, variable)) is None:
        return None
    try:
        return check(named)
    except ConfigurationError as error:
        raise _name_source(error, value, variable) from None


def _address(region: Region | str | None, base_url: str | None) -> tuple[Region | None, str]:
    """Return the region (None if its address is not used) and the base URL. All are checked, used or not."""
    if region is not None and base_url is not None:
        raise ConfigurationError("region and base_url must not both be given: each sets the address of the API")
    checked_region = _check_set(check_region, region, "KEYLESS_REGION") or Region.EU
    checked_url = _check_set(check_base_url, base_url, "KEYLESS_BASE_URL")
    if checked_url is None or region is not None:  # an argument beats the environment
        return checked_region, protocol.ADDRESSES[checked_region]
    return None, checked_url


def _read_target(target: str | ApprovalTicket) -> tuple[str, ApprovalTicket | None]:
    """Return the operation id of a target, and its ticket; None if it has none."""
    if isinstance(target, ApprovalTicket):
        return target.operation_id, target
    if not isinstance(target, str):
        advice = "to read a stored ticket: ApprovalTicket.from_json(...)"
        if inspect.isawaitable(target):
            advice = "await it first"
        raise ConfigurationError(
            f"target must be an operation id or an ApprovalTicket, not {type(target).__name__}; {advice}",
            argument="target",
        )
    return check_operation_id(target), None


def _check_timeout(timeout: WaitTimeout, ticket: ApprovalTicket | None) -> WaitTimeout:
    if isinstance(timeout, DefaultTimeout):
        return DEFAULT_LIFETIME if ticket is None else timeout
    return None if timeout is None else seconds(timeout, "timeout")
