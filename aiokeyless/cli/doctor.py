"""``aiokeyless doctor``: finds out which of our assumptions about the service hold.

The command runs an `Examination`, whose findings go into a `Notebook`. A client asks what clients ask, and
`PlainRequests` the rest. No finding has a payload, a user or a key.
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path  # noqa: TC003  # cyclopts reads the annotations
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import msgspec
from rich.control import Control

from aiokeyless._http import protocol, proxies
from aiokeyless._http.keys import ApiKeys
from aiokeyless._http.transport import Transport
from aiokeyless.errors import BadRequestError, KeylessError, NotFoundError
from aiokeyless.events import Event, RequestEnded
from aiokeyless.models import NewOperation, Operation, OperationState, Secret
from aiokeyless.ticket import DEFAULT_LIFETIME, ApprovalTicket, payload_digest

from .app import (
    CommandError,
    Exit,
    Flag,
    InterruptedCommandError,
    JsonFlag,
    Seconds,
    UsageError,
    User,
    Yes,
    app,
    ask,
    new_client,
)
from .error_messages import describe, describe_method, quote_operation_id
from .findings import CHECKS, CreatedOperation, EarlierReport, Finding, Notebook
from .render import display_for, follow, new_console, print_json, show_waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiohttp.connector import Connection

    from aiokeyless.client import IfMissing, KeylessClient

#: Seconds that a replica or Telemetry may lag.
_LAG: Final = 5.0
_GET: Final = protocol.GET_OPERATION
_GET_WITHOUT_KEY: Final = protocol.Endpoint(_GET.method, _GET.route, _GET.decode, sends_key=False)

_TEST: Final = "A test by aiokeyless doctor:"
_TO_APPROVE: Final = f"{_TEST} please approve it"
_TO_IGNORE: Final = f"{_TEST} nobody needs to approve it"
_LONG: Final = f"{_TO_IGNORE}\n" + ("Zoë pays 🦊 " * 100)[: 999 - len(_TO_IGNORE)]
_CONSENT: Final = """
This creates three operations for the user, and asks them to approve one.
If the service does not refuse ids that are taken, it creates up to five.
Keyless cannot withdraw an operation: the others stay pending for ever.
Their payload says that they are a test.
"""


@app.command(
    help_epilogue="""\
Example, which creates nothing and asks nobody:
  aiokeyless doctor

Example, with a user who has a phone at hand:
  aiokeyless doctor --user C0FFEE --report report.json

Example, a week later:
  aiokeyless doctor --again report.json

To see that the key of your app is refused, set KEYLESS_SDK_KEY to it.

