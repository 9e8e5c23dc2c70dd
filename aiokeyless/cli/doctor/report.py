"""What ``aiokeyless doctor`` found: line by line on the screen, and as JSON. Users and payloads are digests in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import msgspec
from rich.table import Table
from rich.text import Text

from aiokeyless.cli.render import escape, is_terminal, new_console, print_fact
from aiokeyless.ticket import payload_digest

from .table import CHECKS

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from rich.console import Console

    from aiokeyless.models import Operation

#: Whether a check is as expected, and what was found.
Finding: TypeAlias = tuple[bool, str]


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
        created: The operations that were created.
    """

    def __init__(self, *, as_json: bool) -> None:
        self._console = new_console(stderr=as_json)
        self.progress: Console = self._console if is_terminal(self._console) else new_console(stderr=True)
        self._checks: dict[str, dict[str, object]] = {
            name: {"id": name, "status": "skipped", "documented": check.documented, "expected": check.expected}
            for name, check in CHECKS.items()
        }
        self.created: list[CreatedOperation] = []

    def note(self, check_id: str, finding: Finding) -> None:
        """Note and print a finding."""
        holds, found = finding
        yes, no = ("+", "x") if self._console.options.ascii_only else ("✓", "✗")
        sign, check = Text(yes, "green") if holds else Text(no, "bold red"), CHECKS[check_id]
        self._checks[check_id] |= {"status": "as_expected" if holds else "differs", "found": found}
        self._print_row(sign, check_id, Text(escape(found)))
        if not holds:
            self._checks[check_id]["consequence"] = check.consequence
            self._print_row("", "", Text(f"expected: {check.expected}", "dim"))
            self._print_row("", "", Text(check.consequence, "dim"))

    def _print_row(self, *cells: Text | str) -> None:
        row = Table.grid(padding=(0, 2, 0, 0))
        for width in (1, max(map(len, CHECKS)), None):
            row.add_column(width=width, overflow="fold")
        row.add_row(*cells)
        self._console.print(row)

    def is_as_expected(self, check_id: str) -> bool:
        """Return whether a check was asked and is as expected."""
        return self._checks[check_id]["status"] == "as_expected"

    @property
    def is_good(self) -> bool:
        """Whether no check differs."""
        return all(check["status"] != "differs" for check in self._checks.values())

    def record_state(self, operation: Operation) -> None:
        """Record the state of an operation if it was created here."""
        for created in self.created:
            if created.operation_id == operation.operation_id:
                created.state = operation.state

    def finish(
        self, given: Collection[str], user_id: str | None, earlier: Sequence[CreatedOperation]
    ) -> dict[str, object]:
        """Print what was skipped and how many checks differ, and return the report."""
        skipped: dict[str, list[str]] = {}
        for check_id, check in self._checks.items():
            check.setdefault("consequence", None)
            if check["status"] == "skipped":
                missing = (f"without {need}" for need in CHECKS[check_id].needs if need not in given)
                check["found"] = why = next(missing, "interrupted")
                skipped.setdefault(why, []).append(check_id)
        self._console.print()
        for why, ids in skipped.items():
            print_fact(self._console, "Skipped", f"{', '.join(ids)}: {why}")
        statuses = [check["status"] for check in self._checks.values()]
        counts = f"{statuses.count('as_expected')} as expected, {statuses.count('differs')} different"
        print_fact(self._console, "Found", counts, "bold")
        return {
            "version": 1,
            "checks": list(self._checks.values()),
            "user_sha256": None if user_id is None else payload_digest(user_id.upper()),
            "operations": msgspec.to_builtins([*earlier, *self.created]),
        }
