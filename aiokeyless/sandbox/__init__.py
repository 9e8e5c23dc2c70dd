"""A Keyless service to run on localhost, for demos, development and tests: `Sandbox`.

It serves the documented API on a real socket, independently of the client; only `Sandbox.client` uses that.
``import aiokeyless`` does not import this package.
"""

from .journal import RequestRecord
from .service import Sandbox

__all__ = ["RequestRecord", "Sandbox"]
