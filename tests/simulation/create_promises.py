"""What creating an operation promises: exactly one, and the truth about it.

Each function is one promise, by "Creating" in the documentation, and yields what breaks it.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from .evidence import EPS, Evidence, read
from .faults import Lies
from .service import CREATED
from .traffic_promises import total_outages

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .evidence import Violation
    from .faults import Fault
    from .history import Exchange, ObservedCreate
    from .service import Stored

#: Tokens of a client.
TOKENS = 60
#: Requests of single calls after which the client may have too few tokens left to repeat one.
QUOTA = 25


def never_sent_twice_blindly(evidence: Evidence, _faults: Sequence[Fault]) -> Iterator[Violation]:
    """After an ambiguous failure a GET comes first, and only what does not exist is sent again."""
    for create, exchanges in _calls(evidence):
        posts = [exchange for exchange in exchanges if exchange.method == "POST"]
        if len(posts) > evidence.client.max_attempts:
            yield evidence.violation("created once", create, create.ended_at, f"it was sent {len(posts)} times")
        for earlier, later in pairwise(posts):
            between = [e for e in exchanges if e.method == "GET" and earlier.number < e.number < later.number]
            is_missing = bool(between) and between[-1].status == 404
            if _is_ambiguous(earlier) and not is_missing:
                yield evidence.violation("created once", create, later.sent_at, "it was sent again without a check")


def _is_ambiguous(post: Exchange) -> bool:
    """Return whether a POST may have taken effect although it did not succeed."""
    if post.status is None:
        return not post.was_refused
    return (post.was_repeated and post.status == 409) or post.status in {200, 408} or post.status >= 500


def resumed_if_asked(evidence: Evidence, _faults: Sequence[Fault]) -> Iterator[Violation]:
    """A 409 about an id that the application chose is looked into if it resumes; else it is the end."""
    for create, exchanges in _calls(evidence):
        is_plain = not any(_is_ambiguous(post) for post in exchanges if post.method == "POST")
        is_looked_into = any(exchange.method == "GET" for exchange in exchanges)
        is_refused = create.outcome == "ConflictStatusError"
        wrong = is_refused and not is_looked_into if create.resumes else is_looked_into
        if wrong and is_plain and not create.id_is_new:
            text = f"{create.outcome}, {'not ' * (not is_looked_into)}looked into"
            yield evidence.violation("resumed if asked", create, create.ended_at, text)


def created_through_dead_connections(evidence: Evidence, _faults: Sequence[Fault]) -> Iterator[Violation]:
    """A POST on a kept connection that is lost is checked, and sent again, on new ones."""
    attempts = evidence.client.max_attempts
    for create, exchanges in _calls(evidence):
        dead = [exchange for exchange in exchanges if exchange.was_dead]
        is_given_up = create.outcome == "TransportError" and all(e.was_dead or e.status == 404 for e in exchanges)
        single = [e for e in evidence.exchanges if not e.is_poll and e.number < create.number]
        must_be_created = attempts > 1 and len(single) < QUOTA
        if len(dead) > 1 or (dead and is_given_up and must_be_created):
            text = f"{create.outcome}: {len(dead)} of its requests were sent on dead connections"
            yield evidence.violation("created through dead connections", create, create.ended_at, text)


def repetitions_have_a_quota(evidence: Evidence, faults: Sequence[Fault]) -> Iterator[Violation]:
    """While nothing gets through, a client has 60 tokens for all repetitions and checks of its single calls."""
    for outage in total_outages(faults):
        sent = [e for e in evidence.exchanges if not e.is_poll and outage.begins <= e.sent_at < outage.ends]
        calls = [c for c in evidence.creates if c.started_at < outage.ends and c.ended_at >= outage.begins]
        if len(sent) > len(calls) + TOKENS:
            text = f"{len(calls)} calls sent {len(sent)} requests"
            yield evidence.violation("repetitions have a quota", sent[-1], outage.ends, text)


def exactly_one(evidence: Evidence, _faults: Sequence[Fault]) -> Iterator[Violation]:
    """One call makes one operation at most, and an error that ends it names the operation that there may be."""
    for create in evidence.creates:
        numbers = {exchange.number for exchange in evidence.exchanges if exchange.method == "POST"}
        made = [
            stored
            for stored in evidence.history.operations.values()
            if create.id_is_new and stored.payload == create.payload and stored.created_by in numbers
        ]
        if len(made) > 1:
            yield evidence.violation("exactly one", create, create.ended_at, f"it made {len(made)} operations")
        if made and create.outcome != "cancelled" and create.operation_id != made[0].operation_id:
            yield evidence.violation("exactly one", create, create.ended_at, f"it made {made[0].operation_id!r}")


def truth_about_creation(evidence: Evidence, faults: Sequence[Fault]) -> Iterator[Violation]:
    """What the last answer says is what the call ends with."""
    lied_about = {fault.payload for fault in faults if isinstance(fault, Lies)}
    for create, exchanges in _calls(evidence):
        true = evidence.history.operations.get(create.operation_id or "")
        if create.outcome in {"", "cancelled", "ClientClosedError"} or (true and true.payload in lied_about):
            continue
        wrong = _wrong_end(create, exchanges, true)
        if wrong:
            yield evidence.violation("truth about creation", create, create.ended_at, f"{create.outcome}: {wrong}")


def _wrong_end(create: ObservedCreate, exchanges: list[Exchange], true: Stored | None) -> str:
    """Return why the end of a create is wrong; the empty text where it is right."""
    if create.outcome == "InvalidIdentifierError":
        return "the story tries nothing: the client sends no such id"
    own = {exchange.number for exchange in exchanges if exchange.method == "POST"}
    is_own = true is not None and true.created_by in own
    if create.outcome in {"created", "reconciled"}:
        if true is None or not _is_same(create, true.payload, true.external_user_id):
            return f"the truth is {true}"
        if not create.id_is_new and true.approved_at < create.started_at:
            return "it was approved before it was asked for"
    is_repeated = any(exchange.was_repeated for exchange in exchanges)
    if create.outcome == "ConflictStatusError" and is_own and (create.id_is_new or not is_repeated):
        return "it is its own operation"
    if is_own and not create.was_sent:
        return "it says that nothing was sent"
    last = exchanges[-1] if exchanges else None
    expected = None if last is None else _expected(create, last)
    return f"the last answer means {expected}" if expected not in {None, create.outcome} else ""


def _expected(create: ObservedCreate, last: Exchange) -> str | None:
    """Return what the last answer of a call means; None where it is no success."""
    if last.method == "POST":
        return "created" if last.status == 200 and last.body == CREATED else None
    said = read(last, math.inf).said if last.status == 200 else None
    if said is None:
        return None
    if not _is_same(create, said.get("operationPayload"), said.get("externalUserId")):
        return "ConflictStatusError"
    is_earlier = said["state"] == "approved" and not create.id_is_new
    return "AlreadyApprovedError" if is_earlier else "reconciled"


def _is_same(create: ObservedCreate, payload: str | None, external_user_id: str | None) -> bool:
    return payload == create.payload and external_user_id == create.external_user_id


def _calls(evidence: Evidence) -> Iterator[tuple[ObservedCreate, list[Exchange]]]:
    """Yield each call with its requests; where two for one operation overlap, whose is whose is not known."""
    for create in evidence.creates:
        overlapping = [
            other
            for other in evidence.creates
            if other.operation_id == create.operation_id
            and other.started_at <= create.ended_at + EPS
            and other.ended_at >= create.started_at - EPS
        ]
        if len(overlapping) == 1:
            yield (
                create,
                [
                    exchange
                    for exchange in evidence.exchanges
                    if not exchange.is_poll
                    and exchange.operation_id == create.operation_id
                    and create.number < exchange.number
                    and exchange.sent_at <= create.ended_at
                ],
            )


PROMISES = (
    never_sent_twice_blindly,
    resumed_if_asked,
    created_through_dead_connections,
    repetitions_have_a_quota,
    exactly_one,
    truth_about_creation,
)
