"""What commands print: facts, tables, JSON, and the progress of a wait.

Texts from the service or from the user's arguments are printed as plain characters, and never interpreted as a
terminal's control sequences or as rich's markup.
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

from aiokeyless._waits.explanation import in_words
from aiokeyless.client import DefaultTimeout
from aiokeyless.errors import NotFoundError

from .messages import counted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from aiokeyless.client import IfMissing, KeylessClient, WaitTimeout
    from aiokeyless.models import Authentication, Operation
    from aiokeyless.reports import ApprovalUpdate
    from aiokeyless.ticket import ApprovalTicket

#: Columns for the name of a fact.
_NAME_WIDTH: Final = 9
#: Up to this width, that of a UUID, the first column of a table is not folded.
_UNFOLDED_WIDTH: Final = 36
#: Columns of a terminal below which it is folded too.
_NARROW: Final = 70
#: Columns of a file: more than any table needs.
_UNLIMITED: Final = 1 << 24
_PHRASE_WIDTH: Final = 23
#: Seconds between two drawings of a line.
FRAME: Final = 0.125


def safe(text: str) -> str:
    r"""Return a text with everything that is not printable escaped: ``\x1b``, ``\n``, ``\u202e``.

    This covers line breaks, escape sequences and changes of the writing direction, so that a text cannot add lines,
    move the cursor, or read differently from what it holds.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Console(Console):
    """A console whose closed stdout is an error like any other: rich's SystemExit would end the event loop."""

    def on_broken_pipe(self) -> None:
        """Raise the error, after rich has seen to what is still buffered.

        Raises:
            BrokenPipeError: Always.
        """
        try:
            super().on_broken_pipe()
        except SystemExit:
            raise BrokenPipeError from None


def new_console() -> Console:
    """Make the console for stdout."""
    console = _Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:  # a file has no width: nothing is folded
        console.width = _UNLIMITED
    return console


def is_terminal(console: Console) -> bool:
    """Whether lines can be redrawn there."""
    # rich also reports a terminal where FORCE_COLOR is set.
    return console.is_interactive and console.file.isatty()


def print_json(console: Console, data: Mapping[str, object]) -> None:
    """Print one object as one line of ASCII."""
    console.out(json.dumps(data), highlight=False)


def print_title(console: Console, title: str, explanation: str) -> None:
    """Print what the command is, above what it does."""
    console.print()
    console.print(Text(title, style="bold"))
    console.print(explanation)
    console.print()


def print_fact(console: Console, name: str, value: str, style: str = "") -> None:
    """Print a name with a value of any length beside it."""
    name_text, value_text = Text(f"  {name:<{_NAME_WIDTH}}  ", style="dim"), Text(safe(value), style=style)
    if console.is_terminal:
        line = Table.grid()
        line.add_column(width=_NAME_WIDTH + 4)
        line.add_column(overflow="fold")
        line.add_row(name_text, value_text)
        console.print(line)
    else:  # a file has no width
        console.print(name_text + value_text, soft_wrap=True)


def print_line(console: Console, line: str) -> None:
    """Print a text as one line of any length."""
    console.out(safe(line), highlight=False)


def print_command(console: Console, command: str) -> None:
    """Print a command to copy, on one line of any length."""
    console.print(Text(f"  {safe(command)}"), soft_wrap=True)


def print_table(console: Console, rows: list[Mapping[str, str | None]]) -> None:
    """Print a table of texts without its empty columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    cells = {name: [Text(safe(row[name] or "")) for row in rows] for name in names}
    for name in names:
        longest = max(cell.cell_len for cell in cells[name])
        unfolded = name == names[0] and longest <= _UNFOLDED_WIDTH and console.width >= _NARROW
        table.add_column(name, overflow="fold", no_wrap=unfolded)
    for row in zip(*cells.values(), strict=True):
        table.add_row(*row)
    console.print(table)


# -- the progress of a wait


class Progress:
    """The progress of a wait. Times are seconds by the loop's clock since this object was made.

    Args:
        budget: Seconds that the wait may last; None: not shown.
    """

    def __init__(self, budget: float | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._started_at = self._loop.time()
        self._budget = budget
        self.polls: int = 0
        self.next_poll_at: float | None = None
        self.phrase: str = "Waiting for the user"
        self._attempts: tuple[Authentication, ...] = ()

    @property
    def elapsed(self) -> float:
        """Seconds until now."""
        return self._loop.time() - self._started_at

    @property
    def left(self) -> float | None:
        """Seconds left of the budget; None: not shown."""
        return None if self._budget is None else max(0.0, self._budget - self.elapsed)

    def add(self, update: ApprovalUpdate) -> None:
        """Record the result of a poll."""
        self.polls = update.polls
        self.next_poll_at = None if update.next_poll_in is None else self.elapsed + update.next_poll_in
        self._attempts = update.attempts
        failed = sum(attempt.failed for attempt in update.attempts)
        match update.error:
            case None:
                self.phrase = f"{counted(failed, 'attempt')} failed" if failed else "Waiting for the user"
            case NotFoundError():
                self.phrase = "Not created yet"
            case _:
                self.phrase = "No answer, retrying"

    def new_attempts(self, update: ApprovalUpdate) -> list[Authentication]:
        """Return the attempts of an update that earlier ones did not have; call it before `add`."""
        return [attempt for attempt in update.attempts if attempt not in self._attempts]


class Display:
    """Shows the progress of a wait. This base class shows nothing."""

    frame: float | None = None
    """Seconds between two drawings; None: never drawn between polls."""

    def begin(self, facts: Mapping[str, str]) -> None:
        """Show the facts of the wait."""

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Keep the display in place while the wait lasts."""
        yield

    def draw(self, progress: Progress) -> None:
        """Show the progress; called every `frame`."""

    def attempt(self, progress: Progress, attempt: Authentication) -> None:
        """Show that an attempt to authenticate became known."""

    def poll(self, progress: Progress, update: ApprovalUpdate) -> None:
        """Show the result of a poll."""


