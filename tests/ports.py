"""Ports for programs that must be told theirs, which nothing else on the machine is given in the meantime."""

from __future__ import annotations

import socket


def own_port() -> int:
    """Return a port of the loopback at which nobody listens, and at which a server can be started, again and again.

    A socket that never listens, and lets others use its address, holds it until this process ends. Linux then lets a
    server listen that names the port, and gives it to no program that asks for any port.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    port: int = held.getsockname()[1]
    held.detach()
    return port
