"""The scenes of the demo: the library and a plain loop wait for the same approval, side by side.

Both poll one operation of one sandbox over real HTTP, and what becomes of them is measured, never computed. A scene
tells its events to a `Stage` as they happen; nothing is printed here.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Final

import aiohttp
import msgspec

from aiokeyless.errors import OperationMismatchError

from .messages import counted

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine, Iterator

    from aiokeyless.client import KeylessClient
    from aiokeyless.reports import ApprovalUpdate
    from aiokeyless.sandbox import Sandbox
    from aiokeyless.ticket import ApprovalTicket

#: What the library is called, beside "the loop".
AIOKEYLESS: Final = "aiokeyless"
#: Seconds between two polls of the plain loop.
INTERVAL: Final = 1.0
#: Seconds after which the simulated user approves: in the middle between two polls of the loop, as approvals are on
#: average.
DEFAULT_AFTER: Final = 3.5

_USER: Final = "C0FFEE"
_PAYLOAD: Final = "Pay 40 to Alice"
_OTHER_PAYLOAD: Final = "Pay 4000 to Mallory"
#: Seconds that a wait lasts beyond the last event of its scene: more than is ever left between two polls.
_MARGIN: Final = 60.0
#: Seconds that a person has to find the phone and approve, and seconds between two checks whether they did.
_TIME_FOR_A_PERSON: Final = 600.0
_CHECK_INTERVAL: Final = 0.02
# The scripts, in seconds since the creation. The outage is longer than the loop's interval, so that the loop meets it.
_OUTAGE_AFTER: Final = 1.5
_APPROVED_IN_OUTAGE_AFTER: Final = 3.0
_RECOVERED_AFTER: Final = 4.5
_OTHER_ANSWER_AFTER: Final = 1.5


class Stage:
    """Where the scenes are shown. This base class shows nothing."""

    frame: float | None = None
    """Seconds between two calls of `draw`; None: it need not be called again."""

    @contextmanager
    def scene(self, title: str) -> Iterator[None]:  # noqa: ARG002  # for those that show it
        """Show a scene while it lasts."""
        yield

    def invite(self, url: str) -> None:
        """Show a person where to approve."""

    def tell(self, seconds: float, who: str, does: str) -> None:
        """Show what happened, so many seconds after the operation was created."""

    def draw(self, scene: Scene) -> None:
        """Show how far the two waits are."""


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How one of the two waits ended.

    Attributes:
        outcome: ``"approved"``: it took the operation for approved; ``"refused"``: it refused an answer; ``"failed"``:
            an error of the service ended it.
        error: The type of the error; None for an approval.
        after: Seconds from the operation's creation to this end.
        polls: Polls that it made.
        failed_polls: Polls that got an error of the service for an answer.
    """

    outcome: str
    error: str | None
    after: float
    polls: int
    failed_polls: int


