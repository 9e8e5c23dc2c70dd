"""What error reporters show of an exception: the real ones, with the settings with which they show most."""

from __future__ import annotations

import io
import json
import pickle
from typing import TYPE_CHECKING

import sentry_sdk
import structlog
from loguru import logger as loguru
from rich.console import Console
from rich.traceback import Traceback
from sentry_sdk.transport import Transport

if TYPE_CHECKING:
    from collections.abc import Callable

    from sentry_sdk.envelope import Envelope

    Reporter = Callable[[BaseException], str]


def by_loguru(error: BaseException) -> str:
    sink = io.StringIO()
    # Not the frames above the first one of the traceback: they are this file's and pytest's, which know the secrets.
    handler = loguru.add(sink, backtrace=False, diagnose=True)
    loguru.opt(exception=error).error("it failed")
    loguru.remove(handler)
    return sink.getvalue()


# The same text without colours. To find them, rich reads every file of the traceback from its first line.
Traceback.LEXERS = {".py": "text"}


def by_rich(error: BaseException) -> str:
    console = Console(width=400)
    with console.capture() as captured:
        console.print(
            Traceback.from_exception(type(error), error, error.__traceback__, show_locals=True, locals_max_length=99)
        )
    return captured.get()


def by_structlog(error: BaseException) -> str:
    transformer = structlog.tracebacks.ExceptionDictTransformer(show_locals=True, locals_max_string=9999)
    return json.dumps(transformer((type(error), error, error.__traceback__)))


def by_structlog_console(error: BaseException) -> str:
    render = structlog.dev.ConsoleRenderer(
        colors=False, exception_formatter=structlog.dev.RichTracebackFormatter(width=400, locals_max_length=99)
    )
    return render(None, "error", {"event": "it failed", "exc_info": error})


class Recording(Transport):
    """Sentry's way out, which keeps what would be sent."""

    sent = ""

    def capture_envelope(self, envelope: Envelope) -> None:
        self.sent += envelope.serialize().decode()


def by_sentry(error: BaseException) -> str:
    transport = Recording()
    client = sentry_sdk.Client(
        dsn="http://public@127.0.0.1/1", transport=transport, default_integrations=False, max_value_length=99_999
    )
    with sentry_sdk.isolation_scope() as scope:
        scope.set_client(client)
        scope.capture_exception(error)
    client.close()
    return transport.sent


def by_pickle(error: BaseException) -> str:
    return pickle.dumps(error).decode("latin-1")


REPORTERS: dict[str, Reporter] = {
    "loguru": by_loguru,
    "rich": by_rich,
    "structlog": by_structlog,
    "structlog's console": by_structlog_console,
    "sentry": by_sentry,
    "pickle": by_pickle,
}


def reports(error: BaseException) -> dict[str, str]:
    return {name: report(error) for name, report in REPORTERS.items()}