Exit codes: 0 nothing differs, 1 something differs or nothing could be asked,
2 usage, 130 interrupted.""",
)
async def doctor(
    *,
    user: User = None,
    yes: Yes = False,
    seconds: Seconds = DEFAULT_LIFETIME,
    phone_started: Flag = False,
    report: Path | None = None,
    again: Path | None = None,
    as_json: JsonFlag = False,
) -> Exit:
    """Find out whether the service does what aiokeyless expects.

    Without --user it only reads: nothing is created, and nobody is asked.

    Args:
        user: Also create operations for this user, in hex, and ask them once to approve.
        seconds: Seconds that the person has to approve.
        phone_started: Also print an operation id for the app to authenticate with, and wait for it.
        report: Write what was found as JSON, to send to somebody: no key, no payload of yours.
        again: Look once more at the operations of an earlier report.
        as_json: Print the report on stdout, and all else on stderr.
    """
    if phone_started and user is None:
        raise UsageError("--phone-started needs --user")
    if user is not None and not yes and not sys.stdin.isatty():
        raise UsageError("this creates operations, which must be confirmed, and stdin is not a terminal; pass --yes")
    sdk_key = os.environ.get("KEYLESS_SDK_KEY", "").strip()
    names = {"--user": user, "--phone-started": phone_started, "--again": again, "KEYLESS_SDK_KEY": sdk_key}
    given = {"-", *(name for name, value in names.items() if value)}
    earlier = [] if again is None else _read_operations(again)
    notebook = Notebook(as_json=as_json)
    events: list[Event] = []
    was_interrupted = False
    if report is not None:
        report.open("ab").close()  # that it cannot be written must not be found out at the end
    try:
        async with new_client([events.append]) as client, (plain := PlainRequests(client)).session:
            examination = Examination(client, events, plain, notebook, given, user or "", earlier, seconds)
            await examination.run(yes=yes)
    # Ctrl-C raises this in a coroutine.
    except asyncio.CancelledError:
        was_interrupted = True
    found = notebook.finish(given, user, earlier)
    if report is not None:
        report.write_bytes(msgspec.json.format(msgspec.json.encode(found)))  # noqa: ASYNC240  # nothing else runs
    if as_json:
        print_json(new_console(), found)
    if was_interrupted:
        ids = " ".join(map(quote_operation_id, notebook.created))
        raise InterruptedCommandError(f"operations that may stay pending for ever: {ids or 'none'}")
    return Exit.DONE if notebook.is_good else Exit.ERROR


def _read_operations(path: Path) -> list[CreatedOperation]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=EarlierReport).operations
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise CommandError(f"{path} is not a report of aiokeyless doctor --report") from None


def _new_id() -> str:
    return f"doctor-{uuid.uuid4()}"


@dataclass
class Examination:
    """Asks the questions of the table, by one method each. `given` has what checks need; `events` are the client's."""

    client: KeylessClient
    events: Sequence[Event]
    plain: PlainRequests
    notebook: Notebook
    given: set[str]
    user_id: str
    earlier: Sequence[CreatedOperation]
    seconds: float
    _id: str = field(default_factory=_new_id)
    _other_id: str = field(default_factory=_new_id)
    _unknown_id: str = field(default_factory=_new_id)
    _now: Callable[[], float] = field(default_factory=lambda: asyncio.get_running_loop().time)
    _is_taken: bool = False

    async def run(self, *, yes: bool) -> None:
        """Ask all questions that can be asked; unless `yes`, the person is asked before an operation is created."""
        for name, check in CHECKS.items():
            if name == "created" and self.given.issuperset(check.needs):
                self.notebook.progress.print(_CONSENT)
                if not yes and not ask("Go on?"):
                    self.given -= {"--user", "--phone-started"}
            if self.given.issuperset(check.needs):
                # A wait shows itself that it waits.
                async with show_waiting(self.client.base_url, quiet=name in {"approved", "phone_started"}):
                    finding = await self._ask(name)
                self.notebook.note(name, finding)

    async def _ask(self, name: str) -> Finding:
        try:
            finding: Finding = await getattr(self, f"_ask_{name}")()
        except KeylessError as error:
            if isinstance(error, BadRequestError):
                error.detail = None  # the service's own words, which may echo anything
            # Without the user in the path.
            return False, re.sub("/users/[0-9A-F]+", "/users/{userId}", describe(error))
        self.given.add(name)
        return finding

    async def _ask_connection(self) -> Finding:
        # Without a key, since anything may answer.
        path = protocol.operation_path(self._unknown_id)
        self._answer = await self.plain.send(protocol.Request(_GET_WITHOUT_KEY, path))
        if (date := protocol.parse_http_date(self._answer.headers.get("Date", ""))) is not None:
            self.given.add("Date")
            self._ahead = date - time.time()
        return True, self.plain.connections[-1][1]

    async def _ask_proxy(self) -> Finding:
        shown = self.plain.named_proxy
        return _judge(shown, f"{shown} is not used", holds=shown == "none" or shown.startswith("http:"))

    async def _ask_round_trip(self) -> Finding:
        seconds: list[float] = []
        for _ in range(10):
            started = self._now()
            await self._get_plainly(None)
            seconds.append(self._now() - started)
        connections = len({connection for connection, _ in self.plain.connections[-10:]})
        # A balancer may close one in between.
        return connections <= 2, f"{median(seconds) * 1000:.0f} ms for a GET, connections for ten: {connections}"

    async def _ask_clock(self) -> Finding:
        return abs(self._ahead) < 30, f"the service's clock is {round(self._ahead):+d} s ahead"

    async def _ask_no_key(self) -> Finding:
        return _judge_status(401, self._answer)

    async def _ask_wrong_key(self) -> Finding:
        return _judge_status(401, await self._get_plainly(Secret(_new_id())))

    async def _ask_key(self) -> Finding:
        client, user_id = self.client, self.user_id
        with suppress(NotFoundError):  # which accepts the key, too
            await (client.get_pending_operations(user_id) if user_id else client.get_operation(self._unknown_id))
        return True, "the server key is accepted"

    async def _ask_sdk_key(self) -> Finding:
        return _judge_status(401, await self._get_plainly(Secret(os.environ["KEYLESS_SDK_KEY"].strip())))

    async def _ask_unknown_operation(self) -> Finding:
        return await self._expect_nothing(self._unknown_id)

    async def _ask_created(self) -> Finding:
        ticket = await self._create(self._id, _TO_APPROVE)
        posts = [event for event in self.events if isinstance(event, RequestEnded) and event.method == "POST"]
        found = f"answered with {posts[-1].status}"
        return _judge(found, f"{found}, but the operation exists", holds=not ticket.reconciled)

    async def _ask_read_at_once(self) -> Finding:
        self._new = new = await self._read(self._id)
        found = f"{new.state}, and result is {str(new.result).lower()}"
        if self._lag:  # a replica's, which a wait for a new ticket bears
            found += f", after 404 for {self._lag:.1f} s"
        return new.state == OperationState.PENDING and not new.result, found

    async def _ask_pending_factor(self) -> Finding:
        return self._new.auth_type is None, f"{self._new.auth_type or 'none'}"

    async def _ask_content_kept(self) -> Finding:
        await self._create(self._other_id, _LONG)
        self._other = await self._read(self._other_id)
        return _judge("unchanged", "changed", holds=self._other.operation_payload == _LONG)

    async def _ask_id_kept(self) -> Finding:
        odd_id = f"{_new_id()} /?%é"
        await self._create(odd_id, _TO_IGNORE)
        return _judge("unchanged", "changed", holds=(await self._read(odd_id)).operation_id == odd_id)

    async def _ask_id_exact(self) -> Finding:
        return await self._expect_nothing(self._other_id.swapcase())

    async def _ask_id_taken(self) -> Finding:
        self._is_taken, _ = finding = _judge_status(409, await self._create_plainly(self._other_id, _LONG))
        return finding

    async def _ask_id_taken_by_other(self) -> Finding:
        answer = await self._create_plainly(self._other_id, f"{_TEST} other content under the same id")
        stands = (await self._read(self._other_id)).operation_payload == self._other.operation_payload
        if answer.status == 409 and self._is_taken:
            self.given.add("refusals")
        what = f"answered with {answer.status}, and the first content"
        return answer.status == 409 and stands, f"{what} {'stands' if stands else 'is overwritten'}"

    async def _ask_user_case(self) -> Finding:
        is_same = self._new.user_id == self.user_id.upper()
        return _judge("the user's, in upper case", "in lower case, or another user's", holds=is_same)

    async def _ask_timestamp(self) -> Finding:
        if self._new.created_at is None:
            return False, "no time that can be read"
        ahead = (self._new.created_at - datetime.now(UTC)).total_seconds()
        return abs(ahead) < 300, f"{round(ahead):+d} s from now, read as UTC"

    async def _ask_listed(self) -> Finding:
        return _judge("in the list", "not in the list", holds=await self._is_listed())

    async def _ask_approved(self) -> Finding:
        if sys.stdin.isatty() and sys.platform != "win32":  # no loop reads a terminal on Windows
            asyncio.get_running_loop().add_reader(sys.stdin, self._note_enter)
        to_do = "approve this on the phone, and press Enter when you tap"
        self._approved, finding = await self._wait(to_do, self._id, _TO_APPROVE)
        self._approved_at = self._now()
        return finding

    def _note_enter(self) -> None:
        # The end of stdin is no tap.
        if os.read(sys.stdin.fileno(), 1024) and "Enter" not in self.given:
            self.given.add("Enter")
            self._tapped_at = self._now()
            # The terminal has moved down by a line, and the one that is redrawn must be the same.
            self.notebook.progress.control(Control.move(y=-1))

    async def _ask_lateness(self) -> Finding:
        late = self._approved_at - self._tapped_at
        return late <= 10, f"{late:.1f} s"

    async def _ask_stays_approved(self) -> Finding:
        # Another node may answer.
        second = msgspec.structs.replace(await self.client.get_operation(self._id), node_id=self._approved.node_id)
        return _judge("the same", "another answer", holds=second == self._approved)

    async def _ask_unlisted(self) -> Finding:
        return _judge("not in the list", "in the list", holds=not await self._is_listed())

    async def _ask_id_taken_after(self) -> Finding:
        return _judge_status(409, await self._create_plainly(self._id, _TO_APPROVE))

    async def _ask_attempt_told(self) -> Finding:
        for pause in (0, _LAG):
            await asyncio.sleep(pause)
            answered = await self.client.get_authentications(user_id=self.user_id, operation_id=self._id)
            if count := sum(attempt.operation_id == self._id for attempt in answered.attempts):
                return True, f"attempts: {count}"
        return False, "attempts: 0"

    async def _ask_phone_started(self) -> Finding:
        to_do, payload = "let the app authenticate with this operation id and payload", f"{_TEST} started by the app"
        return (await self._wait(to_do, _new_id(), payload, if_missing="wait"))[1]

    async def _ask_remembered(self) -> Finding:
        changed = [created.operation_id for created in self.earlier if not await self._is_unchanged(created)]
        return not changed, f"changed or missing: {', '.join(changed)}" if changed else f"all {len(self.earlier)}"

    async def _get_plainly(self, key: Secret | None) -> protocol.RawAnswer:
        return await self.plain.send(protocol.get_operation(self._unknown_id), key)

    async def _expect_nothing(self, operation_id: str) -> Finding:
        with suppress(NotFoundError):
            await self.client.get_operation(operation_id)
            return False, "answered with an operation"
        return True, "answered with 404"

    async def _create(self, operation_id: str, payload: str) -> ApprovalTicket:
        # Noted before it is sent, so that an interruption names it.
        self.notebook.created[operation_id] = CreatedOperation(operation_id, payload_digest(payload))
        return await self.client.create_operation(self.user_id, operation_id=operation_id, operation_payload=payload)

    async def _create_plainly(self, operation_id: str, payload: str) -> protocol.RawAnswer:
        operation = NewOperation(operation_id=operation_id, operation_payload=payload)
        return await self.plain.send(protocol.create_operation(self.user_id, operation))

    async def _read(self, operation_id: str) -> Operation:
        """Read an operation that exists; `_lag` is for how long it was missing, as at a replica."""
        started, self._lag = self._now(), 0.0
        while True:
            try:
                operation = await self.client.get_operation(operation_id)
            except NotFoundError:
                self._lag = self._now() - started
                if self._lag >= _LAG:
                    raise
                await asyncio.sleep(0.5)
            else:
                self.notebook.record_state(operation)
                return operation

    async def _is_listed(self) -> bool:
        pending = await self.client.get_pending_operations(self.user_id)
        return any(operation.operation_id == self._id for operation in pending)

    async def _is_unchanged(self, created: CreatedOperation) -> bool:
        with suppress(NotFoundError):
            now = await self.client.get_operation(created.operation_id)
            is_same = payload_digest(now.operation_payload) == created.payload_sha256
            return is_same and created.state in {now.state, None}
        return created.state is None  # it may never have been created

    async def _wait(
        self, to_do: str, operation_id: str, payload: str, *, if_missing: IfMissing = "raise"
    ) -> tuple[Operation, Finding]:
        """Tell the person what to do, and wait until it is approved."""
        self.notebook.progress.print()
        seconds, display = self.seconds, display_for(self.notebook.progress, self.seconds)
        display.begin({"To do": to_do, "Operation": operation_id, "Payload": payload, "Time": f"{seconds:g} s at most"})
        ticket = ApprovalTicket.for_operation(operation_id, user_id=self.user_id, operation_payload=payload)
        operation, elapsed = await follow(self.client, ticket, display, timeout=seconds, if_missing=if_missing)
        self.notebook.record_state(operation)
        how = describe_method(operation.auth_type) or ", but no factor is named: require_auth_type never passes"
        return operation, (True, f"after {elapsed:.0f} s{how}")


