"""What a wait promises to its caller: the right end, in time, with the polls that must have happened.

Each function is one promise, by the rule of docs/rules.md that its docstring names, and yields what breaks it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from .evidence import (
    EPS,
    FINAL,
    LEASE,
    TIMED_OUT,
    TOO_LATE,
    UNKNOWN,
    YOUNG,
    Budget,
    Evidence,
    Reading,
    most_final,
    verdict,
)
from .faults import Lies, Moved, Outage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .evidence import Violation
    from .faults import Fault
    from .history import Exchange, ObservedWait

#: Seconds before its end within which an unanswered final poll is not repeated any more: the longest first backoff.
BACKOFF = 0.5
#: Seconds of unexpected failures that end a wait without a deadline.
UNEXPECTED_FOR = 60.0
#: Seconds for which the connections to an old host are used, and until the poll after that.
LONGEST_STALE = 60.0 + 20.0


class Decisive(NamedTuple):
    """An answer that ends a wait.

    Attributes:
        poll: The poll that it answers.
        outcome: What the wait ends with.
        is_certain: Whether it must; else it may.
    """

    poll: Exchange
    outcome: str
    is_certain: bool


def no_wrong_approval(evidence: Evidence, faults: Sequence[Fault]) -> Iterator[Violation]:
    """Rule 2: what is returned is an approval of this operation, for this user, of this payload, and is true."""
    lied_about = {fault.payload for fault in faults if isinstance(fault, Lies)}
    for wait in (*evidence.waits, *evidence.holds):
        if wait.outcome != "approved" or wait.is_lease:  # a hold returns what its wait ended with
            continue
        got = wait.approved
        if got is None:
            yield evidence.violation("no wrong approval", wait, wait.ended_at, "it returned nothing")
            continue
        said = {
            "operationId": got["operation_id"],
            "userId": got["user_id"],
            "operationPayload": got["operation_payload"],
            "externalUserId": got["external_user_id"],
            "state": got["state"],
            "result": got["result"],
        }
        if verdict(said, wait.operation_id, wait.ticket) != "approved":
            yield evidence.violation("no wrong approval", wait, wait.ended_at, f"it returned {said}")
        true = evidence.history.operations.get(wait.operation_id)
        if true is None or (true.approved_at > wait.ended_at and true.payload not in lied_about):
            yield evidence.violation("no wrong approval", wait, wait.ended_at, f"the truth is {true}")


def right_end(evidence: Evidence, _faults: Sequence[Fault]) -> Iterator[Violation]:
    """Rules 2 to 5, O1 to O7: the first answer that decides ends the wait, with what it means; nothing else does."""
    for wait in evidence.waits:
        reasons = [_wrong_end(evidence, wait, budget) for budget in evidence.budgets(wait)]
        if all(reasons):
            yield evidence.violation("right end", wait, wait.ended_at, f"{wait.outcome or 'no end'}; {reasons[0]}")


def _wrong_end(evidence: Evidence, wait: ObservedWait, budget: Budget) -> str:  # noqa: PLR0911  # one for each end
    """Return why the end of a wait is wrong; the empty text where it is right."""
    for decisive in _decisive(evidence, wait, budget):
        at = decisive.poll.ended_at
        # After a standstill, a caller may leave, or a hold end, in the turn of the loop in which the answer arrives.
        may_end_as = {decisive.outcome, "cancelled", "held"} if evidence.woke_lately(at) else {decisive.outcome}
        if wait.outcome in may_end_as and abs(at - wait.ended_at) <= EPS:
            return ""
        if decisive.is_certain:
            return f"the answer at {at:.4f} s must have ended it with {decisive.outcome}"
    match wait.outcome:
        case "cancelled":
            return ""
        case "ClientClosedError":
            return "" if evidence.client.closed_at <= wait.ended_at + EPS else "the client is open"
        case "held":
            holds = (hold for hold in evidence.holds if hold.lease is wait and hold.started_at <= wait.ended_at)
            last = max(hold.ended_at for hold in holds)
            in_time = abs(wait.ended_at - evidence.awake(last + LEASE)) <= EPS
            return "" if in_time else f"it was held until {last:.4f} s, and goes on for {LEASE:g} s"
        case "ApprovalUnknownError":
            return _wrong_unknown(evidence, wait, budget)
        case "AuthenticationError" if evidence.refused_for(wait.ended_at) >= UNEXPECTED_FOR - EPS:
            return ""  # the key is refused for good, whatever operation the last answer was about
    return "no answer says so"


def holds_are_leases(evidence: Evidence, _faults: Sequence[Fault]) -> Iterator[Violation]:
    """Holds: each ends with what its wait ends with, or with nothing at its end while that one's time goes on."""
    for hold in evidence.holds:
        if hold.outcome in {"cancelled", "ClientClosedError"}:
            continue
        assert hold.hold is not None
        assert hold.lease is not None, "each hold has a wait"
        wait, end = hold.lease, hold.started_at + hold.hold
        if hold.outcome == "nothing":
            is_right = abs(hold.ended_at - evidence.awake(end)) <= EPS and any(
                b.deadline > end - EPS for b in evidence.budgets(wait)
            )
        else:
            at = max(hold.started_at, wait.ended_at)
            is_right = hold.outcome == wait.outcome and abs(hold.ended_at - at) <= EPS
        if not is_right:
            text = (
                f"{hold.outcome or 'no end'}; its wait ended at {wait.ended_at:.4f} s with {wait.outcome or 'nothing'}"
            )
            yield evidence.violation("holds are leases", hold, hold.ended_at, text)


