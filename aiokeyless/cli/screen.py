"""How things look: texts that cannot do harm, facts, JSON, and a wait while it lasts.

Texts that come from the service or from the words of the user are shown as characters and never obeyed: not as a
terminal's control sequence, and not as rich's markup.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from aiokeyless.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from aiokeyless.client import IfMissing, KeylessClient, Timeout
    from aiokeyless.models import ApprovalTicket, ApprovalUpdate, Operation

#: Columns of the name of a fact.
_NAME_WIDTH: Final = 9
#: Columns up to which the first column of a table stays in one piece: those of a UUID. A narrow terminal has no room.
_WHOLE_WIDTH: Final = 36
_NARROW: Final = 70
_PHRASE_WIDTH: Final = 23


def safe(text: str) -> str:
    r"""Return a text in which all that is not printable is escaped: ``\x1b``, ``\n``, ``\u202e``.

    Line breaks and escape sequences are among it, and what turns the direction of writing, so that nothing makes two
    lines of one, moves the cursor, or shows other words than it holds.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def new_console() -> Console:
    """Make the console for stdout."""
    return Console(highlight=False, markup=False, emoji=False)


def is_terminal(console: Console) -> bool:
    """Whether lines can be drawn anew there."""
    # Not all that rich takes for a terminal is one: FORCE_COLOR, too, makes it say so.
    return console.is_interactive and console.file.isatty()


def print_json(console: Console, data: Mapping[str, object]) -> None:
    """Print one object as one line, of ASCII alone."""
    console.out(json.dumps(data), highlight=False)


def print_title(console: Console, title: str, explanation: str) -> None:
    """Print what this is."""
    console.print()
    console.print(Text(title, style="bold"))
    console.print(explanation)
    console.print()


def print_fact(console: Console, name: str, value: str, style: str = "") -> None:
    """Print a name and, beside it, a value of any length."""
    name_text, value_text = Text(f"  {name:<{_NAME_WIDTH}}  ", style="dim"), Text(safe(value), style=style)
    if console.is_terminal:
        line = Table.grid()
        line.add_column(width=_NAME_WIDTH + 4)
        line.add_column(overflow="fold")
        line.add_row(name_text, value_text)
        console.print(line)
    else:  # a file has no width to keep to
        console.print(name_text + value_text, soft_wrap=True)


def print_command(console: Console, command: str) -> None:
    """Print a command to copy: in one piece, however long."""
    console.print(Text(f"  {safe(command)}"), soft_wrap=True)


def print_pending(console: Console, rows: list[Mapping[str, str | None]]) -> None:
    """Print a table of texts; a column that is empty throughout is left out."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    cells = {name: [Text(safe(row[name] or "")) for row in rows] for name in names}
    for name in names:
        longest = max(cell.cell_len for cell in cells[name])
        whole = name == names[0] and longest <= _WHOLE_WIDTH and console.width >= _NARROW
        table.add_column(name, overflow="fold", no_wrap=whole)
    for row in zip(*cells.values(), strict=True):
        table.add_row(*row)
    console.print(table)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def method_in_words(auth_type: str | None) -> str:
    """Return how a user approved, as it follows "approved"."""
    return {None: "", "biom": " with their face", "pin": " with their PIN"}.get(auth_type, f" by {auth_type}")


# -- a wait while it lasts


class Progress:
    """How far a wait is. Times are seconds by the loop's clock since this was made.

    Args:
        budget: Seconds that the wait may last; None: not to be shown.
    """

    def __init__(self, budget: float | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._budget = budget
        self.polls = 0
        self.next_poll_at: float | None = None
        self.approved_after: float | None = None
        self.phrase = "Waiting for the user"

    @property
    def elapsed(self) -> float:
        """Seconds until now."""
        return self._loop.time() - self._began

    @property
    def left(self) -> float | None:
        """Seconds left of the budget; None: not to be shown."""
        return None if self._budget is None else max(0.0, self._budget - self.elapsed)

    def approve(self) -> None:
        """Note that the user approved just now."""
        self.approved_after = self.elapsed

    def add(self, update: ApprovalUpdate) -> None:
        """Take in what a poll showed."""
        self.polls = update.polls
        self.next_poll_at = None if update.next_poll_in is None else self.elapsed + update.next_poll_in
        match update.error:
            case None:
                self.phrase = "Waiting for the user"
            case NotFoundError():
                self.phrase = "Not there yet"
            case _:
                self.phrase = "No answer, trying on"


class Display:
    """Shows a wait: this one nothing, others more."""

    frame: float | None = None
    """Seconds between two drawings; None where there is nothing to draw."""

    def begin(self, facts: Mapping[str, str]) -> None:
        """Say what is waited for."""

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Have the display in place while the wait lasts."""
        yield

    def draw(self, progress: Progress) -> None:
        """Show how far it is; called each `frame`."""

    def poll(self, progress: Progress, update: ApprovalUpdate) -> None:
        """Show what a poll showed."""


