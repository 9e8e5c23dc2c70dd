"""The exchanges with Keyless that a delivery is for: its operation is created, or polled once.

What an answer means is decided in `decisions`; how the service fares is told to `aiokeyless._rules.circuit`.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from aiokeyless._rules.backoff import error_delay, is_transient, requested_pause
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
    Decided,
    Pace,
    Redeliver,
    after_conflict,
    after_creation,
    after_failed_creation,
    after_older,
    after_poll,
    is_final,
)
from .logs import log
from .messages import Outcome

if TYPE_CHECKING:
    from tenacity.wait import wait_base

    from aiokeyless._rules.circuit import Circuit
    from aiokeyless.client import KeylessClient

    from .claims import Claims
    from .decisions import Decision
    from .messages import Delivery

#: No operation has this id: that it is missing shows that the key is taken.
_NO_OPERATION: Final = "aiokeyless-worker-checks-its-key"

_REQUEST_TIMEOUT: Final = 408
_LATE_POLLS: Final = 2  # repetitions of a look that the broker is not asked to repeat any more


class Exchanges:
    """The exchanges of one worker.

    Args:
        client: What sends them.
        schedule: When to look.
        circuit: What is told how they went.
        grace: Seconds past the deadline for which a last look that got no answer is repeated.
    """

    def __init__(self, client: KeylessClient, *, schedule: wait_base, circuit: Circuit, grace: float) -> None:
        self._client = client
        self._schedule = schedule
        self._circuit = circuit
        self._grace = grace
        self._failures_in_a_row = 0
        self.claims: Claims  # from the start of the intake on
        self.created: int = 0
        self.polls: int = 0
        self.failures: int = 0  # transient ones

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

    async def process(self, delivery: Delivery) -> Decision:
        """Create the operation, or poll it.

        Raises:
            KeylessError: Something is wrong with this worker, and not with the request.
        """
        if delivery.number > 1 or is_final(delivery, datetime.now(UTC)):
            decision = await self._repeat_late_poll(delivery, await self._poll(delivery))
            # It is missing: an earlier delivery ended before it was created.
            return decision or await self._create(delivery) or self._lagging()
        # Where the id is taken, an earlier delivery of the same request may have done it; the poll will tell.
        return await self._create(delivery) or await self._poll(delivery) or self._lagging()

    async def _repeat_late_poll(self, delivery: Delivery, decision: Decision | None) -> Decision | None:
        """Repeat a last look that came after the grace, as where no worker was there: one error must not decide."""
        for _ in range(_LATE_POLLS):
            if self._circuit.is_probed or not isinstance(decision, Decided) or decision.event.answered is not False:
                break
            await asyncio.sleep(error_delay(1))
            decision = await self._poll(delivery)
        return decision

    def _lagging(self) -> Redeliver:
        """Come again soon: the id is taken and nothing is there, as a replica says that lags behind."""
        return Redeliver(error_delay(1))

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
            self._record_success(sent)
            return await self._meet_older(delivery) if claim is Claim.NEW else None
        except KeylessError as error:
            if claim is Claim.NEW and not _may_have_created(error):
                await self.claims.release(delivery)
            self._record_error(delivery, error, sent, is_probe=True)
            return after_failed_creation(delivery, error, now=datetime.now(UTC), pace=self._pace())
        self._record_success(sent)
        self.created += 1
        return after_creation(delivery, datetime.now(UTC), self._schedule)

    async def _meet_older(self, delivery: Delivery) -> Decision:
        """Decide about an id that this request was the first to hold, and under which there is an operation."""
        await self.claims.release(delivery)
        polled_at = datetime.now(UTC)
        answer = await self._get(delivery, polled_at)
        if isinstance(answer, Operation):
            return after_older(delivery, answer, now=datetime.now(UTC))
        return self._after_poll(delivery, answer, polled_at) or self._lagging()

    async def _poll(self, delivery: Delivery) -> Decision | None:
        """Poll the operation; None where there is none and it is not too late to create it."""
        polled_at = datetime.now(UTC)
        answer = await self._get(delivery, polled_at)
        decision = self._after_poll(delivery, answer, polled_at)
        is_approved = isinstance(decision, Decided) and decision.event.outcome is Outcome.APPROVED
        if is_approved and isinstance(answer, Operation) and not await self.claims.is_held(delivery):
            return after_older(delivery, answer, now=datetime.now(UTC))
        return decision

    def _after_poll(self, delivery: Delivery, answer: Operation | KeylessError, polled_at: datetime) -> Decision | None:
        return after_poll(
            delivery,
            answer,
            polled_at=polled_at,
            now=datetime.now(UTC),
            schedule=self._schedule,
            pace=self._pace(),
            grace=self._grace,
        )

    async def _get(self, delivery: Delivery, polled_at: datetime) -> Operation | KeylessError:
        """Return the operation, or the failure to get it."""
        started_at = self._now()
        self.polls += 1
        try:
            operation = await self._client.get_operation(delivery.ticket.operation_id)
        except KeylessError as error:
            self._record_error(delivery, error, started_at, is_probe=not is_final(delivery, polled_at))
            return error.with_traceback(None)
        self._record_success(started_at)
        return operation

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _record_success(self, started_at: float) -> None:
        self._failures_in_a_row = 0
        self._circuit.record_success(self._now(), started_at=started_at)

    def _record_error(self, delivery: Delivery, error: KeylessError, started_at: float, *, is_probe: bool) -> None:
        """Record what a failure says about the service; raise it where it says something about this worker."""
        if isinstance(error, AuthenticationError | ConfigurationError | ClientClosedError):
            raise error
        if not is_transient(error):
            self._record_success(started_at)
            return
        self._failures_in_a_row += 1
        self.failures += 1
        self._circuit.record_failure(
            self._now(), started_at=started_at, is_probe=is_probe, pause=requested_pause(error)
        )
        log(logging.DEBUG, "keyless.failed", {"operation_id": delivery.ticket.operation_id, "error": str(error)})

    def _pace(self) -> Pace:
        # While the circuit is open it paces the probes, and this request takes its turn.
        failures = 1 if self._circuit.is_probed else max(1, self._failures_in_a_row)
        return Pace(failures, self._circuit.retry_at() - self._now())


def _may_have_created(error: KeylessError) -> bool:
    """Whether a create may have taken effect although it failed."""
    if isinstance(error, TransportError):
        return error.sent
    if isinstance(error, StatusError):
        return isinstance(error, ServerError) or error.status == _REQUEST_TIMEOUT
    return True
