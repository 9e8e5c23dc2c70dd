"""Draws the diagrams of the documentation as SVG files, beside this script: ``python docs/pictures/draw.py``.

They are files and not Mermaid, since GitHub and the built site show the same file, without a script. The background is
white in dark themes too, where text on a transparent one could not be read.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Final, Literal

INK: Final = "#1b1f24"
GREY: Final = "#59636e"
LINE: Final = "#8c959f"
PALE: Final = "#f3f5f7"
BLUE: Final = "#0b57d0"
GREEN: Final = "#1a7f37"
RED: Final = "#c4281c"
FONT: Final = "'Segoe UI', Roboto, Helvetica, Arial, 'Liberation Sans', sans-serif"

Anchor = Literal["start", "middle", "end"]


class Drawing:
    """An SVG file in the making; all numbers are pixels, from the top left corner.

    Args:
        width: Width of the picture.
        height: Height of the picture.
        title: What it shows, for those who do not see it.
    """

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"',
            f' role="img" font-family="{FONT}" font-size="14">',
            f"<title>{escape(title)}</title>",
            *(_arrow_head(colour) for colour in (LINE, GREEN, RED)),
            f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
        ]

    def text(
        self, x: float, y: float, *lines: str, colour: str = INK, anchor: Anchor = "start", bold: bool = False
    ) -> None:
        """Write lines, the first one's baseline at `y`."""
        weight = ' font-weight="600"' if bold else ""
        for number, line in enumerate(lines):
            self._parts.append(
                f'<text x="{x}" y="{y + 18 * number}" fill="{colour}" text-anchor="{anchor}"{weight}>'
                f"{escape(line)}</text>"
            )

    def box(self, x: float, y: float, width: float, height: float, *lines: str, colour: str = LINE) -> None:
        """Draw a box; its first line is bold."""
        self._parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{PALE}" stroke="{colour}"/>'
        )
        top = y + height / 2 + 5 - 9 * (len(lines) - 1)
        for number, line in enumerate(lines):
            self.text(x + width / 2, top + 18 * number, line, anchor="middle", bold=number == 0)

    def band(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        """Draw a shaded span of time."""
        self._parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}"/>')

    def path(self, points: str, colour: str = LINE, *, arrow: bool = True, dashed: bool = False) -> None:
        """Draw a line along an SVG path."""
        head = f' marker-end="url(#head-{colour[1:]})"' if arrow else ""
        dashes = ' stroke-dasharray="4 4"' if dashed else ""
        self._parts.append(f'<path d="{points}" fill="none" stroke="{colour}" stroke-width="1.5"{dashes}{head}/>')

    def dot(self, x: float, y: float, colour: str, *, filled: bool) -> None:
        """Draw a poll."""
        fill = colour if filled else "#ffffff"
        self._parts.append(f'<circle cx="{x}" cy="{y}" r="5" fill="{fill}" stroke="{colour}" stroke-width="2"/>')

    def __str__(self) -> str:
        """Return the text of the file."""
        return "\n".join([*self._parts, "</svg>", ""])


def _arrow_head(colour: str) -> str:
    return (
        f'<marker id="head-{colour[1:]}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="{colour}"/></marker>'
    )


def life_of_a_wait() -> Drawing:
    """Draw the polls of a wait along its time, and below them how it can end."""
    drawing = Drawing(860, 376, "A wait from its first poll to its final poll, and the ways in which it ends")
    axis, start, deadline, end = 130, 40, 640, 756
    drawing.band(300, 84, 150, 92, "#fdecea")
    drawing.band(deadline, 84, end - deadline, 92, "#e8f0fe")
    drawing.path(f"M{start} {axis}H820")
    for x in (44, 96, 122, 152, 186, 224, 266, 470, 516, 568, 624):
        drawing.dot(x, axis, BLUE, filled=False)
    for x in (312, 340, 386, 436):
        drawing.dot(x, axis, RED, filled=True)
    drawing.path(f"M{deadline} 62V176", arrow=False, dashed=True)
    drawing.dot(deadline, axis, BLUE, filled=True)
    drawing.text(start, 34, "Pending: the schedule sets", "the next poll", colour=BLUE)
    drawing.text(375, 34, "Failing: the backoff sets", "the next poll", colour=RED, anchor="middle")
    drawing.text(deadline, 34, "Deadline: the final poll starts here", anchor="middle")
    drawing.text((deadline + end) / 2, 104, "it may take 2 s", colour=GREY, anchor="middle")
    drawing.text(818, axis + 24, "time", colour=GREY, anchor="end")
    drawing.path("M245 178V196H40V178", arrow=False)
    drawing.path("M245 196H600V178", arrow=False)
    drawing.text(320, 216, "an answer to any poll can end it", colour=GREY, anchor="middle")
    drawing.path("M320 224V238", arrow=False)
    drawing.path("M130 256V238H520V256")
    drawing.path("M130 240V256")
    drawing.path("M328 238V256")
    drawing.path("M690 178V256")
    drawing.text(700, 216, "the final poll ends it", colour=GREY)
    drawing.box(30, 258, 180, 96, "approved", "this operation, user,", "payload: returned", colour=GREEN)
    drawing.box(
        224, 258, 208, 96, "about something else", "OperationMismatchError,", "InconsistentOperationError", colour=RED
    )
    drawing.box(446, 258, 150, 96, "400, 401, 403, …", "raised at once", colour=RED)
    drawing.box(620, 258, 210, 96, "pending, or no answer", "ApprovalTimeoutError,", "ApprovalUnknownError")
    return drawing


