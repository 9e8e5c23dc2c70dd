"""A client for synchronous code: one event loop in a background thread, with one client, for each process."""

import atexit
import functools
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

from aiokeyless import ApprovalTicket, ApprovalTimeoutError, KeylessClient

T = TypeVar("T")


@functools.cache
def _background() -> tuple[BlockingPortal, KeylessClient]:
    """Start the loop and the client on first use: after a server has forked its workers, not before."""
    stack = ExitStack()
    portal = stack.enter_context(start_blocking_portal())
    client = stack.enter_context(portal.wrap_async_context_manager(KeylessClient()))
    atexit.register(stack.close)
    return portal, client


def call(method: Callable[[KeylessClient], Awaitable[T]]) -> T:
    """Run a method of the client in its loop, and wait for the result; from any thread."""
    portal, client = _background()
    return portal.call(method, client)


def ask(user_id: str, payload: str) -> ApprovalTicket:
    """Create an operation."""
    return call(lambda client: client.create_operation(user_id, operation_payload=payload))


def is_approved(ticket: ApprovalTicket, seconds: float = 25) -> bool:
    """Wait for so many seconds; True once it is approved, False while it is not.

    The time is bounded since it occupies a thread of the server or a worker of the queue.
    """
    try:
        return call(lambda client: client.hold_for_approval(ticket, seconds=seconds)) is not None
    except ApprovalTimeoutError:  # its own time is up
        return False
