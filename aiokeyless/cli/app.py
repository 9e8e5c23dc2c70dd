"""The command line's application: its common arguments and options, its exit codes, and `run`.

`run` turns every error that ends a command into one line on stderr and an exit code. error_messages.py has the texts.
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import io
import math
import os
import signal
import sys
from contextlib import asynccontextmanager, contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter, UnknownOptionError, UnusedCliTokensError

from aiokeyless._validation import check_operation_id, check_user_id
from aiokeyless._version import __version__
from aiokeyless.client import KeylessClient
from aiokeyless.errors import (
    ApprovalTimeoutError,
    ApprovalUnknownError,
    InvalidIdentifierError,
    KeylessError,
)

from .error_messages import describe, quote
from .render import escape, show_waiting

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence

    from aiokeyless.events import Listener


class Exit(IntEnum):
    """The exit codes."""

    DONE = 0
    ERROR = 1
    USAGE = 2
    TIMED_OUT = 3
    UNKNOWN = 4
    INTERRUPTED = 130


class CommandError(Exception):
    """A command cannot do its work. Its message is printed unchanged, and says what to do."""


class UsageError(CommandError):
    """The arguments of a command do not go together."""


class InterruptedCommandError(Exception):
    """Ctrl-C ended a command. Its message says how to continue, or what to check."""


app: App = App(
    name="aiokeyless",
    version=f"aiokeyless {__version__}",
    help="Ask a Keyless user to approve something on their phone, and wait for it.",
    help_format="plaintext",
    help_epilogue="""\
Example, without a key or a network:
  aiokeyless demo

The API key is read from KEYLESS_API_KEY, the address from KEYLESS_REGION or
KEYLESS_BASE_URL. To run a local service, with a phone in your browser:
  aiokeyless sandbox

Exit codes: 0 approved or done, 1 error, 2 usage, 3 timed out, 4 timed out and
the outcome is unknown, 130 interrupted.""",
    # `run` prints errors, each as one line.
    print_error=False,
    exit_on_error=False,
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)
app.register_install_completion_command(help="Let bash, zsh or fish complete commands and options.")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and print an error as one line on stderr.

    Args:
        arguments: The arguments after ``aiokeyless``. Default: those of this process.

    Returns:
        The exit code, see `Exit`.
    """
    # A payload may contain characters that the terminal's encoding lacks.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        # A command returns a code only if it has reported its error itself.
        return app(sys.argv[1:] if arguments is None else arguments) or Exit.DONE
    except CycloptsError as error:
        command = " ".join(("aiokeyless", *(error.command_chain or ()), "--help"))
        message = _describe_usage(error)
        return _fail(f"{message}{'' if message.endswith(('.', '?')) else '.'} See {command}.", Exit.USAGE)
    # The reader closed stdout, as `head` does.
    except BrokenPipeError:
        return Exit.ERROR
    except (KeylessError, CommandError, OSError) as error:
        return _fail(*describe_end(error))
    except (InterruptedCommandError, KeyboardInterrupt) as interruption:
        return _fail("; ".join(filter(None, ("interrupted", str(interruption)))), Exit.INTERRUPTED)


def _describe_usage(error: CycloptsError) -> str:
    match error:
        case UnusedCliTokensError():
            return _describe_unused(error)
        case UnknownOptionError():
            return _describe_unknown_option(error)
        case _:
            return str(error)


def _describe_unknown_option(error: UnknownOptionError) -> str:
    """Return the message for an unknown option: the variable to set, cyclopts' guess, or the options that exist."""
    option, message = (error.token.keyword or error.token.value).partition("=")[0], str(error)
    if option in {"--api-key", "--base-url", "--region"}:
        return f"Unknown option: {option}. Set KEYLESS_{option[2:].replace('-', '_').upper()} instead."
    if message.endswith("?"):
        return message
    options = [name for argument in error.argument_collection for name in argument.names if name.startswith("--")]
    return f"{message} Options: {', '.join(options)}."


def _describe_unused(error: UnusedCliTokensError) -> str:
    """Return the message for an argument that no command takes, with a guess at what was meant."""
    chain, unused = error.command_chain or (), (error.unused_tokens or [""])[0]
    if chain == ("create",):
        return f"The text to approve is an option: --payload {quote(unused)}"
    commands = [name for name in functools.reduce(lambda group, name: group[name], chain, app) if name.isalpha()]
    what = "command" if commands else "argument"
    close = difflib.get_close_matches(unused, commands, n=1)
    return f'Unknown {what} "{unused}".{f" Did you mean {close[0]}?" if close else ""}'


def describe_end(error: KeylessError | CommandError | OSError) -> tuple[str, Exit]:
    """Return the line and the exit code for an error that ends a command."""
    if not isinstance(error, KeylessError):
        return str(error), Exit.USAGE if isinstance(error, UsageError) else Exit.ERROR
    if isinstance(error, ApprovalUnknownError):
        return describe(error), Exit.UNKNOWN
    return describe(error), Exit.TIMED_OUT if isinstance(error, ApprovalTimeoutError) else Exit.ERROR


