"""``aiokeyless worker``: waits that a broker stores, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import ssl
from contextlib import contextmanager, suppress
from pathlib import Path  # noqa: TC003  # cyclopts reads the annotations
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter

from aiokeyless.errors import ConfigurationError

from .app import AsJson, CommandError, Exit, Seconds, app, new_client
from .sandbox import check_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiokeyless.worker import ApprovalWorker

_SUBJECT: Final = re.compile(r"[\w-]+(?:\.[\w-]+)*", re.ASCII)


def _check_count(_type: object, number: int | None) -> None:
    if number is not None and number < 1:
        raise ValueError("Must be at least 1.")


def _check_rate(_type: object, rate: float) -> None:
    if not 0 < rate < float("inf"):  # NaN is not
        raise ValueError("Must be more than 0 polls, and not infinite.")


def _check_grace(_type: object, grace: float) -> None:
    if not grace >= 0:  # NaN is not
        raise ValueError("Must be at least 0 seconds.")


def _check_subject(_type: object, subject: str | None) -> None:
    if subject is not None and not _SUBJECT.fullmatch(subject):
        raise ValueError("Must be a subject: words of letters, digits, - and _, separated by dots.")


Count = Annotated[int, Parameter(validator=_check_count)]
OptionalCount = Annotated[int | None, Parameter(validator=_check_count)]


@contextmanager
def needs_the_extra() -> Iterator[None]:
    """Import what is a part of the worker; where its extra is missing, say so."""
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in {"nats", "nkeys"}:
            raise
        raise CommandError('the worker is an extra: pip install "aiokeyless[cli,nats]"') from None


@app.command(
    help_epilogue="""\
Example, with a broker and a sandbox in other terminals:
  nats-server -js -sd jetstream
  aiokeyless worker --nats nats://127.0.0.1:4222

Example, as an orchestrator runs it, with NATS_URL naming a cluster's servers:
  aiokeyless worker --replicas 3 --health-port 8080 --json"""
)
async def worker(
    *,
    nats_url: Annotated[str | None, Parameter(name="--nats")] = None,
    name: str = "keyless",
    tenant: str | None = None,
    max_in_flight: Count = 64,
    max_polls_per_second: Annotated[float, Parameter(validator=_check_rate)] = 1000.0,
    grace: Annotated[float, Parameter(validator=_check_grace)] = 30.0,
    creds: Path | None = None,
    inbox_prefix: Annotated[str | None, Parameter(validator=_check_subject)] = None,
    tls_ca: Path | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    event_key: Annotated[list[Path] | None, Parameter(negative="")] = None,
    domain: str | None = None,
    prefix: str | None = None,
    replicas: OptionalCount = None,
    duplicate_window: Seconds = 24 * 3600.0,
    max_age: Seconds = 7 * 24 * 3600.0,
    learned: str | None = None,
    health_port: Annotated[int | None, Parameter(validator=check_port)] = None,
    health_host: str = "127.0.0.1",
    as_json: AsJson = False,
) -> int:
    """Wait for approvals that applications request through NATS JetStream.

    Any number of workers share the requests; a request is not lost when a worker
    ends. Runs until Ctrl-C or SIGTERM, then finishes the requests in flight.

    Args:
        nats_url: Addresses of the broker, separated by commas; NATS_URL, or nats://127.0.0.1:4222, if left out.
        name: Name of the fleet; fleets of different names share a broker and nothing else.
        tenant: Your name of the Keyless tenant. All workers of a fleet name the same one, or none.
        max_in_flight: Requests that are processed at the same time.
        max_polls_per_second: Polls of this worker in a second; what is due beyond that stays at the broker.
        grace: Seconds after its deadline for which a request's final poll is repeated if it gets no answer.
        creds: File with the broker's credentials for this worker.
        inbox_prefix: Subject under which the broker answers this worker, where it may not subscribe to _INBOX.>.
        tls_ca: File with the certificates that the broker's is checked with; those of the system if left out.
        tls_cert: File with this worker's certificate, where the broker asks for one.
        tls_key: File with the key of that certificate; the same file if left out.
        event_key: File with a key that signs events; given again, more keys that readers accept; or KEYLESS_EVENT_KEY.
        domain: JetStream domain of the streams; that of the server if left out.
        prefix: Prefix of JetStream's API, where another account exports it.
        replicas: Servers that store each message; if left out, 1 for new streams.
        duplicate_window: Seconds within which a request that is published twice counts once; no wait may be longer.
        max_age: Seconds for which new streams keep outcomes for readers that are away; at least --duplicate-window.
        learned: File that keeps what this worker learns; or kv://BUCKET, a bucket of the broker that a fleet shares.
        health_port: Port for GET /livez, /readyz and /healthz; none if left out.
        health_host: Address that these are served on.
        as_json: Log JSON objects, one a line.
    """
    with needs_the_extra():
        from aiokeyless.worker import ApprovalWorker, EventKeys, Fleet, StreamSettings, serve_health  # noqa: PLC0415
        from aiokeyless.worker.logs import JsonFormatter  # noqa: PLC0415
        from aiokeyless.worker.service import DEFAULT_NATS_URL  # noqa: PLC0415
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        fleet = Fleet(name=name, tenant=tenant, domain=domain, prefix=prefix)
    except ConfigurationError as error:
        raise CommandError(f"--{error}") from None
    event_keys = EventKeys.from_files(*event_key) if event_key else EventKeys.from_environment()
    options: dict[str, object] = {}
    if creds is not None:
        _check_readable("--creds", creds)  # nats-py reads it only where the broker asks for credentials
        options["user_credentials"] = str(creds)
    if inbox_prefix is not None:
        options["inbox_prefix"] = inbox_prefix
    if tls_ca or tls_cert or tls_key:
        options["tls"] = _tls(tls_ca, tls_cert, tls_key)
    async with new_client() as client:
        service = ApprovalWorker(
            client,
            nats_url or os.environ.get("NATS_URL") or DEFAULT_NATS_URL,
            max_in_flight=max_in_flight,
            max_polls_per_second=max_polls_per_second,
            learned=learned,
            grace=grace,
            fleet=fleet,
            event_keys=event_keys,
            settings=StreamSettings(replicas=replicas, duplicate_window=duplicate_window, max_age=max_age),
            connect_options=options,
        )
        health = None if health_port is None else await serve_health(service, health_port, health_host)
        try:
            _stop_on_signals(service)
            await service.run()
        finally:
            if health is not None:
                await health.cleanup()
    return Exit.DONE


def _tls(ca: Path | None, certificate: Path | None, key: Path | None) -> ssl.SSLContext:
    if key and not certificate:
        raise CommandError("--tls-key needs --tls-cert, the certificate that it is the key of")
    for option, path in (("--tls-ca", ca), ("--tls-cert", certificate), ("--tls-key", key)):
        if path is not None:
            _check_readable(option, path)  # ssl does not say which file it could not read
    try:
        context = ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise CommandError(f"--tls-ca: {ca} holds no certificate: {error}") from None
    if certificate:
        try:
            context.load_cert_chain(certificate, key)
        except OSError as error:
            raise CommandError(
                f"--tls-cert: {certificate} and the key in {key or certificate} cannot be used: {error}"
            ) from None
    return context


def _check_readable(option: str, path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise CommandError(f"{option}: {path} cannot be read: {error.strerror}") from None


def _stop_on_signals(service: ApprovalWorker) -> None:
    loop = asyncio.get_running_loop()
    with suppress(NotImplementedError):  # Windows has no signals to handle in a loop
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, service.stop)
