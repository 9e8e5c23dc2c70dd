"""The exchanges of a delivery with Keyless: they create the operation, or poll it once.

`decisions` decides what an answer means; `aiokeyless._rules.budget` records how the exchanges went.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import TYPE_CHECKING, Final

from aiokeyless._http.creation import OperationCreation
from aiokeyless._http.protocol import get_operation
from aiokeyless._rules.ambiguity import may_have_taken_effect
from aiokeyless._rules.backoff import error_delay, failures_that_count, requested_pause
from aiokeyless._rules.outcome import is_failure, is_logged, is_service_well
from aiokeyless.errors import (
    AlreadyApprovedError,
    AuthenticationError,
    CachedAnswerError,
    ClientClosedError,
    ConfigurationError,
    ConflictError,
    KeylessError,
    NotFoundError,
    RateLimitError,
)
from aiokeyless.models import NewOperation, Operation

from .broker import Claim, ExchangeResult
from .decisions import (
    OTHER_OPERATION,
    OTHER_REQUEST,
    Decided,
    Next,
    Pacing,
    Redeliver,
    after_conflict,
    after_creation,
    after_failed_creation,
    after_poll,
    after_unclaimed,
    fail,
    find_unannounced,
    is_final,
    is_older,
)
from .logs import RateLimitedLog, log
from .messages import FailureReason, Outcome

if TYPE_CHECKING:
    from datetime import datetime

    from tenacity.wait import wait_base

    from aiokeyless._http.transport import Transport
    from aiokeyless._rules.budget import Budget
    from aiokeyless._rules.rate import PollRate

    from .broker import Broker
    from .decisions import Decision
    from .grace import Grace
    from .messages import Delivery
    from .monitoring import WorkerReporter

#: No operation has this id. If Keyless reports it missing, it has accepted the key.
_NO_OPERATION: Final = "aiokeyless-worker-checks-its-key"

#: Seconds of a delivery in which a create that failed is repeated.
CREATES_FOR: Final = 5.0
#: Repetitions of a final poll that comes too late for the broker to repeat it.
_LATE_REPEATS: Final = 2


async def check_key(transport: Transport, who: dict[str, str]) -> None:
    """Raise what Keyless says against the key. If Keyless does not answer, the check passes; `who` begins its line."""
    try:
        await transport.fetch(get_operation(_NO_OPERATION))
    except NotFoundError:
        pass
    except KeylessError as error:
        if not error.is_transient:
            raise
        # It may come back while requests wait.
        log(logging.WARNING, "keyless.unreachable", {**who, "error": str(error)})


class DeliveryProcessor:
    """Processes the deliveries of one worker. It sends each request once, because the broker repeats failed ones."""

    def __init__(
        self,
        transport: Transport,
        broker: Broker,
        *,
        schedule: wait_base,
        budget: Budget,
        rate: PollRate,
        grace: Grace,
        reporter: WorkerReporter,
    ) -> None:
        self._transport = transport
        self._broker = broker
        self._schedule = schedule
        self._budget = budget
        self._rate = rate
        self._grace = grace
        self._clock = broker.now
        self._reporter = reporter
        self._refused = RateLimitedLog(logging.WARNING, "keyless.refusing")

    async def process(self, delivery: Delivery) -> Decision:
        """Create the operation, or poll it. An error is this worker's, and not the request's."""
        creates_until = self._now() + CREATES_FOR
        # The app may authenticate before the first poll, so only a claim tells two requests under one id apart.
        is_first = delivery.is_started_by_phone and delivery.message.is_untried
        if is_first and (conflict := await self._claim_for_phone(delivery)) is not None:
            return conflict
        # Poll before creating, too. A request holds an operation id only if there was no operation before. So an
        # approval under an id that it holds answers this request, even if something fails afterwards.
        step = await self._poll_until_answered(delivery)
        if step is Next.CREATE:
            step = await self._create_repeatedly(delivery, creates_until)
        if isinstance(step, Next):
            # The create found the operation, but no poll has yet. One soon will, even if a replica lags behind.
            return Redeliver(error_delay(1), ExchangeResult.CREATED, find_unannounced(delivery))
        return step

    async def _poll_until_answered(self, delivery: Delivery) -> Decision | Next:
        """Poll. Repeat a final poll that comes after the grace, since one error must not decide the outcome."""
        step = await self._poll(delivery)
        for _ in range(_LATE_REPEATS):
            has_token = self._budget.room(self._now()) >= 1
            if not has_token or not isinstance(step, Decided) or step.event.answered is not False:
                break
            step = await self._poll_again(delivery, error_delay(1))
        return step

    async def _poll_again(self, delivery: Delivery, delay: float) -> Decision | Next:
        await asyncio.sleep(delay)
        self._budget.record_poll(self._now())
        return await self._poll(delivery)

    async def _create_repeatedly(self, delivery: Delivery, until: float) -> Decision | Next:
        """Create the operation, which was missing just now. Repeat that for some seconds if it fails transiently.

        A create needs two good answers in a row. If it were tried once a delivery, users would be asked late or never.
        The operation may be there in spite of the failure, so each create follows a poll that did not find it.
        """
        step = await self._create(delivery)
        while (
            isinstance(step, Redeliver)
            and step.result is ExchangeResult.FAILED
            and self._now() + step.delay < until
            and delivery.ticket.remaining(self._clock()) > step.delay
            and self._budget.room(self._now()) >= 1
        ):
            step, found = await self._poll_again(delivery, step.delay), ExchangeResult.ANSWERED
            if step is Next.CREATE:
                step, found = await self._create(delivery), ExchangeResult.CREATED  # or a conflict, if a replica lags
            # A poll that found nothing until the deadline creates nothing, and is no news of an operation either.
            is_news = found is ExchangeResult.CREATED or not is_final(delivery, self._clock())
            if isinstance(step, Redeliver) and step.result is found and is_news:
                step = step._replace(created=delivery.request)  # no other delivery can have known of it
        return step

    async def _create(self, delivery: Delivery) -> Decision | Next:
        """Create the operation, which was missing just now. Return `Next.POLL` if this request may have created it."""
        claim = await self._broker.claim(delivery.message)
        if claim is Claim.ANOTHERS:
            return fail(delivery, FailureReason.CONFLICT, OTHER_REQUEST, now=self._clock())
        if not is_final(delivery, self._clock()):
            return await self._create_claimed(delivery, claim)
        if claim is Claim.NEW:  # the broker took long: it is too late to ask the user
            await self._broker.unclaim(delivery.message)
        return Redeliver(0.0)

    async def _create_claimed(self, delivery: Delivery, claim: Claim) -> Decision | Next:
        """Create the operation under an id that this request holds, by this claim or by an earlier one."""
        ticket, started_at = delivery.ticket, self._now()
        self._budget.record_poll(started_at)
        try:
            await OperationCreation(
                self._transport,
                ticket.user_id,
                NewOperation(
                    operation_id=ticket.operation_id,
                    operation_payload=delivery.request.operation_payload,
                    external_user_id=ticket.external_user_id,
                ),
                id_is_new=False,
                resumes=False,
            ).run()
        except AlreadyApprovedError:
            # There was no operation before, and our create was in doubt. The user approved before the check found it.
            self._record_success()
            return Next.POLL
        except ConflictError:
            self._record_success()
            if claim is Claim.HELD or not await self._broker.unclaim(delivery.message):
                return after_conflict(delivery, self._clock(), self._pacing(delivery))
            return fail(delivery, FailureReason.CONFLICT, OTHER_OPERATION, now=self._clock())
        except KeylessError as error:
            may_exist = (
                claim is Claim.HELD or may_have_taken_effect(error) or not await self._broker.unclaim(delivery.message)
            )
            # The poll before it was answered well: it found nothing.
            self._record_error(delivery, error, started_at, was_seen=may_exist, was_good=True)
            return after_failed_creation(
                delivery, error, now=self._clock(), pacing=self._pacing(delivery, error), may_exist=may_exist
            )
        self._record_success()
        self._reporter.count("created")
        return after_creation(delivery, self._clock(), self._pacing(delivery))

    async def _poll(self, delivery: Delivery) -> Decision | Next:
        """Poll the operation. Return `Next.CREATE` if there is none and it is not too late to create it."""
        polled_at, started_at = self._clock(), self._now()
        grace_left = self._grace.left(delivery, polled_at) if is_final(delivery, polled_at) else math.inf
        answer = await self._get(delivery, polled_at)
        was_created = await self._was_created(delivery, answer, polled_at)
        if isinstance(answer, KeylessError):
            is_late = is_final(delivery, polled_at)
            was_good = not (delivery.message.is_untried or delivery.message.failures)
            self._record_error(delivery, answer, started_at, was_seen=was_created, was_good=was_good, is_final=is_late)
        else:
            self._record_success()
        step = after_poll(
            delivery,
            answer,
            polled_at=polled_at,
            now=self._clock(),
            pacing=self._pacing(delivery, answer),
            was_created=was_created,
            grace_left=grace_left,
        )
        if isinstance(answer, Operation) and _needs_claim(delivery, step):
            return await self._disown(delivery, answer) or step
        return step

    async def _disown(self, delivery: Delivery, operation: Operation) -> Decided | None:
        """Decide about an operation that is not this request's. Return None if it is."""
        if delivery.is_started_by_phone:
            if not (self._broker.forgets_claims and is_older(operation, delivery)):
                # Again, since the first claim may have failed. This one is kept for as long as the outcome.
                return await self._claim_for_phone(delivery)
        elif await self._broker.has_claim(delivery.message):
            return None
        return after_unclaimed(delivery, operation, now=self._clock())

    async def _claim_for_phone(self, delivery: Delivery) -> Decided | None:
        """Claim the id with which the phone starts the operation. Return the decision if another request has it."""
        if await self._broker.claim(delivery.message) is Claim.ANOTHERS:
            return fail(delivery, FailureReason.CONFLICT, OTHER_REQUEST, now=self._clock())
        return None

    async def _was_created(self, delivery: Delivery, answer: Operation | KeylessError, polled_at: datetime) -> bool:
        """Return whether this request may have created the operation, so that an odd answer is a gateway's.

        A 404 is none before the deadline, since the operation may not exist yet and the worker creates it, nor if the
        phone has not started the operation.
        """
        # A refused key concerns the worker.
        if isinstance(answer, Operation | AuthenticationError) or answer.is_transient:
            return False
        may_be_missing = delivery.is_started_by_phone or not is_final(delivery, polled_at)
        if not is_failure(answer, was_seen=True) or (isinstance(answer, NotFoundError) and may_be_missing):
            return False
        return await self._broker.has_claim(delivery.message)

    async def _get(self, delivery: Delivery, polled_at: datetime) -> Operation | KeylessError:
        """Return the operation, or the failure to get it."""
        started_at, operation_id = self._now(), delivery.ticket.operation_id
        self._reporter.count("polls")
        self._rate.record_poll(started_at)
        answer: Operation | KeylessError
        try:
            is_renewal = self._budget.take_renewal(started_at)
            answer = await self._transport.fetch(get_operation(operation_id), is_renewal=is_renewal)
        except KeylessError as error:
            answer = error.with_traceback(None)
        final = is_final(delivery, polled_at)
        self._reporter.report_poll(operation_id, answer, is_final=final, started_at=started_at)
        return answer

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _record_success(self) -> None:
        self._budget.record_success(self._now())
        self._rate.record_answer()
        self._reporter.report_exchange(None)

    def _record_error(
        self,
        delivery: Delivery,
        error: KeylessError,
        started_at: float,
        *,
        was_seen: bool,
        was_good: bool,
        is_final: bool = False,
    ) -> None:
        """Record what a failure says about the service. If it says something about this worker, raise it."""
        # Of these, only what may pass by itself is transient: a key that was replaced, a function that returned none.
        if isinstance(error, AuthenticationError | ConfigurationError | ClientClosedError) and not error.is_transient:
            raise error
        if is_well := is_service_well(error, was_seen=was_seen):
            self._record_success()
            return
        if is_failure(error, was_seen=was_seen):
            self._reporter.count("transient_failures")
            log(logging.DEBUG, "keyless.failed", {"operation_id": delivery.ticket.operation_id, "error": str(error)})
        if is_well is None:
            self._budget.record_other()
            if isinstance(error, CachedAnswerError):
                self._refused.log({**self._reporter.who, "error": str(error)})
            return
        now = self._now()
        self._budget.record_failure(now, started_at=started_at)
        if isinstance(error, RateLimitError):
            before = self._rate.paused_until
            self._rate.record_refusal(now, error, started_at=started_at, is_final=is_final, was_good=was_good)
            if self._rate.paused_until > before:
                self._grace.record_pause(self._clock(), self._rate.paused_until - now)
        else:
            self._rate.record_answer()
        if is_logged(error, is_limited=self._rate.is_limited(now)):
            self._refused.log({**self._reporter.who, "error": str(error)})
        self._reporter.report_exchange(error)

    def _pacing(self, delivery: Delivery, answer: Operation | KeylessError | None = None) -> Pacing:
        own_pause = requested_pause(answer) if isinstance(answer, KeylessError) else 0.0
        now = self._now()
        age = (self._clock() - delivery.ticket.created_at).total_seconds()
        return Pacing(
            schedule=self._schedule,
            failures=failures_that_count(
                delivery.message.failures + 1,
                since_good=min(now - self._budget.answered_at, age),
                is_refusal=isinstance(answer, RateLimitError),
            ),
            paused_for=own_pause,
            closed_for=max(self._budget.ready_at(now), self._rate.ready_at(now)) - now,
            grace=self._grace.seconds,
        )


def _needs_claim(delivery: Delivery, step: Decision | Next) -> bool:
    """Return whether the claim matters: for an approval, and for an operation that is found for the first time."""
    if isinstance(step, Redeliver) and step.created is not None:
        return True
    return delivery.message.is_untried or (isinstance(step, Decided) and step.event.outcome is Outcome.APPROVED)