def _wrong_unknown(evidence: Evidence, wait: ObservedWait, budget: Budget) -> str:
    """Rule 3: an unanswered final poll is repeated for two seconds."""
    if budget.had_expired:
        return "" if wait.ended_at <= evidence.last_end(budget.deadline) + EPS else "it is late"
    if wait.ended_at < budget.deadline - EPS:
        return f"its deadline is at {budget.deadline:.4f} s"
    final = [poll for poll in evidence.polls_of[wait.operation_id] if poll.sent_at >= budget.deadline - EPS]
    if any(poll.retry_after and poll.status == 429 for poll in final):
        return ""
    if wait.ended_at < evidence.final_from(budget.deadline) + FINAL - TOO_LATE - BACKOFF - EPS:
        return "a final poll that fails is repeated"
    return ""


def _means(reading: Reading, wait: ObservedWait) -> str:
    return "" if reading.said is None else verdict(reading.said, wait.operation_id, wait.ticket)


def _decisive(evidence: Evidence, wait: ObservedWait, budget: Budget) -> Iterator[Decisive]:
    """Yield the answers that decide about a wait, in the order in which they came."""
    polls = evidence.polls_of[wait.operation_id]
    came = [poll for poll in polls if wait.started_at - EPS <= poll.ended_at <= wait.ended_at]
    for poll in sorted(came, key=lambda poll: poll.ended_at):
        reading = evidence.read(poll)
        is_served = poll.number > wait.number  # an answer counts for those who were there when its poll started
        is_final = budget.had_expired or poll.sent_at >= budget.deadline - EPS
        # Where two polls are under way after the deadline, one of them is the final one.
        is_alone = not any(p.ended_at > poll.sent_at - EPS for p in evidence.around(poll, poll.sent_at + EPS))
        meaning = _means(reading, wait)
        if meaning == "approved":  # an approval counts for all
            yield Decisive(poll, "approved", is_certain=poll.ended_at > wait.started_at + EPS)
        elif meaning == "pending":
            if is_final and is_served:
                yield Decisive(poll, TIMED_OUT, is_certain=is_alone)
        elif not is_served:
            continue
        elif meaning:
            yield Decisive(poll, meaning, is_certain=True)
        elif reading.error:
            yield from _decisive_error(evidence, wait, budget, poll, is_final=is_final, is_alone=is_alone)


def _decisive_error(
    evidence: Evidence, wait: ObservedWait, budget: Budget, poll: Exchange, *, is_final: bool, is_alone: bool
) -> Iterator[Decisive]:
    """Yield the end of a wait by an error that is no failure of the moment, or lasts for too long."""
    reading = evidence.read(poll)
    if reading.kind == "failed":
        too_long = evidence.unexpected_for(poll) - UNEXPECTED_FOR
        if budget.deadline == math.inf and too_long > -EPS:
            yield Decisive(poll, reading.error, is_certain=too_long > EPS)
        return
    is_young = wait.ticket is not None and poll.sent_at - budget.origin < YOUNG
    if reading.error != "NotFoundError" or not (wait.may_be_missing or is_young):
        yield Decisive(poll, reading.error, is_certain=reading.kind != "unsure")
    elif is_final:
        yield Decisive(poll, TIMED_OUT, is_certain=reading.kind != "unsure" and is_alone)


def ends_in_time(evidence: Evidence, _faults: Sequence[Fault]) -> Iterator[Violation]:
    """Rule 3: no wait lasts longer than its budget and two seconds; for an expired ticket, than its first failure."""
    for wait in evidence.waits:
        budgets = evidence.budgets(wait)
        last = max(evidence.last_end(budget.deadline) for budget in budgets)
        if all(budget.had_expired for budget in budgets):
            own = [poll for poll in evidence.polls_of[wait.operation_id] if poll.number > wait.number]
            failed = [poll.ended_at for poll in own if evidence.read(poll).kind == "failed"]
            # Its first poll counts, even if it hangs while another one fails that began at another wait's deadline.
            last = min(last, evidence.last_end(max(own[0].ended_at, min(failed)) if failed else last))
        if wait.ended_at > last + EPS or wait.ended_at == math.inf:
            yield evidence.violation("ends in time", wait, wait.ended_at, f"it must have ended at {last:.4f} s")