class _Facts(Display):
    """Prints the facts of a wait."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def begin(self, facts: Mapping[str, str]) -> None:
        """Print the facts."""
        for name, value in facts.items():
            print_fact(self._console, name, value)
        self._console.print()


class PlainLines(_Facts):
    """A line for each poll. For files, pipes and dumb terminals."""

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Print an empty line at the end."""
        yield
        self._console.print()

    def attempt(self, progress: Progress, attempt: Authentication) -> None:
        """Print an attempt that failed."""
        if words := in_words([attempt]):
            self._console.print(Text(f"  {progress.elapsed:6.2f} s  {words}"))

    def poll(self, progress: Progress, update: ApprovalUpdate) -> None:
        """Print the result of a poll."""
        after = "" if update.next_poll_in is None else f", next in {update.next_poll_in:.2f} s"
        self._console.print(Text(f"  {progress.elapsed:6.2f} s  poll {update.polls}: {_result(update)}{after}"))


def _result(update: ApprovalUpdate) -> str:
    if update.operation is not None:
        return "approved" if update.operation.is_approved else "pending"
    if isinstance(update.error, NotFoundError):
        return "not created yet"
    return f"no answer ({type(update.error).__name__})"


class StatusLine:
    """A line below everything that is printed; it is redrawn while it is shown, and then removed."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._spinner = Spinner("line" if console.options.ascii_only else "dots", style="cyan")
        # The waiting task draws, and not a thread of rich's: an error is raised where it can be handled.
        self._live = Live(console=console, auto_refresh=False, transient=True)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Keep the line in place, and remove it at the end."""
        with self._live:
            yield

    def draw(self, text: Text) -> None:
        """Redraw the line."""
        frame = self._spinner.render(self._console.get_time())
        assert isinstance(frame, Text)  # noqa: S101  # a spinner without a text
        # Only a single line can be redrawn, in a narrow terminal too.
        self._live.update(Text.assemble(frame, " ", text, no_wrap=True, overflow="ellipsis"), refresh=True)


class LiveLine(_Facts):
    """One line that is redrawn while the wait lasts, and removed at its end."""

    frame: float | None = FRAME

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._line = StatusLine(console)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Keep the line in place, and remove it at the end."""
        with self._line.shown():
            yield

    def draw(self, progress: Progress) -> None:
        """Redraw the line."""
        self._line.draw(_live_text(progress))


def _live_text(progress: Progress) -> Text:
    elapsed = progress.elapsed
    text = Text(progress.phrase)
    text.truncate(_PHRASE_WIDTH, pad=True)
    text.append(f"{elapsed:7.1f} s", style="bold")
    text.append(f"  {counted(progress.polls, 'poll')}")
    if progress.next_poll_at is not None:
        text.append(f"  next in {max(0.0, progress.next_poll_at - elapsed):.1f} s", style="dim")
    if progress.left is not None:
        text.append(f"  {progress.left:.0f} s left", style="dim")
    return text


def display_for(console: Console) -> Display:
    """Return the display for a console: a live line on a terminal, else plain lines."""
    return LiveLine(console) if is_terminal(console) else PlainLines(console)


async def follow(
    client: KeylessClient,
    target: str | ApprovalTicket,
    progress: Progress,
    display: Display,
    *,
    timeout: WaitTimeout = DefaultTimeout.FROM_TARGET,  # noqa: ASYNC109  # the client's own
    if_missing: IfMissing = "raise",
    explain: bool = False,
) -> tuple[Operation, float]:
    """Wait for an approval while the display shows the progress; return the operation, and when it was noticed."""

    def on_poll(update: ApprovalUpdate) -> None:
        made = progress.new_attempts(update)
        progress.add(update)
        display.draw(progress)
        for attempt in made:
            display.attempt(progress, attempt)
        display.poll(progress, update)

    async def wait() -> tuple[Operation, float]:
        operation = await client.wait_for_approval(
            target, timeout=timeout, if_missing=if_missing, on_poll=on_poll, explain=explain
        )
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
