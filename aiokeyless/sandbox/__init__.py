"""A Keyless service to run on localhost, for demos, development and tests; `Sandbox` is all of it.

It speaks the documented API over a real socket and knows no more of the client than a real service would; only
`Sandbox.client` makes one. ``import aiokeyless`` does not load it.
"""

from .journal import RequestRecord
from .service import Sandbox

__all__ = ["RequestRecord", "Sandbox"]
