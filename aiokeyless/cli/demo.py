"""``aiokeyless demo``: an approval on this machine, by a simulated user or by a click, and the cost of the wait."""

from __future__ import annotations

import asyncio
import math
import sys
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from cyclopts import Parameter

from .app import AsJson, Exit, app
from .messages import counted
from .render import (
    Display,
    Progress,
    display_for,
    follow,
    new_console,
    print_command,
    print_fact,
    print_json,
    print_title,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from aiokeyless.models import Operation
    from aiokeyless.sandbox import Sandbox

_USER: Final = "C0FFEE"
_PAYLOAD: Final = "Approve wire transfer of $500 to account 1234"
_LONGEST_AFTER: Final = 3600.0
_DEFAULT_AFTER: Final = 7.5
#: Seconds that the wait lasts beyond the approval: more than the default schedule leaves between two polls.
_MARGIN: Final = 60.0
#: Seconds that a person has to find the phone and approve, and seconds between two checks whether they did.
_TIME_FOR_A_PERSON: Final = 600.0
_CHECK_INTERVAL: Final = 0.02
#: Seconds between two polls of the fixed loop that the demo is compared with.
_FIXED_INTERVAL: Final = 1.0


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
    """Wait for a simulated user, without a key or a network.

    Starts a sandbox on this machine, creates an operation over real HTTP, waits
    until it is approved, and prints how many requests that took and how late the
    approval was noticed.

    Args:
        after: Seconds until the simulated user approves, 0 to 3600; 7.5 if left out.
        phone: Do not simulate a user: open the phone in your browser, and approve there.
        as_json: Print one JSON object at the end, and nothing else.
    """
    console = new_console()
    approve_after = None if phone else _DEFAULT_AFTER if after is None else after
    if as_json:
        print_json(console, (await run_demo(approve_after, _PhoneOnStderr())).to_dict())
        return Exit.DONE
    user = "the user is you" if phone else "the user is simulated"
    print_title(console, "aiokeyless demo", f"The real client, real HTTP; the service is a sandbox, {user}.")
    _print_summary(console, await run_demo(approve_after, display_for(console)))
    return Exit.DONE


class _PhoneOnStderr(Display):
    """Shows only the phone's address, on stderr: stdout is for the result."""

    def begin(self, facts: Mapping[str, str]) -> None:
        if "Phone" in facts:
            sys.stderr.write(f"aiokeyless: open {facts['Phone']} and approve\n")


class DemoResult(msgspec.Struct, frozen=True, kw_only=True):
    """What the demo measured. Times are seconds by the loop's clock.

    Attributes:
        operation: The approved operation, as the client returned it.
        requests: Requests that the sandbox received.
        polls: How many of them were polls.
        approved_after: From the operation's creation to its approval.
        lateness: From the approval until it was noticed.
    """

    operation: Operation
    requests: int
    polls: int
    approved_after: float
    lateness: float

    @property
    def fixed_polls(self) -> int:
        """Polls of a loop that polls 0, 1, 2, ... seconds after the creation."""
        return math.ceil(self.approved_after / _FIXED_INTERVAL) + 1

    @property
    def fixed_requests(self) -> int:
        """Requests of that loop: its polls, and the creation."""
        return self.requests - self.polls + self.fixed_polls

    @property
    def fixed_lateness(self) -> float:
        """Seconds from the approval until the next poll of that loop."""
        return (self.fixed_polls - 1) * _FIXED_INTERVAL - self.approved_after

    def to_dict(self) -> dict[str, object]:
        """Return plain data, for ``--json``."""
        return {
            "operation_id": self.operation.operation_id,
            "operation_payload": self.operation.operation_payload,
            "user_id": self.operation.user_id,
            "auth_type": self.operation.auth_type,
            "approved_after": round(self.approved_after, 3),
            "lateness": round(self.lateness, 3),
            "requests": self.requests,
            "polls": self.polls,
            "fixed_loop": {
                "interval": _FIXED_INTERVAL,
                "lateness": round(self.fixed_lateness, 3),
                "requests": self.fixed_requests,
                "polls": self.fixed_polls,
            },
        }


async def run_demo(after: float | None, display: Display) -> DemoResult:
    """Run the demo and return what it measured.

    Args:
        after: Seconds until the simulated user approves; None: a person approves on the sandbox's phone.
        display: Shows the wait while it lasts.
    """
    from aiokeyless.sandbox import Sandbox  # noqa: PLC0415  # a server: only the commands that serve should load it

    async with Sandbox() as sandbox, sandbox.client() as client:
        budget = _TIME_FOR_A_PERSON if after is None else after + _MARGIN
        ticket = await client.create_operation(_USER, operation_payload=_PAYLOAD, expires_in=budget)
        progress = Progress(budget if after is None else None)
        facts = {"Operation": ticket.operation_id, "Payload": _PAYLOAD}
        if after is None:
            display.begin({**facts, "Phone": f"{sandbox.url}/"})
            user = _follow_phone(sandbox, ticket.operation_id, progress)
        else:
            display.begin({**facts, "User": f"simulated, approves after {after:g} s"})
            user = _simulate_user(sandbox, ticket.operation_id, progress, after)
        approving = asyncio.create_task(user)
        try:
            operation, noticed_after = await follow(client, ticket, progress, display)
        finally:
            approving.cancel()
        # The wait may notice a person's approval before the next check of the phone does.
        approved_after = noticed_after if progress.approved_after is None else progress.approved_after
        return DemoResult(
            operation=operation,
            requests=sum(request.path.startswith("/v2/") for request in sandbox.requests),
            polls=client.statistics.polls,
            approved_after=approved_after,
            lateness=noticed_after - approved_after,
        )


async def _simulate_user(sandbox: Sandbox, operation_id: str, progress: Progress, after: float) -> None:
    await asyncio.sleep(after)
    sandbox.approve(operation_id)
    progress.approve()


async def _follow_phone(sandbox: Sandbox, operation_id: str, progress: Progress) -> None:
    while not sandbox.operations[operation_id].is_approved:  # noqa: ASYNC110  # the sandbox has no event for it
        await asyncio.sleep(_CHECK_INTERVAL)
    progress.approve()


def _print_summary(console: Console, result: DemoResult) -> None:
    requests = f"{result.requests}: {result.requests - result.polls} to create it, {counted(result.polls, 'poll')}"
    print_fact(console, "Approved", f"{result.approved_after:.2f} s after it was created")
    print_fact(console, "Noticed", f"{result.lateness:.2f} s after the approval", "bold green")
    print_fact(console, "Requests", requests, "bold green")
    console.print()
    console.print(f"  A fixed loop of one poll a second would have made about {result.fixed_requests} requests")
    console.print(f"  and noticed about {result.fixed_lateness:.2f} s after the approval.")
    console.print()
    console.print("  To choose how many seconds of lateness one request is worth:")
    print_command(console, "KeylessClient(schedule=wait_adaptive(poll_cost=...))")
    console.print()
