"""`Service`: what the sandbox does, without its socket: operations, users, keys and faults, and what drives them."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from aiokeyless._validation import finite_seconds, whole_number
from aiokeyless.errors import ConfigurationError
from aiokeyless.models import Authentication, AuthType, Device, Operation

from .api import JSON, TENANT, Answer, KeylessApi, error_answer
from .attempts import MISMATCH
from .snapshot import Fault, PhoneBook
from .store import OperationStore

if TYPE_CHECKING:
    from .signing import Signer  # which needs an extra

logger: Final = logging.getLogger("aiokeyless")


class RequestRecord(msgspec.Struct, frozen=True):
    """One request in `Sandbox.requests`.

    Attributes:
        method: HTTP method.
        path: Request target as received: percent-encoded, with the query.
        status: Status of the answer. None until there is one. It stays None if the connection was dropped, the client
            disconnected, or the sandbox closed.
        at: When the request arrived, by the loop's clock, in seconds.
        duration: Seconds until the request was answered or ended without an answer; 0.0 until then.
    """

    method: str
    path: str
    status: int | None
    at: float
    duration: float = 0.0


class _Fault(msgspec.Struct):
    """A fault that replaces the answers to the next `left` requests; without an `answer`, it drops the connection."""

    left: float
    method: str | None
    stored: bool
    answer: Answer | None


#: Seconds until a simulated user approves an operation, or what returns them for each; None: never.
AutoApprove: TypeAlias = float | Callable[[Operation], float | None] | None


class Service:
    """What a `Sandbox` is without its socket: operations, users, keys and faults, and what drives them.

    Args:
        api_key: See `Sandbox`.
        auto_approve: See `Sandbox`.
        host: See `Sandbox`.
    """

    JOURNAL_LIMIT: Final = 10_000
    """Largest number of records in `requests`; the oldest are removed."""

    def __init__(self, api_key: str, auto_approve: AutoApprove, host: str) -> None:
        _check_text("host", host)
        _check_text("api_key", api_key)
        self._host = host
        self._api_key = api_key
        self.auto_approve = auto_approve
        self._loop: asyncio.AbstractEventLoop | None = None
        # This machine's clock and the loop's, when they were last read.
        self._clocks = (time.time_ns(), time.monotonic())
        # Nanoseconds by which tests have moved the loop's clock.
        self._ahead = 0
        self._store = OperationStore(self._time_ns, self._now, self._show_attempt)
        self._api = KeylessApi(self._store, api_key, self._handle_creation, self._encode_key_set)
        self._lazy_signer: Signer | None = None
        self._book = PhoneBook(self._store, lambda: self.requests, self._describe_fault)
        self._latency = 0.0
        self._faults: list[_Fault] = []
        self._approvals: dict[str, asyncio.TimerHandle] = {}
        self.requests: list[RequestRecord] = []
        """The received requests, oldest first, at most `JOURNAL_LIMIT`; a live list that you may clear."""
        self.request_count: int = 0
        """Number of all received requests, also of those that were removed from `requests`."""

    @property
    def api_key(self) -> str:
        """The key that requests must carry."""
        return self._api_key

    @property
    def tenant(self) -> str:
        """The tenant's name, for `aiokeyless.signatures.TransactionVerifier`."""
        return TENANT

    @property
    def operations(self) -> Mapping[str, Operation]:
        """A live, read-only view of the operations by operation id, oldest first; `tamper` does not change it."""
        return self._store.operations

    @property
    def authentications(self) -> list[Authentication]:
        """All users' attempts to authenticate in the last ten minutes, failed ones too, oldest first."""
        return self._store.authentications

    def approve(
        self,
        operation_id: str,
        *,
        user_id: str | None = None,
        auth_type: str = AuthType.BIOMETRIC,
        external_user_id: str | None = None,
        operation_payload: str | None = None,
    ) -> Operation:
        """Approve an operation, as the user does on the phone.

        If there is no such operation and `user_id` is given, this stores an approved one, as the phone's
        ``operationInfo`` does. If there is one, the given `user_id`, `external_user_id` and `operation_payload` must be
        its own. Approving again has no effect. While the user is locked out (see `fail_authentication`), it raises, and
        Telemetry shows the attempt.

        Args:
            operation_id: The operation.
            user_id: The user, in hex; required only if there is no such operation. Default: not compared.
            auth_type: ``"biom"`` (biometric) or ``"pin"``. Default: ``"biom"``.
            external_user_id: The customer's own id of the user. Default: none, or not compared.
            operation_payload: The approved text. Default: none, or not compared.

        Returns:
            The approved operation.

        Raises:
            ConfigurationError: There is no such operation and `user_id` is missing, the user is locked out or has no
                device, or an argument is wrong. (It is not a `LookupError`: this library has one exception for wrong
                arguments.)
        """
        operation = self._store.approve(
            operation_id,
            user_id=user_id,
            auth_type=auth_type,
            external_user_id=external_user_id,
            operation_payload=operation_payload,
        )
        self._cancel_approval(operation_id)
        return operation

    def enroll(self, user_id: str, *, external_user_id: str | None = None) -> Device:
        """Enroll a user, or enroll them on one more device.

        You need not enroll a new user: their first operation enrolls them on one device. A user cannot approve anything
        after you deleted them or their last device, until you enroll them again.

        Args:
            user_id: The user, in hex.
            external_user_id: Your own id of the user; it replaces an earlier one. Default: none, or the earlier one.

        Returns:
            The new device.

        Raises:
            ConfigurationError: The external user id belongs to another user, or an argument is wrong.
        """
        device = self._store.users.enroll(user_id, external_user_id)
        self._book.show(device.user_id)
        return device

    def fail_authentication(
        self,
        operation_id: str | None = None,
        error_code: int = MISMATCH,
        *,
        user_id: str | None = None,
        auth_type: str = AuthType.BIOMETRIC,
        external_user_id: str | None = None,
    ) -> Authentication:
        """Let an attempt to authenticate fail, as on the phone; its operation stays pending.

        Telemetry shows the attempt for ten minutes. The fifth failed attempt in a row locks the user out for ten
        minutes. During a lockout, `approve` raises, and each attempt fails with 30007. Cancelled attempts and those
        with a code below 30000 do not count.

        Args:
            operation_id: The operation; it must not be approved. If it does not exist, the attempt is for one that the
                phone would create. Default: none, as if the app passed no operation id to the SDK. Telemetry then shows
                the attempt of `user_id`, and no wait with ``explain=True`` knows which operation it was for.
            error_code: Why it fails: 30003 the user left the scan, 30004 the face does not match, or another code from
                the vendor's page "Error handling". Default: 30004.
            user_id: The user, in hex; required only if there is no such operation, or none is named. Default: not
                compared.
            auth_type: ``"biom"`` (biometric) or ``"pin"``. Default: ``"biom"``.
            external_user_id: The customer's own id of the user. Default: none, or not compared.

        Returns:
            The attempt, as Telemetry shows it.

        Raises:
            ConfigurationError: There is no such operation, or none is named, and `user_id` is missing; it is approved;
                the user has no device; or an argument is wrong.
        """
        return self._store.fail(
            operation_id,
            error_code=error_code,
            user_id=user_id,
            auth_type=auth_type,
            external_user_id=external_user_id,
        )

    def unlock(self, user_id: str) -> None:
        """End a user's lockout (see `fail_authentication`) before its time, and forget the failed attempts in a row.

        Args:
            user_id: The user, in hex. If they are not locked out, nothing happens.

        Raises:
            ConfigurationError: `user_id` is not hex.
        """
        self._store.unlock(user_id)
        self._book.refresh()

    def sign(self, operation_id: str, *, tampered: bool = False, claims: Mapping[str, object] | None = None) -> str:
        """Return the token with which the phone signed an approved operation. The app passes it to your backend.

        The phone signs the operation's payload, at the time of the approval, with the tenant's key at that time. This
        needs the extra ``jwt``.

        Args:
            operation_id: The operation.
            tampered: Whether to change the transaction data after signing, so that the signature is wrong.
                Default: False.
            claims: Claims to add, or to put in place of the usual ones, such as ``{"exp": 0}``. The signature covers
                them. Default: none.

        Raises:
            ConfigurationError: There is no such operation, it is not approved, or the extra ``jwt`` is not installed.

        Example::

            sandbox.approve("txn-1")
            token = sandbox.sign("txn-1")
        """
        operation, approved_at = self._store.get_approved(operation_id)
        token = self._signer.sign(
            operation.user_id,
            operation.operation_payload or "",
            operation.external_user_id or self._store.users.external_id(operation.user_id),
            approved_at,
            claims or {},
        )
        return self._signer.tamper(token) if tampered else token

    def rotate_keys(self, *, retire: bool = False) -> str:
        """Publish a new key, with which phones sign from now on. This needs the extra ``jwt``.

        Args:
            retire: Whether to stop publishing the earlier keys. Default: False.

        Returns:
            The ``kid`` of the new key.

        Raises:
            ConfigurationError: The extra ``jwt`` is not installed.
        """
        return self._signer.rotate(self._time_ns(), retire=retire)

    @property
    def _signer(self) -> Signer:
        if self._lazy_signer is None:
            try:
                from .signing import Signer  # noqa: PLC0415  # needs the extra
            except ModuleNotFoundError:
                raise ConfigurationError('signing needs PyJWT: install the extra "jwt"') from None
            self._lazy_signer = Signer()
        return self._lazy_signer

    def _encode_key_set(self) -> bytes:
        return self._signer.key_set_json()

    def forget(self, operation_id: str) -> None:
        """Remove an operation. A GET then answers 404, and the id can be used again.

        Args:
            operation_id: The operation.

        Raises:
            ConfigurationError: There is no such operation.
        """
        self._store.forget(operation_id)
        self._cancel_approval(operation_id)
        self._book.refresh()

    def tamper(self, operation_id: str, /, **fields: object) -> None:
        """Return false fields from ``GET`` of an operation, to test how a client handles them.

        Only that answer changes; `operations` and the pending list do not. Each call replaces the false fields of
        earlier calls. A call without fields restores the true answer.

        Args:
            operation_id: The operation.
            **fields: Fields of `Operation` with the JSON values to return, of any type: ``state="denied"``,
                ``result=False``, ``user_id="BAD"``. None returns null; ``msgspec.UNSET`` leaves the field out.

        Raises:
            ConfigurationError: There is no such operation or field, or JSON cannot carry a value.

        Example::

            sandbox.approve("txn-1")
            sandbox.tamper("txn-1", operation_payload="Pay 9000 to mallory")
        """
        self._store.tamper(operation_id, fields)

    @property
    def auto_approve(self) -> AutoApprove:
        """When a simulated user approves an operation, see the argument. A change applies to later operations.

        Raises:
            ConfigurationError: The new value is neither a finite number of seconds, at least 0, nor callable, nor None.
        """
        return self._auto_approve

    @auto_approve.setter
    def auto_approve(self, value: AutoApprove) -> None:
        is_delay = value is not None and not callable(value)
        self._auto_approve: AutoApprove = finite_seconds(value, "auto_approve", zero=True) if is_delay else value

    @property
    def latency(self) -> float:
        """Seconds between a request's effect and its answer; default 0. Faults are delayed too.

        The delay comes after the effect. So a slow creation takes effect even if the client stops waiting for its
        answer, and a poll returns the state at its arrival. This is the worst case of a slow network. A change applies
        to later requests. A very large latency simulates a service that hangs.

        Raises:
            ConfigurationError: The new value is not a finite number of seconds, at least 0.
        """
        return self._latency

    @latency.setter
    def latency(self, value: float) -> None:
        self._latency = finite_seconds(value, "latency", zero=True)

    def fail_next(
        self,
        status: int = 503,
        times: int | None = 1,
        *,
        retry_after: float | str | None = None,
        stored: bool = False,
        method: str | None = None,
        body: bytes | None = None,
        content_type: str = JSON,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Answer the next requests with an error or another answer, as a gateway in front of the service does.

        Faults are queued. Each request, even one with a wrong key, takes the first fault that matches its method.

        Args:
            status: Status of the answer, 200 to 599. Default: 503.
            times: Number of requests; None: all until `recover`. Default: 1.
            retry_after: ``Retry-After``: seconds, or a text to send unchanged (an HTTP date). Default: none.
            stored: Whether the request takes effect before it fails. Default: False, it never reaches the service.
            method: Only requests with this method. Default: any.
            body: Body of the answer. Default: JSON that names the error.
            content_type: ``Content-Type`` of the answer. Default: ``application/json``.
            headers: More headers of the answer (``{"Location": ...}``); they replace those above. Default: none.

        Raises:
            ConfigurationError: An argument is wrong.
        """
        whole_number(status, "status", 200, 599)
        all_headers = {"Content-Type": content_type}
        if retry_after is not None:
            all_headers["Retry-After"] = _format_retry_after(retry_after)
        for name, value in (headers or {}).items():
            _check_text("the name of a header", name, argument="headers")
            # One spelling, since names are case-insensitive.
            all_headers[name.title()] = value
        arguments = {"Content-Type": "content_type", "Retry-After": "retry_after"}
        for name, value in all_headers.items():
            _check_text(name, value, argument=arguments.get(name, "headers"))
        if body is None:
            body = error_answer(status, f"the sandbox simulates a {status}").body
        self._add_fault(times, method, stored=stored, answer=Answer(status, body, all_headers))

    def drop_next(self, times: int | None = 1, *, stored: bool = False, method: str | None = None) -> None:
        """Close the connection of the next requests without an answer. These faults share the queue of `fail_next`.

        The client by itself sends a GET once more if it loses the connection. That is another request, and takes
        another fault.

        Args:
            times: Number of requests; None: all until `recover`. Default: 1.
            stored: Whether the request takes effect before it fails. Default: False, it never reaches the service.
            method: Only requests with this method. Default: any.

        Raises:
            ConfigurationError: An argument is wrong.
        """
        self._add_fault(times, method, stored=stored, answer=None)

    def recover(self) -> None:
        """Remove all faults: those of `fail_next` and `drop_next`, and of the page."""
        self._faults.clear()
        self._book.refresh()

    def _add_fault(self, times: int | None, method: str | None, *, stored: bool, answer: Answer | None) -> None:
        if times is not None:
            whole_number(times, "times")
        if method is not None:
            _check_text("method", method)
        left = math.inf if times is None else times
        self._faults.append(_Fault(left, method and method.upper(), stored, answer))
        self._book.refresh()

    def _describe_fault(self) -> Fault:
        if not self._faults:
            return "recover"
        return "drop" if self._faults[0].answer is None else "fail"

    def _next_fault(self, method: str) -> _Fault | None:
        for index, fault in enumerate(self._faults):
            if fault.method is None or fault.method == method:
                fault.left -= 1
                if fault.left == 0:
                    del self._faults[index]
                return fault
        return None

    def _record(self, method: str, path: str) -> RequestRecord:
        record = RequestRecord(method, path, None, self._now())
        self.requests.append(record)
        del self.requests[: -self.JOURNAL_LIMIT]
        self.request_count += 1
        self._book.refresh()
        return record

    def _now(self) -> float:
        """Return seconds by the clock of the sandbox's loop; before the first start, by this machine's."""
        return time.monotonic() if self._loop is None else self._loop.time()

    def _time_ns(self) -> int:
        """Return nanoseconds since the epoch, ahead by as much as tests have moved the loop's clock.

        That clock may also start again at 0, or stop while the machine sleeps. Neither moves the time back.
        """
        before, (now, moved_to) = self._clocks, (time.time_ns(), self._now())
        self._clocks = now, moved_to
        self._ahead += max(0, round((moved_to - before[1]) * 1e9) - (now - before[0]))
        return now + self._ahead

    def _show_attempt(self, user_id: str, attempt: Authentication) -> None:
        self._book.add_attempt(user_id, attempt)

    def _create_on_phone(self, user_id: str, operation_payload: str | None) -> None:
        operation = self._store.create(user_id, f"page-{secrets.token_hex(8)}", operation_payload=operation_payload)
        assert operation is not None  # noqa: S101  # the id is random
        self._handle_creation(operation)

    def _handle_creation(self, operation: Operation) -> None:
        self._book.show(operation.user_id)
        delay = self._auto_approve
        if callable(delay):
            delay = delay(operation)
            if delay is not None:
                delay = finite_seconds(delay, "the result of auto_approve", zero=True)
        if delay is None:
            return
        if delay == 0:
            self._approve_automatically(operation.operation_id)
            return
        self._approvals[operation.operation_id] = asyncio.get_running_loop().call_later(
            delay, self._approve_automatically, operation.operation_id
        )

    def _approve_automatically(self, operation_id: str) -> None:
        try:
            self.approve(operation_id)
        # The user is locked out, or has no device. No caller could handle the error.
        except ConfigurationError as error:
            logger.info("the sandbox did not approve automatically: %s", error)

    def _cancel_approval(self, operation_id: str) -> None:
        if timer := self._approvals.pop(operation_id, None):
            timer.cancel()


def _format_retry_after(value: float | str) -> str:
    if isinstance(value, str):
        return value
    delay = finite_seconds(value, "retry_after", zero=True)
    return str(int(delay)) if delay.is_integer() else str(delay)


def _check_text(name: str, value: object, *, argument: str | None = None) -> None:
    """Check that a header can carry a value unchanged.

    Args:
        name: Name of the value, for the message.
        value: The value.
        argument: The argument that contains it; None: `name`.

    Raises:
        ConfigurationError: It is not a text of printable ASCII, is empty, or has surrounding blanks.
    """
    if (
        not isinstance(value, str)
        or not (value.isascii() and value.isprintable())
        or value.strip() != value
        or not value
    ):
        raise ConfigurationError(
            f"{name} must be a text of printable ASCII, not empty and without surrounding blanks",
            argument=argument or name,
        )
