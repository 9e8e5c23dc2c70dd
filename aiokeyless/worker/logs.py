"""Log lines that machines can read: an event and its facts, as ``event key=value ...`` or as JSON.

The logger is ``aiokeyless.worker``. Each record carries the facts as ``record.facts`` too, for other handlers.
"""

from __future__ import annotations

import json
import logging
import math
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

_logger: Final = logging.getLogger("aiokeyless.worker")
_QUIET: Final = 60.0  # seconds


def log(level: int, event: str, facts: Mapping[str, object] | None = None, *, exc_info: bool = False) -> None:
    """Log an event and its facts, which must hold no secret and no payload."""
    if _logger.isEnabledFor(level):
        facts = facts or {}
        # Text is written as JSON, so that each record stays one line.
        line = " ".join([event, *(f"{name}={json.dumps(fact, default=str)}" for name, fact in facts.items())])
        _logger.log(level, "%s", line, extra={"event": event, "facts": facts}, exc_info=exc_info)


def name_client(client: str | None) -> dict[str, str]:
    """Return the fact that begins each line of a whole worker: its client's name, if it has one."""
    return {} if client is None else {"client": client}


class RateLimitedLog:
    """An event that others can cause at will. It is logged at once, and then once a minute with its count."""

    def __init__(self, level: int, event: str) -> None:
        self._level = level
        self._event = event
        self._count = 0
        self._quiet_until = -math.inf

    def log(self, facts: Mapping[str, object]) -> None:
        """Log it, or count it."""
        self._count += 1
        now = time.monotonic()
        if now >= self._quiet_until:
            log(self._level, self._event, {**facts, "count": self._count})
            self._count, self._quiet_until = 0, now + _QUIET


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``at``, ``level``, ``event``, and the facts."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
        line: dict[str, object] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", record.name),
            **(getattr(record, "facts", None) or {"message": record.getMessage()}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
