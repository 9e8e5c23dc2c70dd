"""The command line: what can be asked for, how it looks, and with which exit code it ends.

A command is a coroutine that uses the library as any program would, and returns its exit code; what it raises becomes
one line in `run`. Nobody imports this module but ``__main__``: it needs the extra ``cli``.
"""

from __future__ import annotations

import asyncio
import json as json_lines
import math
import sys
from contextlib import contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from . import __version__
from .errors import ApprovalTimeoutError, KeylessError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .client import KeylessClient
    from .models import ApprovalTicket, ApprovalUpdate, Operation
    from .sandbox import Sandbox

__all__ = ["Exit", "app", "run"]

_USER: Final = "C0FFEE"
_PAYLOAD: Final = "Approve wire transfer of $500 to account 1234"
_LONGEST_AFTER: Final = 3600.0
#: How long the demo waits beyond the approval, in seconds: more than any schedule lets pass between two polls.
_PATIENCE: Final = 60.0
#: Seconds between two looks of the fixed loop that the demo compares with.
_FIXED_INTERVAL: Final = 1.0


class Exit(IntEnum):
    """The exit codes."""

    DONE = 0
    ERROR = 1
    USAGE = 2
    TIMED_OUT = 3
    INTERRUPTED = 130


app = App(
    name="aiokeyless",
    version=f"aiokeyless {__version__}",
    help="Ask a Keyless user to approve something on their phone, and wait for it.",
    help_format="plaintext",
    help_epilogue="Example, with no key and no network:\n  aiokeyless demo",
    # What goes wrong is for `run` to say, in one line.
    print_error=False,
    exit_on_error=False,
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what goes wrong is one line on stderr.

    Args:
        arguments: The words after ``aiokeyless``. Default: those of this process.

    Returns:
        The exit code, see `Exit`.
    """
    try:
        # --help and --version return nothing
        return app(sys.argv[1:] if arguments is None else arguments) or Exit.DONE
    except CycloptsError as error:
        command = " ".join(("aiokeyless", *(error.command_chain or ()), "--help"))
        return _complain(f"{error} See {command}.", Exit.USAGE)
    except ApprovalTimeoutError as error:
        return _complain(str(error), Exit.TIMED_OUT)
    except (KeylessError, OSError) as error:
        return _complain(str(error), Exit.ERROR)
    except KeyboardInterrupt:
        return _complain("interrupted", Exit.INTERRUPTED)


def _complain(message: str, code: Exit) -> Exit:
    # Words of the user's are quoted in messages: no line break of theirs makes two lines, no escape moves the cursor.
    line = "".join(character if character.isprintable() else " " for character in message)
    sys.stderr.write(f"aiokeyless: {line}\n")
    return code


# -- demo


def _check_after(_type: object, after: float) -> None:
    if not 0 <= after <= _LONGEST_AFTER:  # NaN is not
        raise ValueError(f"Must be from 0 to {_LONGEST_AFTER:.0f} seconds.")


@app.command(help_epilogue="Example:\n  aiokeyless demo --after 3")
async def demo(
    *,
    after: Annotated[float, Parameter(validator=_check_after)] = 7.5,
    json: Annotated[bool, Parameter(negative="", show_default=False)] = False,
) -> int:
    """Wait for a simulated user, with no key and no network.

    Starts a sandbox on this machine, creates an operation over real HTTP, waits
    until it is approved, and tells how many requests that took and how late the
    approval was noticed.

    Args:
        after: Seconds until the simulated user approves, 0 to 3600.
        json: Print one JSON object when it is over, and nothing else.
    """
    console = Console(highlight=False)
    if json:
        result = await run_demo(after, _Display())
        console.out(json_lines.dumps(result.to_dict()), highlight=False)
        return Exit.DONE
    console.print()
    console.print(Text("aiokeyless demo", style="bold"))
    console.print("The real client, real HTTP; the service is a sandbox, the user is simulated.")
    console.print()
    # Not all that rich takes for a terminal is one: FORCE_COLOR, too, makes it say so.
    on_terminal = console.is_interactive and console.file.isatty()
    result = await run_demo(after, _LiveLine(console) if on_terminal else _PlainLines(console))
    _print_summary(console, result)
    return Exit.DONE


class DemoResult(msgspec.Struct, frozen=True, kw_only=True):
    """What the demo measured. Times are seconds by the loop's clock.

    Attributes:
        operation: The approved operation, as the client returned it.
        requests: Requests that the sandbox received.
        polls: How many of them were polls.
        approved_after: From the operation's creation to its approval.
        lateness: From the approval to its being noticed.
    """

    operation: Operation
    requests: int
    polls: int
    approved_after: float
    lateness: float

    @property
    def fixed_polls(self) -> int:
        """How many polls a loop that looks 0, 1, 2, ... seconds after the creation would have made."""
        return math.ceil(self.approved_after / _FIXED_INTERVAL) + 1

    @property
    def fixed_requests(self) -> int:
        """The polls of that loop and what came before them."""
        return self.requests - self.polls + self.fixed_polls

    @property
    def fixed_lateness(self) -> float:
        """How long after the approval that loop would have looked again."""
        return (self.fixed_polls - 1) * _FIXED_INTERVAL - self.approved_after

    def to_dict(self) -> dict[str, object]:
        """Return plain data, for ``--json``."""
        return {
            "operation_id": self.operation.operation_id,
            "operation_payload": self.operation.operation_payload,
            "user_id": self.operation.user_id,
            "auth_type": self.operation.auth_type,
            "approved_after": round(self.approved_after, 3),
            "lateness": round(self.lateness, 3),
            "requests": self.requests,
            "polls": self.polls,
            "fixed_loop": {
                "interval": _FIXED_INTERVAL,
                "lateness": round(self.fixed_lateness, 3),
                "requests": self.fixed_requests,
                "polls": self.fixed_polls,
            },
        }


async def run_demo(after: float, display: _Display) -> DemoResult:
    """Run the demo and return what it measured.

    Args:
        after: Seconds until the simulated user approves.
        display: Shows the wait while it lasts.
    """
    from .sandbox import Sandbox  # noqa: PLC0415  # a server: only the commands that serve should load it

    async with Sandbox() as sandbox, sandbox.client() as client:
        ticket = await client.create_operation(_USER, operation_payload=_PAYLOAD, expires_in=after + _PATIENCE)
        progress = _Progress()
        display.begin(sandbox.operations[ticket.operation_id], after)
        user = asyncio.get_running_loop().call_later(after, _approve, sandbox, ticket, progress)
        try:
            with display.shown():
                operation, noticed_after = await _watch(client, ticket, progress, display)
        finally:
            user.cancel()
        assert progress.approved_after is not None  # noqa: S101  # the client returns nothing that is not approved
        return DemoResult(
            operation=operation,
            requests=sandbox.request_count,
            polls=client.statistics.polls,
            approved_after=progress.approved_after,
            lateness=noticed_after - progress.approved_after,
        )


def _approve(sandbox: Sandbox, ticket: ApprovalTicket, progress: _Progress) -> None:
    sandbox.approve(ticket.operation_id)
    progress.approved_after = progress.elapsed


async def _watch(
    client: KeylessClient, ticket: ApprovalTicket, progress: _Progress, display: _Display
) -> tuple[Operation, float]:
    """Wait for the approval, drawing now and then; return the operation and when it was noticed."""

    def on_poll(update: ApprovalUpdate) -> None:
        progress.add(update)
        display.draw(progress)  # what happened before the poll stands before it
        display.poll(progress, update)

    async def wait() -> tuple[Operation, float]:
        operation = await client.wait_for_approval(ticket, on_poll=on_poll)
        return operation, progress.elapsed

    waiting = asyncio.create_task(wait())
    try:
        while not waiting.done():
            display.draw(progress)
            await asyncio.wait([waiting], timeout=display.frame)
        return waiting.result()
    finally:
        waiting.cancel()


# -- how a wait is shown


class _Progress:
    """How far a wait is. Times are seconds by the loop's clock since this was made."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self.polls = 0
        self.next_poll_at: float | None = None
        self.approved_after: float | None = None

    @property
    def elapsed(self) -> float:
        return self._loop.time() - self._began

    def add(self, update: ApprovalUpdate) -> None:
        self.polls = update.polls
        self.next_poll_at = None if update.next_poll_in is None else self.elapsed + update.next_poll_in


class _Display:
    """Shows a wait: this one nothing, those below more."""

    frame: float | None = None
    """Seconds between two drawings; None where there is nothing to draw."""

    def begin(self, operation: Operation, after: float) -> None:
        """Say what is waited for."""

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Have the display in place while the wait lasts."""
        yield

    def draw(self, progress: _Progress) -> None:
        """Show how far it is; called each `frame`."""

    def poll(self, progress: _Progress, update: ApprovalUpdate) -> None:
        """Show what a poll showed."""


class _Facts(_Display):
    """Shows what is waited for."""

    frame = 0.125

    def __init__(self, console: Console) -> None:
        self._console = console

    def begin(self, operation: Operation, after: float) -> None:
        _print_fact(self._console, "Operation", operation.operation_id)
        _print_fact(self._console, "Payload", operation.operation_payload or "", "bold")
        _print_fact(self._console, "User", f"simulated, approves after {after:g} s")
        self._console.print()


class _PlainLines(_Facts):
    """A line for what happens: each poll, and the approval. For files, pipes and dumb terminals."""

    _approval_shown = False

    @contextmanager
    def shown(self) -> Iterator[None]:
        yield
        self._console.print()

    def draw(self, progress: _Progress) -> None:
        if progress.approved_after is not None and not self._approval_shown:
            self._approval_shown = True
            self._line(progress.approved_after, "the simulated user approves")

    def poll(self, progress: _Progress, update: ApprovalUpdate) -> None:
        if update.error is not None:
            found = f"no answer ({type(update.error).__name__})"
        elif update.next_poll_in is None:
            found = "approved"
        else:
            found = "pending"
        after = "" if update.next_poll_in is None else f", next in {update.next_poll_in:.2f} s"
        self._line(progress.elapsed, f"poll {update.polls}: {found}{after}")

    def _line(self, seconds: float, what: str) -> None:
        self._console.print(Text(f"  {seconds:6.2f} s  {what}"))


class _LiveLine(_Facts):
    """One line that is drawn again and again, and is gone when the wait is over."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._spinner = Spinner("line" if console.options.ascii_only else "dots", style="cyan")
        # Drawn by whoever waits, and by no thread: a failure surfaces where it can be handled.
        self._live = Live(self._spinner, console=console, auto_refresh=False, transient=True)

    @contextmanager
    def shown(self) -> Iterator[None]:
        with self._live:
            yield

    def draw(self, progress: _Progress) -> None:
        self._spinner.update(text=_live_text(progress))
        self._live.refresh()


def _live_text(progress: _Progress) -> Text:
    elapsed = progress.elapsed
    text = Text("Waiting for the user" if progress.approved_after is None else "Approved, not noticed yet")
    text.truncate(25, pad=True)
    text.append(f"  {elapsed:6.1f} s", style="bold")
    text.append(f"  {_count(progress.polls, 'poll')}")
    if progress.next_poll_at is not None:
        text.append(f"  next in {max(0.0, progress.next_poll_at - elapsed):.1f} s", style="dim")
    return text


def _print_summary(console: Console, result: DemoResult) -> None:
    requests = f"{result.requests}: {result.requests - result.polls} to create it, {_count(result.polls, 'poll')}"
    _print_fact(console, "Approved", f"{result.approved_after:.2f} s after it was created")
    _print_fact(console, "Noticed", f"{result.lateness:.2f} s after the approval", "bold green")
    _print_fact(console, "Requests", requests, "bold green")
    console.print()
    console.print(f"  A fixed loop of one poll a second would have made about {result.fixed_requests} requests")
    console.print(f"  and noticed about {result.fixed_lateness:.2f} s after the approval.")
    console.print()
    console.print("  How many seconds of lateness a request is worth is yours to say:")
    console.print("  KeylessClient(schedule=wait_adaptive(poll_cost=...))")
    console.print()


def _print_fact(console: Console, name: str, value: str, style: str = "") -> None:
    console.print(Text.assemble("  ", (f"{name:<9}", "dim"), "  ", (value, style)))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
