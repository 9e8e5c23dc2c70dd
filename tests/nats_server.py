"""A real broker: a nats-server with JetStream, which can be killed and started again where it was."""

from __future__ import annotations

import json
import os
import signal
import weakref
from typing import TYPE_CHECKING, Final, Self

from ports import hold_port
from waiting import PATIENCE

from benchmarks import broker

if TYPE_CHECKING:
    from pathlib import Path

    from nats.aio.client import Client
    from nats.js import JetStreamContext

    from aiokeyless.worker.nats import StreamSettings

#: What the streams, the consumer and the subject of requests are called where the fleet has no name of its own.
REQUESTS: Final = "KEYLESS_REQUESTS"
OUTCOMES: Final = "KEYLESS_OUTCOMES"
CLAIMS: Final = "KEYLESS_CLAIMS"
CONSUMER: Final = "keyless-approvals"
REQUEST_SUBJECT: Final = "keyless.approvals.request"


def jetstream(connection: Client) -> JetStreamContext:
    """JetStream's calls, for the tests: nats-py waits five seconds for an answer, which a busy machine may exceed."""
    return connection.jetstream(timeout=PATIENCE)


async def prepare(stream: JetStreamContext, settings: StreamSettings | None = None, *, ack_wait: float) -> float:
    """Make the streams and the consumer of the fleet that has no name of its own, as an operator does.

    They say nothing of the service that they are for, so that a worker of any sandbox may use them.
    """
    from aiokeyless.worker.nats import Fleet, StreamSettings, streams  # here, as every test loads this module

    made = settings or StreamSettings()
    return await streams.prepare(stream, Fleet(), made, ack_wait=ack_wait, service="")


async def change_consumer(
    connection: Client, stream: str = REQUESTS, consumer: str = CONSUMER, **settings: object
) -> None:
    """Change settings of a consumer, or make it with them, as an operator does. nats-py does not know all of them."""
    subject = f"$JS.API.CONSUMER.INFO.{stream}.{consumer}"
    made = {"durable_name": consumer, "ack_policy": "explicit", "max_ack_pending": -1}
    config = json.loads((await connection.request(subject, timeout=PATIENCE)).data).get("config", made)
    wanted = json.dumps({"stream_name": stream, "config": config | settings}).encode()
    answer = await connection.request(f"$JS.API.CONSUMER.CREATE.{stream}.{consumer}", wanted, timeout=PATIENCE)
    assert "error" not in json.loads(answer.data)


class NatsServer(broker.NatsServer):
    """One server, which has its port for itself from the first start to the last, and what may befall it."""

    def __init__(self, folder: Path, *options: str, configuration: str = "", jetstream: bool = True) -> None:
        if configuration:
            folder.mkdir(exist_ok=True)
            file = folder / "nats.conf"
            file.write_text(configuration)
            options = ("-c", str(file), *options)
        super().__init__(folder, *options, jetstream=jetstream)
        self._port, held = hold_port()
        weakref.finalize(self, os.close, held)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_error: object) -> None:
        self.stop()

    def configure(self, configuration: str) -> None:
        """Give it another configuration while it runs, in place of the one that it was started with."""
        (self._folder / "nats.conf").write_text(configuration)
        os.kill(self.pid, signal.SIGHUP)

    def pause(self) -> None:
        """Have it say nothing, and keep its connections, until `resume`."""
        os.kill(self.pid, signal.SIGSTOP)
        # A signal is delivered some time after it is sent; until every thread has stopped, the server still answers.
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)
