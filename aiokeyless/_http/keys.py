"""`ApiKeys`: the key of each exchange, either always the same or the one that the application's function returns."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Final, NamedTuple

from aiokeyless._validation import read_api_key
from aiokeyless.errors import ConfigurationError
from aiokeyless.models import Secret

from .redaction import Redaction, find_place

if TYPE_CHECKING:
    from collections.abc import Callable

#: Keys that answers are searched for: the one of the exchange, and those before, which a late answer may repeat.
_KNOWN: Final = 3


class ApiKey(NamedTuple):
    """The key of one exchange, and the redaction of its answer."""

    secret: Secret
    redaction: Redaction


class ApiKeys:
    """The API keys of a client: a checked key, or a function that returns one."""

    # The function is not shown by any repr: it may be a `functools.partial` of a key.
    __slots__ = ("_ask", "_current", "_known")

    def __init__(self, source: Secret | Callable[[], object]) -> None:
        self._ask: Callable[[], object] | None = None
        self._current: ApiKey | None = None
        # The newest first.
        self._known: tuple[Secret, ...] = ()
        if isinstance(source, Secret):
            self._current = ApiKey(source, Redaction(source))
        else:
            self._ask = source

    def static(self) -> Secret | None:
        """Return the key if it is always the same."""
        return self._current.secret if self._ask is None and self._current is not None else None

    def current(self) -> ApiKey:
        """Return the key of an exchange that begins now. Raise `ConfigurationError` if the function returned none."""
        if self._ask is not None:
            try:
                return self._update(_read(self._ask))
            except ConfigurationError as error:
                error.key_was_good = self._current is not None
                raise
        assert self._current is not None  # noqa: S101  # it is either a key or a function
        return self._current

    def is_replaced(self, key: ApiKey) -> bool:
        """Return whether an exchange that began now would have another key. Raises as `current` does."""
        return self.current().secret != key.secret

    def _update(self, secret: Secret) -> ApiKey:
        if self._current is None or self._current.secret != secret:
            self._known = (secret, *self._known)[:_KNOWN]
            self._current = ApiKey(secret, Redaction(*self._known))
        return self._current


def make_api_keys(api_key: object) -> ApiKeys | ConfigurationError:
    """Return the keys for a client's argument, or the error to raise: see `read_api_key`."""
    if inspect.iscoroutinefunction(api_key):
        return ConfigurationError("api_key must be a plain function, not an async one", argument="api_key")
    if callable(api_key):
        return ApiKeys(api_key)
    key = read_api_key(api_key)
    return key if isinstance(key, ConfigurationError) else ApiKeys(key)


def _read(ask: Callable[[], object]) -> Secret:
    try:
        key = read_api_key(ask())
    # Its traceback and its text may contain a key.
    except Exception as error:  # noqa: BLE001  # an application's function
        raised = f"{type(error).__name__} at {find_place(error)}"
        key = ConfigurationError(
            f"api_key must be a function that returns the key; it raised {raised}", argument="api_key"
        )
    del ask
    if isinstance(key, ConfigurationError):
        raise key
    return key
