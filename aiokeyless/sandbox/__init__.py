"""`Sandbox`, a Keyless service to run on localhost for demos, development and tests.

It serves the documented API on a real socket. Only `Sandbox.client` uses the library's client. ``import aiokeyless``
does not import this package.
"""

from .server import Sandbox
from .service import RequestRecord

__all__ = ["RequestRecord", "Sandbox"]
