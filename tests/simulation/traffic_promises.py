"""What a client promises to the service: how many requests it sends, when, and for whom.

Each function is one promise, by the rule of docs/rules.md that its docstring names, and yields what breaks it.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from .evidence import (
    EPS,
    FINAL,
    LONGEST_PAUSE,
    MANY_REFUSED,
    SLOW,
    TOO_LATE,
    Evidence,
    most_final,
    most_in_flight,
)
from .faults import Capacity, Flapping, Moved, Outage, RateLimit, Shard, Slowness, Standstill

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .evidence import Reading, Violation
    from .faults import Fault
    from .history import Exchange, ObservedWait

#: The backoff's shortest pause, and its longest.
SHORTEST, LONGEST = 0.25, 5.0
#: Its longest pause for as long as the service answers, and after so many failures of an operation in a row.
LONGEST_AT_FIRST, LONGEST_OFTEN, OFTEN = 1.0, 2.0, 32
#: Seconds from a good answer for which the service answers.
SHORT = 30.0
#: Seconds for which a 503's Retry-After counts, unless a good answer comes.
SHORTEST_HOLD = 2.5
#: Seconds from the beginning of a service's trouble, in which a client learns what it can answer; polls that are enough
#: to tell; and the share of them whose answer may come too late for a final poll.
QUEUE_SETTLES, MANY, LATE = 30.0, 50, 0.8
#: Seconds in which everybody is polled after a first good answer: one more poll is in flight with each.
RAMP = 5.0
#: Seconds of the longest usual answer: if there are more waits than slots, they take turns.
ROUND_TRIP = 0.6


def polls_for_somebody(evidence: Evidence, _faults: Sequence[Fault]) -> Iterator[Violation]:
    """Rules 6 and 7: the last wait that ends stops the polling, and a closed client sends nothing."""
    for poll in evidence.polls:
        if not any(evidence.waits_at(poll.operation_id, poll.sent_at)):
            yield evidence.violation("polls for somebody", poll, poll.sent_at, "nobody waits for it")
    for exchange in evidence.exchanges:
        if exchange.sent_at > evidence.client.closed_at + EPS:
            yield evidence.violation("polls for somebody", exchange, exchange.sent_at, "the client is closed")


def cut_at_the_deadline(evidence: Evidence, _faults: Sequence[Fault]) -> Iterator[Violation]:
    """Rules 3 and 6: a poll ends with the last wait for its operation, or at the last deadline that it was sent for."""
    for poll in evidence.polls:
        waits = list(evidence.waits_at(poll.operation_id, poll.sent_at, poll.ended_at))
        last = max((wait.ended_at for wait in waits), default=math.inf)
        until = max((_needs_until(evidence, wait, poll, last) for wait in waits), default=last)
        if poll.ended_at > evidence.awake(until) + EPS:
            yield evidence.violation("cut at the deadline", poll, until, "a poll goes on for nobody")


def _needs_until(evidence: Evidence, wait: ObservedWait, poll: Exchange, last: float) -> float:
    """Return until when a poll may go on for a wait: to its deadline if it was sent before, and if the wait is there.

    A wait that leaves early does not cut the poll that it shared.
    """
    budgets = evidence.budgets(wait)
    deadline = max(b.deadline for b in budgets)
    if any(b.had_expired or b.deadline <= poll.sent_at + EPS for b in budgets):
        return wait.ended_at
    return last if wait.number > poll.number or wait.ended_at < deadline - EPS else deadline


def final_polls_have_time(evidence: Evidence, _faults: Sequence[Fault]) -> Iterator[Violation]:
    """Rule 3: no poll starts if all who wait for it end within half a second."""
    for poll in evidence.polls:
        waits = evidence.waits_at(poll.operation_id, poll.sent_at)
        budgets = [budget for wait in waits for budget in evidence.budgets(wait)]
        lasts = (math.inf if b.had_expired else evidence.last_end(b.deadline) - TOO_LATE for b in budgets)
        last = max(lasts, default=math.inf)
        if poll.sent_at > last + EPS:
            yield evidence.violation("final polls have time", poll, poll.sent_at, f"the last could start at {last:.4f}")


def single_flight(evidence: Evidence, _faults: Sequence[Fault]) -> Iterator[Violation]:
    """Rule 6: waits for one operation share their polls; only a final one starts beside another."""
    for polls in evidence.polls_of.values():
        for earlier, later in pairwise(polls):
            overlaps = later.sent_at < earlier.ended_at - EPS
            if overlaps and not evidence.is_final(later) and not evidence.is_final(earlier):
                yield evidence.violation("single flight", later, later.sent_at, "another poll of it is in flight")


def polls_in_flight(evidence: Evidence, _faults: Sequence[Fault]) -> Iterator[Violation]:
    """`max_in_flight`, `request_timeout`: so many polls take a slot for their first second, and so long at most."""
    for poll in evidence.polls:
        if poll.ended_at > evidence.awake(poll.sent_at + evidence.client.request_timeout) + EPS:
            yield evidence.violation("polls in flight", poll, poll.ended_at, "it took longer than request_timeout")
    slots = evidence.client.max_in_flight
    for poll in evidence.polls:
        at = poll.sent_at
        lately = [p for p in evidence.sent_between(at - SLOW + EPS, at) if p.number <= poll.number and p.ended_at > at]
        young = sum(not evidence.is_final(p) for p in lately)
        count = len(evidence.in_flight(at)) + sum(p.sent_at > at - EPS for p in lately)
        if young > slots or count > most_in_flight(slots) + most_final(slots):
            text = f"{count} polls are in flight, {young} with a slot"
            yield evidence.violation("polls in flight", poll, at, text)


def rate_of_polls(evidence: Evidence, _faults: Sequence[Fault]) -> Iterator[Violation]:
    """The rate: a second's polls may start at once; final ones are free."""
    rate, tokens, filled_at = evidence.client.rate, max(1.0, evidence.client.rate), 0.0
    for poll in evidence.polls:
        tokens = min(max(1.0, rate), tokens + rate * (poll.sent_at - filled_at))
        filled_at = poll.sent_at
        if evidence.is_final(poll):
            continue
        if tokens < 1.0 - 0.01:
            yield evidence.violation("rate of polls", poll, poll.sent_at, f"more than {rate:g} a second")
        tokens -= 1.0