def no_approval_lost(evidence: Evidence, faults: Sequence[Fault]) -> Iterator[Violation]:
    """Rule 3: a final poll decides, so a wait whose operation was approved by its deadline does not time out."""
    untrue: set[str | None] = {fault.payload for fault in faults if isinstance(fault, Lies)}
    untrue |= {fault.payload for fault in faults if isinstance(fault, Outage) and fault.failure.status == 404}
    stale = [fault for fault in faults if isinstance(fault, Moved) and fault.failure is None]
    for wait in evidence.waits:
        true = evidence.history.operations.get(wait.operation_id)
        if wait.outcome != TIMED_OUT or true is None or true.payload in untrue:
            continue
        ends = [poll for poll in evidence.polls_of[wait.operation_id] if abs(poll.ended_at - wait.ended_at) <= EPS]
        if any(poll.status == 404 for poll in ends):  # a replica lags: O6
            continue
        if any(fault.begins <= wait.ended_at <= fault.begins + LONGEST_STALE for fault in stale):
            continue
        by = min(wait.started_at if budget.had_expired else budget.deadline for budget in evidence.budgets(wait))
        if true.approved_at < by - max((poll.stored_for for poll in ends), default=0.0):
            yield evidence.violation("no approval lost", wait, wait.ended_at, f"approved at {true.approved_at:.4f} s")


def first_poll_at_once(evidence: Evidence, _faults: Sequence[Fault]) -> Iterator[Violation]:
    """Rule 1: a wait polls when it begins, unless its ticket was made here less than a second ago."""
    for wait in evidence.waits:
        start = wait.started_at
        is_fresh = wait.made_here and min(wait.ages) < 1.0 + EPS
        if is_fresh or evidence.failed_lately(wait.operation_id, start):
            continue
        others = sum(abs(other.started_at - start) <= EPS for other in evidence.waits)
        if wait.ended_at <= start + EPS or not evidence.has_room(start, others):
            continue
        polls = evidence.polls_of[wait.operation_id]
        if not any(poll.sent_at <= start + EPS and poll.ended_at >= start - EPS for poll in polls):
            yield evidence.violation("first poll at once", wait, start, "no poll starts with it")


def final_poll_at_deadline(evidence: Evidence, _faults: Sequence[Fault]) -> Iterator[Violation]:
    """Rule 3: a final poll starts exactly at the deadline, also without a token if it is the only one."""
    first_budgets = [(wait, evidence.budgets(wait)[0]) for wait in evidence.waits]
    for wait in evidence.waits:
        budget, *more = evidence.budgets(wait)
        deadline = budget.deadline
        due = evidence.awake(deadline)
        differs = any(abs(other.deadline - deadline) > EPS for other in more)
        if budget.had_expired or differs or wait.ended_at <= due + EPS:
            continue
        rivals = sum(
            other.started_at <= due <= other.ended_at + EPS
            and (its.had_expired or due - FINAL - EPS <= evidence.awake(its.deadline) <= due + EPS)
            for other, its in first_budgets
        )
        fits = (
            evidence.is_free(deadline, rivals)
            and evidence.is_free(due, rivals)
            and rivals <= most_final(evidence.client.max_in_flight)
        )
        # Without a token, one final poll at a time: a late one counts for its two seconds, whoever needs it.
        late = (p for p in evidence.sent_between(deadline - FINAL, due - EPS) if p.ended_at > deadline - EPS)
        fits_alone = rivals == 1 and not any(map(evidence.is_final, late))
        if not fits and not fits_alone:
            continue
        final = [poll for poll in evidence.polls_of[wait.operation_id] if poll.sent_at >= deadline - EPS]
        final = [poll for poll in final if poll.sent_at <= wait.ended_at]
        if not final or final[0].sent_at > due + EPS:
            yield evidence.violation("final poll at the deadline", wait, due, "no poll starts there")
            continue
        failed_early = final[0].ended_at < evidence.final_from(budget.deadline) + 1.0 and final[0].status != 429
        # Without a token, final polls go one at a time, and one that is due later may hang meanwhile.
        failed_early &= not any(deadline < its.deadline < due + FINAL for _, its in first_budgets)
        if wait.outcome == UNKNOWN and failed_early and len(final) == 1 and rivals == 1:
            yield evidence.violation("final poll at the deadline", wait, deadline, "it fails, and is not repeated")


def slow_handlers(evidence: Evidence, _faults: Sequence[Fault]) -> Iterator[Violation]:
    """Rule 8: a slow handler delays the result by its own time, for one update and the last one."""
    for wait in evidence.waits:
        last = evidence.awake(evidence.awake(wait.ended_at + wait.handler) + wait.handler)
        if wait.handler and wait.returned_at > last + EPS and evidence.client.closed_at > last:
            yield evidence.violation("slow handlers", wait, wait.returned_at, f"it ended at {wait.ended_at:.4f} s")


PROMISES = (
    slow_handlers,
    no_wrong_approval,
    right_end,
    holds_are_leases,
    ends_in_time,
    no_approval_lost,
    first_poll_at_once,
    final_poll_at_deadline,
)
