"""The broker that tests and benchmarks start."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from nats_server import NatsServer

if TYPE_CHECKING:
    from pathlib import Path


async def test_a_server_that_cannot_start_is_not_waited_for_and_its_words_are_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="flag provided but not defined"):
        await NatsServer(tmp_path, "--nonsense").start()
