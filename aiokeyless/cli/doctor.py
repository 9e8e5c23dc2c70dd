"""``aiokeyless doctor``: finds out which of our assumptions about the service hold.

The command runs an `Examination`, whose findings go into a `Notebook`. A client waits, and `PlainRequests` ask the
rest. No finding has a payload, a user or a key.
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
from typing import TYPE_CHECKING, Any, Final, TypeVar

import aiohttp
import msgspec
from rich.control import Control

from aiokeyless import errors
from aiokeyless._http import protocol, proxies
from aiokeyless._http.keys import ApiKeys
from aiokeyless._http.transport import MAX_RETRY_AFTER, Transport
from aiokeyless._rules.approval import Verdict, evaluate, is_same_user
from aiokeyless._version import __version__
from aiokeyless.models import AuthType, NewOperation, Operation, OperationState, Secret
from aiokeyless.ticket import DEFAULT_LIFETIME, ApprovalTicket, payload_digest

from .app import Delay, Exit, Flag, InterruptedCommandError, JsonFlag, UsageError, User, Yes, app, ask, new_client
from .error_messages import describe, describe_method, quote_operation_id
from .findings import CHECKS, CreatedOperation, Finding, Notebook, read_report
from .render import display_for, follow, new_console, print_json, show_waiting

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.connector import Connection

    from aiokeyless.client import KeylessClient

T = TypeVar("T")

#: Seconds that a replica or Telemetry may lag.
_LAG: Final = 5.0
_REPETITIONS: Final = 3  # of a request, while what comes says nothing about the question
_GET_WITHOUT_KEY: Final = protocol.Endpoint("GET", protocol.GET_OPERATION.route, bytes, sends_key=False)
#: Checks that need not be as expected for those that need them.
_ENOUGH: Final = {"created", "read_at_once", "content_kept"}
_TEST: Final = "A test by aiokeyless doctor:"
_TO_APPROVE: Final = f"{_TEST} please approve it"
_TO_IGNORE: Final = f"{_TEST} nobody needs to approve it"
_LONG: Final = f"{_TO_IGNORE}\n" + ("Zoë pays 🦊 " * 100)[: 999 - len(_TO_IGNORE)]
_CONSENT: Final = """
This creates three operations for the user, and asks {}.
If the service does not refuse ids that are taken, it creates up to five.
Keyless cannot withdraw an operation: the others stay pending for ever.
Their payload says that they are a test, and one has an external user id.
"""


@app.command(
    help_epilogue="""\
Examples, with a user who has a phone at hand, and a week later:
  aiokeyless doctor
  aiokeyless doctor --user C0FFEE --report report.json
  aiokeyless doctor --again report.json