class _Facts(Display):
    """Shows what is waited for."""

    frame = 0.125

    def __init__(self, console: Console) -> None:
        self._console = console

    def begin(self, facts: Mapping[str, str]) -> None:
        """Print the facts."""
        for name, value in facts.items():
            print_fact(self._console, name, value)
        self._console.print()


class PlainLines(_Facts):
    """A line for what happens: each poll, and the approval where it is known. For files, pipes and dumb terminals."""

    _approval_shown = False

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Leave a gap at the end."""
        yield
        self._console.print()

    def draw(self, progress: Progress) -> None:
        """Print the approval, once."""
        if progress.approved_after is not None and not self._approval_shown:
            self._approval_shown = True
            self._line(progress.approved_after, "the user approves")

    def poll(self, progress: Progress, update: ApprovalUpdate) -> None:
        """Print what a poll showed."""
        after = "" if update.next_poll_in is None else f", next in {update.next_poll_in:.2f} s"
        self._line(progress.elapsed, f"poll {update.polls}: {_found(update)}{after}")

    def _line(self, seconds: float, what: str) -> None:
        self._console.print(Text(f"  {seconds:6.2f} s  {what}"))


def _found(update: ApprovalUpdate) -> str:
    if update.operation is not None:
        return "approved" if update.operation.is_approved else "pending"
    if isinstance(update.error, NotFoundError):
        return "not there yet"
    return f"no answer ({type(update.error).__name__})"


class LiveLine(_Facts):
    """One line that is drawn again and again, and is gone when the wait is over."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._spinner = Spinner("line" if console.options.ascii_only else "dots", style="cyan")
        # Drawn by whoever waits, and by no thread: a failure surfaces where it can be handled.
        self._live = Live(console=console, auto_refresh=False, transient=True)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Have the line in place, and take it away."""
        with self._live:
            yield

    def draw(self, progress: Progress) -> None:
        """Draw the line anew."""
        frame = self._spinner.render(self._console.get_time())
        assert isinstance(frame, Text)  # noqa: S101  # a spinner with no text of its own
        # A terminal may be narrow: what is drawn anew has to be a single line.
        line = Text.assemble(frame, " ", _live_text(progress), no_wrap=True, overflow="ellipsis")
        self._live.update(line, refresh=True)


def _live_text(progress: Progress) -> Text:
    elapsed = progress.elapsed
    text = Text(progress.phrase if progress.approved_after is None else "Approved, not noticed")
    text.truncate(_PHRASE_WIDTH, pad=True)
    text.append(f"{elapsed:7.1f} s", style="bold")
    text.append(f"  {counted(progress.polls, 'poll')}")
    if progress.next_poll_at is not None:
        text.append(f"  next in {max(0.0, progress.next_poll_at - elapsed):.1f} s", style="dim")
    if progress.left is not None:
        text.append(f"  {progress.left:.0f} s left", style="dim")
    return text


def display_for(console: Console) -> Display:
    """Return what shows a wait best there."""
    return LiveLine(console) if is_terminal(console) else PlainLines(console)


async def follow(
    client: KeylessClient,
    target: str | ApprovalTicket,
    progress: Progress,
    display: Display,
    *,
    timeout: Timeout = ...,  # noqa: ASYNC109  # the client's own
    if_missing: IfMissing = "raise",
) -> tuple[Operation, float]:
    """Wait for an approval while the display shows it; return the operation, and when it was noticed."""

    def on_poll(update: ApprovalUpdate) -> None:
        progress.add(update)
        display.draw(progress)  # what happened before the poll stands before it
        display.poll(progress, update)

    async def wait() -> tuple[Operation, float]:
        operation = await client.wait_for_approval(target, timeout=timeout, if_missing=if_missing, on_poll=on_poll)
        return operation, progress.elapsed

    with display.shown():
        waiting = asyncio.create_task(wait())
        try:
            while not waiting.done():
                display.draw(progress)
                await asyncio.wait([waiting], timeout=display.frame)
            return waiting.result()
        finally:
            waiting.cancel()
