"""The checks of ``aiokeyless doctor``, and what it found: line by line on the screen, and as JSON.

docs/reference/assumptions.md has what they expect. Users and payloads are digests in a report.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import msgspec
from rich.table import Table
from rich.text import Text

from aiokeyless.ticket import payload_digest

from .render import escape, is_terminal, new_console, print_fact

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from rich.console import Console

    from aiokeyless.models import Operation

#: Whether a check is as expected, and what was found.
Finding: TypeAlias = tuple[bool, str]


class Check(NamedTuple):
    """One check: `documented` is None for a fact about the way, `needs` are answered checks, options and the like."""

    id: str
    documented: bool | None
    needs: tuple[str, ...]
    expected: str
    consequence: str


#: Two lines a check, in the order of the questions: id, documented, needs, expected; a page in docs/, consequence.
_TABLE: Final = """\
connection | - | - | the service answers
reference/environment.md | Check the address, the network, and the authorities that this machine trusts.
proxy | - | - | the proxy that the environment names for the host, if any, is used
reference/environment.md | Requests go directly. If a firewall lets only the proxy through, they get no answer.
round_trip | - | connection | ten GETs are answered, on a connection that is kept
explanation/limits.md | Each poll costs a new connection. Look for a gateway that closes them.
clock | no | connection, Date | the service's Date differs by less than 30 s
howto/before-production.md | If your clock is wrong, waits for other machines' tickets end at wrong times.
no_key | yes | connection | 401 without a key
howto/get-access.md | Something else answers, or keys are not checked. Find out before you send payloads.
wrong_key | yes | connection | 401 with a wrong key
howto/get-access.md | Something else answers, or keys are not checked. Find out before you send payloads.
key | yes | connection | the server key is accepted
howto/get-access.md | No call works. After 401, ask for the region's server key. Else look for a gateway.
sdk_key | no | connection, KEYLESS_SDK_KEY | 401 with the key in KEYLESS_SDK_KEY
howto/before-production.md | It is in every copy of the app: anybody could read and delete.
unknown_operation | yes | key | 404 for an unknown operation
rules.md | A wait for an operation that the phone starts raises an error, and a lost create is not repeated.
created | yes | key, --user | a create is answered with 200 (or 201) and {"success": true}
rules.md | Each create costs a GET, which finds out whether it took effect, or raises an error.
read_at_once | no | created | a new operation can be read within 5 s, is pending, and its result is false
rules.md | A wait for its ticket raises an error. Trust no other state or result.
pending_factor | no | read_at_once | a pending operation names no authType
explanation/what-an-approval-proves.md | A wait that requires another factor ends at once.
content_kept | no | created | 1 000 characters with accents, an emoji and a line break come back byte for byte
explanation/what-an-approval-proves.md | Waits refuse a changed payload. Send short ones, in ASCII.
id_kept | no | created | an id with /, ?, %, a space and a letter outside ASCII can be created and read
howto/paid-once.md | Use ids of letters, digits and hyphens only.
id_exact | no | content_kept | the id in other letters' case is another operation: 404
howto/paid-once.md | Ids that differ in case only are one operation. Use lower case only.
id_taken | yes | content_kept | a second create with the same content is 409
howto/paid-once.md | An id does not make a create idempotent. Record each id before you create.
id_taken_by_other | yes | content_kept | a second create with other content is 409, and the first content stands
howto/paid-once.md | An approval can be for what nobody was shown. Never use an id twice.
user_case | yes | read_at_once | the answer's userId is the user's, in upper-case hex
howto/find-the-user.md | Ignore the case in user ids. If it is another user's, trust no answer.
timestamp | no | read_at_once | the operation's timestamp is UTC: within 5 minutes of now
howto/operating-workers.md | Do not compute an operation's age from its timestamp.
listed | yes | created | a pending operation is in the user's list
howto/prompt-bombing.md | Decide nothing by the list, such as whether the user has been asked already.
approved | yes | created | the person approves in time, and the answer says approved and true
howto/notify-the-phone.md | The phone was not told, or the app cannot approve what a backend created.
lateness | - | approved, Enter | the answer says approved at most 10 s after the tap
explanation/schedule.md | The service, or a cache, shows approvals late. Give waits more time.
stays_approved | no | approved | a second GET says the same
howto/paid-once.md | Record an approval as soon as a wait returns it: a later GET may not show it.
unlisted | no | approved | an approved operation is no longer in the user's list
howto/prompt-bombing.md | Do not take the list for what is still to be approved.
id_taken_after | no | approved, refusals | a create under the id of an approved operation is 409
howto/paid-once.md | One id can be approved twice. Record what was paid for an id.
attempt_told | no | approved | Telemetry has the attempt, under the operation's id
howto/declined.md | explain=True explains nothing, unless the app passes the operation's id to the SDK.
phone_started | yes | key, --phone-started | an operation that the app starts: 404 until it succeeds, then approved
howto/resuming.md | Waits for operations that the phone starts do not return.
remembered | no | key, --again | the operations of the earlier report are there, with the same content and state
howto/paid-once.md | The service forgets operations. Record what was approved.
"""


_LINES: Final = [line.split(" | ") for line in _TABLE.splitlines()]
_DOCUMENTED: Final = {"yes": True, "no": False, "-": None}
CHECKS: Final = {
    name: Check(name, _DOCUMENTED[says], tuple(needs.split(", ")), expected, f"{follows} See docs/{page}.")
    for (name, says, needs, expected), (page, follows) in zip(_LINES[::2], _LINES[1::2], strict=True)
}
"""All checks by id, in the order of the questions."""

_STATUS: Final = {True: "as_expected", False: "differs", None: "skipped"}


class CreatedOperation(msgspec.Struct):
    """An operation that was created, and its latest state; without one, it may not exist."""

    operation_id: str
    payload_sha256: str
    state: str | None = None


class EarlierReport(msgspec.Struct):
    """What ``--again`` reads of a report."""

    operations: list[CreatedOperation]


class Notebook:
    """Takes the findings, and prints each. With JSON, stdout is for the report only.

    Attributes:
        progress: Where a person is told what to do.
        created: The operations that were created, by id.
    """

    def __init__(self, *, as_json: bool) -> None:
        self._console = new_console(stderr=as_json)
        self.progress: Console = self._console if is_terminal(self._console) else new_console(stderr=True)
        self.created: dict[str, CreatedOperation] = {}
        self._findings: dict[str, Finding] = {}

    def note(self, check_id: str, finding: Finding) -> None:
        """Note and print a finding."""
        self._findings[check_id] = holds, found = finding
        yes, no = ("+", "x") if self._console.options.ascii_only else ("✓", "✗")
        sign, check = Text(yes, "green") if holds else Text(no, "bold red"), CHECKS[check_id]
        rows: list[tuple[Text | str, str, Text]] = [(sign, check_id, Text(escape(found)))]
        if not holds:
            rows += [("", "", Text(text, "dim")) for text in (f"expected: {check.expected}", check.consequence)]
        for row in rows:
            table = Table.grid(padding=(0, 2, 0, 0))
            for width in (1, max(map(len, CHECKS)), None):
                table.add_column(width=width, overflow="fold")
            table.add_row(*row)
            self._console.print(table)

    @property
    def is_good(self) -> bool:
        """Whether no check differs."""
        return all(holds for holds, _ in self._findings.values())

    def record_state(self, operation: Operation) -> None:
        """Record the state of an operation if it was created here."""
        if (created := self.created.get(operation.operation_id)) is not None:
            created.state = operation.state

    def finish(
        self, given: Collection[str], user_id: str | None, earlier: Sequence[CreatedOperation]
    ) -> dict[str, object]:
        """Print what was skipped and how many checks differ, and return the report."""
        checks: list[dict[str, object]] = []
        skipped: dict[str, list[str]] = {}
        for check_id, check in CHECKS.items():
            missing = (f"without {need}" for need in check.needs if need not in given)
            holds, found = self._findings.get(check_id) or (None, next(missing, "interrupted"))
            if holds is None:
                skipped.setdefault(found, []).append(check_id)
            about = {"id": check_id, "status": _STATUS[holds], "documented": check.documented}
            consequence = check.consequence if holds is False else None
            checks.append({**about, "expected": check.expected, "found": found, "consequence": consequence})
        self._console.print()
        for why, ids in skipped.items():
            print_fact(self._console, "Skipped", f"{', '.join(ids)}: {why}")
        statuses = [check["status"] for check in checks]
        counts = f"{statuses.count('as_expected')} as expected, {statuses.count('differs')} different"
        print_fact(self._console, "Found", counts, "bold")
        return {
            "version": 1,
            "checks": checks,
            "user_sha256": None if user_id is None else payload_digest(user_id.upper()),
            "operations": msgspec.to_builtins([*earlier, *self.created.values()]),
        }
