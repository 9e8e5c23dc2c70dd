"""``aiokeyless demo``: compares the library with a loop of one poll a second, on this machine, in three scenes."""

from __future__ import annotations

from decimal import Decimal
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Final

from rich.text import Text

from .app import app
from .render import FRAME, StatusLine, is_terminal, new_console, print_title
from .scenes import (
    APPROVALS,
    INTERVAL,
    OTHER_PAYLOAD,
    OUTAGE,
    PAYLOAD,
    PEOPLE,
    play_mismatch,
    play_outage,
    play_people,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from rich.console import Console

    from .scenes import Draw, Scene, Side

_AIOKEYLESS: Final = "aiokeyless"
_LOOP: Final = "the loop"
_NEXT: Final = {
    "aiokeyless sandbox": "a Keyless service for your own code, with a phone",
    "aiokeyless --help": "what else there is; README.md has the code of a wait",
}


@app.command(help_epilogue="Example:\n  aiokeyless demo")
async def demo() -> None:
    """Compare waits with loops of one poll a second, without a key or a network.

    Both wait at the same time for the same operations of a sandbox on this machine,
    over real HTTP. First all is well, then there is an outage, and at last answers
    are about something else. The loop survives errors. Takes less than 25 seconds.
    """
    console = new_console()
    print_title(
        console,
        "aiokeyless demo",
        f"{PEOPLE} people are asked, and for each of them wait at the same time: aiokeyless, and\n"
        "a loop that polls once a second and survives errors. Real HTTP; the service is a\n"
        "sandbox, the people are simulated, and every number is measured now. Late is the\n"
        "time from the approval, or the end of the outage, until the wait returned.",
    )
    await _show(
        console, f"1. All approve within {APPROVALS[1] + INTERVAL:.0f} s, at random", play_people, describe_people
    )
    failing = f"2. The service answers 503 for {OUTAGE[1] - OUTAGE[0]:.0f} s, and all approve meanwhile"
    await _show(console, failing, play_outage, describe_outage)
    other = f'3. Asked about "{PAYLOAD}", it answers "{OTHER_PAYLOAD}: approved"'
    await _show(console, other, play_mismatch, describe_mismatch)
    console.print(Text("Next", style="bold"))
    for command, purpose in _NEXT.items():
        console.print(Text.assemble(f"  {command:<20}", (purpose, "dim")))


async def _show(
    console: Console,
    title: str,
    play: Callable[[Draw], Awaitable[Scene]],
    describe: Callable[[Scene], list[str]],
) -> None:
    """Play a scene and print the measurements; on a terminal, a line shows the progress meanwhile."""
    console.print(Text(title, style="bold"))
    if is_terminal(console):
        line = StatusLine(console)
        with line.show():
            scene = await play(partial(_draw_progress, line))
    else:
        scene = await play(_draw_nothing)
    for text in describe(scene):
        console.print(Text(f"  {text}"), soft_wrap=True)
    console.print()


def _draw_nothing(_scene: Scene) -> float:
    return FRAME


def _draw_progress(line: StatusLine, scene: Scene) -> float:
    sides = {_AIOKEYLESS: scene.aiokeyless, _LOOP: scene.loop}
    counts = "   ".join(f"{name}: {side.requests()} requests" for name, side in sides.items())
    line.draw(Text.assemble((f"{scene.elapsed:5.1f} s", "bold"), f"   {counts}"))
    return FRAME


def describe_people(scene: Scene) -> list[str]:
    """Return the lines about the first scene."""
    ours, loop = scene.aiokeyless, scene.loop
    return [
        *_format_table(
            scene, {"requests": _format_requests, "late on average": _format_mean, "late at worst": _format_worst}
        ),
        _compare("Sooner on average", _format_mean(ours), _format_mean(loop)),
        _compare("Fewer requests", _format_requests(ours), _format_requests(loop)),
        "For slow people and those who never approve, see docs/explanation/schedule.md.",
    ]


def describe_outage(scene: Scene) -> list[str]:
    """Return the lines about the second scene."""
    ours, loop = scene.aiokeyless, scene.loop
    return [
        *_format_table(
            scene,
            {"requests during it": lambda side: str(side.requests_in_outage), "last one late by": _format_worst},
        ),
        _compare("Fewer requests during it", str(ours.requests_in_outage), str(loop.requests_in_outage)),
        _compare("Back sooner", _format_worst(ours), _format_worst(loop)),
    ]


def describe_mismatch(scene: Scene) -> list[str]:
    """Return the lines about the third scene."""
    return _format_table(
        scene, {"pay": lambda side: str(len(side.approved_at)), "refuse": lambda side: str(side.refused)}
    )


def _format_requests(side: Side) -> str:
    return str(side.requests())


def _format_mean(side: Side) -> str:
    return f"{fmean(side.lateness):.2f} s"


def _format_worst(side: Side) -> str:
    return f"{max(side.lateness):.2f} s"


def _format_table(scene: Scene, columns: dict[str, Callable[[Side], str]]) -> list[str]:
    """Return a line of headings and a line for each side."""
    sides = {_AIOKEYLESS: scene.aiokeyless, _LOOP: scene.loop}
    rows = {"": [*columns]} | {name: [cell(side) for cell in columns.values()] for name, side in sides.items()}
    return ["".join([f"{name:<12}", *(f"{cell:>18}" for cell in cells)]) for name, cells in rows.items()]


def _compare(what: str, ours: str, loop: str) -> str:
    """Return which side has the smaller number, and by how much: the difference of the numbers as they are printed."""
    difference = Decimal(loop.removesuffix(" s")) - Decimal(ours.removesuffix(" s"))
    who = "both" if not difference else _AIOKEYLESS if difference > 0 else _LOOP
    return f"{what}: {who}, by {abs(difference)}{' s' if ours.endswith(' s') else ''}"