def not_too_soon(evidence: Evidence, _faults: Sequence[Fault]) -> Iterator[Violation]:
    """Rule 4: the schedule paces pending answers, the backoff failures; a wait that begins or ends polls at once."""
    for polls in evidence.polls_of.values():
        for earlier, later in pairwise(polls):
            reading = evidence.read(earlier)
            waits = [*evidence.waits_at(earlier.operation_id, earlier.ended_at)]
            waits += evidence.waits_at(earlier.operation_id, later.sent_at)
            # Beside a final poll, which sets the next one too, it counts from either answer.
            at = earlier.sent_at
            if not waits or later.sent_at < earlier.ended_at - EPS:
                continue
            if any(at < poll.ended_at + EPS for poll in evidence.around(earlier, at)):
                continue
            if reading.kind in {"cut", "error"} or (reading.said is not None and not _is_pending(reading, earlier)):
                continue
            # A final poll that fails does not put off an ordinary one that is scheduled already.
            if reading.kind == "failed" and evidence.is_final(earlier):
                continue
            least = SHORTEST if reading.kind in {"failed", "missing"} else min(wait.delays[0] for wait in waits)
            if later.sent_at < earlier.ended_at + least - EPS and not _is_excused(evidence, earlier, later):
                yield evidence.violation("not too soon", later, later.sent_at, f"{least:g} s had to pass")
        ordinary = [poll for poll in polls if not evidence.is_final(poll)]
        for earlier, later in pairwise(ordinary):
            if earlier.ended_at - EPS <= later.sent_at < earlier.ended_at + SHORTEST - EPS and _must_back_off(
                evidence, earlier, later
            ):
                yield evidence.violation("not too soon", later, later.sent_at, f"{SHORTEST:g} s had to pass")


