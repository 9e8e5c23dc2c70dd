"""``aiokeyless inspect``: what waits at a broker, and what nobody reads."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter

from .app import AsJson, CommandError, app
from .render import new_console, print_fact, print_json, print_table
from .worker import NatsOptions, open_broker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from aiokeyless.worker import Inspection
    from aiokeyless.worker.broker import UnreadOutcome

_OLDEST: Final = 10  # unread outcomes that are listed


@app.command(
    help_epilogue="""\
Example, with KEYLESS_BROKER naming the broker, as for a worker:
  aiokeyless inspect"""
)
async def inspect(
    *,
    broker: str | None = None,
    schema: str | None = None,
    as_json: AsJson = False,
    nats: Annotated[NatsOptions | None, Parameter(name="*", group="NATS")] = None,
) -> None:
    """Show what waits at a broker, and which outcomes applications have not handled.

    It needs the rights of a worker, and no API key. It consumes nothing.

    Args:
        broker: The broker: sqlite:FILE, postgresql://..., nats://...; or KEYLESS_BROKER.
        schema: Schema of the database, if the broker is PostgreSQL; if left out, ?schema= of its URL, or keyless.
        nats: Only if the broker is NATS.
    """
    from aiokeyless.worker.broker import UnavailableError  # noqa: PLC0415  # only when used

    opened = open_broker(broker, schema, nats)
    if opened.system == "sqlite":
        _check_exists(opened.destination)
    try:
        async with opened:
            inspection = await opened.inspect()
            oldest = await opened.list_unread(_OLDEST)
    except UnavailableError as error:
        raise CommandError(f"the broker does not answer: {error}") from None
    if as_json:
        print_json(new_console(), _to_json(inspection, oldest))
    else:
        _print(new_console(), inspection, oldest)


def _check_exists(path: str) -> None:
    if not Path(path).is_file():  # to open it would make it
        raise CommandError(f"--broker must name the broker's file, and there is none at {path}")


def _to_json(inspection: Inspection, oldest: Sequence[UnreadOutcome]) -> dict[str, object]:
    return {
        "waiting": inspection.waiting,
        "oldest_age": inspection.oldest_age,
        "unread": {
            reader: {"count": count, "oldest_age": inspection.oldest_unread_age[reader]}
            for reader, count in inspection.unread.items()
        },
        "oldest_unread": [outcome._asdict() for outcome in oldest],
        "problems": inspection.problems,
    }


def _print(console: Console, inspection: Inspection, oldest: Sequence[UnreadOutcome]) -> None:
    for problem in inspection.problems:
        print_fact(console, "Problem", problem, "bold")
    print_fact(console, "Waiting", _describe(inspection.waiting, inspection.oldest_age))
    for reader, count in inspection.unread.items():
        print_fact(console, "Unread", f"{reader}: {_describe(count, inspection.oldest_unread_age[reader])}")
    if oldest:
        console.print()
        rows = [
            {
                "operation": outcome.operation_id,
                "reader": outcome.reader,
                "age": _format_age(outcome.age),
                "failures": str(outcome.failures),
            }
            for outcome in oldest
        ]
        print_table(console, rows)


def _describe(count: int, age: float) -> str:
    return f"{count}, the oldest for {_format_age(age)}" if count else "0"


def _format_age(seconds: float) -> str:
    """Return an age as hours, minutes and seconds: ``1:02:03``, or ``2 days, 1:02:03``."""
    return str(timedelta(seconds=round(seconds)))
