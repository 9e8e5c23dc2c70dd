"""The entry point of the command ``aiokeyless`` and of ``python -m aiokeyless``.

It checks that the extra ``cli`` is installed. ``aiokeyless/cli/`` has the command line; no other module imports that.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

#: The exit code that shells use for an interrupted command.
_INTERRUPTED: Final = 130


def main() -> int:
    """Run the command line, and return its exit code."""
    try:
        return _load_command_line()()
    # Only during the import: later, the command line handles Ctrl-C.
    except KeyboardInterrupt:
        sys.stderr.write("aiokeyless: interrupted\n")
        return _INTERRUPTED


def _load_command_line() -> Callable[[], int]:
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
