"""The checks of ``aiokeyless doctor``, and what it found: line by line on the screen, and as JSON.

docs/reference/assumptions.md shows the checks. Users and payloads are digests in a report.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

import msgspec
from rich.table import Table
from rich.text import Text

from aiokeyless.models import Private

from .app import CommandError
from .render import escape, is_terminal, new_console, print_fact

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from rich.console import Console


#: Whether a check is as expected, unknown if what came says nothing about it, and what was found.
Finding: TypeAlias = tuple[bool | Literal["unknown", "skipped"], str]


class Check(NamedTuple):
    """One check: `documented` is None for a fact about the way, `needs` are answered checks, options and the like."""

    id: str
    documented: bool | None
    sent: str
    expected: str
    needs: tuple[str, ...]
    consequence: str


#: In the order of the questions: id, whether it is documented, sent, expected, needs, a page in docs/, the consequence.
TABLE: Final = """\
connection | - | a GET without a key | an answer that is no redirect | - | reference/environment.md | Check the address, the network, and which authorities this machine trusts.
proxy | - | nothing | the environment names no proxy for the host, or an http: one, which is used | - | reference/environment.md | Requests go directly. If a firewall lets only the proxy through, they get no answer.
round_trip | - | ten GETs | ten answers, on a connection that is kept | connection | explanation/limits.md | Each poll costs a new connection. Look for a gateway that closes them.
clock | no | a GET | the Date of its answer differs by less than 30 s | connection | howto/before-production.md | If yours is wrong, waits for other machines' tickets end at wrong times.
no_key | yes | a GET without a key | 401 | connection | howto/get-access.md | Something else answers, or keys are not checked. Find out before you send payloads.
wrong_key | yes | a GET with a made-up key | 401 | connection | howto/get-access.md | Something else answers, or keys are not checked. Find out before you send payloads.
key | yes | a GET with the server key | the key is accepted | connection | howto/get-access.md | No call works. After 401, ask for the region's server key. Else look for a gateway.
sdk_key | no | a GET with the key in KEYLESS_SDK_KEY | 401 or 403 | key, KEYLESS_SDK_KEY | howto/before-production.md | It is in every copy of the app: anybody could read and delete.
unknown_operation | yes | GET of an operation that does not exist | 404 | key | rules.md | Waits for operations that the phone starts end with an error, and no lost create is repeated. aiokeyless has no remedy: ask the vendor for 404.
users | yes | GET of the users of an external user id that nobody has | an empty list, or 404 | key | howto/find-the-user.md | find_users and get_user fail, or find a stranger. Call neither, and keep user ids in a record of your own.
devices | yes | GET of the user's devices | a list, or 404 | key, --user | howto/find-the-user.md | get_devices fails. Do not call it; no wait needs it.
created | yes | POST of a new operation | 200 or 201, and {"success": true} | key, --user | rules.md | Each create costs a GET, which finds out whether it took effect, or raises an error.
read_at_once | no | GET of the new operation, for up to 5 s | it is there, pending, and its result is false | created | rules.md | A wait for its ticket may end with an error. aiokeyless has no remedy, since it trusts the documented state and result only: ask the vendor.
cache | no | the same GET twice, 2 s apart | no answer has an Age above 1 s | key | howto/before-production.md | Waits learn of an approval late, or never. Switch the cache off for /v2.
pending_factor | no | GET of the new operation | no authType | a comparable answer | explanation/what-an-approval-proves.md | A wait with require_auth_type ends at once if that is another one. Leave it out, and compare auth_type of what is approved.
content_kept | no | POST of 1 000 characters with accents, an emoji and a line break | GET has them byte for byte | read_at_once | explanation/what-an-approval-proves.md | Waits refuse a changed payload. Send short ones, in ASCII. If those are changed, too, there is no remedy: ask the vendor.
external_user | no | POST with an external user id | GET has it | content_kept | howto/find-the-user.md | Waits refuse another one. Create without external_user_id.
id_kept | no | POST of an id with ?, %, a space and a letter outside ASCII | GET finds it | read_at_once | howto/paid-once.md | Use ids of letters, digits and hyphens only.
id_exact | no | GET of an id in other letters' case | 404 | unknown_operation, content_kept | howto/paid-once.md | Ids that differ in case only are one operation. Use lower case.
id_taken_by_other | yes | POST of other content under a taken id | 409, and the first content stands | content_kept | howto/paid-once.md | An approval can be for what nobody was shown. Never use an id twice: let aiokeyless make them.
id_taken | yes | POST of the same content again | 409 | answers to taken ids | howto/paid-once.md | An id does not make a create idempotent. Record each id before you create.
user_case | yes | GET of the new operation | userId is the user's, in upper-case hex | read_at_once | howto/find-the-user.md | Ignore its case, as waits do. If it is another user's, trust no answer, and ask the vendor.
timestamp | no | GET of the new operation | its timestamp, without a zone read as UTC, is within 5 minutes of now | read_at_once | howto/running-workers.md | Only workers on NATS need it: what the phone starts is refused there if its time is missing, or over 15 h before the request.
listed | yes | GET of the user's pending operations | a new operation is listed | content_kept, a comparable answer | howto/prompt-bombing.md | Decide nothing by the list, such as whether the user has been asked already.
approved | yes | GET of the new operation, while a person approves | approved in time, and result is true | time to approve, a direct way, a comparable answer | howto/notify-the-phone.md | The phone was not told, or the app cannot approve what a backend created. Then let the app start it: started_by="phone".
factor | no | the same GET | authType is biom or pin | approved | explanation/what-an-approval-proves.md | A wait with require_auth_type refuses each approval, since it knows no other word. Leave it out, and compare auth_type yourself. Without any factor there is no remedy: ask the vendor.
lateness | - | the same GET | it says approved at most 10 s after the tap | approved, Enter | explanation/schedule.md | The service, or a cache, shows approvals late. Give waits more time.
stays_approved | no | the same GET again | the same answer | approved | howto/paid-once.md | Record an approval as soon as a wait returns it: a later GET may not show it.
unlisted | no | GET of the user's pending operations | the approved operation is not listed | approved, listed | howto/prompt-bombing.md | Do not take the list for what is still to be approved.
id_taken_after | no | POST of the approved operation again | 409 | approved, id_taken_by_other, id_taken | howto/paid-once.md | One id can be approved twice. Record what was paid for it.
attempt_told | no | GET of the user's authentications, with the operation's id | the attempt is there | approved | howto/declined.md | explain=True explains nothing, unless the app passes the operation's id to the SDK.
phone_started | yes | GET of an id that the app authenticates with | 404, then approved | --phone-started, --user, time to approve, unknown_operation, a direct way | howto/resuming.md | Waits for operations that the phone starts do not return. Let your backend create them.
remembered | no | GET of the operations of the earlier report | the same content and state | key, --again | howto/paid-once.md | The service forgets operations. Record what was approved.
"""  # noqa: E501  # a table
_SAYS: Final = {"yes": True, "no": False}
CHECKS: Final = {
    name: Check(name, _SAYS.get(says), sent, expected, tuple(needs.split(", ")), f"{follows} See docs/{page}.")
    for name, says, sent, expected, needs, page, follows in (line.split(" | ") for line in TABLE.splitlines())
}
"""All checks by id, in the order of the questions."""

_STATUS: Final[dict[bool | str, str]] = {True: "as_expected", False: "differs"}
_SIGNS: Final = {True: ("✓", "+", "green"), False: ("✗", "x", "bold red"), "unknown": ("?", "?", "yellow")}
_WHO: Final = {True: "documented by the vendor", False: "assumed by aiokeyless", None: "expected"}


class CreatedOperation(Private, msgspec.Struct):
    """An operation that was created, and its latest state; without one, it may not exist."""

    operation_id: str
    payload_sha256: str
    state: str | None = None


class EarlierReport(msgspec.Struct):
    """What ``--again`` reads of a report; without it, of none."""

    date: str
    operations: list[CreatedOperation]
    checks: list[dict[str, Any]]


def read_report(path: Path | None) -> EarlierReport:
    """Read the report of an earlier visit, if there is one."""
    if path is None:
        return EarlierReport("", [], [])
    try:
        return msgspec.json.decode(path.read_bytes(), type=EarlierReport)
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise CommandError(f"{path} is not a report of aiokeyless doctor --report") from None


class Notebook:
    """Takes the findings, and prints each. With JSON, stdout is for the report only.

    Attributes:
        about: The visit, for the report.
        progress: Where a person is told what to do.
        created: The operations that were created, by id.
    """

    def __init__(self, *, as_json: bool) -> None:
        self._console = new_console(stderr=as_json)
        self.progress: Console = self._console if is_terminal(self._console) else new_console(stderr=True)
        self.about: dict[str, object] = {}
        self.created: dict[str, CreatedOperation] = {}
        self._findings: dict[str, Finding] = {}

    def note(self, check_id: str, finding: Finding) -> None:
        """Note a finding, and print it unless it is skipped."""
        self._findings[check_id] = status, found = finding
        if status == "skipped":
            return
        (sign, plain_sign, style), check = _SIGNS[status], CHECKS[check_id]
        rows = [(Text(plain_sign if self._console.options.ascii_only else sign, style), check_id, Text(escape(found)))]
        if status is False or (status == "unknown" and check_id in {"connection", "key"}):
            lines = f"sent: {check.sent}", f"{_WHO[check.documented]}: {check.expected}", check.consequence
            rows += [(Text(), "", Text(line, "dim")) for line in lines]
        for row in rows:
            table = Table.grid(padding=(0, 2, 0, 0))
            for width in (1, max(map(len, CHECKS)), None):
                table.add_column(width=width, overflow="fold")
            table.add_row(*row)
            self._console.print(table)

    def finish(self, given: Collection[str], earlier: EarlierReport) -> dict[str, Any]:
        """Print what was skipped, how many checks differ, and what is new; return the report."""
        checks: list[dict[str, object]] = []
        skipped: dict[str, list[str]] = {}
        before = {check.get("id"): check.get("status", "skipped") for check in earlier.checks}
        news: list[str] = []
        for check_id, check in CHECKS.items():
            holds, found = self._findings.get(check_id) or ("skipped", self._explain(check, given))
            status = _STATUS.get(holds, holds)
            if status == "skipped":
                skipped.setdefault(found, []).append(check_id)
            elif before.get(check_id, "skipped") not in {status, "skipped"}:
                news.append(f"{check_id} ({before[check_id]}, now {status})")
            consequence = None if holds is not False else check.consequence
            checks.append({**check._asdict(), "consequence": consequence, "status": status, "found": found})
        self._console.print()
        for why, ids in skipped.items():
            print_fact(self._console, "Skipped", f"{', '.join(ids)}: {why}")
        statuses = [check["status"] for check in checks]
        unknown = f", {count} unknown: ask again later" if (count := statuses.count("unknown")) else ""
        counts = f"{statuses.count('as_expected')} as expected, {statuses.count('differs')} different{unknown}"
        print_fact(self._console, "Found", counts, "bold")
        if earlier.date:
            print_fact(self._console, "New", f"since {earlier.date}: {', '.join(news) or 'nothing'}")
        operations = msgspec.to_builtins([*earlier.operations, *self.created.values()])
        return {**self.about, "operations": operations, "checks": checks}

    def _explain(self, check: Check, given: Collection[str]) -> str:
        """Return why a check was not asked: by the first thing that is missing, and by what that needs."""
        need = next((need for need in check.needs if need not in given), None)
        if need in CHECKS and need not in self._findings:
            return self._explain(CHECKS[need], given)
        if need == "--user" and "declined" in given:
            return "declined"
        return f"without {need}" if need else "interrupted"
