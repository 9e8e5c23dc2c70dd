"""Tells listeners what happens. A listener can be slow, and it can fail, but no wait fails with it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .events import Event, Listener

logger = logging.getLogger("aiokeyless")

DEFAULT_LISTENERS: Final[list[Listener]] = []
"""What each new client tells, beside its own listeners: for instrumentation."""


class Listeners:
    """The listeners of one client, at least one; a client without listeners has None instead, and builds no events.

    Args:
        listeners: The listeners, in the order in which they are told.
    """

    __slots__ = ("_failed", "_listeners")

    def __init__(self, listeners: tuple[Listener, ...]) -> None:
        self._listeners = listeners
        self._failed: set[tuple[int, type[BaseException]]] = set()

    def tell(self, event: Event) -> None:
        """Tell each listener of an event; what one raises is logged, and the others are told all the same."""
        for listener in self._listeners:
            try:
                listener(event)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # noqa: BLE001  # a CancelledError too: it would end a poll or a wait
                self._log(listener, event, error)

    def _log(self, listener: Listener, event: Event, error: BaseException) -> None:
        """Log a failure; with a traceback once for each kind of it, as there may be thousands a second."""
        kind = (id(listener), type(error))
        if kind in self._failed:
            logger.debug("listener %r failed again: %s", listener, type(error).__name__)
            return
        self._failed.add(kind)
        logger.error(
            "listener %r failed on %s, and is told of the next event all the same; further failures of this kind are "
            "logged at DEBUG",
            listener,
            type(event).__name__,
            exc_info=error,
        )
