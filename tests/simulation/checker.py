"""The checker: every promise, for every client of a story."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import create_promises, traffic_promises, wait_promises
from .evidence import Evidence, Violation

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .faults import Fault
    from .history import History

PROMISES = (*wait_promises.PROMISES, *traffic_promises.PROMISES, *create_promises.PROMISES)


def check(history: History, faults: Sequence[Fault]) -> list[Violation]:
    """Return the promises that were broken, the earliest first.

    Args:
        history: What happened.
        faults: What went wrong in the service, which some promises depend on.
    """
    return sorted(_violations(history, faults), key=lambda violation: violation.at)


def _violations(history: History, faults: Sequence[Fault]) -> Iterator[Violation]:
    for problem in history.problems:
        yield Violation("nothing left behind", "", "", history.ended_at, problem)
    for client in history.clients.values():
        for leftover in client.leftovers:
            yield Violation("nothing left behind", client.name, "", client.closed_at, leftover)
        evidence = Evidence(client, history)
        for promise in PROMISES:
            yield from promise(evidence, faults)