def _must_back_off(evidence: Evidence, earlier: Exchange, later: Exchange) -> bool:
    """Return whether a poll certainly repeats an ordinary one that failed: no other answer and no new wait sets it.

    A final poll that fails beside it sets no time.
    """
    begins, at = earlier.sent_at - EPS, later.sent_at + EPS
    beside = [p for p in evidence.polls_of[earlier.operation_id] if p.sent_at <= at and p.ended_at >= begins]
    waits = evidence.waits_of[earlier.operation_id]
    return (
        evidence.read(earlier).kind == "failed"
        and all(evidence.read(poll).kind == "failed" and poll.ended_at < at for poll in beside if poll is not later)
        and not any(begins <= wait.started_at <= at for wait in waits)
        and any(wait.started_at < begins and wait.ended_at > at for wait in waits)
    )


def _is_pending(reading: Reading, poll: Exchange) -> bool:
    said = reading.said
    return said is not None and said["state"] == "pending" and said["operationId"] == poll.operation_id


def _is_excused(evidence: Evidence, earlier: Exchange, later: Exchange) -> bool:
    """Return whether a wait that begins, a deadline, or an older final poll explains a poll that is too soon."""
    waits = evidence.waits_of[earlier.operation_id]
    older = [p for p in evidence.around(earlier, earlier.sent_at) if earlier.ended_at < p.ended_at < later.sent_at]
    return any(evidence.is_final(poll) for poll in older) or any(
        earlier.sent_at - EPS <= wait.started_at <= later.sent_at + EPS
        or any(
            b.had_expired or earlier.sent_at - FINAL - EPS <= evidence.awake(b.deadline) <= later.sent_at + EPS
            for b in evidence.budgets(wait)
        )
        for wait in waits
    )


def cut_for_nobody(evidence: Evidence, _faults: Sequence[Fault]) -> Iterator[Violation]:
    """Rules 3 and 6: a poll that a wait needs is not cut for the end of another."""
    for poll in evidence.polls:
        if evidence.read(poll).kind != "cut" or evidence.is_final(poll):
            continue
        at = poll.ended_at
        waits = list(evidence.waits_at(poll.operation_id, at))
        needed = any(
            wait.number < poll.number
            and wait.ended_at > at + EPS
            and all(b.deadline > at + EPS for b in evidence.budgets(wait))
            for wait in waits
        )
        beside = any(p.sent_at <= at < p.ended_at - EPS for p in evidence.polls_of[poll.operation_id] if p is not poll)
        if needed and not beside and not evidence.gives_way(poll):
            yield evidence.violation("cut for nobody", poll, at, "a poll that is needed was cut off")


def not_too_late(evidence: Evidence, _faults: Sequence[Fault]) -> Iterator[Violation]:
    """Rules 1 and 4: while the service is well, the next poll comes within the schedule's longest delay."""
    for polls in evidence.polls_of.values():
        for poll, later in zip(polls, [*polls[1:], None], strict=True):
            reading = evidence.read(poll)
            waits = [
                wait
                for wait in evidence.waits_at(poll.operation_id, poll.ended_at)
                if wait.number < poll.number
                and evidence.is_paced(wait, poll.ended_at)
                and poll.ended_at < wait.ended_at - EPS
            ]
            if not (_is_pending(reading, poll) or reading.kind in {"failed", "cut"}) or not waits:
                continue
            # A 429's Retry-After is the operation's own, and longer.
            longest = LONGEST if reading.kind == "failed" else min(wait.delays[1] for wait in waits)
            if reading.kind == "failed" and _is_short(evidence, poll):
                longest = LONGEST_OFTEN if _has_failed_often(evidence, poll) else LONGEST_AT_FIRST
                if poll.status == 503 and poll.retry_after:  # it holds up to the next good answer to any poll
                    good = evidence.answered_between(poll.ended_at + EPS, poll.ended_at + LONGEST)
                    longest = max(longest, good[0] - poll.ended_at if good else LONGEST)
            if reading.kind == "cut":  # perhaps it gave way to another one, which counts as a failure
                longest = max(longest, LONGEST)
            due = evidence.awake(poll.ended_at + longest)
            sent = math.inf if later is None else later.sent_at
            goes_on = any(wait.ended_at > due + EPS and evidence.is_paced(wait, due) for wait in waits)
            if sent <= due + EPS or not goes_on or (poll.status == 429 and poll.retry_after is not None):
                continue
            if any(due < other.ended_at for other in evidence.around(poll, due)):  # then it comes after that one
                continue
            goes_last = reading.kind != "said" and evidence.starts_slowly(due)
            if not goes_last and evidence.has_room(poll.ended_at, 1) and evidence.has_room(due, 1):
                yield evidence.violation("not too late", poll, due, f"the next poll is due, and starts at {sent:.4f} s")


