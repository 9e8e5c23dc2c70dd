"""A sandbox that can be driven from any thread: what is called runs in its loop, while the caller waits."""

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


class ThreadSafeSandbox(Sandbox):
    """A `Sandbox` that can be used in any thread, also in one that runs an event loop.

    Args:
        make_client: Makes a client of the API key, the base URL and the options.
        **options: Those of `Sandbox`.
    """

    def __init__(self, make_client: Callable[..., Any], **options: Any) -> None:
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

    def _loop_elsewhere(self) -> asyncio.AbstractEventLoop | None:
        """Return the loop of the sandbox; None if the caller is in it, as before the start."""
        return None if asyncio._get_running_loop() is self._loop else self._loop  # noqa: SLF001  # it raises nothing


def _in_loop(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that runs in the loop of the sandbox while its caller waits."""

    @wraps(method)
    def call(self: ThreadSafeSandbox, *args: Any, **kwargs: Any) -> Any:
        async def run() -> Any:
            return method(self, *args, **kwargs)

        if (loop := self._loop_elsewhere()) is None:
            return method(self, *args, **kwargs)
        return asyncio.run_coroutine_threadsafe(run(), loop).result()

    return call


def _awaited_in_loop(method: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., Coroutine[Any, Any, None]]:
    """Return an async method that runs in the loop of the sandbox, whichever loop awaits it."""

    @wraps(method)
    async def call(self: ThreadSafeSandbox) -> None:
        if (loop := self._loop_elsewhere()) is None:
            await method(self)
        else:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(method(self), loop))

    return call


for _name, _method in (vars(Service) | vars(Sandbox)).items():
    if inspect.isfunction(_method) and not _name.startswith("_") and _name != "client":
        _wrap = _awaited_in_loop if inspect.iscoroutinefunction(_method) else _in_loop
        setattr(ThreadSafeSandbox, _name, _wrap(_method))
