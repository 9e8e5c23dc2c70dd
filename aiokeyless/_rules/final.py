"""The final poll: which one it is, and whether it is repeated. Pure; for both engines.

Rule 3 of docs/rules.md. Each engine keeps its deadlines by a clock of its own, so the functions take seconds only.
"""

from __future__ import annotations

from typing import Final

#: Seconds past the deadline for the final poll of a wait in memory, and for repeating it if it fails.
FINAL_POLL_TIMEOUT: Final = 2.0
#: Seconds to which the clocks in use round, or better. A timer that fires so little before its time is not early.
RESOLUTION: Final = 1e-6


def is_final(left: float) -> bool:
    """Return whether a poll that starts so many seconds before the deadline is the final one."""
    return left <= RESOLUTION


def repeat_final_after(delay: float, *, left: float, is_awaited: bool) -> float | None:
    """Return the seconds after which a final poll that failed transiently is repeated.

    An error at the wrong moment must not cost an approval that came in time.

    Args:
        delay: Seconds that the backoff, the circuit and the service ask for.
        left: Seconds that are left of the engine's time for final polls, which begins at the deadline.
        is_awaited: Whether a caller waits for the outcome. If so, the repetition must start in that time. Otherwise, it
            is enough that there is time left now.

    Returns:
        The delay; None if that is too late, as after a long ``Retry-After``.
    """
    return delay if (delay if is_awaited else 0.0) < left else None
