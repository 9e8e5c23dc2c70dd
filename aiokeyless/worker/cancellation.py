"""A cancellation that asyncio loses on Python 3.11, and how a worker's own tasks notice it."""

from __future__ import annotations

import asyncio


def raise_lost_cancellation() -> None:
    """Raise a cancellation that came with the broker's answer: asyncio.wait_for loses it on Python 3.11.

    A task that asks the broker again and again calls it after each answer: it may be cancelled only once.
    """
    task = asyncio.current_task()
    assert task is not None  # noqa: S101  # what has asked runs in one
    if task.cancelling():
        raise asyncio.CancelledError
