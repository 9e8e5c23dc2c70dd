from __future__ import annotations

from typing import TYPE_CHECKING

import nats
import pytest

from benchmarks.soak.disk import small_disk

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator
    from pathlib import Path

    from nats.aio.client import Client
    from nats_server import NatsServer


@pytest.fixture
async def connection(broker: NatsServer) -> AsyncGenerator[Client]:
    async with await nats.connect(broker.url) as connection:
        yield connection


@pytest.fixture
def disk() -> Generator[Path]:
    """A real disk of 32 MB."""
    try:
        with small_disk(32) as place:
            yield place
    except PermissionError as error:
        pytest.skip(f"this user may not mount a disk: {error}")


@pytest.fixture(autouse=True)
def _hasty_key_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose key is refused ends soon: it takes half a minute otherwise."""
    monkeypatch.setattr("aiokeyless.worker.serving.KEY_CHECKS", (0.01,) * 5)


@pytest.fixture(autouse=True)
def _short_pulls(short_pulls: None) -> None:
    """Every worker in this process ends soon."""