def _judge(good: str, bad: str, *, holds: bool) -> Finding:
    return holds, good if holds else bad


def _judge_status(expected: int, answer: protocol.RawAnswer) -> Finding:
    return answer.status == expected, f"answered with {answer.status}"


class PlainRequests:
    """Sends each request once, as the client does, but returns its answer whatever the status; close `session`."""

    def __init__(self, client: KeylessClient) -> None:
        self._key = Secret(os.environ["KEYLESS_API_KEY"].strip())  # the client has checked it
        self.connections: list[tuple[asyncio.Transport, str]] = []
        """The connection of each request, and its description."""
        self.session: aiohttp.ClientSession = _open_session(self.connections)
        named = proxies.read_environment(client.base_url)
        self.named_proxy: str = "none" if named is None else proxies.show_proxy(named)
        """The proxy that the environment names, without its password."""
        # The client has logged that no other proxy is used.
        proxy = named if self.named_proxy.startswith("http:") else None
        self._base_url, timeout = client.base_url, client.request_timeout
        self._options: Any = {"session": self.session, "request_timeout": timeout, "max_attempts": 1, "proxy": proxy}

    async def send(self, request: protocol.Request[Any], key: Secret | None = None) -> protocol.RawAnswer:
        """Send a request, by default with the server key."""
        return await Transport(self._base_url, ApiKeys(key or self._key), **self._options).receive(request)


