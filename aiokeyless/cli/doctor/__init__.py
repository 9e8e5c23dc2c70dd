"""``aiokeyless doctor``: finds out which of our assumptions about the service hold."""

# The command registers itself with the application.
from .command import doctor

__all__ = ["doctor"]
