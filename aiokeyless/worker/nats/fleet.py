"""The names of a fleet of workers on NATS: its streams, its consumer, its subjects, and the prefix of JetStream."""

from __future__ import annotations

import re
from typing import Final

import msgspec
from nats.aio.client import Client
from nats.js import JetStreamContext

from aiokeyless.errors import ConfigurationError
from aiokeyless.worker.messages import Outcome

_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")
_PREFIX: Final = re.compile(r"[^\s.*>]+(?:\.[^\s.*>]+)*")


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """A fleet: all workers of one tenant, and the applications that submit requests and read outcomes.

    Two fleets on one broker never see each other's messages, and only their names keep them apart. Give production and
    staging a name each, even if their brokers are separate today.

    Attributes:
        name: In the names of all streams and subjects: a lower-case letter, then letters, digits and ``-``, 32 at most.
            Default: ``keyless``.
        prefix: Prefix of JetStream's API, if another account has the streams and exports the API, or a JetStream domain
            has them: ``$JS.<domain>.API``. Default: ``$JS.API``.

    Raises:
        ConfigurationError: An attribute is wrong.
    """

    name: str = "keyless"
    prefix: str = "$JS.API"

    def __post_init__(self) -> None:
        if not _matches(_NAME, self.name):
            raise ConfigurationError(
                f"name must be a lower-case letter, and then up to 31 of them, digits and '-', not {self.name!r:.80}",
                argument="name",
            )
        if not _matches(_PREFIX, self.prefix):
            raise ConfigurationError(
                f"prefix must be words separated by dots, without blanks, '*' and '>', not {self.prefix!r:.80}",
                argument="prefix",
            )

    @property
    def requests(self) -> str:
        """Name of the stream of requests."""
        return f"{self.name.upper()}_REQUESTS"

    @property
    def outcomes(self) -> str:
        """Name of the stream of outcomes."""
        return f"{self.name.upper()}_OUTCOMES"

    @property
    def claims(self) -> str:
        """Name of the stream of claims."""
        return f"{self.name.upper()}_CLAIMS"

    @property
    def consumer(self) -> str:
        """Name of the workers' consumer of requests."""
        return f"{self.name}-approvals"

    @property
    def request_subject(self) -> str:
        """The subject of requests."""
        return f"{self.name}.approvals.request"

    def outcome_subject(self, outcome: Outcome) -> str:
        """Return the subject of events of a kind."""
        return f"{self.name}.approvals.{outcome}"

    def claim_subject(self, operation: str) -> str:
        """Return the subject of the claims on one operation id, by a name for the id."""
        return f"{self.name}.claims.{operation}"

    def jetstream(self, connection: Client, timeout: float) -> JetStreamContext:
        """Return the JetStream that has the streams, with a timeout for its requests in seconds."""
        return connection.jetstream(prefix=self.prefix, timeout=timeout)


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


#: The default fleet.
KEYLESS: Final = Fleet()
