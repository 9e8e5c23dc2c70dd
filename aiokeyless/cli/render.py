"""The output of commands: facts, tables, JSON, and the progress of a wait.

Texts from the service and from arguments are printed as plain characters, never as a terminal's control sequences or
as rich's markup.
"""

from __future__ import annotations

import asyncio
import json
import math
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from aiokeyless._waits.explanation import describe_failures
from aiokeyless.errors import NotFoundError

from .error_messages import format_count

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence

    from aiokeyless.client import IfMissing, KeylessClient
    from aiokeyless.models import Authentication, Operation
    from aiokeyless.reports import ApprovalUpdate
    from aiokeyless.ticket import ApprovalTicket, WaitTimeout

#: Columns for the name of a fact.
_NAME_WIDTH: Final = 9
#: Up to this width, that of a UUID, the first column of a table is not folded,
_UNFOLDED_WIDTH: Final = 36
#: unless the terminal has fewer columns than this.
_NARROW: Final = 70
#: Columns of a file: more than any table needs.
_UNLIMITED: Final = 1 << 24
_PHRASE_WIDTH: Final = 23
#: Seconds between two drawings of a line.
FRAME: Final = 0.125


def escape(text: str) -> str:
    r"""Return a text with everything that is not printable escaped: ``\x1b``, ``\n``, ``\u202e``.

    This includes line breaks, escape sequences and changes of the writing direction: a text cannot add lines, move the
    cursor, or appear as another text.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Console(Console):
    """A console that raises BrokenPipeError if stdout is closed: rich's SystemExit would end the event loop."""

    def on_broken_pipe(self) -> None:
        """Raise the error after rich has handled the buffered output.

        Raises:
            BrokenPipeError: Always.
        """
        try:
            super().on_broken_pipe()
        except SystemExit:
            raise BrokenPipeError from None


def new_console(*, stderr: bool = False) -> Console:
    """Make the console for stdout, or for stderr."""
    console = _Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    # A file has no width, so nothing is folded.
    if not console.is_terminal:
        console.width = _UNLIMITED
    return console


def is_terminal(console: Console) -> bool:
    """Return whether the console can redraw lines."""
    # rich reports a terminal if FORCE_COLOR is set, too.
    return console.is_interactive and console.file.isatty()


def print_json(console: Console, data: Mapping[str, object]) -> None:
    """Print one object as one line of ASCII."""
    console.out(json.dumps(data), highlight=False)


def print_title(console: Console, title: str, explanation: str) -> None:
    """Print a title and an explanation below it."""
    console.print()
    console.print(Text(title, style="bold"))
    console.print(explanation)
    console.print()


def print_fact(console: Console, name: str, value: str, style: str = "") -> None:
    """Print a name, and beside it a value of any length."""
    name_text, value_text = Text(f"  {name:<{_NAME_WIDTH}}  ", style="dim"), Text(escape(value), style=style)
    if console.is_terminal:
        line = Table.grid()
        line.add_column(width=_NAME_WIDTH + 4)
        line.add_column(overflow="fold")
        line.add_row(name_text, value_text)
        console.print(line)
    else:
        console.print(name_text + value_text, soft_wrap=True)


def print_facts(console: Console, facts: Mapping[str, str | None], *, bold: str) -> None:
    """Print names and values, one of them in bold, without those that are None."""
    for name, value in facts.items():
        if value is not None:
            print_fact(console, name, value, "bold" if name == bold else "")


def print_line(console: Console, line: str) -> None:
    """Print a text as one line of any length."""
    console.out(escape(line), highlight=False)


def print_command(console: Console, command: str) -> None:
    """Print a command to copy, on one line of any length."""
    console.print(Text(f"  {escape(command)}"), soft_wrap=True)


