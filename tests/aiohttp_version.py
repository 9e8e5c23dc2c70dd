"""Which aiohttp the tests run on: `nox -s lowest` runs them on the lowest one that pyproject.toml allows."""

from __future__ import annotations

import aiohttp
import pytest

AIOHTTP = tuple(map(int, aiohttp.__version__.split(".")[:2]))
#: The end of the reasons below, for tests/conftest.py.
NOT_THERE = "of this aiohttp"

#: aiohttp 3.10 keeps what was reset until the garbage collector comes.
may_not_leak = pytest.mark.skipif(AIOHTTP < (3, 11), reason=f"a flaw {NOT_THERE}")
#: Before 3.14, a server refuses a body of just the size that it allows.
takes_the_limit = pytest.mark.skipif(AIOHTTP < (3, 14), reason=f"a byte less {NOT_THERE}")
#: Before 3.12, a session with a base URL sends nothing to another one.
needs_free_sessions = pytest.mark.skipif(AIOHTTP < (3, 12), reason=f"a limit {NOT_THERE}")
