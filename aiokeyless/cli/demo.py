"""``aiokeyless demo``: the library and a plain loop side by side, on this machine, in three scenes."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from cyclopts import Parameter
from rich.text import Text

from .app import AsJson, Exit, app
from .messages import counted
from .render import FRAME, StatusLine, is_terminal, new_console, print_fact, print_json, print_title
from .scenes import (
    AIOKEYLESS,
    DEFAULT_AFTER,
    INTERVAL,
    SceneResult,
    Stage,
    play_approval,
    play_mismatch,
    play_outage,
    play_phone,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from .scenes import Scene, Waiter

_LONGEST_AFTER: Final = 3600.0


def _check_after(_type: object, after: float | None) -> None:
    if after is not None and not 0 <= after <= _LONGEST_AFTER:  # NaN is not
        raise ValueError(f"Must be from 0 to {_LONGEST_AFTER:.0f} seconds.")


def _check_user(*, after: float | None = None, phone: bool = False, **_others: object) -> None:
    if phone and after is not None:
        raise ValueError("With --phone you approve yourself, and --after has no meaning; leave one of them out.")


@app.command(validator=_check_user, help_epilogue="Example:\n  aiokeyless demo --after 3\n  aiokeyless demo --phone")
async def demo(
    *,
    after: Annotated[float | None, Parameter(validator=_check_after)] = None,
    phone: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    as_json: AsJson = False,
) -> int:
    """Compare a wait with a loop of one poll a second, without a key or a network.

    Both wait at the same time for the same operation of a sandbox on this machine,
    over real HTTP: while nothing goes wrong, during an outage, and where the answer
    is about something else. Takes about 15 seconds.

    Args:
        after: Seconds until the simulated user approves in the first scene, 0 to 3600; 3.5 if left out.
        phone: Be the user of the first scene: open the phone in your browser, and approve there.
        as_json: Print one JSON object at the end, and nothing else.
    """
    console = new_console()
    approve_after = None if phone else DEFAULT_AFTER if after is None else after
    if as_json:
        print_json(console, (await run_demo(approve_after, _PhoneOnStderr())).to_dict())
        return Exit.DONE
    user = "the user is you" if phone else "the user is simulated"
    print_title(
        console,
        "aiokeyless demo",
        f"The real client over real HTTP; the service is a sandbox, {user}.\n"
        "At the same time, for the same operation, a plain loop runs: GET, raise for an\n"
        "error, compare the state, sleep one second.",
    )
    await run_demo(approve_after, _LiveTranscript(console) if is_terminal(console) else _Transcript(console))
    _print_next(console, phone=phone)
    return Exit.DONE


class DemoResult(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured in the three scenes."""

    approval: SceneResult
    outage: SceneResult
    mismatch: SceneResult

    def to_dict(self) -> dict[str, object]:
        """Return plain data, for ``--json``."""
        return {"loop_interval": INTERVAL, **msgspec.to_builtins(self)}


async def run_demo(after: float | None, stage: Stage) -> DemoResult:
    """Play the three scenes, and return what was measured.

    Args:
        after: Seconds until the simulated user approves in the first scene; None: a person does on the sandbox's phone.
        stage: Where the scenes are shown.
    """
    return DemoResult(
        approval=await (play_phone(stage) if after is None else play_approval(after, stage)),
        outage=await play_outage(stage),
        mismatch=await play_mismatch(stage),
    )


class _PhoneOnStderr(Stage):
    """Shows only the phone's address, on stderr: stdout is for the result."""

    def invite(self, url: str) -> None:
        sys.stderr.write(f"aiokeyless: open {url} and approve\n")


class _Transcript(Stage):
    """A line for each event, which stays."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._scenes = 0

    @contextmanager
    def scene(self, title: str) -> Iterator[None]:
        self._scenes += 1
        self._console.print(Text(f"{self._scenes}. {title}", style="bold"))
        yield
        self._console.print()

    def invite(self, url: str) -> None:
        print_fact(self._console, "Phone", url, "bold")

    def tell(self, seconds: float, who: str, does: str) -> None:
        style = "bold green" if who == AIOKEYLESS else ""
        line = Text.assemble((f"  {seconds:7.2f} s  ", "dim"), (f"{who:<11}  {does}", style))
        self._console.print(line, soft_wrap=True)


class _LiveTranscript(_Transcript):
    """The same, above a line that is redrawn while both wait."""

    frame = FRAME

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._line = StatusLine(console)

    @contextmanager
    def scene(self, title: str) -> Iterator[None]:
        with super().scene(title), self._line.shown():
            yield

    def draw(self, scene: Scene) -> None:
        self._line.draw(
            Text.assemble(
                (f"{scene.elapsed:7.1f} s", "bold"), f"  {_progress(scene.aiokeyless)}   {_progress(scene.loop)}"
            )
        )


def _progress(waiter: Waiter) -> str:
    return f"{waiter.name}: {counted(waiter.polls, 'poll')}{'' if waiter.outcome is None else ', ended'}"


def _print_next(console: Console, *, phone: bool) -> None:
    commands = {
        "aiokeyless demo --phone": "be the user: approve in your browser",
        "aiokeyless sandbox": "a Keyless service for your own code, with a phone",
        "aiokeyless --help": "what else there is; README.md has the code of a wait",
    }
    if phone:
        del commands["aiokeyless demo --phone"]
    console.print(Text("Next", style="bold"))
    for command, purpose in commands.items():
        console.print(Text.assemble(f"  {command:<25}", (purpose, "dim")))
