"""``aiokeyless worker``: runs a worker on a broker until Ctrl-C or SIGTERM."""

from __future__ import annotations

import functools
import logging
import os
import ssl
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003  # cyclopts reads the annotations
from typing import TYPE_CHECKING, Annotated, ParamSpec

from cyclopts import Parameter

from aiokeyless.client import KeylessClient
from aiokeyless.errors import ConfigurationError, KeylessError

from .app import (
    CommandError,
    Flag,
    JsonFlag,
    OptionalCount,
    OptionalPort,
    UsageError,
    app,
    describe_end,
    new_client,
    stop_on_signals,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiokeyless.worker import Broker

P = ParamSpec("P")


def _ends_in_json(command: Callable[P, Awaitable[None]]) -> Callable[P, Awaitable[int | None]]:
    """Write the error that ends a command as JSON, too, if its other lines are JSON."""

    @functools.wraps(command)
    async def run(*arguments: P.args, **options: P.kwargs) -> int | None:
        try:
            await command(*arguments, **options)
        except (KeylessError, CommandError, OSError) as error:
            if not options.get("as_json"):
                raise
            from aiokeyless.worker.logs import log  # noqa: PLC0415  # only when used

            message, code = describe_end(error)
            log(logging.CRITICAL, "worker.ended", {"error": message})
            return code
        return None

    return run


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class NatsOptions:
    """The options for NATS only.

    Args:
        name: Name of the fleet; fleets of different names share a broker and nothing else.
        creds: File with the broker's credentials for this worker.
        tls_ca: File with certificates to check the broker's with; those of the system if left out.
        event_key: File with a key that signs events; given again, more keys that readers accept; or KEYLESS_EVENT_KEY.
        replicas: Servers that store each message; if left out, 1 for new streams.
    """

    name: str = "keyless"
    creds: Path | None = None
    tls_ca: Path | None = None
    event_key: Annotated[list[Path] | None, Parameter(negative="")] = None
    replicas: OptionalCount = None


@app.command(
    help_epilogue="""\
Example, with a sandbox in another terminal, and no server:
  aiokeyless worker --broker sqlite:keyless.db

Example, as an orchestrator runs it, with KEYLESS_BROKER naming the database:
  aiokeyless worker --health-port 8080 --json"""
)
@_ends_in_json
async def worker(
    *,
    broker: str | None = None,
    schema: str | None = None,
    health_port: OptionalPort = None,
    health_host: str = "127.0.0.1",
    prepare: Flag = False,
    as_json: JsonFlag = False,
    nats: Annotated[NatsOptions | None, Parameter(name="*", group="NATS")] = None,
) -> None:
    """Wait for approvals that applications request through a broker.

    Any number of workers share the requests; a request is not lost when a worker
    ends. Runs until Ctrl-C or SIGTERM, then finishes the requests in flight.

    Args:
        broker: The store of the requests: sqlite:FILE, postgresql://..., nats://...; or KEYLESS_BROKER.
        schema: Schema of the database, if the broker is PostgreSQL; if left out, ?schema= of its URL, or keyless.
        health_port: Port for GET /livez, /readyz and /healthz; none if left out.
        health_host: Address to serve these on.
        prepare: Only create, or migrate, what workers need at the broker; this needs neither API key nor region.
        as_json: Log JSON objects, one a line.
        nats: Only if the broker is NATS.
    """
    from aiokeyless.worker import ApprovalWorker, serve_health  # noqa: PLC0415  # only when used
    from aiokeyless.worker.logs import JsonFormatter  # noqa: PLC0415

    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    opened = open_broker(broker, schema, nats)
    # To prepare, it names the service and sends nothing, so it needs no key.
    new = KeylessClient(os.environ.get("KEYLESS_API_KEY") or "none") if prepare else new_client()
    async with new as client, opened:
        service = ApprovalWorker(client, opened)
        if prepare:
            await service.prepare()
            return
        health = None if health_port is None else await serve_health(service, health_port, health_host)
        try:
            with stop_on_signals(service.stop):
                await service.run()
        finally:
            if health is not None:
                await health.cleanup()


def open_broker(url: str | None, schema: str | None, options: NatsOptions | None) -> Broker:
    """Return the broker of a URL, not yet open; that of the environment if there is none.

    Raises:
        UsageError: There is no URL, or the options do not fit it.
        CommandError: An option's value is wrong, or a library is missing.
    """
    from aiokeyless.worker.broker import Broker  # noqa: PLC0415  # only when used
    from aiokeyless.worker.brokers import broker_for  # noqa: PLC0415  # as above
    from aiokeyless.worker.nats import SCHEMES  # noqa: PLC0415  # this needs no nats-py
    from aiokeyless.worker.postgres import SCHEMES as POSTGRES  # noqa: PLC0415  # this needs no asyncpg

    url = url or os.environ.get("KEYLESS_BROKER")
    if not url:
        found = "NATS_URL alone names none" if os.environ.get("NATS_URL") else "there is no default"
        raise UsageError(
            f"--broker or KEYLESS_BROKER must name the broker, {found}: sqlite:FILE, postgresql://... or nats://..."
        )
    scheme = url.partition(":")[0].partition("+")[0].lower()
    if schema is not None:
        if scheme not in POSTGRES:
            raise UsageError("--schema needs a broker whose URL begins with postgresql:")
        url += f"{'&' if '?' in url else '?'}schema={schema}"
    if scheme in SCHEMES:
        return _open_nats_broker(url, options or NatsOptions())
    if options is not None:
        raise UsageError("options for NATS need a broker whose URL begins with nats: or tls:")
    try:
        opened = broker_for(url)
    except ConfigurationError as error:
        raise UsageError(f"--{error}") from None
    assert isinstance(opened, Broker)  # noqa: S101  # a URL names one
    return opened


def _open_nats_broker(url: str, options: NatsOptions) -> Broker:
    try:
        from aiokeyless.worker.nats import EventKeys, Fleet, NatsBroker, StreamSettings  # noqa: PLC0415  # as above
    except ModuleNotFoundError as error:
        raise CommandError(f'--broker needs {error.name}, which is not installed: install the extra "nats"') from None
    try:
        fleet = Fleet(name=options.name)
    except ConfigurationError as error:
        raise CommandError(f"--{error}") from None
    keys = EventKeys.from_files(*options.event_key) if options.event_key else EventKeys.from_environment()
    connect_options: dict[str, object] = {}
    if options.creds is not None:
        # nats-py reads the file only if the broker asks for credentials.
        _check_readable("--creds", options.creds)
        connect_options["user_credentials"] = str(options.creds)
    if options.tls_ca is not None:
        connect_options["tls"] = _load_tls(options.tls_ca)
    settings = StreamSettings(replicas=options.replicas)
    return NatsBroker(url, fleet=fleet, event_keys=keys, settings=settings, connect_options=connect_options)


def _load_tls(authority: Path) -> ssl.SSLContext:
    _check_readable("--tls-ca", authority)  # ssl does not name a file that it cannot read
    try:
        return ssl.create_default_context(cafile=authority)
    except OSError as error:
        raise CommandError(f"--tls-ca must name a file with a certificate, not {authority}: {error}") from None


def _check_readable(option: str, path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise CommandError(f"{option}: {path} cannot be read: {error.strerror}") from None
