"""Calls the listeners of events. A listener can be slow or raise, but no wait fails because of it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from .events import Event, Listener

logger = logging.getLogger("aiokeyless")

DEFAULT_LISTENERS: Final[list[Listener]] = []
"""Listeners of each new client, besides its own: for instrumentation."""


class Listeners:
    """The listeners of one client, and its name. A client without listeners has None instead, and builds no events."""

    def __init__(self, listeners: tuple[Listener, ...], client: str | None = None) -> None:
        self._listeners = listeners
        self.client: str | None = client
        """The client's name."""
        self._failed: set[tuple[int, type[BaseException]]] = set()

    def tell(self, event: Event) -> None:
        """Call each listener with an event. If one raises, that is logged, and the others are still called."""
        if self.client is not None:
            event = msgspec.structs.replace(event, client=self.client)
        for listener in self._listeners:
            try:
                listener(event)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # noqa: BLE001  # a CancelledError too: it would end a poll or a wait
                self._log(listener, event, error)

    def _log(self, listener: Listener, event: Event, error: BaseException) -> None:
        """Log a failure. Only the first of each kind has a traceback, as there may be thousands a second."""
        kind = (id(listener), type(error))
        if kind in self._failed:
            logger.debug("listener %r failed again: %s", listener, type(error).__name__)
            return
        self._failed.add(kind)
        logger.error(
            "listener %r failed on %s; it is called for later events too, and further failures of this kind are logged "
            "at DEBUG",
            listener,
            type(event).__name__,
            exc_info=error,
        )