Exit codes: 0 nothing differs, 1 something differs, the service did not answer
or you declined, 2 usage, 130 interrupted.""",
)
async def doctor(
    *,
    user: User = None,
    yes: Yes = False,
    seconds: Delay = DEFAULT_LIFETIME,
    phone_started: Flag = False,
    report: Path | None = None,
    again: Path | None = None,
    as_json: JsonFlag = False,
) -> Exit:
    """Find out whether the service does what aiokeyless expects.

    Without --user it only reads, and asks nobody. With your app's key in KEYLESS_SDK_KEY, it sees that it is refused.

    Args:
        user: Also create operations for this user, in hex, and ask them once to approve.
        seconds: Seconds that the person has to approve; 0: nobody is asked.
        phone_started: Also print an operation id for the app to authenticate with, and wait for it.
        report: Write what was found as JSON, to send to somebody: no key, no payload of yours.
        again: Look once more at the operations of an earlier report, and say what is new.
        as_json: Print the report on stdout, and all else on stderr.
    """
    if phone_started and user is None:
        raise UsageError("--phone-started needs --user")
    if user is not None and not yes and not sys.stdin.isatty():
        raise UsageError("this creates operations, which must be confirmed, and stdin is not a terminal; pass --yes")
    sdk_key = os.environ.get("KEYLESS_SDK_KEY", "").strip()
    names = {"--user": user, "--phone-started": phone_started, "time to approve": seconds, "--again": again}
    given = {"-", "a direct way", *(name for name, value in {**names, "KEYLESS_SDK_KEY": sdk_key}.items() if value)}
    earlier = read_report(again)
    notebook = Notebook(as_json=as_json)
    was_interrupted = False
    if report is not None:
        with report.open("ab"):  # that it cannot be written must not be found out at the end
            if report.is_file():  # noqa: ASYNC240  # and not a device; nothing else runs
                report.chmod(0o600)  # noqa: ASYNC240
    try:
        async with new_client() as client, (plain := PlainRequests(client)).session:
            now, digest = datetime.now(UTC).isoformat(timespec="seconds"), user and payload_digest(user.upper())
            notebook.about = {"version": 1, "date": now, "library": __version__, "user": digest}
            region = {url: region for region, url in protocol.ADDRESSES.items()}.get(client.base_url)
            notebook.about |= {"host": client.base_url.split("/")[2], "region": region}
            examination = Examination(client, plain, notebook, given, user or "", earlier.operations, seconds)
            await examination.run(yes=yes)
    # Ctrl-C raises this in a coroutine.
    except asyncio.CancelledError:
        was_interrupted = True
    found = notebook.finish(given, earlier)
    if report is not None:
        report.write_bytes(msgspec.json.format(msgspec.json.encode(found)))  # noqa: ASYNC240  # nothing else runs
    if as_json:
        print_json(new_console(), found)
    if was_interrupted:
        ids = " ".join(map(quote_operation_id, notebook.created))
        raise InterruptedCommandError(f"operations that may stay pending for ever: {ids or 'none'}")
    is_good = "key" in given and "declined" not in given
    return Exit.DONE if is_good and all(check["status"] != "differs" for check in found["checks"]) else Exit.ERROR


def _new_id() -> str:
    return f"doctor-{uuid.uuid4()}"


class UnansweredError(Exception):
    """What came says nothing about the question."""


@dataclass
class Examination:
    """Asks the questions of the table, by one method each. `given` has what checks need."""

    client: KeylessClient
    plain: PlainRequests
    notebook: Notebook
    given: set[str]
    user_id: str
    earlier: list[CreatedOperation]
    seconds: float
    _id: str = field(default_factory=_new_id)
    _other_id: str = field(default_factory=_new_id)
    _now: Callable[[], float] = field(default_factory=lambda: asyncio.get_running_loop().time)
    _refusals: set[int] = field(default_factory=set)  # what was answered without a right key, in place of 401
    _external_user: str | None = "aiokeyless-doctor"
    _tapped_at: float = 0.0
    _known: dict[str, Finding] = field(default_factory=dict)  # what the answer to an earlier question shows

    async def run(self, *, yes: bool) -> None:
        """Ask all questions that can be asked; unless `yes`, the person is asked before an operation is created."""
        self._payload = _TO_APPROVE if self.seconds else _TO_IGNORE
        self._known["proxy"] = self.plain.named_proxy.startswith(("none", "http:")), self.plain.named_proxy
        for name, check in CHECKS.items():
            if name == "created" and self.given.issuperset(check.needs):
                self.notebook.progress.print(_CONSENT.format("them to approve one" if self.seconds else "nothing"))
                if not yes and not ask("Go on?"):
                    self.given.symmetric_difference_update({"--user", "declined"})
            if self.given.issuperset(check.needs):
                # A wait shows itself that it waits.
                async with show_waiting(self.client.base_url, quiet=name in {"approved", "phone_started"}):
                    finding = await self._ask(name)
                self.notebook.note(name, finding)

    async def _ask(self, name: str) -> Finding:
        try:
            finding: Finding = self._known.get(name) or await getattr(self, f"_ask_{name}")()
        except UnansweredError as error:
            return "unknown", str(error)
        except errors.KeylessError as error:
            return "unknown" if isinstance(error, errors.ApprovalUnknownError) else False, _describe(error)
        if finding[0] is True or name in _ENOUGH:
            self.given.add(name)
        return finding

    async def _ask_connection(self) -> Finding:
        # Without a key, since anything may answer.
        request = protocol.Request(_GET_WITHOUT_KEY, protocol.operation_path(_new_id()))
        first = await self.plain.ask(request)
        self._known["clock"] = "skipped", "without a Date"
        if (date := protocol.parse_http_date(first.headers.get("Date", ""))) is not None:
            ahead = date - time.time()
            self._known["clock"] = abs(ahead) < 30, f"the service's clock is {round(ahead):+d} s ahead"
        self._known["no_key"] = self._judge_refusal(first.status, {401})
        return True, self.plain.connections[-1][1]

    async def _ask_round_trip(self) -> Finding:
        seconds, connections = [], set()
        for _ in range(10):
            started = self._now()
            await self._get_status()
            seconds.append(self._now() - started)
            connections.add(self.plain.connections[-1][0])
        # A balancer may close one in between.
        found = f"{median(seconds) * 1000:.0f} ms for a GET, connections for ten: {len(connections)}"
        return len(connections) <= 2, found

    async def _ask_wrong_key(self) -> Finding:
        return self._judge_refusal(await self._get_status(key=Secret(_new_id())), {401})

    async def _ask_key(self) -> Finding:
        status = await self._get_status()
        self._known["unknown_operation"] = _judge(status, 404)
        if status == 403 and self.user_id:  # which may be of an unknown operation
            status = (await self.plain.ask(protocol.get_pending_operations(self.user_id))).status
        # A service that checks no key has answered with 404, and a captive portal with something else.
        if status in self._refusals - {404}:
            return "skipped", "the same answer as without a right key"
        return status not in {401, 403}, f"answered with {status}"

    async def _ask_sdk_key(self) -> Finding:
        status = await self._get_status(key=Secret(os.environ["KEYLESS_SDK_KEY"].strip()))
        return self._judge_refusal(status, {401, 403})

    def _judge_refusal(self, status: int, expected: set[int]) -> Finding:
        if status in self._refusals:
            return "skipped", "the same answer as without a right key"
        if status not in expected:
            self._refusals.add(status)
        return status in expected, f"answered with {status}"

    async def _ask_users(self) -> Finding:
        users = await self._list(protocol.find_users(_new_id()))
        return not users, f"users: {len(users)}"

    async def _ask_devices(self) -> Finding:
        return True, f"devices: {len(await self._list(protocol.get_devices(self.user_id)))}"

    async def _list(self, request: protocol.Request[list[T]]) -> list[T]:
        with suppress(errors.NotFoundError):
            return await self.plain.fetch(request)
        return []

    async def _ask_created(self) -> Finding:
        return await self._create(self._id, self._payload)

    async def _ask_read_at_once(self) -> Finding:
        self._new = new = await self._read(self._id)
        ticket = ApprovalTicket.for_operation(self._id, user_id=self.user_id, operation_payload=self._payload)
        if evaluate(new, self._id, ticket) is Verdict.PENDING:
            self.given.add("a comparable answer")
        is_same, is_other = new.user_id == self.user_id.upper(), not is_same_user(new.user_id, self.user_id)
        what = "the user's" if is_same else "another user's" if is_other else "in lower case"
        self._known["user_case"] = is_same, f"userId is {what}"
        self._known["pending_factor"] = new.auth_type is None, f"authType is {new.auth_type or 'missing':.20}"
        found = f"state is {new.state:.20}, result is {str(new.result).lower()}"
        # A replica's lag, which a wait for a new ticket bears.
        found += f", after 404 for {self._lag:.1f} s" * (self._lag > 0)
        return new.state == OperationState.PENDING and not new.result, found

    async def _ask_cache(self) -> Finding:
        operation_id = self._id if "read_at_once" in self.given else _new_id()
        for pause in (0, 2):
            await asyncio.sleep(pause)
            await self._get_status(operation_id)
        if self.plain.oldest > 1:
            self.given.remove("a direct way")
        return self.plain.oldest <= 1, f"Age is {self.plain.oldest:.0f} s at most"

    async def _ask_content_kept(self) -> Finding:
        refused = 0
        try:
            await self._create(self._other_id, _LONG, self._external_user)
        except errors.StatusError as error:
            self._external_user, refused = None, error.status
            await self._create(self._other_id, _LONG)
        self._other = await self._read(self._other_id)
        is_kept = self._other.external_user_id == self._external_user
        found = f"externalUserId is {'the same' if is_kept else 'missing or changed'}"
        of_create = False, f"answered with {refused}, and without one with a success"
        self._known["external_user"] = of_create if refused else (is_kept, found)
        is_kept = (self._new.operation_payload, self._other.operation_payload) == (self._payload, _LONG)
        return is_kept, f"operationPayload is {'the same' if is_kept else 'changed'}"

    async def _ask_id_kept(self) -> Finding:
        odd_id = f"{_new_id()} ?%é"
        await self._create(odd_id, _TO_IGNORE)
        is_kept = (await self._read(odd_id)).operation_id == odd_id
        return is_kept, f"operationId is {'the same' if is_kept else 'changed'}"

    async def _ask_id_exact(self) -> Finding:
        return _judge(await self._get_status(self._other_id.swapcase()), 404)

    async def _ask_id_taken_by_other(self) -> Finding:
        contents = _LONG, f"{_TEST} other content under the same id"
        same, other = [(await self._post(self._other_id, each, self._external_user)).status for each in contents]
        stands = (await self._read(self._other_id)).operation_payload == self._other.operation_payload
        self.given.add("answers to taken ids")
        self._known["id_taken"] = ("skipped", "as id_taken_by_other") if same == other != 409 else _judge(same, 409)
        found = f"answered with {other}, and the first content {'stands' if stands else 'is overwritten'}"
        return other == 409 and stands, found

    async def _ask_timestamp(self) -> Finding:
        if (created_at := self._new.created_at) is None:
            return False, f"timestamp is {'missing' if self._new.timestamp is None else 'no time'}"
        ahead = (created_at - datetime.now(UTC)).total_seconds()
        return abs(ahead) < 300, f"timestamp is {round(ahead):+d} s from now"

    async def _ask_listed(self) -> Finding:
        listed = {each.operation_id for each in await self._list(protocol.get_pending_operations(self.user_id))}
        is_listed, others = self._other_id in listed, listed - self.notebook.created.keys()
        # Of what nobody approves. A service may list only some, such as those of earlier visits.
        is_unknown = not is_listed and any(each.startswith("doctor-") for each in others)
        return "unknown" if is_unknown else is_listed, f"listed: {len(listed)}, {'with' if is_listed else 'without'} it"

    async def _ask_approved(self) -> Finding:
        if sys.stdin.isatty() and sys.platform != "win32":  # no loop reads a terminal on Windows
            asyncio.get_running_loop().add_reader(sys.stdin, self._note_enter)
        to_do = "approve this on the phone, and press Enter when you tap"
        self._approved, finding = await self._wait(to_do, self._id, self._payload)
        late, how = self._now() - self._tapped_at, self._approved.auth_type
        self._known["factor"] = how in tuple(AuthType), f"authType is {how or 'missing':.20}"
        self._known["lateness"] = late <= 10, f"{late:.1f} s"
        return finding

    def _note_enter(self) -> None:
        # The end of stdin is no tap.
        if os.read(sys.stdin.fileno(), 1024) and "Enter" not in self.given:
            self.given.add("Enter")
            self._tapped_at = self._now()
            # The terminal has moved down by a line, and the one that is redrawn must be the same.
            self.notebook.progress.control(Control.move(y=-1))

    async def _ask_stays_approved(self) -> Finding:
        second = await self.plain.fetch(protocol.get_operation(self._id))
        names = {*Operation.__struct_fields__} - {"node_id"}  # another node may answer
        changed = sorted(name for name in names if getattr(second, name) != getattr(self._approved, name))
        return not changed, f"changed: {', '.join(changed) or 'nothing'}"

    async def _ask_unlisted(self) -> Finding:
        listed = await self._list(protocol.get_pending_operations(self.user_id))
        is_listed = self._id in {operation.operation_id for operation in listed}
        return not is_listed, f"listed: {len(listed)}, {'with' if is_listed else 'without'} it"

    async def _ask_id_taken_after(self) -> Finding:
        return _judge((await self._post(self._id, self._payload)).status, 409)

    async def _ask_attempt_told(self) -> Finding:
        count = 0
        for pause in (0, _LAG):
            await asyncio.sleep(pause)
            answered = await self.plain.fetch(protocol.get_authentications(self.user_id, self._id))
            if count := sum(attempt.operation_id == self._id for attempt in answered.attempts):
                break
        return count > 0, f"attempts: {count}"

    async def _ask_phone_started(self) -> Finding:
        to_do, payload = "let the app authenticate with this operation id and payload", f"{_TEST} started by the app"
        return (await self._wait(to_do, _new_id(), payload))[1]

    async def _ask_remembered(self) -> Finding:
        changes: list[str] = []
        for created in self.earlier:
            found = "missing" if created.state else ""  # without a state, it may never have been created
            with suppress(errors.NotFoundError):
                now = await self.plain.fetch(protocol.get_operation(created.operation_id))
                is_other = payload_digest(now.operation_payload) != created.payload_sha256
                found = "" if created.state in {now.state, None} else f"state is {now.state:.20}"
                found = "another operationPayload" if is_other else found
            changes += [f"{created.operation_id}: {found}"] * bool(found)
        return not changes, "; ".join(changes) or f"all {len(self.earlier)}"

    async def _get_status(self, operation_id: str | None = None, key: Secret | None = None) -> int:
        """Return what answers a GET, by default of an operation that does not exist, and that no cache can have."""
        return (await self.plain.ask(protocol.get_operation(operation_id or _new_id()), key)).status

    async def _post(self, operation_id: str, payload: str, external: str | None = None) -> protocol.RawAnswer:
        operation = NewOperation(operation_id=operation_id, operation_payload=payload, external_user_id=external)
        return await self.plain.ask(protocol.create_operation(self.user_id, operation))

    async def _create(self, operation_id: str, payload: str, external: str | None = None) -> Finding:
        """Create an operation. Raise if it is not there afterwards."""
        # Noted before it is sent, so that an interruption names it.
        self.notebook.created[operation_id] = CreatedOperation(operation_id, payload_digest(payload))
        answer = await self._post(operation_id, payload, external)
        failure: errors.KeylessError = errors.StatusError(status=answer.status, method="POST", path="")
        was_repeated, found = self.plain.was_repeated, f"answered with {answer.status}"
        try:
            if self.plain.read(protocol.POST_OPERATION, answer).success:
                return True, found
        except errors.KeylessError as error:
            failure, found = error, _describe(error)
        if answer.status // 100 == 2 or answer.status == 409:
            with suppress(errors.NotFoundError):
                await self._read(operation_id)
                return "unknown" if was_repeated else False, f"{found}, without success, but the operation exists"
        raise failure

    async def _read(self, operation_id: str) -> Operation:
        """Read an operation that exists; `_lag` is for how long it was missing, as at a replica."""
        started, self._lag = self._now(), 0.0
        while True:
            try:
                operation = await self.plain.fetch(protocol.get_operation(operation_id))
            except errors.NotFoundError:
                self._lag = self._now() - started
                if self._lag >= _LAG:
                    raise
                await asyncio.sleep(0.5)
            else:
                self.notebook.created[operation_id].state = operation.state
                return operation

    async def _wait(self, to_do: str, operation_id: str, payload: str) -> tuple[Operation, Finding]:
        """Tell the person what to do, and wait until it is approved."""
        self.notebook.progress.print()
        seconds, display = self.seconds, display_for(self.notebook.progress, self.seconds)
        display.begin({"To do": to_do, "Operation": operation_id, "Payload": payload, "Time": f"{seconds:g} s at most"})
        ticket = ApprovalTicket.for_operation(operation_id, user_id=self.user_id, operation_payload=payload)
        operation, elapsed = await follow(self.client, ticket, display, timeout=seconds, if_missing="wait")
        if created := self.notebook.created.get(operation_id):
            created.state = operation.state
        return operation, (True, f"after {elapsed:.0f} s{describe_method(operation.auth_type):.20}")


def _judge(status: int, expected: int) -> Finding:
    return status == expected, f"answered with {status}"


def _describe(error: errors.KeylessError) -> str:
    """Return what came, without the service's own words, which may echo anything, and without the user."""
    if isinstance(error, errors.StatusError):
        return f"answered with {error.status}"
    if isinstance(error, errors.DecodeError):
        return f"answered with {str(error).partition(' answered ')[2].rpartition('; ')[0]}"
    return describe(error)


