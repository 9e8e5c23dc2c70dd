"""`Sandbox`, a Keyless service to run on localhost for demos, development and tests.

It serves the documented API on a real socket. Only `Sandbox.client` uses the library's client. ``import aiokeyless``
does not import this package.
"""

from .journal import RequestRecord
from .server import Sandbox

__all__ = ["RequestRecord", "Sandbox"]