def _is_short(evidence: Evidence, poll: Exchange) -> bool:
    """Return whether the service answered lately, or the operation is young; a refusal is another matter."""
    at = poll.ended_at
    is_young = all(
        budget.origin > at - SHORT + EPS
        for wait in evidence.waits_of[poll.operation_id]
        if wait.started_at <= at
        for budget in evidence.budgets(wait)
    )
    return poll.status != 429 and (is_young or bool(evidence.answered_between(at - SHORT + EPS, at - EPS)))


def _has_failed_often(evidence: Evidence, poll: Exchange) -> bool:
    """Return whether so many polls of an operation may have failed in a row that the pause is longer."""
    ended = sorted((p.ended_at, evidence.read(p).kind) for p in evidence.polls_of[poll.operation_id])
    lately = [kind for at, kind in ended if at <= poll.ended_at and kind != "cut"][-OFTEN:]
    return len(lately) == OFTEN and all(kind in {"failed", "unsure"} for kind in lately)


def few_requests_in_outage(evidence: Evidence, _faults: Sequence[Fault]) -> Iterator[Violation]:
    """Rule 4: each poll takes a token. Without one only a final poll starts, and one at a time."""
    for poll, tokens in evidence.most_tokens:
        at = poll.sent_at
        if tokens >= 1.0 - 0.1:
            continue
        if not evidence.is_final(poll):
            text = f"{tokens:.2f} tokens are left"
            yield evidence.violation("few requests in an outage", poll, at, text)
        elif evidence.is_only_final(poll):
            lately = evidence.sent_between(at - FINAL + EPS, at)
            beside = [p for p in lately if p.number < poll.number and p.ended_at > at + EPS]
            if any(map(evidence.is_only_final, beside)):
                yield evidence.violation("few requests in an outage", poll, at, "two final polls at once")


def total_outages(faults: Sequence[Fault]) -> list[Outage]:
    """Return the outages that nothing gets through, none of them with a Retry-After, which is another promise."""
    total = [fault for fault in faults if isinstance(fault, Outage) and fault.is_total]
    return [f for f in total if f.failure.retry_after is None and f.failure.status not in {404, 429}]


def a_queue_stays_short(evidence: Evidence, faults: Sequence[Fault]) -> Iterator[Violation]:
    """Slots: of a service that answers so many requests a second, polls soon ask no more than it answers in time."""
    for capacity in (fault for fault in faults if isinstance(fault, Capacity)):
        begins, ends = capacity.begins + QUEUE_SETTLES, capacity.ends - evidence.client.request_timeout
        polls = evidence.sent_between(begins, ends)
        late = [poll for poll in polls if poll.ended_at - poll.sent_at > FINAL]
        is_alone = not any(_concerns(f, capacity.begins, capacity.ends) for f in faults if f is not capacity)
        if is_alone and len(polls) >= MANY and len(late) > LATE * len(polls):
            text = f"{len(late)} of {len(polls)} polls were not answered in time"
            yield evidence.violation("a queue stays short", late[0], ends, text)


def pauses_are_kept(evidence: Evidence, _faults: Sequence[Fault]) -> Iterator[Violation]:
    """Rule 4: ``Retry-After`` on a 429 holds the operation; if very many are refused, all polls but final ones.

    On a 503 it holds the operation for a shorter time, up to the next good answer to any poll.
    """
    for poll in evidence.polls:
        if poll.retry_after is None or poll.status not in {429, 503}:
            continue
        is_refusal = poll.status == 429
        begins = poll.ended_at
        ends = begins + min(poll.retry_after, LONGEST_PAUSE if is_refusal else SHORTEST_HOLD)
        if not is_refusal:
            ends = min([ends, *evidence.answered_between(begins - EPS, ends)[:1]])
        holds_all = _is_tenants(evidence, poll)
        for later in evidence.sent_between(begins + EPS, ends - EPS):
            if evidence.is_final(later):
                continue
            is_own = later.operation_id == poll.operation_id
            excused = not is_own or evidence.is_final(poll) or _is_excused(evidence, poll, later)
            if excused and not holds_all:
                continue
            yield evidence.violation("pauses are kept", later, later.sent_at, f"a pause until {ends:.4f} s")


