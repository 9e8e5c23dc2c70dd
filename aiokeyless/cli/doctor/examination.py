"""`Examination`: the questions of ``aiokeyless doctor``, and what their answers come to.

A client asks what clients ask, and `PlainRequests` the rest. No finding has a payload, a user or a key.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace
from rich.control import Control

from aiokeyless._http import protocol
from aiokeyless._http.proxies import read_environment, show_proxy
from aiokeyless.cli.error_messages import describe, describe_method
from aiokeyless.cli.render import Progress, display_for, follow, show_waiting
from aiokeyless.errors import BadRequestError, KeylessError, NotFoundError
from aiokeyless.events import Event, RequestEnded
from aiokeyless.models import NewOperation, Operation, OperationState, Secret
from aiokeyless.ticket import ApprovalTicket, payload_digest

from .report import CreatedOperation, Finding, Notebook
from .table import CHECKS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiokeyless.client import IfMissing, KeylessClient

    from .requests import PlainRequests


#: Seconds that a replica or Telemetry may lag, and between two looks.
_LAG: Final = 5.0
_PAUSE: Final = 0.5

_TEST: Final = "A test by aiokeyless doctor:"
_TO_APPROVE: Final = f"{_TEST} please approve it"
_TO_START: Final = f"{_TEST} started by the app"
_TO_IGNORE: Final = f"{_TEST} nobody needs to approve it"
_OTHER: Final = f"{_TEST} other content under the same id"
_LONG: Final = f"{_TO_IGNORE}\n" + ("Zoë pays 🦊 " * 100)[: 999 - len(_TO_IGNORE)]
_ODD: Final = " /?%é"


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
    sdk_key: Secret
    earlier: Sequence[CreatedOperation]
    seconds: float
    _id: str = field(default_factory=_new_id)
    _other_id: str = field(default_factory=_new_id)
    _unknown_id: str = field(default_factory=_new_id)

    async def run(self, agree: Callable[[], bool]) -> None:
        """Ask all questions that can be asked; `agree` asks the person whether operations may be created."""
        for name, check in CHECKS.items():
            if name == "created" and self.given.issuperset(check.needs) and not agree():
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
        self._answer = await self.plain.get_without_key(self._unknown_id)
        if (date := protocol.parse_http_date(self._answer.headers.get("Date", ""))) is not None:
            self.given.add("Date")
            self._ahead = date - time.time()
        return True, self.plain.connections[-1][1]

    async def _ask_proxy(self) -> Finding:
        named = read_environment(self.client.base_url)
        shown = "none" if named is None else show_proxy(named)
        return _judge(shown, f"{shown} is not used", holds=named is None or shown.startswith("http:"))

    async def _ask_round_trip(self) -> Finding:
        times = [_now()]
        for _ in range(10):
            await self._get_plainly(None)
            times.append(_now())
        milliseconds = median(later - earlier for earlier, later in pairwise(times)) * 1000
        connections = len({connection for connection, _ in self.plain.connections[-10:]})
        # A balancer may close one in between.
        return connections <= 2, f"{milliseconds:.0f} ms for a GET, connections for ten: {connections}"

    async def _ask_clock(self) -> Finding:
        return abs(self._ahead) < 30, f"the service's clock is {round(self._ahead):+d} s ahead"

    async def _ask_no_key(self) -> Finding:
        return _judge_status(401, self._answer)

    async def _ask_wrong_key(self) -> Finding:
        return _judge_status(401, await self._get_plainly(Secret(_new_id())))

    async def _ask_key(self) -> Finding:
        # A 404 accepts the key, too.
        with suppress(NotFoundError):
            if "--user" in self.given:
                await self.client.get_pending_operations(self.user_id)
            else:
                await self.client.get_operation(self._unknown_id)
        return True, "the server key is accepted"

    async def _ask_sdk_key(self) -> Finding:
        return _judge_status(401, await self._get_plainly(self.sdk_key))

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
        odd_id = f"{_new_id()}{_ODD}"
        await self._create(odd_id, _TO_IGNORE)
        return _judge("unchanged", "changed", holds=(await self._read(odd_id)).operation_id == odd_id)

    async def _ask_id_exact(self) -> Finding:
        return await self._expect_nothing(self._other_id.swapcase())

    async def _ask_id_taken(self) -> Finding:
        return _judge_status(409, await self._create_plainly(self._other_id, _LONG))

    async def _ask_id_taken_by_other(self) -> Finding:
        answer = await self._create_plainly(self._other_id, _OTHER)
        stands = (await self._read(self._other_id)).operation_payload == self._other.operation_payload
        if answer.status == 409 and self.notebook.is_as_expected("id_taken"):
            self.given.add("refusals")
        what = f"answered with {answer.status}, and the first content"
        return answer.status == 409 and stands, f"{what} {'stands' if stands else 'is overwritten'}"

    async def _ask_user_case(self) -> Finding:
        is_same = self._new.user_id == self.user_id.upper()
        return _judge("the user's, in upper case", "in lower case, or another user's", holds=is_same)

    async def _ask_timestamp(self) -> Finding:
        if self._new.created_at is None:
            return False, "not in the documented form"
        ahead = (self._new.created_at.replace(tzinfo=UTC) - datetime.now(UTC)).total_seconds()
        return abs(ahead) < 300, f"{round(ahead):+d} s from now, read as UTC"

    async def _ask_listed(self) -> Finding:
        return _judge("in the list", "not in the list", holds=await self._is_listed())

    async def _ask_approved(self) -> Finding:
        if sys.stdin.isatty() and sys.platform != "win32":  # no loop reads a terminal on Windows
            asyncio.get_running_loop().add_reader(sys.stdin, self._note_enter)
        to_do = "approve this on the phone, and press Enter when you tap"
        self._approved, finding = await self._wait(to_do, self._id, _TO_APPROVE)
        self._approved_at = _now()
        return finding

    def _note_enter(self) -> None:
        # The end of stdin is no tap.
        if os.read(sys.stdin.fileno(), 1024) and "Enter" not in self.given:
            self.given.add("Enter")
            self._tapped_at = _now()
            # The terminal has moved down by a line, and the one that is redrawn must be the same.
            self.notebook.progress.control(Control.move(y=-1))

    async def _ask_lateness(self) -> Finding:
        late = self._approved_at - self._tapped_at
        return late <= 10, f"{late:.1f} s"

    async def _ask_stays_approved(self) -> Finding:
        # Another node may answer.
        second = replace(await self.client.get_operation(self._id), node_id=self._approved.node_id)
        return _judge("the same", "another answer", holds=second == self._approved)

    async def _ask_unlisted(self) -> Finding:
        return _judge("not in the list", "in the list", holds=not await self._is_listed())

    async def _ask_id_taken_after(self) -> Finding:
        return _judge_status(409, await self._create_plainly(self._id, _TO_APPROVE))

    async def _ask_attempt_told(self) -> Finding:
        if not (count := await self._count_attempts()):
            await asyncio.sleep(_LAG)
            count = await self._count_attempts()
        return count > 0, f"attempts: {count}"

    async def _ask_phone_started(self) -> Finding:
        to_do = "let the app authenticate with this operation id and payload"
        return (await self._wait(to_do, _new_id(), _TO_START, if_missing="wait"))[1]

    async def _ask_remembered(self) -> Finding:
        changed = [created.operation_id for created in self.earlier if not await self._is_unchanged(created)]
        return not changed, f"changed or missing: {', '.join(changed)}" if changed else f"all {len(self.earlier)}"

    async def _get_plainly(self, key: Secret | None) -> protocol.Answer:
        return await self.plain.send(protocol.get_operation(self._unknown_id), key)

    async def _expect_nothing(self, operation_id: str) -> Finding:
        with suppress(NotFoundError):
            await self.client.get_operation(operation_id)
            return False, "answered with an operation"
        return True, "answered with 404"

    async def _create(self, operation_id: str, payload: str) -> ApprovalTicket:
        # Noted before it is sent, so that an interruption names it.
        self.notebook.created.append(CreatedOperation(operation_id, payload_digest(payload)))
        return await self.client.create_operation(self.user_id, operation_id=operation_id, operation_payload=payload)

    async def _create_plainly(self, operation_id: str, payload: str) -> protocol.Answer:
        operation = NewOperation(operation_id=operation_id, operation_payload=payload)
        return await self.plain.send(protocol.create_operation(self.user_id, operation))

    async def _read(self, operation_id: str) -> Operation:
        """Read an operation that exists; `_lag` is for how long it was missing, as at a replica."""
        started, self._lag = _now(), 0.0
        while True:
            try:
                operation = await self.client.get_operation(operation_id)
            except NotFoundError:
                self._lag = _now() - started
                if self._lag >= _LAG:
                    raise
                await asyncio.sleep(_PAUSE)
            else:
                self.notebook.record_state(operation)
                return operation

    async def _is_listed(self) -> bool:
        pending = await self.client.get_pending_operations(self.user_id)
        return any(operation.operation_id == self._id for operation in pending)

    async def _count_attempts(self) -> int:
        attempts = await self.client.get_authentications(user_id=self.user_id, operation_id=self._id)
        return sum(attempt.operation_id == self._id for attempt in attempts)

    async def _is_unchanged(self, created: CreatedOperation) -> bool:
        # One without a state may never have been created.
        try:
            now = await self.client.get_operation(created.operation_id)
        except NotFoundError:
            return created.state is None
        is_same = payload_digest(now.operation_payload) == created.payload_sha256
        return is_same and created.state in {now.state, None}

    async def _wait(
        self, to_do: str, operation_id: str, payload: str, *, if_missing: IfMissing = "raise"
    ) -> tuple[Operation, Finding]:
        """Tell the person what to do, and wait until it is approved."""
        self.notebook.progress.print()
        seconds, display = self.seconds, display_for(self.notebook.progress)
        display.begin({"To do": to_do, "Operation": operation_id, "Payload": payload, "Time": f"{seconds:g} s at most"})
        ticket = ApprovalTicket.for_operation(operation_id, user_id=self.user_id, operation_payload=payload)
        progress = Progress(seconds)
        operation, elapsed = await follow(
            self.client, ticket, progress, display, timeout=seconds, if_missing=if_missing
        )
        self.notebook.record_state(operation)
        how = describe_method(operation.auth_type) or ", but no factor is named: require_auth_type never passes"
        return operation, (True, f"after {elapsed:.0f} s{how}")


def _now() -> float:
    return asyncio.get_running_loop().time()


def _judge(good: str, bad: str, *, holds: bool) -> Finding:
    return holds, good if holds else bad


def _judge_status(expected: int, answer: protocol.Answer) -> Finding:
    return answer.status == expected, f"answered with {answer.status}"
