"""Run all of the example in one terminal: broker, sandbox, worker, application, and payday. The user is simulated."""

import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import nats
import nats.js.errors
from nats.js import JetStreamContext

from aiokeyless.sandbox import Sandbox

FOLDER = Path(__file__).parent
PATIENCE = 60.0  # seconds for each program to start


async def main() -> None:
    """Start one program after the other, each when what it needs is there, and end them in reverse."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sandbox = await stack.enter_async_context(Sandbox(auto_approve=3))
        broker = await start_broker(stack, folder)
        environment = {
            "KEYLESS_API_KEY": sandbox.api_key,
            "KEYLESS_BASE_URL": sandbox.url,
            "NATS_URL": broker,
            "KEYLESS_BROKER": broker,
            "PAYMENTS_DB": str(folder / "payments.sqlite3"),
        }
        stream = (await stack.enter_async_context(await nats.connect(broker))).jetstream()
        try:
            worker = running(folder, sys.executable, "-m", "aiokeyless", "worker", **environment)
            await stack.enter_async_context(worker)
            await made("KEYLESS_OUTCOMES", stream)
            await stack.enter_async_context(running(folder, sys.executable, FOLDER / "payments.py", **environment))
            await made("payments", stream)
        except TimeoutError:
            raise SystemExit((folder / "log").read_text()) from None
        payday = await asyncio.create_subprocess_exec(
            sys.executable, FOLDER / "payday.py", env=os.environ | environment
        )
        if await payday.wait():
            raise SystemExit((folder / "log").read_text())


async def start_broker(stack: AsyncExitStack, folder: Path) -> str:
    """Start a broker on a free port; return its URL."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    server = shutil.which("nats-server", path=path)
    if server is None:
        raise SystemExit("there is no nats-server on the PATH; README.md says how to install it")
    where = ("-a", "127.0.0.1", "-p", "-1", "--ports_file_dir", folder, "-js", "-sd", folder / "store")
    broker = await stack.enter_async_context(running(folder, server, *where))
    ports = folder / f"nats-server_{broker.pid}.ports"
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                return str(json.loads(ports.read_text())["nats"][0])
            except (FileNotFoundError, json.JSONDecodeError):  # not written yet, or only half
                await asyncio.sleep(0.05)


async def made(name: str, stream: JetStreamContext) -> None:
    """Wait until a program has made its stream."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                await stream.stream_info(name)
            except nats.js.errors.NotFoundError:
                await asyncio.sleep(0.05)
            else:
                return


@asynccontextmanager
async def running(
    folder: Path, program: str, *arguments: str | Path, **environment: str
) -> AsyncGenerator[asyncio.subprocess.Process]:
    """Run a program; what it prints goes to a file, which is shown where something fails."""
    with (folder / "log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            program, *arguments, env=os.environ | environment, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


if __name__ == "__main__":
    asyncio.run(main())