def _is_tenants(evidence: Evidence, poll: Exchange) -> bool:
    """Return whether a 429 is certainly the tenant's: it is the last of so many with no other answer between.

    A refusal of an operation whose poll before was not answered well does not count.
    """
    if poll.status != 429 or evidence.is_final(poll) or not _was_good(evidence, poll):
        return False
    lately = [
        p for p in evidence.sent_between(poll.ended_at - LONGEST_PAUSE, poll.ended_at) if p.ended_at < poll.ended_at
    ]
    count = 1
    for earlier in sorted(lately, key=lambda p: -p.ended_at):
        if evidence.read(earlier).kind != "cut":
            if earlier.status != 429:
                break
            count += _was_good(evidence, earlier)
    return count > MANY_REFUSED


def _was_good(evidence: Evidence, poll: Exchange) -> bool:
    """Return whether the poll before, of the same operation and for the same wait, was certainly answered well."""
    before = [p for p in evidence.polls_of[poll.operation_id] if p.number < poll.number]
    return (
        bool(before)
        and before[-1].ended_at < poll.sent_at
        and _is_pending(evidence.read(before[-1]), before[-1])
        and any(
            wait.number < before[-1].number and wait.ended_at > poll.ended_at
            for wait in evidence.waits_of[poll.operation_id]
        )
    )


def polled_after_outage(evidence: Evidence, faults: Sequence[Fault]) -> Iterator[Violation]:
    """Rule 4: within the longest backoff after an outage, and a hanging poll, everybody is polled again."""
    for outage in total_outages(faults):
        hanging = evidence.client.request_timeout if outage.failure.how == "hangs" else 0.0
        crowd = sum(wait.started_at <= outage.ends <= wait.ended_at for wait in evidence.waits)
        turns = crowd * (ROUND_TRIP / evidence.client.max_in_flight + 1.0 / evidence.client.rate)
        until = outage.ends + hanging + LONGEST + RAMP + turns
        troubled = any(
            _concerns(fault, outage.begins - LONGEST_PAUSE, until) for fault in faults if fault is not outage
        )
        troubled |= any(poll.had_no_key for poll in evidence.sent_between(outage.begins, until))
        if troubled or evidence.client.rate < 20 or len(evidence.waits) > 400:
            continue
        for wait in evidence.waits:
            goes_on = wait.started_at < outage.ends and wait.ended_at > until
            if not goes_on or any(budget.deadline <= until for budget in evidence.budgets(wait)):
                continue
            polls = [poll for poll in evidence.polls_of[wait.operation_id] if wait.number < poll.number]
            before = [poll for poll in polls if poll.sent_at < outage.ends]
            failed = before and evidence.read(before[-1]).kind == "failed"
            if failed and not any(outage.ends <= poll.sent_at <= until + EPS for poll in polls):
                yield evidence.violation(
                    "polled after an outage", wait, until, f"the outage ended at {outage.ends:.4f} s"
                )


def _concerns(fault: Fault, begins: float, ends: float) -> bool:
    return (
        isinstance(fault, Capacity | Flapping | Moved | Outage | RateLimit | Shard | Slowness | Standstill)
        and fault.begins < ends
        and fault.ends > begins
    )


PROMISES = (
    polls_for_somebody,
    cut_at_the_deadline,
    final_polls_have_time,
    single_flight,
    polls_in_flight,
    rate_of_polls,
    not_too_soon,
    cut_for_nobody,
    not_too_late,
    few_requests_in_outage,
    a_queue_stays_short,
    pauses_are_kept,
    polled_after_outage,
)
