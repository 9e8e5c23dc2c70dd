"""The entry point of the command ``aiokeyless`` and of ``python -m aiokeyless``; checks that the extra is installed.

The command line itself is in ``aiokeyless/cli/``, which no other module imports.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_INTERRUPTED: Final = 130  # as a shell reports it


def main() -> int:
    """Run the command line; return its exit code."""
    try:
        return _command_line()()
    except KeyboardInterrupt:  # while it was imported: later, the command line reports it by itself
        sys.stderr.write("aiokeyless: interrupted\n")
        return _INTERRUPTED


def _command_line() -> Callable[[], int]:
    try:
        from aiokeyless.cli import run  # noqa: PLC0415  # needs the extra
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing not in {"cyclopts", "rich"}:
            raise
        sys.stderr.write(f'aiokeyless: the command line needs {missing}: install the extra "cli"\n')
        return lambda: 1
    return run


if __name__ == "__main__":
    sys.exit(main())
