"""The quota of repetitions: in an outage, the single calls of a client must not multiply its requests.

A lone failure is repeated and checked as ever. botocore's standard mode of retries has the same rule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aiokeyless.errors import RequestTimeoutError

if TYPE_CHECKING:
    from aiokeyless.errors import KeylessError

_TOKENS: Final = 60
_COST: Final = 1
#: A service that answers nothing suffers longer from each request.
_COST_AFTER_TIMEOUT: Final = 2


class RepetitionQuota:
    """The tokens of one client, for the requests that repeat a single call or check what became of it."""

    def __init__(self) -> None:
        self._tokens = _TOKENS

    def take(self, failure: KeylessError) -> bool:
        """Take the tokens for one request after this failure. Return False if too few are left; none is taken then."""
        cost = _COST_AFTER_TIMEOUT if isinstance(failure, RequestTimeoutError) else _COST
        if self._tokens < cost:
            return False
        self._tokens -= cost
        return True

    def give_back(self) -> None:
        """Give one token back, for a call that succeeded at once."""
        if self._tokens < _TOKENS:
            self._tokens += 1