def machine() -> Drawing:
    """Draw the machine, what is around it, and what goes to and fro."""
    drawing = Drawing(860, 330, "The poller reports to the machine what happens, and asks it what is next")
    drawing.box(30, 130, 130, 62, "client", "awaits the wait")
    drawing.box(290, 50, 180, 222, "poller", "one timer, and", "tasks that", "send polls", colour=BLUE)
    drawing.box(640, 24, 190, 92, "machine: pure", "waits, operations, polls", colour=GREEN)
    drawing.box(640, 140, 190, 62, "dispatcher: pure", "queues and slots", colour=GREEN)
    drawing.box(640, 226, 190, 62, "rules: pure", "what a result means", colour=GREEN)
    drawing.box(30, 226, 130, 62, "transport", "one exchange")
    drawing.path("M160 150H288")
    drawing.text(170, 140, "start, leave")
    drawing.path("M290 174H162", dashed=True)
    drawing.path("M290 250H162")
    drawing.text(190, 240, "poll")
    drawing.path("M160 272H288", dashed=True)
    drawing.path("M470 66H638")
    drawing.text(480, 56, "start, leave, expire,", colour=GREY)
    drawing.text(480, 84, "finish_poll(result)", colour=GREY)
    drawing.path("M638 100H472", dashed=True)
    drawing.text(480, 120, "next_poll, wake_at,", colour=GREY)
    drawing.text(480, 138, "take_cut; outcomes", colour=GREY)
    drawing.path("M735 116V138")
    drawing.path("M832 70H848V257H832")
    drawing.text(
        30,
        318,
        "Solid: calls. Dashed: what they return, and the outcomes that the machine gives to waits.",
        colour=GREY,
    )
    return drawing


LAYERS: Final = (
    (("cli", "pytest_plugin"), "what people run"),
    (("sync",), "the client, without an event loop"),
    (
        ("worker", "sandbox", "signatures", "shutdown", "otel"),
        "engine 2, a test service, signed data, signals, OpenTelemetry",
    ),
    (("client",), "the public methods"),
    (("_waits",), "engine 1: waits in memory"),
    (("_http", "_token"), "exchanges over aiohttp; checks of signatures"),
    (("_rules",), "what a poll means, the budget, the backoff: pure"),
    (("schedule",), "when to poll next"),
    (("_listeners", "_tracing"), "calls listeners; the caller's trace"),
    (("reports",), "what a client reports"),
    (("errors",), "every exception"),
    (("ticket",), "what is stored of an operation"),
    (("_validation",), "checks of arguments and identifiers"),
    (("events",), "what listeners get"),
    (("models",), "what the service sends and takes"),
    (("_base_errors",), "the root of the errors, and those of arguments"),
)


def house() -> Drawing:
    """Draw the layers of the package, the highest one at the top."""
    drawing = Drawing(980, 48 + 44 * len(LAYERS), "The layers of the package; each imports only what is below it")
    for row, (modules, what) in enumerate(LAYERS):
        top = 16 + 44 * row
        width = (476 - 8 * (len(modules) - 1)) / len(modules)
        for column, module in enumerate(modules):
            colour = LINE if module.startswith("_") else BLUE
            drawing.box(44 + column * (width + 8), top, width, 34, module, colour=colour)
        drawing.text(536, top + 22, what, colour=GREY)
    bottom = 16 + 44 * len(LAYERS)
    drawing.path(f"M24 18V{bottom - 12}")
    drawing.text(44, bottom + 12, "Imports go down, never up. Blue: public. Grey: private.", colour=GREY)
    return drawing


def actors() -> Drawing:
    """Draw who takes part, and the boundaries that the threat model numbers."""
    drawing = Drawing(860, 250, "The actors, and the four boundaries between them")
    across = (("user", 30, 80), ("phone", 150, 80), ("Keyless", 270, 100), ("gateway, network", 420, 140))
    for name, x, width in across:
        drawing.box(x, 40, width, 48, name)
    drawing.box(610, 40, 220, 48, "your process", colour=BLUE)
    drawing.box(610, 150, 220, 64, "a broker,", "if there are workers")
    drawing.box(330, 150, 230, 64, "the broker's users:", "workers, askers, readers, others")
    drawing.box(30, 150, 250, 64, "logs, tracebacks,", "stores, error reporters")
    drawing.path("M110 64H148")
    drawing.path("M230 64H268")
    drawing.path("M420 64H372")
    drawing.path("M610 64H562")
    drawing.path("M720 88V148")
    drawing.path("M560 182H608")
    drawing.path("M650 88V118H155V148")
    for x, y, number in ((396, 56, "1"), (586, 56, "2"), (400, 112, "3"), (734, 124, "4")):
        drawing.text(x, y, number, colour=RED, anchor="middle", bold=True)
    return drawing


PICTURES: Final = {
    "actors.svg": actors,
    "house.svg": house,
    "machine.svg": machine,
    "wait.svg": life_of_a_wait,
}


if __name__ == "__main__":
    for name, draw in PICTURES.items():
        Path(__file__).with_name(name).write_text(str(draw()))
