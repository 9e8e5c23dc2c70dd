"""What becomes of the broker's object when its connection is opened, lost or closed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import nats
import pytest
from waiting import until

from aiokeyless.errors import BrokerError, ConfigurationError
from aiokeyless.worker.broker import UnavailableError
from aiokeyless.worker.nats import NatsBroker
from aiokeyless.worker.nats.failures import broker_errors

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats_server import NatsServer

SERVICE = "https://keyless.test"


async def test_a_broker_is_opened_once(broker: NatsServer) -> None:
    async with NatsBroker(broker.url) as opened:
        with pytest.raises(ConfigurationError, match="open already"):
            await opened.open()
    await opened.aclose()


async def test_a_broker_that_is_not_open_says_how_to_open_it() -> None:
    with pytest.raises(ConfigurationError, match="async with NatsBroker"):
        await NatsBroker("nats://127.0.0.1:1").inspect()


async def test_a_connection_of_the_applications_stays_open(connection: Client) -> None:
    async with NatsBroker(connection) as opened:
        await opened.prepare(lease=30.0, service=SERVICE)
        await opened.prepare(lease=30.0, service=SERVICE)  # a second worker
        assert opened.keeps_delays
    assert connection.is_connected


async def test_a_reader_that_got_nothing_yet_is_closed_with_its_broker(connection: Client) -> None:
    async with NatsBroker(connection) as opened:
        with pytest.raises(BrokerError, match="there is no stream"):
            await opened.next_outcome("shop")


async def test_a_connection_that_was_closed_is_gone_for_good(broker: NatsServer) -> None:
    connection = await nats.connect(broker.url)
    await connection.close()
    with pytest.raises(BrokerError, match="was closed"):
        await NatsBroker(connection).inspect()


async def test_a_connection_that_is_lost_is_waited_for(broker: NatsServer) -> None:
    async with NatsBroker(broker.url) as opened:
        await opened.prepare(lease=30.0, service=SERVICE)
        assert opened._connection is not None
        connection = opened._connection
        broker.kill()
        await until(lambda: not connection.is_connected)
        for call in (opened.inspect(), opened.take(1, 1.0), opened.take_overdue(1, 1.0)):
            with pytest.raises(UnavailableError, match="no connection"):
                await call
        await broker.start()
        await until(lambda: connection.is_connected)
        assert (await opened.inspect()).waiting == 0


async def test_what_the_machine_raises_is_an_error_of_the_broker() -> None:
    with pytest.raises(UnavailableError, match="ConnectionResetError: gone"), broker_errors():
        raise ConnectionResetError("gone")
