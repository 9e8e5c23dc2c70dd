"""The broker on NATS JetStream (extra ``nats``), for fleets that run on NATS already.

`NatsBroker`, and what only NATS needs: `Fleet` (names), `StreamSettings`, `EventKeys` (signatures of outcomes).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

from .event_keys import EventKeys

if TYPE_CHECKING:
    from nats.aio.client import Client

    from .broker import NatsBroker
    from .fleet import Fleet
    from .readers import is_outcome
    from .streams import StreamSettings

__all__ = ["EventKeys", "Fleet", "NatsBroker", "StreamSettings", "is_outcome"]

SCHEMES: Final = ("nats", "tls", "ws", "wss")
DRIVERS: Final = ("nats",)
HINT: Final = 'install the extra "nats"'

_MODULES: Final = {"Fleet": "fleet", "NatsBroker": "broker", "StreamSettings": "streams", "is_outcome": "readers"}


def from_url(url: str) -> NatsBroker:
    """Return the broker at the address of a server, or of several, separated by commas."""
    from .broker import NatsBroker  # noqa: PLC0415  # it needs nats-py

    return NatsBroker(url)


def from_connection(connection: Client) -> NatsBroker:
    """Return the broker on an application's connection: the same one for the same connection."""
    from .broker import NatsBroker  # noqa: PLC0415  # as above

    return NatsBroker.on(connection)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    except ModuleNotFoundError as missing:  # PyPI has other packages of such names
        raise ModuleNotFoundError(f"{__name__} needs {missing.name}: {HINT}", name=missing.name) from missing
