"""The manifests in examples/kubernetes/: their command lines, probes, secrets and grace periods fit the worker."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import pytest
import yaml
from nats_server import NatsServer
from postgres_server import shared_server
from waiting import PATIENCE

from aiokeyless import KeylessClient
from aiokeyless.cli.app import app
from aiokeyless.worker import ApprovalWorker, serve_health
from aiokeyless.worker.nats.intake import EXPIRES
from aiokeyless.worker.postgres import PostgresBroker

if TYPE_CHECKING:
    from aiokeyless.sandbox import Sandbox

EXAMPLES: Final = Path(__file__).parents[2] / "examples"
DEPLOYMENT, BUDGET = yaml.safe_load_all((EXAMPLES / "kubernetes" / "worker.yaml").read_text())
POSTGRES_TEXT: Final = (EXAMPLES / "kubernetes" / "worker-postgres.yaml").read_text()
ON_POSTGRES, BUDGET_ON_POSTGRES, PREPARATION = yaml.safe_load_all(POSTGRES_TEXT)


def pod_of(deployment: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the pod that a deployment starts, and its one container."""
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    return pod, container


POD, WORKER = pod_of(DEPLOYMENT)
ARGUMENTS: Final[list[str]] = WORKER["args"]
EVENT_KEY: Final = "a-key-of-the-workers-and-readers-only"
PASSWORD: Final = "of-every-user"
OF_URL: Final = set(re.findall(r"sslrootcert=(/\S+)", POSTGRES_TEXT))
each_manifest = pytest.mark.parametrize("deployment", [DEPLOYMENT, ON_POSTGRES], ids=["NATS", "PostgreSQL"])


@each_manifest
def test_the_command_line_is_one_that_the_worker_takes(deployment: dict[str, Any]) -> None:
    _, container = pod_of(deployment)
    command, bound, _ = app.parse_args(container["args"], exit_on_error=False, print_error=False)
    assert command.__name__ == "worker"
    assert bound.arguments["health_port"] == container["ports"][0]["containerPort"]
    assert bound.arguments["health_host"] == "0.0.0.0"  # noqa: S104  # the probes come from outside of the container


@each_manifest
async def test_what_is_probed_is_served(client: KeylessClient, deployment: dict[str, Any]) -> None:
    _, container = pod_of(deployment)
    server = await serve_health(ApprovalWorker(client, "sqlite::memory:"), 0)
    [(host, port)] = server.addresses
    try:
        async with aiohttp.ClientSession() as session:
            for probe, status in (("livenessProbe", 200), ("readinessProbe", 503)):  # it has not started
                assert container[probe]["httpGet"]["port"] == container["ports"][0]["name"]
                path = container[probe]["httpGet"]["path"]
                async with session.get(f"http://{host}:{port}{path}") as response:
                    assert response.status == status
    finally:
        await server.cleanup()


@each_manifest
def test_the_grace_period_covers_the_longest_that_a_worker_may_take_to_end(deployment: dict[str, Any]) -> None:
    pod, _ = pod_of(deployment)
    limits = ApprovalWorker(KeylessClient("a-key"), "sqlite::memory:")._limits
    assert pod["terminationGracePeriodSeconds"] > limits.longest_delivery + EXPIRES


@pytest.mark.parametrize(
    ("deployment", "named"),
    [
        pytest.param(DEPLOYMENT, {argument.partition("=")[2] for argument in ARGUMENTS if "=/" in argument}, id="NATS"),
        pytest.param(ON_POSTGRES, OF_URL, id="PostgreSQL"),
        pytest.param(PREPARATION, OF_URL, id="preparation"),
    ],
)
def test_each_file_that_is_named_is_mounted_from_a_secret(deployment: dict[str, Any], named: set[str]) -> None:
    pod, container = pod_of(deployment)
    [mount], [volume] = container["volumeMounts"], pod["volumes"]
    assert named == {f"{mount['mountPath']}/{item['path']}" for item in volume["secret"]["items"]}
    assert mount["name"] == volume["name"]


@pytest.mark.parametrize(
    ("deployment", "secrets"),
    [
        pytest.param(DEPLOYMENT, ["KEYLESS_API_KEY", "KEYLESS_BROKER"], id="NATS"),
        pytest.param(ON_POSTGRES, ["KEYLESS_API_KEY", "KEYLESS_BROKER"], id="PostgreSQL"),
        pytest.param(PREPARATION, ["KEYLESS_BROKER"], id="preparation"),
    ],
)
def test_no_secret_is_an_argument(deployment: dict[str, Any], secrets: list[str]) -> None:
    _, container = pod_of(deployment)
    assert [entry["name"] for entry in container["env"]] == secrets
    assert all("secretKeyRef" in entry["valueFrom"] for entry in container["env"])
    assert not any("://" in argument for argument in container["args"])


@pytest.mark.parametrize(
    ("deployment", "budget"), [(DEPLOYMENT, BUDGET), (ON_POSTGRES, BUDGET_ON_POSTGRES)], ids=["NATS", "PostgreSQL"]
)
def test_the_selectors_find_the_workers(deployment: dict[str, Any], budget: dict[str, Any]) -> None:
    pod, _ = pod_of(deployment)
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert budget["spec"]["selector"]["matchLabels"] == labels
    [spread] = pod["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == labels
    assert budget["spec"]["minAvailable"] < deployment["spec"]["replicas"]


async def test_the_job_makes_the_schema_with_no_api_key() -> None:
    server = shared_server()
    url = server.url(server.new_database())
    _, container = pod_of(PREPARATION)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aiokeyless", *container["args"]), env={**os.environ, "KEYLESS_BROKER": url}
    )
    assert await process.wait() == 0
    async with PostgresBroker(url) as broker:
        assert (await broker.inspect()).problems == ()


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
