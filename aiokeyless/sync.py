"""`KeylessClient`, `submit_approval` and `next_outcome` for code without an event loop: Flask, Django, Celery, scripts.

They have the arguments, results and errors of `aiokeyless.KeylessClient` and of `aiokeyless.worker`. Each process has
one event loop, in one daemon thread, for all of its clients and brokers. A call runs there while its caller waits. This
module decides no rule of a wait.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import inspect
import os
import selectors
import sys
import threading
import time
import warnings
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractAsyncContextManager
from queue import Empty, SimpleQueue
from types import GenericAlias, TracebackType
from typing import (
    Any,
    Concatenate,
    Final,
    NoReturn,
    ParamSpec,
    Protocol,
    Self,
    TypeAlias,
    TypeVar,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

from tenacity.wait import wait_base

from ._validation import check_handler
from .client import KeylessClient as AsyncKeylessClient
from .client import for_another_process
from .errors import ClientClosedError, ConfigurationError
from .events import Listener
from .models import Region, Secret
from .reports import ApprovalUpdate, ClientStatistics
from .ticket import ApprovalTicket
from .worker import ApprovalEvent, Broker, Submission, applications
from .worker.broker import ApplicationSide
from .worker.brokers import broker_for, hide_url

__all__ = ["KeylessClient", "OnCreated", "OnPoll", "next_outcome", "submit_approval"]

OnPoll: TypeAlias = Callable[[ApprovalUpdate], object]
"""Called for each poll of a wait, in the thread that waits: a plain function."""
OnCreated: TypeAlias = Callable[[ApprovalTicket], object]
"""Called with the ticket of a new operation, in the thread that asks: a plain function."""
_Runner: TypeAlias = Callable[[Callable[[], Coroutine[Any, Any, Any]]], Any]
_Errands: TypeAlias = SimpleQueue[Callable[[], object]]
P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

#: The most seconds that a fork, or the end of the process, waits for the loop's thread. A listener may block it.
_PATIENCE: Final = 1.0
#: Seconds within which a signal such as that of Ctrl-C interrupts a call, if it does not do so at once.
_SIGNAL_WITHIN: Final = 0.5
#: What this module's documentation says instead of that of the other face.
_WORDS: Final = {
    "aclose()": "close()",
    "in this task; may be async": "in this thread; must not be async",
    "A broker, or a driver's connection that a broker can use.": (
        "A session or connection of SQLAlchemy, psycopg, psycopg2 or Django to the PostgreSQL that has the broker. Or "
        "a broker that is not open, or its URL: it is opened on first use, and stays open."
    ),
}


class _Background:
    """The event loop of this process, in a daemon thread, and the clients that belong to it."""

    #: Bound here, where freezegun does not find it: in a loop whose clock stands still, each wait is for ever.
    _clock = staticmethod(time.monotonic)

    def __init__(self) -> None:
        self.ended: bool = False  # also in a forked child, in which its thread does not exist
        self._loop = asyncio.new_event_loop()
        self._loop.time = self._clock  # type: ignore[method-assign]  # the one place that makes this loop
        # The clients that are not closed, and the calls and iterations that are not over. A forked child never releases
        # them, nor the frame of `_serve`. If it collected a client, that would remove the parent's sockets from the
        # epoll that the two processes share.
        self._clients: set[AsyncKeylessClient] = set()
        self._calls: set[asyncio.Task[Any]] = set()
        self._iterations: set[AsyncGenerator[Any, None]] = set()
        self._brokers: dict[Broker | Secret, Broker] = {}  # open brokers, by the caller's argument
        self._opening = asyncio.Lock()
        self._thread = threading.Thread(target=self._serve, name="aiokeyless", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def pause(self, end: threading.Event) -> None:
        """Stop the thread until this event is set. Between two steps of the loop, it has no lock."""
        if threading.current_thread() is self._thread:
            return
        paused = threading.Event()

        def stop() -> None:
            paused.set()
            end.wait()

        self._loop.call_soon_threadsafe(stop)
        paused.wait(_PATIENCE)

    def adopt(self, client: AsyncKeylessClient) -> None:
        """Close this client at the end of the process, unless it is closed before."""
        self._clients.add(client)

    def call(self, method: Callable[[], Coroutine[Any, Any, T]], errands: _Errands | None = None) -> T:
        """Run a coroutine in the loop, and return its result. If the caller is interrupted, cancel it.

        It is the result of a function. If the caller is interrupted before the loop calls that, there is no coroutine.
        Meanwhile this thread runs the errands that the coroutine puts into the queue. If one raises, the call ends so.
        """
        errands = errands or SimpleQueue()
        # Made here: with asyncio.run_coroutine_threadsafe, an interruption could come before the future exists.
        future: Future[T] = Future()
        future.add_done_callback(lambda _: errands.put(lambda: None))  # which wakes this thread
        try:
            self._loop.call_soon_threadsafe(self._begin, method, future)
            while not future.done():
                self.check_alive()  # a handler may have forked
                try:  # in pieces: a signal that comes just before this thread sleeps, or to another, does not wake it
                    errand = errands.get(timeout=_SIGNAL_WITHIN)
                except Empty:
                    continue
                errand()
            return future.result()
        except BaseException:  # such as KeyboardInterrupt; if the coroutine raised, the future is done
            future.cancel()
            raise
        finally:
            del future  # otherwise the error and this frame would reference each other

    def _begin(self, method: Callable[[], Coroutine[Any, Any, T]], future: Future[T]) -> None:
        task = self._loop.create_task(_call_in_loop(method))
        self._calls.add(task)

        def cancel(done: Future[T]) -> None:
            if done.cancelled() and not self.ended:
                self._loop.call_soon_threadsafe(task.cancel)

        task.add_done_callback(self._calls.discard)
        task.add_done_callback(lambda _: _settle(future, task))
        future.add_done_callback(cancel)

    async def run_errand(self, errands: _Errands, function: Any, argument: object) -> None:
        """Have the thread that waits for this coroutine call a function."""
        done = asyncio.Event()
        errands.put(functools.partial(function, argument))
        errands.put(functools.partial(self._loop.call_soon_threadsafe, done.set))
        await done.wait()

    def check_alive(self) -> None:
        """Refuse to go on with a call or an iteration if the loop has no thread: in a forked child, or at the end."""
        if not self._thread.is_alive():
            raise ClientClosedError("the wait belongs to a process that was forked, or is ending: start it anew")

    def start(self, method: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Run a coroutine in the loop without waiting, since the garbage collector may call this in any thread."""
        if not self.ended:
            asyncio.run_coroutine_threadsafe(method(), self._loop)

    @contextlib.contextmanager
    def holding(self, context: AbstractAsyncContextManager[T]) -> Generator[T, None, None]:
        """Enter an asynchronous context manager in the loop, and leave it there, in one task."""
        entered: Future[T] = Future()
        left: Future[None] = Future()

        async def hold() -> None:
            async with context as value:
                entered.set_result(value)
                await asyncio.shield(asyncio.wrap_future(left))  # which is left even if the context cancels this task

        held = asyncio.run_coroutine_threadsafe(hold(), self._loop)
        either: set[Future[Any]] = {entered, held}
        wait(either, return_when=FIRST_COMPLETED)
        if not entered.done():
            held.result()  # raises why
        try:
            yield entered.result()
        finally:
            left.set_result(None)
            held.result()

    @contextlib.contextmanager
    def lending(self, broker: Broker) -> Generator[None, None, None]:
        """Let calls use a broker that is open in the loop already."""
        self._brokers[broker] = broker
        try:
            yield
        finally:
            del self._brokers[broker]

    @contextlib.contextmanager
    def iterating(self, values: AsyncGenerator[Any, None]) -> Generator[None, None, None]:
        """Keep an asynchronous generator, so that the garbage collector does not take it with its iterator."""
        self._iterations.add(values)
        try:
            yield
        finally:
            if not self.ended:
                self._iterations.discard(values)

    async def close(self, client: AsyncKeylessClient) -> None:
        """Close a client of this loop."""
        try:
            await client.aclose()
        finally:
            self._clients.discard(client)

    async def open_broker(self, target: Broker | Secret) -> Broker:
        """Open a broker, or the broker of a URL, and return it. It stays open for later calls."""
        async with self._opening:
            if target not in self._brokers:
                broker = cast("Broker", broker_for(target))  # as it is for a broker or a URL
                await broker.open()
                self._brokers[target] = broker
            return self._brokers[target]

    async def _close_all(self) -> None:
        await asyncio.gather(*(client.aclose() for client in list(self._clients)))
        # A file is not closed: at the end of the process its thread takes no more work, and SQLite needs none.
        await asyncio.gather(*(broker.aclose() for broker in self._brokers.values()), return_exceptions=True)
        await self._loop.shutdown_asyncgens()  # of iterators that were neither exhausted nor left

    def end(self) -> None:
        """Close the clients and brokers, within a second, and end the thread."""
        self.ended = True
        closing = asyncio.run_coroutine_threadsafe(self._close_all(), self._loop)
        with contextlib.suppress(TimeoutError):  # a listener blocks the loop: the process ends nevertheless
            closing.result(_PATIENCE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_PATIENCE)


