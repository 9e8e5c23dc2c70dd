"""The root of all exceptions, and those for wrong arguments; `aiokeyless.errors` has them all.

They live below the models and the tickets, whose checks of arguments raise them; the other exceptions live above, since
they carry operations and tickets.
"""

from __future__ import annotations

from typing import Any, Final

PUBLIC_MODULE: Final = "aiokeyless.errors"


def _restore(cls: type[KeylessError], args: tuple[Any, ...]) -> KeylessError:
    """Create an exception without running its ``__init__``, which would build the message a second time."""
    error = cls.__new__(cls)
    error.args = args  # OSError.__new__, under the timeouts here, leaves args empty
    return error


class KeylessError(Exception):
    """Root of all errors of this library.

    What to do: catch it to handle "Keyless did not work" in one place; catch its subclasses to tell the causes apart.
    """

    __module__ = PUBLIC_MODULE

    @property
    def is_transient(self) -> bool:
        """Whether the same call may well succeed a little later, so that an HTTP handler of yours answers 503.

        True for a `TransportError`, for 408, 425, 429 and 5xx, and for a `NotJsonError`: rule 4 of ``docs/rules.md``.
        True also for a 401 if the key has been replaced, and if a function ``api_key`` fails after it returned keys.
        True for a `SignatureError` if the keys are unavailable, and for a `BrokerError` that may pass by itself.
        Repeat a create under the same operation id. An `ApprovalError` is not transient: its wait has ended.
        """
        return False

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args), self.__dict__


class ConfigurationError(KeylessError, ValueError):
    """An argument, key, region, URL or event loop is wrong; nothing was sent.

    What to do: fix the call; the message names the argument and states what is wrong and what is valid.

    Attributes:
        argument: Name of the wrong argument, as in the message, such as ``"user_id"``; None where the error is not
            about one argument.
        key_was_good: Whether ``api_key`` is a function that returned a key before. Try again then.
    """

    key_was_good: bool = False

    __module__ = PUBLIC_MODULE

    def __init__(self, message: str, *, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument

    @property
    def is_transient(self) -> bool:
        """True if a function that returned keys before returned none; see `KeylessError.is_transient`."""
        return self.key_was_good


class InvalidIdentifierError(ConfigurationError):
    """A user id, an operation id or an external user id cannot be sent; nothing was sent.

    What to do: check where the id comes from. User ids are hex; operation ids and external user ids are 1 to 512
    characters without control characters.
    """

    __module__ = PUBLIC_MODULE