def print_table(console: Console, rows: Sequence[Mapping[str, str | None]]) -> None:
    """Print a table of texts, without empty columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    cells = {name: [Text(escape(row[name] or "")) for row in rows] for name in names}
    for name in names:
        longest = max(cell.cell_len for cell in cells[name])
        unfolded = name == names[0] and longest <= _UNFOLDED_WIDTH and console.width >= _NARROW
        table.add_column(name, overflow="fold", no_wrap=unfolded)
    for row in zip(*cells.values(), strict=True):
        table.add_row(*row)
    console.print(table)


# -- the result of a command: one object of JSON, or its text for people


def print_result(result: Mapping[str, object], line: str, *, as_json: bool) -> None:
    """Print a line."""
    if as_json:
        print_json(new_console(), result)
    else:
        print_line(new_console(), line)


def print_object(result: Mapping[str, object], facts: Mapping[str, str | None], *, bold: str, as_json: bool) -> None:
    """Print names and values; see `print_facts`."""
    if as_json:
        print_json(new_console(), result)
    else:
        print_facts(new_console(), facts, bold=bold)


def print_list(
    result: Mapping[str, object], rows: Sequence[Mapping[str, str | None]], nothing: str, *, as_json: bool
) -> None:
    """Print a table, or that there is nothing."""
    if as_json:
        print_json(new_console(), result)
    elif rows:
        print_table(new_console(), rows)
    else:
        print_line(new_console(), nothing)


# -- the progress of a wait


class Display:
    """The progress of a wait, and its display. This base class shows the facts of the wait only.

    Args:
        console: Prints it.
        budget: Seconds that the wait may last; if infinite, no limit is shown.
    """

    frame: float | None = None
    """Seconds between two calls of `draw`; None: no calls between polls."""

    def __init__(self, console: Console, budget: float = math.inf) -> None:
        self._console = console
        self._budget = budget
        self._now = asyncio.get_running_loop().time
        self._started_at = self._now()
        self._update: ApprovalUpdate | None = None
        self._updated_at = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since this object was created, by the loop's clock."""
        return self._now() - self._started_at

    @property
    def polls(self) -> int:
        """Number of polls."""
        return 0 if self._update is None else self._update.polls

    def begin(self, facts: Mapping[str, str]) -> None:
        """Show the facts of the wait."""
        for name, value in facts.items():
            print_fact(self._console, name, value)
        self._console.print()

    def add(self, update: ApprovalUpdate) -> None:
        """Record the result of a poll, and show it, and each attempt that is new."""
        known = () if self._update is None else self._update.attempts
        self._update, self._updated_at = update, self.elapsed
        self.draw()
        for attempt in update.attempts:
            if attempt not in known:
                self.show_attempt(attempt)
        self.show_poll(update)

    @contextmanager
    def show(self) -> Iterator[None]:
        """Keep the display in place while the wait lasts."""
        yield

    def draw(self) -> None:
        """Show the progress."""

    def show_attempt(self, attempt: Authentication) -> None:
        """Show a new attempt to authenticate."""

    def show_poll(self, update: ApprovalUpdate) -> None:
        """Show the result of a poll."""


class PlainLines(Display):
    """A line for each poll, for files, pipes and dumb terminals."""

    @contextmanager
    def show(self) -> Iterator[None]:
        """Print an empty line at the end."""
        yield
        self._console.print()

    def show_attempt(self, attempt: Authentication) -> None:
        """Print an attempt that failed."""
        if words := describe_failures([attempt]):
            self._console.print(Text(f"  {self.elapsed:6.2f} s  {words}"))

    def show_poll(self, update: ApprovalUpdate) -> None:
        """Print the result of a poll."""
        after = "" if update.next_poll_in is None else f", next in {update.next_poll_in:.2f} s"
        self._console.print(Text(f"  {self.elapsed:6.2f} s  poll {update.polls}: {_describe_result(update)}{after}"))


def _describe_result(update: ApprovalUpdate) -> str:
    if update.operation is not None:
        return "approved" if update.operation.is_approved else "pending"
    if isinstance(update.error, NotFoundError):
        return "not created yet"
    return f"no answer ({type(update.error).__name__})"