class _Process:
    """The state of this process: its background loop, made on first use."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # reentrant: a signal's handler may use a client while one is being opened
        self._background: _Background | None = None
        self._inherited: list[_Background] = []  # kept for ever: see `_Background._clients`
        self._fork_is_over = threading.Event()

    def background(self) -> _Background:
        """Return the loop; the caller has the lock."""
        if self._background is None:
            # Its threads would be tasks of the caller's own thread; and in a real one, its selectors end at once.
            if (threading.get_ident.__module__, selectors.DefaultSelector.__module__) != ("_thread", "selectors"):
                raise ConfigurationError(
                    "gevent or eventlet has replaced threads or selectors, which this client needs: "
                    "run real ones, such as gunicorn's worker class gthread or Celery's pool threads"
                )
            self._background = _Background()
        if self._background.ended:
            raise ClientClosedError("the process is ending: its clients are closed")
        return self._background

    def before_fork(self) -> None:
        """Pause the loop. Otherwise a lock of its thread, such as that of an import, would stay locked in the child."""
        self.lock.acquire()
        self._fork_is_over = threading.Event()
        if self._background is not None and not self._background.ended:
            self._background.pause(self._fork_is_over)

    def after_fork_in_parent(self) -> None:
        """Resume the loop."""
        self._fork_is_over.set()
        self.lock.release()

    def after_fork_in_child(self) -> None:
        """Start anew in a child, which does not have the thread of the loop."""
        self.lock = threading.RLock()
        if self._background is not None:
            self._background.ended = True
            self._inherited.append(self._background)
            self._background = None

    def end(self) -> None:
        """End the loop, if there is one."""
        if self._background is not None:
            self._background.end()


_process: Final = _Process()
atexit.register(_process.end)
if hasattr(os, "register_at_fork"):  # pragma: no branch  # Windows has no fork
    os.register_at_fork(
        before=_process.before_fork,
        after_in_parent=_process.after_fork_in_parent,
        after_in_child=_process.after_fork_in_child,
    )


def get_background() -> _Background:
    """Return the loop of this process, for the fixtures of tests."""
    with _process.lock:
        return _process.background()


class _Method(Protocol[P, T_co]):
    """A method, for type checkers: not each of them binds a `Callable` that is in a class."""

    @overload
    def __get__(self, client: None, owner: object, /) -> Callable[Concatenate[KeylessClient, P], T_co]: ...
    @overload
    def __get__(self, client: KeylessClient, owner: object, /) -> Callable[P, T_co]: ...


def _call(method: Callable[Concatenate[AsyncKeylessClient, P], Coroutine[Any, Any, T]]) -> _Method[P, T]:
    """Return a method of the other face as one that runs in the loop while its caller waits.

    The functions that it is given as ``on_...`` run in the caller's thread.
    """

    @_described_by(method)
    def call(self: KeylessClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        background, client = self._open()
        errands: _Errands = SimpleQueue()
        for name, handler in kwargs.items():
            if name.startswith("on_") and handler is not None:
                check_handler(handler, name, is_plain=True)
                kwargs[name] = functools.partial(background.run_errand, errands, handler)
        return background.call(lambda: method(client, *args, **kwargs), errands)

    return cast("_Method[P, T]", call)


def _iteration(
    method: Callable[Concatenate[AsyncKeylessClient, P], AsyncGenerator[T, None]],
) -> _Method[P, Generator[T, None, None]]:
    """Return a method of the other face, one that makes an asynchronous generator, as one that makes a plain one."""

    @_described_by(method)
    def iteration(self: KeylessClient, /, *args: P.args, **kwargs: P.kwargs) -> Generator[T, None, None]:
        background, client = self._open()
        return _iterate(background, method(client, *args, **kwargs))

    return cast("_Method[P, Generator[T, None, None]]", iteration)


def _described_by(theirs: Callable[P, object]) -> Callable[[Callable[..., T]], Callable[P, T]]:
    """Return a decorator that gives a function the name, signature and documentation of that of the other face.

    It gets no ``__wrapped__``: a framework that finds a coroutine function there awaits the result of this one.
    """

    def describe(ours: Callable[..., T]) -> Callable[P, T]:
        names = vars(sys.modules[theirs.__module__]) | globals()  # `OnPoll` and `OnCreated` are those of this face
        signature = inspect.signature(theirs, globals=names, eval_str=True)
        result = signature.return_annotation
        if get_origin(result) is AsyncGenerator:
            result = GenericAlias(Generator, (get_args(result)[0], None, None))
        vars(ours)["__signature__"] = signature.replace(return_annotation=result)
        ours.__name__, ours.__qualname__ = theirs.__name__, theirs.__qualname__
        ours.__annotations__ = get_type_hints(theirs, names) | {"return": result}
        ours.__doc__ = _documentation(theirs)
        return ours

    return describe


def _documentation(theirs: Callable[..., object]) -> str:
    documentation = (inspect.getdoc(theirs) or "").partition("\n\nExample:")[0]  # none with python -OO
    for words, ours in _WORDS.items():
        documentation = documentation.replace(words, ours)
    return documentation


class KeylessClient:
    """A client for the Keyless Operations API, for code without an event loop.

    One client is enough for a process, and its threads can share it: its waits share polls, the limits on polling and
    the learned schedule. It can be created before a server forks its workers. Close it with ``with`` or `close`; after
    that, each call raises `ClientClosedError`. A client that lives as long as the process may stay open.

    A call that is interrupted, such as by Ctrl-C, ends at once. In a thread that runs an event loop each call raises
    `ConfigurationError`, as it would stop that loop: use `aiokeyless.KeylessClient` there.

    Args:
        api_key: The API key, or a plain function that returns it, for keys that rotate. It is called for each HTTP
            exchange, so it must be quick. If it raises or returns no key, the call or the wait ends with
            `ConfigurationError`. Default: ``$KEYLESS_API_KEY``.
        region: Region of the tenant: ``eu``, ``us``, ``latam`` or ``sg``. Default: ``$KEYLESS_REGION``, else ``eu``.
        base_url: Base URL of the API, instead of a region's: https, or http to a loopback host. It cannot be combined
            with `region`. Default: ``$KEYLESS_BASE_URL``, which is ignored if `region` is given.
        trust_env: Whether requests use the http proxy that ``$HTTPS_PROXY``, or else ``$ALL_PROXY``, names. Hosts in
            ``$NO_PROXY`` and loopback hosts are reached directly. Default: False.
        request_timeout: Seconds for one HTTP exchange, from connecting to the last byte. Default: 10.
        max_attempts: Attempts of one call on transient failures; 1 means no retry. If many calls fail, only some are
            retried, and the errors of the others say so. Default: 3.
        max_in_flight: Polls of all waits together that have been in flight for less than a second. Slower polls and
            final polls have room of their own. By default, all need 768 connections at most. Default: 256.
        max_polls_per_second: Polls that start in a second, of all waits together; None for as many as fit. If more are
            due, the one due longest goes first; ``statistics.lag`` shows how late polls are. Final polls count, but do
            not wait for it. If the service refuses polls with 429, the rate is halved, and recovers within about a
            minute. Default: 1000.
        schedule: When waits poll: a `wait_adaptive` or any other tenacity wait strategy. Default: a `wait_adaptive`
            that only this client uses.
        listeners: Functions that are called with each `Event` while it happens, in the thread of the event loop. A slow
            one delays polls and waits. If one raises, that is logged. Default: none.
        name: Tells this client's log lines, events, spans and metrics from those of others, such as one a tenant:
            1 to 64 printable characters. Clients of one name share their metrics. Default: none.

    Raises:
        ConfigurationError: An argument is wrong; the message names it and states the valid values.

    Example:
        >>> with KeylessClient() as client:
        ...     operation = client.request_approval("0123456789ABCDEF", operation_payload="Log in?")
    """

    # On the class, since __del__ and __repr__ read them even if __init__ raised.
    _base_url = ""
    _name: str | None = None
    _background: _Background | None = None
    _closed = False

    def __init__(
        self,
        api_key: str | Callable[[], str] | None = None,
        *,
        region: Region | str | None = None,
        base_url: str | None = None,
        trust_env: bool = False,
        request_timeout: float = 10.0,
        max_attempts: int = 3,
        max_in_flight: int = 256,
        max_polls_per_second: float | None = 1000.0,
        schedule: wait_base | None = None,
        listeners: Iterable[Listener] = (),
        name: str | None = None,
    ) -> None:
        reveal = _hide(api_key)
        del api_key  # before anything is raised: error reporters print local variables
        self._client = AsyncKeylessClient(
            reveal(),
            region=region,
            base_url=base_url,
            trust_env=trust_env,
            request_timeout=request_timeout,
            max_attempts=max_attempts,
            max_in_flight=max_in_flight,
            max_polls_per_second=max_polls_per_second,
            schedule=schedule,
            listeners=listeners,
            name=name,
        )
        self._base_url, self._name = self._client.base_url, name

    def __reduce__(self) -> NoReturn:
        raise TypeError("a KeylessClient cannot be pickled or copied: create one where it is used")

    def __repr__(self) -> str:
        name = f"name={self._name!r} " if self._name is not None else ""
        return f"<sync.KeylessClient {name}base_url={self._base_url!r}{' closed' if self._closed else ''}>"

    @property
    def name(self) -> str | None:
        """What tells it from other clients; None if it has no name."""
        return self._name

    @property
    def base_url(self) -> str:
        """Base URL of the API."""
        return self._base_url

    @property
    def request_timeout(self) -> float:
        """Seconds for one HTTP exchange."""
        return self._client.request_timeout

    @property
    def listeners(self) -> tuple[Listener, ...]:
        """All listeners for its events: its own, and those of instrumentations."""
        return self._client.listeners

    # -- opening and closing

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the client; closing it again has no effect.

        Every call and every wait under way, in any thread, ends with `ClientClosedError`. In a forked child,
        it closes nothing of the parent's.
        """
        background = self._background
        if background is None or background.ended:
            self._closed = True
            return
        _refuse_event_loop()
        self._closed = True
        background.call(lambda: background.close(self._client))

    def __del__(self) -> None:
        background = self._background
        if self._closed or background is None or background.ended:
            return
        warnings.warn(f"unclosed {self!r}: use 'with' or close()", ResourceWarning, source=self, stacklevel=2)
        client = self._client
        background.start(lambda: background.close(client))

    def _open(self) -> tuple[_Background, AsyncKeylessClient]:
        """Return the loop of this process, and the client that belongs to it."""
        if self._closed:
            raise ClientClosedError("the client is closed; create a new one, or close it later")
        _refuse_event_loop()
        with _process.lock:
            background = _process.background()
            if self._background is not background:
                if self._background is not None:  # that of the process from which this one was forked
                    self._client = for_another_process(self._client)
                background.adopt(self._client)
                self._background = background
            return background, self._client

    # -- what is the same on both faces
    # Final: a checker of a library's types infers no others.

    get_pending_operations: Final = _call(AsyncKeylessClient.get_pending_operations)
    get_operation: Final = _call(AsyncKeylessClient.get_operation)
    get_authentications: Final = _call(AsyncKeylessClient.get_authentications)
    create_operation: Final = _call(AsyncKeylessClient.create_operation)
    create_external_user: Final = _call(AsyncKeylessClient.create_external_user)
    update_external_user: Final = _call(AsyncKeylessClient.update_external_user)
    find_users: Final = _call(AsyncKeylessClient.find_users)
    get_user: Final = _call(AsyncKeylessClient.get_user)
    delete_external_user: Final = _call(AsyncKeylessClient.delete_external_user)
    delete_user: Final = _call(AsyncKeylessClient.delete_user)
    get_devices: Final = _call(AsyncKeylessClient.get_devices)
    delete_device: Final = _call(AsyncKeylessClient.delete_device)
    get_key_set: Final = _call(AsyncKeylessClient.get_key_set)
    wait_for_approval: Final = _call(AsyncKeylessClient.wait_for_approval)
    request_approval: Final = _call(AsyncKeylessClient.request_approval)
    hold_for_approval: Final = _call(AsyncKeylessClient.hold_for_approval)
    watch_approval: Final = _iteration(AsyncKeylessClient.watch_approval)
    wait_for_approvals: Final = _iteration(AsyncKeylessClient.wait_for_approvals)

    @property
    def statistics(self) -> ClientStatistics:
        """The client's current waits, and its counts since it was created."""
        background, client = self._background, self._client
        if background is None or background.ended:
            return client.statistics
        _refuse_event_loop()
        return background.call(lambda: _statistics(client))


