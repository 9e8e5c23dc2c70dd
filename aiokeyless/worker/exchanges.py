"""The exchanges with Keyless that a delivery is for: its operation is created, or polled once.

What an answer means is decided in `decisions`; how the service fares is told to `aiokeyless._rules.circuit`.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from aiokeyless._http.protocol import is_transient
from aiokeyless._rules.backoff import error_delay
from aiokeyless.errors import (
    AuthenticationError,
    ClientClosedError,
    ConfigurationError,
    ConflictError,
    KeylessError,
    NotFoundError,
    ServerError,
    StatusError,
    TransportError,
)
from aiokeyless.models import Operation

from .claims import Claim
from .decisions import (
    Again,
    Decided,
    Pace,
    after_answer,
    after_conflict,
    after_creation,
    after_failed_creation,
    after_failed_look,
    after_missing,
    after_older,
    is_last,
)
from .logs import log
from .messages import Outcome

if TYPE_CHECKING:
    from tenacity.wait import wait_base

    from aiokeyless._rules.circuit import Health
    from aiokeyless.client import KeylessClient

    from .claims import Claims
    from .decisions import Decision
    from .messages import Delivery

#: No operation has this id: that it is missing shows that the key is taken.
_NO_OPERATION: Final = "aiokeyless-worker-looks-whether-its-key-works"

_REQUEST_TIMEOUT: Final = 408
_LATE_LOOKS: Final = 2  # repetitions of a look that the broker is not asked to repeat any more


class Exchanges:
    """The exchanges of one worker.

    Args:
        client: What sends them.
        schedule: When to look.
        health: What is told how they went.
        grace: Seconds past the deadline for which a last look that got no answer is repeated.
    """

    def __init__(self, client: KeylessClient, *, schedule: wait_base, health: Health, grace: float) -> None:
        self._client = client
        self._schedule = schedule
        self._health = health
        self._grace = grace
        self._failures_in_a_row = 0
        self.claims: Claims  # from the start of the intake on
        self.created = 0
        self.looks = 0
        self.failures = 0  # transient ones

    async def check_key(self) -> None:
        """Look whether the key works; that Keyless does not answer says nothing about it.

        Raises:
            KeylessError: It does not, or what answers makes no sense.
        """
        try:
            await self._client.get_operation(_NO_OPERATION)
        except NotFoundError:
            pass
        except KeylessError as error:
            if not is_transient(error):
                raise
            log(logging.WARNING, "keyless.unreachable", {"error": str(error)})  # it may come back while requests wait

    async def attend(self, delivery: Delivery) -> Decision:
        """Create the operation, or poll it.

        Raises:
            KeylessError: Something is wrong with this worker, and not with the request.
        """
        if delivery.number > 1 or is_last(delivery, datetime.now(UTC)):
            decision = await self._look_again_if_late(delivery, await self._look(delivery))
            # It is missing: an earlier delivery ended before it was created.
            return decision or await self._create(delivery) or self._lagging()
        # Where the id is taken, an earlier delivery of the same request may have done it; the poll will tell.
        return await self._create(delivery) or await self._look(delivery) or self._lagging()

    async def _look_again_if_late(self, delivery: Delivery, decision: Decision | None) -> Decision | None:
        """Repeat a last look that came after the grace, as where no worker was there: one error must not decide."""
        for _ in range(_LATE_LOOKS):
            if self._health.is_down or not isinstance(decision, Decided) or decision.event.answered is not False:
                break
            await asyncio.sleep(error_delay(1))
            decision = await self._look(delivery)
        return decision

    def _lagging(self) -> Again:
        """Come again soon: the id is taken and nothing is there, as a replica says that lags behind."""
        return Again(error_delay(1))

    async def _create(self, delivery: Delivery) -> Decision | None:
        """Create the operation; None where an earlier delivery of this request may have created it."""
        claim = await self.claims.take(delivery)
        if claim is Claim.ANOTHERS:
            return after_conflict(delivery, now=datetime.now(UTC))
        ticket, sent = delivery.ticket, self._now()
        try:
            await self._client.create_operation(
                ticket.user_id,
                operation_id=ticket.operation_id,
                operation_payload=delivery.payload,
                external_user_id=ticket.external_user_id,
            )
        except ConflictError:
            self._went_well(sent)
            return await self._meet_older(delivery) if claim is Claim.NEW else None
        except KeylessError as error:
            if claim is Claim.NEW and not _may_have_created(error):
                await self.claims.release(delivery)
            pace = self._went_wrong(delivery, error, sent)
            return after_failed_creation(delivery, error, now=datetime.now(UTC), pace=pace)
        self._went_well(sent)
        self.created += 1
        return after_creation(delivery, datetime.now(UTC), self._schedule)

    async def _meet_older(self, delivery: Delivery) -> Decision:
        """Decide about an id that this request was the first to hold, and under which there is an operation."""
        await self.claims.release(delivery)
        answer = await self._get(delivery, datetime.now(UTC))
        if isinstance(answer, Operation):
            return after_older(delivery, answer, now=datetime.now(UTC))
        return answer or self._lagging()

    async def _look(self, delivery: Delivery) -> Decision | None:
        """Poll the operation; None where there is none and it is not too late to create it."""
        sent_at = datetime.now(UTC)
        answer = await self._get(delivery, sent_at)
        if not isinstance(answer, Operation):
            return answer
        now = datetime.now(UTC)
        decision = after_answer(delivery, answer, sent_at=sent_at, now=now, schedule=self._schedule)
        is_approved = isinstance(decision, Decided) and decision.event.outcome is Outcome.APPROVED
        if is_approved and not await self.claims.is_held(delivery):
            return after_older(delivery, answer, now=now)
        return decision

    async def _get(self, delivery: Delivery, sent_at: datetime) -> Operation | Decision | None:
        """Return the operation, or what its absence or a failure to get it comes to."""
        sent = self._now()
        self.looks += 1
        try:
            operation = await self._client.get_operation(delivery.ticket.operation_id)
        except NotFoundError:
            self._went_well(sent)
            return after_missing(delivery, sent_at=sent_at, now=datetime.now(UTC))
        except KeylessError as error:
            pace = self._went_wrong(delivery, error, sent)
            now = datetime.now(UTC)
            return after_failed_look(delivery, error, sent_at=sent_at, now=now, pace=pace, grace=self._grace)
        self._went_well(sent)
        return operation

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _went_well(self, sent: float) -> None:
        self._failures_in_a_row = 0
        self._health.good(self._now(), sent_at=sent)

    def _went_wrong(self, delivery: Delivery, error: KeylessError, sent: float) -> Pace:
        """Tell the health of a failure, and return the pace at which to go on."""
        if isinstance(error, AuthenticationError | ConfigurationError | ClientClosedError):
            raise error
        now = self._now()
        if is_transient(error):
            self._failures_in_a_row += 1
            self.failures += 1
            hold = error.retry_after if isinstance(error, StatusError) and error.status in {429, 503} else None
            self._health.bad(now, sent_at=sent, is_probe=True, hold=hold)
            log(logging.DEBUG, "keyless.failed", {"operation_id": delivery.ticket.operation_id, "error": str(error)})
        else:
            self._went_well(sent)
        # While the service is down, its health paces the probes, and this request takes its turn.
        failures = 1 if self._health.is_down else self._failures_in_a_row
        return Pace(failures, self._health.opens_at() - now)


def _may_have_created(error: KeylessError) -> bool:
    """Whether a create may have taken effect although it failed."""
    if isinstance(error, TransportError):
        return error.sent
    if isinstance(error, StatusError):
        return isinstance(error, ServerError) or error.status == _REQUEST_TIMEOUT
    return True
