"""The entry point of the command ``aiokeyless`` and of ``python -m aiokeyless``; checks that the extra is installed.

The command line itself is in ``aiokeyless/cli/``, which no other module imports.
"""

import sys


def main() -> int:
    """Run the command line; return its exit code."""
    try:
        from aiokeyless.cli import run  # noqa: PLC0415  # needs the extra
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in {"cyclopts", "rich"}:
            raise
        sys.stderr.write('aiokeyless: the command line is an extra: pip install "aiokeyless[cli]"\n')
        return 1
    return run()


if __name__ == "__main__":
    sys.exit(main())