@_described_by(applications.submit_approval)
def submit_approval(broker: object, *args: Any, **kwargs: Any) -> Submission:
    """Ask for an approval; when this returns, the request is stored and a worker will process it."""
    broker = hide_url(broker)
    side, finish = _application_side(broker)
    submission: Submission = finish(lambda: applications.submit_approval(side, *args, **kwargs))
    return submission


@_described_by(applications.next_outcome)
@contextlib.contextmanager
def next_outcome(broker: object, reader: str) -> Generator[ApprovalEvent, None, None]:
    """Wait for the next outcome that this reader has not handled."""
    broker = hide_url(broker)
    side, finish = _application_side(broker)
    outcome = applications.next_outcome(side, reader)
    event: ApprovalEvent = finish(outcome.__aenter__)
    try:
        yield event
    except BaseException as error:
        finish(functools.partial(outcome.__aexit__, type(error), error, error.__traceback__))
        raise
    finish(functools.partial(outcome.__aexit__, None, None, None))


def _application_side(broker: object) -> tuple[ApplicationSide, _Runner]:
    """Return the applications' side of a broker, and the function that runs its coroutines to their end."""
    from .worker.postgres import PostgresConnection  # noqa: PLC0415  # only where a broker is used

    _refuse_event_loop()
    if isinstance(broker, Broker | Secret):
        with _process.lock:
            background = _process.background()
        return background.call(lambda: background.open_broker(broker)), background.call
    if isinstance(side := broker_for(broker), PostgresConnection):
        return side, _finish
    raise ConfigurationError(
        f"broker must be a connection to PostgreSQL, a closed broker, or a broker's URL, not {type(broker).__name__}",
        argument="broker",
    )


