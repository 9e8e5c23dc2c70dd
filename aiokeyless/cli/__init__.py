"""The command line: its commands, what they print, and the exit codes.

A command is a coroutine that uses the library as any program does, and returns its exit code. `run` turns its errors
into one line on stderr. Only ``__main__`` imports this package, since it needs the extra ``cli``.
"""

# The commands register themselves with the application.
from . import (  # noqa: F401
    demo,
    doctor,
    drive,
    inspect,
    operations,
    sandbox,
    schema,
    users,
    verify,
    wait,
    worker,
)
from .app import run

__all__ = ["run"]
