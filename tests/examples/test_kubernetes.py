"""The manifest in examples/kubernetes/: its command line, probes, secrets and grace period fit the worker."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import yaml
from nats_server import PATIENCE, NatsServer

from aiokeyless import KeylessClient
from aiokeyless.cli.app import app
from aiokeyless.worker import ApprovalWorker, serve_health
from aiokeyless.worker.nats.intake import EXPIRES

if TYPE_CHECKING:
    import pytest

    from aiokeyless.sandbox import Sandbox

EXAMPLES: Final = Path(__file__).parents[2] / "examples"
DEPLOYMENT, BUDGET = yaml.safe_load_all((EXAMPLES / "kubernetes" / "worker.yaml").read_text())
POD: Final[dict[str, Any]] = DEPLOYMENT["spec"]["template"]["spec"]
[WORKER] = POD["containers"]
ARGUMENTS: Final[list[str]] = WORKER["args"]
EVENT_KEY: Final = "a-key-of-the-workers-and-readers-only"
PASSWORD: Final = "of-every-user"


def test_the_command_line_is_one_that_the_worker_takes() -> None:
    command, bound, _ = app.parse_args(ARGUMENTS, exit_on_error=False, print_error=False)
    assert command.__name__ == "worker"
    assert bound.arguments["health_port"] == WORKER["ports"][0]["containerPort"]
    assert bound.arguments["health_host"] == "0.0.0.0"  # noqa: S104  # the probes come from outside of the container


async def test_what_is_probed_is_served(client: KeylessClient) -> None:
    server = await serve_health(ApprovalWorker(client, "sqlite::memory:"), 0)
    [(host, port)] = server.addresses
    try:
        async with aiohttp.ClientSession() as session:
            for probe, status in (("livenessProbe", 200), ("readinessProbe", 503)):  # it has not started
                path = WORKER[probe]["httpGet"]["path"]
                async with session.get(f"http://{host}:{port}{path}") as response:
                    assert response.status == status
    finally:
        await server.cleanup()


def test_the_grace_period_covers_the_longest_that_a_worker_may_take_to_end() -> None:
    limits = ApprovalWorker(KeylessClient("a-key"), "sqlite::memory:")._limits
    assert POD["terminationGracePeriodSeconds"] > limits.longest_delivery + EXPIRES


def test_each_file_that_is_named_is_mounted_from_a_secret() -> None:
    [mount], [volume] = WORKER["volumeMounts"], POD["volumes"]
    mounted = {f"{mount['mountPath']}/{item['path']}" for item in volume["secret"]["items"]}
    assert {argument.partition("=")[2] for argument in ARGUMENTS if "=/" in argument} == mounted
    assert mount["name"] == volume["name"]


def test_no_secret_is_an_argument() -> None:
    assert [entry["name"] for entry in WORKER["env"]] == ["KEYLESS_API_KEY", "KEYLESS_BROKER"]
    assert all("secretKeyRef" in entry["valueFrom"] for entry in WORKER["env"])
    assert not any("://" in argument for argument in ARGUMENTS)


def test_the_selectors_find_the_workers() -> None:
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels
    assert BUDGET["spec"]["selector"]["matchLabels"] == labels


async def test_a_worker_with_these_arguments_is_ready_at_a_broker_with_these_accounts(
    tmp_path: Path, certificate: tuple[Path, Path], sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    for user in ("OPERATOR", "WORKER", "SHOP"):
        monkeypatch.setenv(f"{user}_PASSWORD", PASSWORD)
    (tmp_path / "ca.crt").write_bytes(certificate[0].read_bytes())
    (tmp_path / "event.key").write_text(EVENT_KEY)
    tls = ("--tls", "--tlscert", str(certificate[0]), "--tlskey", str(certificate[1]))
    broker = NatsServer(tmp_path, "-c", str(EXAMPLES / "nats" / "accounts.conf"), *tls)
    await broker.start()
    # What is other here: one server, any free port, and where the files are.
    here = {"--replicas=3": "--replicas=1", "--health-port=8080": "--health-port=0"}
    arguments = [here.get(argument, argument).replace("/etc/keyless", str(tmp_path)) for argument in ARGUMENTS]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aiokeyless", *arguments),
        env={
            **os.environ,
            "KEYLESS_BASE_URL": sandbox.url,
            "KEYLESS_API_KEY": sandbox.api_key,
            "KEYLESS_BROKER": broker.url.replace("nats://", f"tls://worker:{PASSWORD}@"),
        },
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    logged = b""
    try:
        async with asyncio.timeout(PATIENCE):
            while b"worker.ready" not in logged:
                line = await process.stderr.readline()
                assert line, logged
                logged += line
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        broker.stop()
