"""A sandbox for threads that run no event loop: what they call runs in its loop, as the sandbox is of one thread."""

from __future__ import annotations

import asyncio
import inspect
from functools import wraps
from typing import TYPE_CHECKING, Any

from .server import Sandbox
from .service import Service

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from aiokeyless.models import Authentication, Operation


def _in_loop(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that runs in the loop of the sandbox while its caller waits."""

    @wraps(method)
    def call(self: ThreadSafeSandbox, *args: Any, **kwargs: Any) -> Any:
        if asyncio._get_running_loop() is self._loop:  # noqa: SLF001  # None is None: before the start
            return method(self, *args, **kwargs)

        async def in_loop() -> Any:
            return method(self, *args, **kwargs)

        return self._run(in_loop)

    return call


class ThreadSafeSandbox(Sandbox):
    """A `Sandbox` whose methods can be called in any thread.

    Args:
        run: Runs what a function returns in the loop in which the sandbox runs, and returns its result.
        make_client: Makes a client of the API key, the base URL and the options.
        **options: Those of `Sandbox`.
    """

    def __init__(
        self,
        run: Callable[[Callable[[], Coroutine[Any, Any, Any]]], Any],
        make_client: Callable[..., Any],
        **options: Any,
    ) -> None:
        self._run = run
        self._make_client = make_client
        super().__init__(**options)

    @property
    def operations(self) -> Mapping[str, Operation]:
        """The operations by operation id. A copy: what another thread changes cannot be iterated over."""
        operations: dict[str, Operation] = _in_loop(lambda sandbox: dict(Sandbox.operations.__get__(sandbox)))(self)
        return operations

    @property
    def authentications(self) -> list[Authentication]:
        """All users' attempts to authenticate in the last ten minutes, failed ones too, oldest first."""
        attempts: list[Authentication] = _in_loop(Sandbox.authentications.__get__)(self)
        return attempts

    def client(self, **options: Any) -> Any:
        """Return a new client, one that `make_client` makes; the caller must close it."""
        return self._make_client(self.api_key, base_url=self.url, **options)


for _name, _method in (vars(Service) | vars(Sandbox)).items():
    _is_plain = inspect.isfunction(_method) and not inspect.iscoroutinefunction(_method)
    if _is_plain and not _name.startswith("_") and _name != "client":
        setattr(ThreadSafeSandbox, _name, _in_loop(_method))
