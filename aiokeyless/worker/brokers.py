"""Which broker is for a URL or for a driver's connection. Each broker's folder names those that it is for.

Only this module knows the folders. Their ``__init__`` has ``SCHEMES``, ``DRIVERS``, ``HINT``, ``from_url(url)`` and
``from_connection(connection)``. ``DRIVERS`` are top-level modules of its drivers' types. Importing a folder needs no
driver.
"""

from __future__ import annotations

import re
from types import ModuleType
from typing import Final

from aiokeyless.errors import ConfigurationError
from aiokeyless.models import Secret

from . import nats, postgres, sqlite  # by name: a packer of frozen programs, such as PyInstaller, sees no others
from .broker import ApplicationSide

_FOLDERS: tuple[ModuleType, ...] = (nats, postgres, sqlite)  # if it were Final, pyright would see each one's own types

#: The scheme of a URL, of which one for SQLAlchemy also names a driver. A drive of Windows is none.
_SCHEME: Final = re.compile(r"([a-z][a-z0-9.-]+)(\+\w+)?:", re.IGNORECASE)


def broker_for(target: object) -> ApplicationSide:
    """Return the broker of a URL, the application's side for a driver's connection, or the given broker itself.

    Raises:
        ConfigurationError: No broker is for it, or a broker's library is not installed.
    """
    found = _find_side(target)
    del target  # before anything is raised: see `hide_url`
    if isinstance(found, ConfigurationError):
        raise found
    return found


def hide_url(broker: object) -> object:
    """Return a broker's URL as a secret, and anything else unchanged.

    A URL may hold a password, and error reporters print local variables.
    """
    return Secret(broker) if isinstance(broker, str) else broker


def _find_side(target: object) -> ApplicationSide | ConfigurationError:
    """Return the side, or the error. It is not raised here, where the URL is a local variable."""
    if isinstance(target, ApplicationSide):
        return target
    if isinstance(target, Secret):
        target = target.reveal()
    modules = {base.__module__.partition(".")[0] for base in type(target).__mro__}
    found = _SCHEME.match(target) if isinstance(target, str) else None
    known: list[str] = []
    side: ApplicationSide  # a type checker does not know it
    for package in _FOLDERS:
        known += [f"{scheme}:" for scheme in package.SCHEMES]
        try:
            if isinstance(target, str):
                if found is not None and found[1].lower() in package.SCHEMES:
                    side = package.from_url(target)
                    return side
            elif not modules.isdisjoint(package.DRIVERS):
                side = package.from_connection(target)
                return side
        except ModuleNotFoundError as error:
            return ConfigurationError(
                f"broker needs {error.name}, which is not installed: {package.HINT}", argument="broker"
            )
        except ConfigurationError as error:
            return error.with_traceback(None)
    required, shown = f"a URL ({', '.join(known)})", "a text without a scheme: a SQLite file is sqlite:PATH"
    if not isinstance(target, str):
        required, shown = f"a broker, {required} or a driver's connection", type(target).__name__
    return ConfigurationError(
        f"broker must be {required}, not {f'a URL of the scheme {found[1]!r:.40}' if found else shown}",
        argument="broker",
    )
