"""``aiokeyless doctor``: its options, the consent to create operations, its report, and its exit code."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import nullcontext
from pathlib import Path  # noqa: TC003  # cyclopts reads the annotations
from typing import TYPE_CHECKING, Final

import msgspec

from aiokeyless.cli.app import (
    CommandError,
    Exit,
    Flag,
    InterruptedCommandError,
    JsonFlag,
    Seconds,
    UsageError,
    User,
    Yes,
    app,
    ask,
    new_client,
)
from aiokeyless.cli.error_messages import quote_operation_id
from aiokeyless.cli.render import new_console, print_json
from aiokeyless.models import Secret
from aiokeyless.ticket import DEFAULT_LIFETIME

from .examination import Examination
from .report import CreatedOperation, EarlierReport, Notebook
from .requests import PlainRequests

if TYPE_CHECKING:
    from aiokeyless.events import Event

_CONSENT: Final = """
This creates three operations for the user, and asks them to approve one.
If the service does not refuse ids that are taken, it creates up to five.
Keyless cannot withdraw an operation: the others stay pending for ever.
Their payload says that they are a test.
"""


@app.command(
    help_epilogue="""\
Example, which creates nothing and asks nobody:
  aiokeyless doctor

Example, with a user who has a phone at hand:
  aiokeyless doctor --user C0FFEE --report report.json

Example, a week later:
  aiokeyless doctor --again report.json

To see that the key of your app is refused, set KEYLESS_SDK_KEY to it.

Exit codes: 0 nothing differs, 1 something differs or nothing could be asked,
2 usage, 130 interrupted.""",
)
async def doctor(
    *,
    user: User = None,
    yes: Yes = False,
    seconds: Seconds = DEFAULT_LIFETIME,
    phone_started: Flag = False,
    report: Path | None = None,
    again: Path | None = None,
    as_json: JsonFlag = False,
) -> Exit:
    """Find out whether the service does what aiokeyless expects.

    Without --user it only reads: nothing is created, and nobody is asked.

    Args:
        user: Also create operations for this user, in hex, and ask them once to approve.
        seconds: Seconds that the person has to approve.
        phone_started: Also print an operation id for the app to authenticate with, and wait for it.
        report: Write what was found as JSON, to send to somebody: no key, no payload of yours.
        again: Look once more at the operations of an earlier report.
        as_json: Print the report on stdout, and all else on stderr.
    """
    if phone_started and user is None:
        raise UsageError("--phone-started needs --user")
    if user is not None and not yes and not sys.stdin.isatty():
        raise UsageError("this creates operations, which must be confirmed, and stdin is not a terminal; pass --yes")
    sdk_key = os.environ.get("KEYLESS_SDK_KEY", "").strip()
    names = {"--user": user, "--phone-started": phone_started, "--again": again, "KEYLESS_SDK_KEY": sdk_key}
    given = {"-", *(name for name, value in names.items() if value)}
    earlier = [] if again is None else _read_operations(again)
    notebook = Notebook(as_json=as_json)
    events: list[Event] = []
    was_interrupted = False

    def agree() -> bool:
        notebook.progress.print(_CONSENT)
        return yes or ask("Go on?")

    async with new_client([events.append]) as client:
        # Opened now: that a file cannot be written must not be found out at the end.
        with nullcontext() if report is None else report.open("ab") as file:
            plain, key = PlainRequests(client), Secret(sdk_key)
            examination = Examination(client, events, plain, notebook, given, user or "", key, earlier, seconds)
            try:
                async with plain.session:
                    await examination.run(agree)
            # Ctrl-C raises this in a coroutine.
            except asyncio.CancelledError:
                was_interrupted = True
            found = notebook.finish(given, user, earlier)
            if file is not None:
                file.truncate(0)
                file.write(msgspec.json.format(msgspec.json.encode(found)))
    if as_json:
        print_json(new_console(), found)
    if was_interrupted:
        ids = " ".join(quote_operation_id(operation.operation_id) for operation in notebook.created)
        raise InterruptedCommandError(f"operations that may stay pending for ever: {ids or 'none'}")
    return Exit.DONE if notebook.is_good else Exit.ERROR


def _read_operations(path: Path) -> list[CreatedOperation]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=EarlierReport).operations
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise CommandError(f"{path} is not a report of aiokeyless doctor --report") from None
