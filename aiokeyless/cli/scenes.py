"""The scenes of the demo: the library and a loop of one poll a second wait for the same approvals.

Both poll the same operations of one sandbox over real HTTP. Every number is measured. Nothing here prints.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final, TypeAlias

import aiohttp

from aiokeyless.errors import OperationMismatchError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from aiokeyless.client import KeylessClient
    from aiokeyless.sandbox import Sandbox
    from aiokeyless.ticket import ApprovalTicket

PEOPLE: Final = 30
#: Seconds between two polls of the loop.
INTERVAL: Final = 1.0
#: When people approve in the first scene: from, until, in seconds after everybody was asked (which takes a second).
APPROVALS: Final = (1.0, 9.0)
#: When the service fails in the second scene: from, until, likewise.
OUTAGE: Final = (0.2, 8.2)
PAYLOAD: Final = "Pay 40 to Alice"
OTHER_PAYLOAD: Final = "Pay 4000 to Mallory"

_OTHER_ANSWERS_AT: Final = 0.2

#: Shows the progress of a scene, and returns the seconds until it is to be called again.
Draw: TypeAlias = "Callable[[Scene], float]"
#: An event of a scene: seconds after everybody was asked, and what happens then.
Step: TypeAlias = "tuple[float, Callable[[], None]]"


class Side:
    """The waits of one side, and what they did so far.

    Args:
        requests: Returns the number of their polls.
        due: When each approval could be noticed: the end of the outage, if the service was failing at the approval.
    """

    def __init__(self, requests: Callable[[], int], due: dict[str, float]) -> None:
        self.requests: Callable[[], int] = requests
        self._due = due
        self.approved_at: dict[str, float] = {}
        self.refused: int = 0
        self.requests_before_outage: int = 0
        self.requests_in_outage: int = 0

    @property
    def lateness(self) -> list[float]:
        """Seconds until each wait returned; empty if nobody approved."""
        return [self.approved_at[operation_id] - at for operation_id, at in self._due.items()]


class Scene:
    """Thirty operations, and for each one a wait of the library and a loop.

    Args:
        sandbox: The service.
        client: A client for it.
        http: The session of the loops.
    """

    def __init__(self, sandbox: Sandbox, client: KeylessClient, http: aiohttp.ClientSession) -> None:
        self._sandbox = sandbox
        self._client = client
        self._http = http
        self._polls_of_loop = 0
        self._due: dict[str, float] = {}
        self.aiokeyless: Side = Side(lambda: client.statistics.polls, self._due)
        self.loop: Side = Side(lambda: self._polls_of_loop, self._due)
        self._now = asyncio.get_running_loop().time
        self._began_at = self._now()

    @property
    def elapsed(self) -> float:
        """Seconds since the scene began."""
        return self._now() - self._began_at

    async def play(self, draw: Draw, approvals: tuple[float, float] | None, *script: Step) -> Scene:
        """Let people approve while both sides wait, and return the scene once all waits have ended.

        Args:
            draw: Shows the progress of the scene.
            approvals: From when until when people approve at random, in seconds after everybody was asked; None: nobody
                approves.
            script: Further events.
        """
        async with asyncio.TaskGroup() as group:
            drawing = group.create_task(self._draw(draw))
            waits: list[asyncio.Task[None]] = []
            # Spread over one interval, so that the loops do not all poll at once.
            for _ in range(PEOPLE):
                await asyncio.sleep(INTERVAL / PEOPLE)
                ticket = await self._client.create_operation("C0FFEE", operation_payload=PAYLOAD)
                waits += group.create_task(self._wait(ticket)), group.create_task(self._poll_every_second(ticket))
                if approvals is not None:
                    script += ((random.uniform(*approvals), self._make_approval(ticket)),)  # noqa: S311
            for at, action in script:
                group.create_task(self._act_after(at, action))
            await asyncio.wait(waits)
            drawing.cancel()
        return self

    async def _draw(self, draw: Draw) -> None:
        while True:  # noqa: ASYNC110  # an animation
            await asyncio.sleep(draw(self))

    async def _act_after(self, seconds: float, action: Callable[[], None]) -> None:
        await asyncio.sleep(seconds)
        action()

    # -- events

    def _make_approval(self, ticket: ApprovalTicket) -> Callable[[], None]:
        def approve() -> None:
            self._sandbox.approve(ticket.operation_id)
            self._due[ticket.operation_id] = self.elapsed

        return approve

    def fail(self) -> None:
        """Let the service fail from now on."""
        self._sandbox.fail_next(status=503, times=None)
        for side in (self.aiokeyless, self.loop):
            side.requests_before_outage = side.requests()

    def recover(self) -> None:
        """Let the service answer again: the approvals so far can be noticed from now on."""
        self._sandbox.recover()
        for side in (self.aiokeyless, self.loop):
            side.requests_in_outage = side.requests() - side.requests_before_outage
        self._due.update(dict.fromkeys(self._due, self.elapsed))

    def answer_about_another(self) -> None:
        """Let the service answer with the approval of another payment."""
        for operation_id in self._sandbox.operations:
            self._sandbox.tamper(operation_id, operation_payload=OTHER_PAYLOAD, state="approved", result=True)

    # -- the two sides

    async def _wait(self, ticket: ApprovalTicket) -> None:
        """Wait as the library does."""
        try:
            await self._client.wait_for_approval(ticket)
        except OperationMismatchError:
            self.aiokeyless.refused += 1
        else:
            self.aiokeyless.approved_at[ticket.operation_id] = self.elapsed

    async def _poll_every_second(self, ticket: ApprovalTicket) -> None:
        """Wait as hand-written loops do: GET, compare the state, ignore an error, sleep."""
        while await self._get_state(ticket) != "approved":  # noqa: ASYNC110  # the loop that people write
            await asyncio.sleep(INTERVAL)
        self.loop.approved_at[ticket.operation_id] = self.elapsed

    async def _get_state(self, ticket: ApprovalTicket) -> object:
        self._polls_of_loop += 1
        with suppress(aiohttp.ClientError):
            async with self._http.get(f"/v2/operations/{ticket.operation_id}") as answer:
                return (await answer.json())["state"]
        return None


@asynccontextmanager
async def _open_scene() -> AsyncGenerator[Scene]:
    from aiokeyless.sandbox import Sandbox  # noqa: PLC0415  # a server: only the commands that serve should load it

    async with Sandbox() as sandbox, sandbox.client() as client:
        headers = {"X-Api-Key": sandbox.api_key}
        async with aiohttp.ClientSession(sandbox.url, headers=headers, raise_for_status=True) as http:
            yield Scene(sandbox, client, http)


async def play_people(draw: Draw) -> Scene:
    """Play a service that works."""
    async with _open_scene() as scene:
        return await scene.play(draw, APPROVALS)


async def play_outage(draw: Draw) -> Scene:
    """Play an outage, during which everybody approves."""
    async with _open_scene() as scene:
        return await scene.play(draw, OUTAGE, (OUTAGE[0], scene.fail), (OUTAGE[1], scene.recover))


async def play_mismatch(draw: Draw) -> Scene:
    """Play a service, or a proxy in front of it, that answers about another payment. Nobody approves."""
    async with _open_scene() as scene:
        return await scene.play(draw, None, (_OTHER_ANSWERS_AT, scene.answer_about_another))
