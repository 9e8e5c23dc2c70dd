"""Ports for programs that must be told theirs, which nothing else on the machine is given in the meantime."""

from __future__ import annotations

import socket


def own_port() -> int:
    """Return a port of the loopback at which nobody listens, until this process ends; see `hold_port`."""
    return hold_port()[0]


def hold_port() -> tuple[int, int]:
    """Return a port of the loopback at which a server can be started, again and again; and what to close at the end.

    That is the descriptor of a socket that never listens, and lets others use its address. Linux then lets a server
    listen that names the port, and gives the port to no program that asks for any.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    port: int = held.getsockname()[1]
    return port, held.detach()
