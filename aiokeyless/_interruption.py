"""Ctrl-C while the command ``aiokeyless`` starts: one line, and not the traceback of an import.

The package imports this module first, since what it imports next takes long. Once the command line is loaded, that
handles Ctrl-C. Any other program keeps Python's own report.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType


def report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Report the exception that ends the process. After a KeyboardInterrupt, a shell sees the exit code 130."""
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("aiokeyless: interrupted\n")
    else:
        sys.__excepthook__(kind, error, traceback)


def _is_the_command() -> bool:
    """Return whether this process is the command: ``aiokeyless``, or ``python -m aiokeyless``."""
    program = Path((sys.argv or [""])[0]).name.removesuffix(".exe")
    # Python calls a program "-m" until it has found the module to run. Meanwhile it imports the module's package, which
    # may be another one that imports this one.
    return program == "aiokeyless" or (program == "-m" and "aiokeyless" in sys.orig_argv)


if _is_the_command():
    sys.excepthook = report