class PlainRequests:
    """Sends each request as the client does, but returns its answer whatever the status; close `session`."""

    def __init__(self, client: KeylessClient) -> None:
        self._keys = ApiKeys(Secret(os.environ["KEYLESS_API_KEY"].strip()))  # the client has checked it
        self.connections: list[tuple[asyncio.Transport, str]] = []  # of each answer, with its description
        self.session: aiohttp.ClientSession = _open_session(self.connections)
        self.oldest: float = 0.0  # the highest Age of all answers
        self.was_repeated: bool = False  # the last request
        self._repetitions = _REPETITIONS
        named = proxies.read_environment(client.base_url)
        self.named_proxy: str = "none" if named is None else proxies.show_proxy(named)
        proxy = named if self.named_proxy.startswith("http:") else None  # the client has logged that no other is used
        self._base_url, timeout = client.base_url, client.request_timeout
        self._options: Any = {"session": self.session, "request_timeout": timeout, "max_attempts": 1, "proxy": proxy}

    async def ask(self, request: protocol.Request[Any], key: Secret | None = None) -> protocol.RawAnswer:
        """Send a request, by default with the server key. Repeat it while what comes says nothing."""
        transport = Transport(self._base_url, ApiKeys(key) if key else self._keys, **self._options)
        left = self._repetitions
        while True:
            self.was_repeated, pause = left < self._repetitions, 1.0
            try:
                answer = await transport.receive(request)
            except errors.TransportError as error:
                found = str(error).partition(f"{request.shown_path} ")[2]
            else:
                with suppress(ValueError):
                    self.oldest = max(self.oldest, float(answer.headers.get("Age", "0")))
                if answer.status not in errors.TRANSIENT_STATUSES and answer.status // 100 not in {3, 5}:
                    self._repetitions = _REPETITIONS
                    return answer
                # Of a redirect, only the host is shown.
                host = re.findall(r"^https?://(?:[^/?#]*@)?([\w.-]+)", answer.headers.get("Location", ""))
                found = " to ".join([f"answered with {answer.status}", *host])
                pause = protocol.retry_after(answer.headers) or pause
            if not left or pause > MAX_RETRY_AFTER:
                self._repetitions = 0  # of the next request, too
                raise UnansweredError(found)
            left -= 1
            await asyncio.sleep(pause)

    async def fetch(self, request: protocol.Request[T]) -> T:
        """Send a request, and return its answer as a struct."""
        return self.read(request.endpoint, await self.ask(request))

    def read(self, endpoint: protocol.Endpoint[T], answer: protocol.RawAnswer) -> T:
        """Return an answer as a struct."""
        return protocol.read(endpoint, endpoint.route, answer, self._keys.current().redaction)


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