def _fail(message: str, code: Exit) -> Exit:
    sys.stderr.write(f"aiokeyless: {escape(message)}\n")
    return code


# -- arguments and options


def validator(check: Callable[[str], str]) -> Callable[[object, str | None], None]:
    """Return a validator that applies the library's check of an argument; an absent value passes."""

    def validate(_type: object, value: str | None) -> None:
        if value is None:
            return
        try:
            check(value)
        except InvalidIdentifierError as error:
            # Without the argument's name, which cyclopts replaces, and without advice for programs.
            raise ValueError(f"It {str(error).partition(' ')[2].partition('; pass ')[0]}.") from None

    return validate


def limit(is_valid: Callable[[Any], bool], requirement: str) -> Parameter:
    """Return the parameter of a number that must be valid, as the requirement says; an absent value passes."""

    def validate(_type: object, value: object) -> None:
        if value is not None and not is_valid(value):
            raise ValueError(f"Must be {requirement}.")

    return Parameter(validator=validate)


_check_operation_id = validator(check_operation_id)

# Those with a help are described here, once, and not in the docstrings of commands.
UserId = Annotated[str, Parameter(name="USER_ID", validator=validator(check_user_id), help="The user, in hex.")]
User = Annotated[str | None, Parameter(name="--user", validator=validator(check_user_id))]
OperationId = Annotated[str, Parameter(name="OPERATION_ID", validator=_check_operation_id, help="The operation.")]
AuthType = Literal["biom", "pin"]
OptionalOperationId = Annotated[str | None, Parameter(validator=_check_operation_id)]
# NaN is not more than 0.
Seconds = Annotated[float, limit(lambda value: 0 < value < math.inf, "more than 0 seconds, and not infinite")]
Timeout = Annotated[float | None, limit(lambda value: value > 0, "more than 0 seconds")]
_delay = limit(lambda value: 0 <= value < math.inf, "a number of seconds, at least 0")
Delay = Annotated[float, _delay]
OptionalDelay = Annotated[float | None, _delay]
_count = limit(lambda value: value >= 1, "at least 1")
Count = Annotated[int, _count]
OptionalCount = Annotated[int | None, _count]
_port = limit(range(65536).__contains__, "from 0 to 65535")
Port = Annotated[int, _port]
OptionalPort = Annotated[int | None, _port]
Flag = Annotated[bool, Parameter(negative="", show_default=False)]
JsonFlag = Annotated[bool, Parameter(name="--json", negative="", show_default=False)]
Yes = Annotated[bool, Parameter(name="--yes", negative="", show_default=False, help="Do not ask.")]
AsJson = Annotated[JsonFlag, Parameter(help="Print one JSON object and nothing else.")]


@contextmanager
def explain_interruption(explanation: str) -> Iterator[None]:
    """Turn Ctrl-C, which cancels a command, into an error whose message is the explanation.

    Raises:
        InterruptedCommandError: The body was cancelled.
    """
    try:
        yield
    except asyncio.CancelledError:
        raise InterruptedCommandError(explanation) from None


@contextmanager
def stop_on_signals(stop: Callable[[], object]) -> Iterator[None]:
    """Call a function in the event loop at Ctrl-C and SIGTERM, whose usual effect they then do not have."""
    loop = asyncio.get_running_loop()
    replaced = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, stop)
        except NotImplementedError:  # on Windows
            replaced[number] = signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop))
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


@contextmanager
def reading() -> Iterator[None]:
    """Let Ctrl-C interrupt a read from a file or a terminal, which asyncio's handler would not."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def ask(question: str) -> bool:
    """Ask at the terminal, and return whether the answer is yes."""
    sys.stderr.write(f"{question} Type yes: ")
    sys.stderr.flush()
    with reading():
        return sys.stdin.readline().strip().lower() == "yes"


@asynccontextmanager
async def open_client(*, as_json: bool) -> AsyncGenerator[KeylessClient]:
    """Make a client, see `new_client`, for a command that shows nothing until the service has answered."""
    async with new_client() as client, show_waiting(client.base_url, quiet=as_json):
        yield client


def new_client(listeners: Iterable[Listener] = ()) -> KeylessClient:
    """Make a client with the key and the address from the environment; the caller must close it.

    Args:
        listeners: Called with each event of the client.

    Raises:
        CommandError: The environment has no key.
        ConfigurationError: A variable is wrong; the error names it.
    """
    if not os.environ.get("KEYLESS_API_KEY", "").strip():
        raise CommandError(
            "no API key: export KEYLESS_API_KEY=... with the server key of your tenant (to try it without one: "
            "aiokeyless sandbox)"
        )
    return KeylessClient(trust_env=True, listeners=listeners)
