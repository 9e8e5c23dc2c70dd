"""The entry point of the command ``aiokeyless`` and of ``python -m aiokeyless``.

It checks that the extra ``cli`` is installed. ``aiokeyless/cli/`` has the command line; no other module imports that.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line, and return its exit code."""
    try:
        from aiokeyless.cli import run  # noqa: PLC0415  # needs the extra
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing not in {"cyclopts", "rich"}:
            raise
        sys.stderr.write(
            f'aiokeyless: the command line needs {missing}: install the extra "cli" of the checkout, '
            'by pip install "path/to/aiokeyless[cli]"\n'
        )
        return 1
    return run()


if __name__ == "__main__":
    sys.exit(main())
