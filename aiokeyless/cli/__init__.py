"""The command line: what can be asked for, how it looks, and with which exit code it ends.

A command is a coroutine that uses the library as any program would, and returns its exit code; what it raises becomes
one line in `run`. Nobody imports this package but ``__main__``: it needs the extra ``cli``.
"""

from . import demo, operations, sandbox, wait, worker  # the commands: they enter themselves into `app`
from .words import CommandError, Exit, app, run

__all__ = ["CommandError", "Exit", "app", "demo", "operations", "run", "sandbox", "wait", "worker"]