class SceneResult(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured in a scene. Times are seconds since the operation's creation, by the loop's clock.

    Attributes:
        operation_id: The operation that both waited for.
        approved_after: When the user approved; None: they did not.
        outage_after: When the service began to fail; None: it did not.
        recovered_after: When it answered again.
        aiokeyless: How the library's wait ended.
        loop: How the plain loop ended.
    """

    operation_id: str
    approved_after: float | None
    outage_after: float | None
    recovered_after: float | None
    aiokeyless: Ending
    loop: Ending


class Waiter:
    """One of the two that wait: what it did so far, and how it ended."""

    def __init__(self, name: str) -> None:
        self.name: str = name
        self.polls: int = 0
        self.failed_polls: int = 0
        self.outcome: str | None = None  # one of `Ending`; None while it waits
        self.error: Exception | None = None
        self.after: float = 0.0

    def ending(self) -> Ending:
        """Return how it ended."""
        assert self.outcome is not None  # noqa: S101  # Scene.play returns when both have ended
        return Ending(
            outcome=self.outcome,
            error=None if self.error is None else type(self.error).__name__,
            after=round(self.after, 3),
            polls=self.polls,
            failed_polls=self.failed_polls,
        )


class Scene:
    """The wait of both for one operation, and what happens meanwhile.

    Args:
        sandbox: The service.
        client: A client for it.
        ticket: The operation, which was created just now.
        stage: Where the scene is shown.
    """

    def __init__(self, sandbox: Sandbox, client: KeylessClient, ticket: ApprovalTicket, stage: Stage) -> None:
        self.aiokeyless: Waiter = Waiter(AIOKEYLESS)
        self.loop: Waiter = Waiter("the loop")
        self._approved_after: float | None = None
        self._outage_after: float | None = None
        self._recovered_after: float | None = None
        self._sandbox = sandbox
        self._client = client
        self._ticket = ticket
        self._stage = stage
        self._now = asyncio.get_running_loop().time
        self._created_at = self._now()

    @property
    def elapsed(self) -> float:
        """Seconds since the operation was created."""
        return self._now() - self._created_at

    async def play(self, script: Coroutine[None, None, None]) -> SceneResult:
        """Follow the script while both wait, and return what was measured once both have ended."""
        waits = {asyncio.create_task(self._wait()), asyncio.create_task(self._poll_every_second())}
        everything = {asyncio.create_task(script), *waits}
        under_way = everything
        try:
            while not waits.isdisjoint(under_way):
                self._stage.draw(self)
                ended, under_way = await asyncio.wait(
                    under_way, timeout=self._stage.frame, return_when=asyncio.FIRST_COMPLETED
                )
                for task in ended:
                    task.result()
        finally:
            for task in everything:
                task.cancel()
            await asyncio.gather(*everything, return_exceptions=True)
        return SceneResult(
            operation_id=self._ticket.operation_id,
            approved_after=_rounded(self._approved_after),
            outage_after=_rounded(self._outage_after),
            recovered_after=_rounded(self._recovered_after),
            aiokeyless=self.aiokeyless.ending(),
            loop=self.loop.ending(),
        )

    # -- what a script lets happen

    async def until(self, seconds: float) -> None:
        """Sleep until so many seconds after the creation."""
        await asyncio.sleep(seconds - self.elapsed)

    def approve(self) -> None:
        """Approve, as the user does on the phone."""
        self._sandbox.approve(self._ticket.operation_id)
        self._note_approval()

    async def follow_phone(self) -> None:
        """Wait until a person has approved on the sandbox's phone."""
        self._stage.invite(f"{self._sandbox.url}/")
        while not self._is_approved:  # noqa: ASYNC110  # the sandbox has no event for it
            await asyncio.sleep(_CHECK_INTERVAL)
        self._note_approval()

    def fail(self) -> None:
        """Let the service fail from now on."""
        self._sandbox.fail_next(status=503, times=None)
        self._outage_after = self.elapsed
        self._tell("the service", "answers 503 to everything")

    def recover(self) -> None:
        """Let the service answer again."""
        self._sandbox.recover()
        self._recovered_after = self.elapsed
        self._tell("the service", "answers again")

    def answer_about_another(self) -> None:
        """Let the service answer with the approval of another payment."""
        self._sandbox.tamper(self._ticket.operation_id, operation_payload=_OTHER_PAYLOAD, state="approved", result=True)
        self._tell("the service", f'answers with an approval of "{_OTHER_PAYLOAD}"')

    @property
    def _is_approved(self) -> bool:
        return self._sandbox.operations[self._ticket.operation_id].is_approved

    def _note_approval(self) -> None:
        if self._approved_after is None:
            self._approved_after = self.elapsed
            self._tell("the user", "approves")

    def _tell(self, who: str, does: str) -> None:
        self._stage.tell(self.elapsed, who, does)

    # -- the two waits

    async def _wait(self) -> None:
        """Wait as the library does."""
        waiter = self.aiokeyless

        def on_poll(update: ApprovalUpdate) -> None:
            waiter.polls = update.polls
            waiter.failed_polls += update.error is not None

        try:
            await self._client.wait_for_approval(self._ticket, on_poll=on_poll)
        except OperationMismatchError as error:
            waiter.polls = error.polls
            self._end(waiter, "refused", error)
        else:
            self._end(waiter, "approved")

    async def _poll_every_second(self) -> None:
        """Wait as one does by hand: GET, raise for a status, compare the state, sleep."""
        headers = {"X-Api-Key": self._sandbox.api_key}
        try:
            async with aiohttp.ClientSession(self._sandbox.url, headers=headers, raise_for_status=True) as http:
                while await self._state(http) != "approved":  # noqa: ASYNC110  # the loop that people write
                    await asyncio.sleep(INTERVAL)
        except aiohttp.ClientResponseError as error:
            self.loop.failed_polls += 1
            self._end(self.loop, "failed", error)
        else:
            self._end(self.loop, "approved")

    async def _state(self, http: aiohttp.ClientSession) -> object:
        self.loop.polls += 1
        async with http.get(f"/v2/operations/{self._ticket.operation_id}") as answer:
            return (await answer.json())["state"]

    def _end(self, waiter: Waiter, outcome: str, error: Exception | None = None) -> None:
        if self._is_approved:  # a wait may notice a person's approval before the next check of the phone
            self._note_approval()
        waiter.outcome, waiter.error, waiter.after = outcome, error, self.elapsed
        self._tell(waiter.name, self._describe_end(waiter))

    def _describe_end(self, waiter: Waiter) -> str:
        polls = counted(waiter.polls, "poll")
        if waiter.outcome == "refused":
            return f"refuses: {type(waiter.error).__name__}, {polls}"
        if isinstance(waiter.error, aiohttp.ClientResponseError):
            return f"ends with an error: {waiter.error.status} {waiter.error.message}, {polls}"
        if self._approved_after is None:
            return f"returns it as the approval, {polls}"
        if self._recovered_after is None:
            return f"returns {waiter.after - self._approved_after:.2f} s after the approval, {polls}"
        return f"returns {waiter.after - self._recovered_after:.2f} s after that, {polls}, {waiter.failed_polls} failed"


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


@asynccontextmanager
async def _scene(title: str, stage: Stage, last_event_after: float) -> AsyncGenerator[Scene]:
    """Start a sandbox with an operation; closing it tells the page of its phone that the scene is over."""
    from aiokeyless.sandbox import Sandbox  # noqa: PLC0415  # a server: only the commands that serve should load it

    lifetime = last_event_after + _MARGIN
    with stage.scene(title):
        async with Sandbox() as sandbox, sandbox.client() as client:
            ticket = await client.create_operation(_USER, operation_payload=_PAYLOAD, expires_in=lifetime)
            yield Scene(sandbox, client, ticket, stage)


async def play_approval(after: float, stage: Stage) -> SceneResult:
    """Play a simple wait: the simulated user approves after so many seconds."""
    async with _scene(f"The user approves after {after:g} s", stage, after) as scene:

        async def script() -> None:
            await scene.until(after)
            scene.approve()

        return await scene.play(script())


async def play_phone(stage: Stage) -> SceneResult:
    """Play the same wait with a person, who approves on the sandbox's phone.

    Raises:
        ApprovalTimeoutError: They did not, for ten minutes.
    """
    async with _scene("You approve", stage, _TIME_FOR_A_PERSON - _MARGIN) as scene:
        return await scene.play(scene.follow_phone())


async def play_outage(stage: Stage) -> SceneResult:
    """Play an outage, during which the user approves."""
    async with _scene("The service fails, and the user approves meanwhile", stage, _RECOVERED_AFTER) as scene:

        async def script() -> None:
            await scene.until(_OUTAGE_AFTER)
            scene.fail()
            await scene.until(_APPROVED_IN_OUTAGE_AFTER)
            scene.approve()
            await scene.until(_RECOVERED_AFTER)
            scene.recover()

        return await scene.play(script())


async def play_mismatch(stage: Stage) -> SceneResult:
    """Play a service, or a proxy in front of it, that answers about something else."""
    async with _scene(
        f'Asked about "{_PAYLOAD}", the service answers about another payment', stage, _OTHER_ANSWER_AFTER
    ) as scene:

        async def script() -> None:
            await scene.until(_OTHER_ANSWER_AFTER)
            scene.answer_about_another()

        return await scene.play(script())