class StatusLine:
    """A line below all other output. It can be redrawn, and disappears at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._spinner = Spinner("line" if console.options.ascii_only else "dots", style="cyan")
        # The waiting task draws, not a thread of rich's, so that it can handle errors.
        self._live = Live(console=console, auto_refresh=False, transient=True)

    @contextmanager
    def show(self) -> Iterator[None]:
        """Keep the line in place, and remove it at the end."""
        with self._live:
            yield

    def draw(self, text: Text) -> None:
        """Redraw the line."""
        frame = self._spinner.render(self._console.get_time())
        assert isinstance(frame, Text)  # noqa: S101  # a spinner without a text
        # Cut to one line in a narrow terminal, since only one line can be redrawn.
        self._live.update(Text.assemble(frame, " ", text, no_wrap=True, overflow="ellipsis"), refresh=True)


@asynccontextmanager
async def show_waiting(whom: str, *, quiet: bool) -> AsyncGenerator[None]:
    """Say on stderr, after a second, whose answer the command waits for; only to a person at a terminal.

    Args:
        whom: Name or address of what answers.
        quiet: Show nothing.
    """
    console = new_console(stderr=True)
    if quiet or not is_terminal(console):
        yield
        return
    drawing = asyncio.create_task(_count_seconds(StatusLine(console), whom))
    try:
        yield
    finally:
        drawing.cancel()
        await asyncio.wait([drawing])


async def _count_seconds(line: StatusLine, whom: str) -> None:
    seconds = 1
    await asyncio.sleep(1)
    with line.show():
        while True:
            line.draw(Text(f"Waiting for an answer of {escape(whom)}: {seconds} s"))
            await asyncio.sleep(1)
            seconds += 1


class LiveLine(Display):
    """A line that is redrawn during the wait, and disappears at its end."""

    frame: float | None = FRAME

    def __init__(self, console: Console, budget: float) -> None:
        super().__init__(console, budget)
        self._line = StatusLine(console)

    @contextmanager
    def show(self) -> Iterator[None]:
        """Keep the line in place, and remove it at the end."""
        with self._line.show():
            yield

    def draw(self) -> None:
        """Redraw the line."""
        text = Text(_describe_state(self._update))
        text.truncate(_PHRASE_WIDTH, pad=True)
        text.append(f"{self.elapsed:7.1f} s", style="bold")
        text.append(f"  {format_count(self.polls, 'poll')}")
        if self._update is not None and self._update.next_poll_in is not None:
            left = max(0.0, self._updated_at + self._update.next_poll_in - self.elapsed)
            text.append(f"  next in {left:.1f} s", style="dim")
        if self._budget < math.inf:
            text.append(f"  {max(0.0, self._budget - self.elapsed):.0f} s left", style="dim")
        self._line.draw(text)


def _describe_state(update: ApprovalUpdate | None) -> str:
    if update is None:
        return "Waiting for Keyless"
    if update.error is not None:
        return "Not created yet" if isinstance(update.error, NotFoundError) else "No answer, retrying"
    failed = sum(attempt.failed for attempt in update.attempts)
    return f"{format_count(failed, 'attempt')} failed" if failed else "Waiting for the user"


def display_for(console: Console, budget: float) -> Display:
    """Return a live line for a terminal, else plain lines."""
    return LiveLine(console, budget) if is_terminal(console) else PlainLines(console)


async def follow(
    client: KeylessClient,
    target: str | ApprovalTicket,
    display: Display,
    *,
    timeout: WaitTimeout,  # noqa: ASYNC109  # the client's own
    if_missing: IfMissing,
) -> tuple[Operation, float]:
    """Wait for an approval while the display shows the progress.

    Returns:
        The approved operation, and when the wait returned, in seconds after the display was created.
    """

    async def wait() -> tuple[Operation, float]:
        operation = await client.wait_for_approval(
            target, timeout=timeout, if_missing=if_missing, on_poll=display.add, explain=True
        )
        return operation, display.elapsed

    with display.show():
        waiting = asyncio.create_task(wait())
        try:
            while not waiting.done():
                display.draw()
                await asyncio.wait([waiting], timeout=display.frame)
            return waiting.result()
        finally:
            waiting.cancel()