def _open_session(connections: list[tuple[asyncio.Transport, str]]) -> aiohttp.ClientSession:
    class Response(aiohttp.ClientResponse):
        """Records its connection, which aiohttp drops as soon as the body is read."""

        async def start(self, connection: Connection) -> aiohttp.ClientResponse:
            assert connection.transport is not None  # noqa: S101  # it is open
            # Now, since a connection that is closed has forgotten its certificate.
            connections.append((connection.transport, describe_connection(connection.transport)))
            return await super().start(connection)

    return aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), response_class=Response)


def describe_connection(connection: asyncio.BaseTransport) -> str:
    """Return the address family, the TLS version, and the issuer and the days of the certificate."""
    family = "IPv6" if ":" in connection.get_extra_info("peername")[0] else "IPv4"
    tls: ssl.SSLObject | None = connection.get_extra_info("ssl_object")
    if tls is None:
        return f"{family}, without TLS"
    certificate: dict[str, Any] = tls.getpeercert() or {}
    # ssl returns a name as a sequence of sets of pairs.
    issuer = dict(pair for pairs in certificate["issuer"] for pair in pairs)
    days = (ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()) / 86400
    who = issuer.get("organizationName") or issuer.get("commonName")
    return f"{family}, {tls.version()}, certificate of {who} for {days:.0f} more days"