def _finish(method: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine that awaits nothing, in this thread: on a connection whose driver blocks."""
    coroutine = method()
    while True:  # the first step is the last one
        try:
            coroutine.send(None)
        except StopIteration as returned:
            return cast("T", returned.value)


def _settle(future: Future[T], task: asyncio.Task[T]) -> None:
    """Give the result of a task to the thread that waits for it, unless that was interrupted."""
    error = asyncio.CancelledError() if task.cancelled() else task.exception()
    if not future.set_running_or_notify_cancel():
        return
    if error is None:
        future.set_result(task.result())
    else:
        future.set_exception(error)


async def _call_in_loop(method: Callable[[], Coroutine[Any, Any, T]]) -> T:
    return await method()


def _hide(value: T) -> Callable[[], T]:
    """Return a function that returns the value, which no repr shows."""
    return lambda: value


async def _statistics(client: AsyncKeylessClient) -> ClientStatistics:
    """Return the statistics, read in the loop, which changes them."""
    return client.statistics


async def _next(values: AsyncGenerator[T, None]) -> tuple[T] | None:
    """Return the next value in a tuple; None at the end, since a coroutine must not raise `StopIteration`."""
    async for value in values:
        return (value,)
    return None


def _iterate(background: _Background, values: AsyncGenerator[T, None]) -> Generator[T, None, None]:
    """Iterate over an asynchronous generator of the loop."""
    with background.iterating(values):
        try:
            while True:
                _refuse_event_loop()
                background.check_alive()
                found = background.call(lambda: _next(values))
                if found is None:
                    return
                yield found[0]
        except BaseException:
            # Left early, or interrupted. This must not wait: the garbage collector may do it in the loop's thread.
            background.start(values.aclose)
            raise


def _refuse_event_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise ConfigurationError(
        "this thread runs an event loop, which a call would stop: use aiokeyless.KeylessClient and await its methods"
    )
