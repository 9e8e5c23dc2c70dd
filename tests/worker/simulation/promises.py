"""The promises of a worker and its broker, checked by what an observer outside of the library saw.

Each is a function of the evidence that tells how it was broken. Nothing of the library's rules is used here.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from simulation.evidence import Violation
from simulation.faults import Lag, Lies, Moved, Outage, RoundTrips
from simulation.world import EPOCH

from .story import USER
from .world import GIVEN_UP_AFTER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from simulation.history import Exchange

    from .story import Ask, Story
    from .world import Decided, Delivered, WorkerHistory

    #: The request, when, and how.
    Broken = tuple[Ask, float, str]

EPS: Final = 1e-3
#: Seconds until a request is asked for at a service that is well to it: at once, or two polls beside bad requests.
ASKED, ASKED_BESIDE_BAD = 1.0, 12.0
#: Seconds from an answer that shows an operation until the phone is told.
TOLD: Final = 0.1
#: Seconds from the approval of a good request until it is noticed beside bad ones.
NOTICED_BESIDE_BAD: Final = 15.0
#: Seconds until the end of such a request is noticed.
SOON: Final = 5.0
#: Seconds by which a poll of such a request may be late.
LATE: Final = 0.5
#: Requests that fail before a service seems to be down.
OPENS: Final = 5
#: Seconds until a worker does again what was due while the broker or the key was away, beside its lease.
BACK: Final = 15.0
#: Seconds for which a clock that was set back may hold a request up.
HELD_UP: Final = 230.0
#: Seconds after which a worker has started, its check of the key included.
STARTED: Final = 2.0
#: Seconds between two inspections.
INSPECTED: Final = 6.0
#: Seconds for which a problem may be shown that has passed, and if it was a refusal.
FORGOTTEN: Final = (25.0, 75.0)
#: Seconds after which an outcome comes again, at most.
LONGEST_PAUSE: Final = 300.0
#: Mishaps after which all goes on, and soon.
AWAY: Final = ("full", "read-only", "silent", "vanishes", "no key", "not cleaned", "not corrected")
#: Seconds by which absences delay an outcome, unless one of them is longer.
ABSENT: Final = 150.0
#: Polls of a request from its deadline on, at least, if none is answered.
REPEATED: Final = 3


@dataclass
class Evidence:
    """What a story was, and what happened in it."""

    story: Story
    history: WorkerHistory

    def wall(self, at: float) -> float:
        """Return what the wall clock showed at a time, in seconds since 1970."""
        return EPOCH.timestamp() + at + sum(seconds for step, seconds in self.story.steps if step <= at)

    @cached_property
    def decided(self) -> list[tuple[Ask, Decided]]:
        """The outcomes, with the requests that they name."""
        asks = {ask.number: ask for ask in self.story.asks}
        return [(asks[each.event.read_context(int)], each) for each in self.history.decided]

    def deadline(self, ask: Ask) -> float:
        """Return the deadline of a request by the wall clock; infinity if it was not stored."""
        return self.history.stored.get(ask.operation_id, (0.0, 0.0, math.inf))[2]

    def sent(self, ask: Ask, method: str, until: float = math.inf) -> list[Exchange]:
        """Return the exchanges about an operation, those that had ended by a time."""
        every = self.history.exchanges
        return [e for e in every if (e.method, e.operation_id) == (method, ask.operation_id) and e.ended_at <= until]

    def deliveries(self, ask: Ask) -> list[list[Exchange]]:
        """Return the exchanges about an operation, by delivery of its request, in order."""
        deliveries: dict[int, list[Exchange]] = {}
        for exchange in self.history.exchanges:
            if exchange.operation_id == ask.operation_id:
                deliveries.setdefault(id(self.history.deliveries[exchange.number]), []).append(exchange)
        return list(deliveries.values())

    def is_delivered_twice(self, ask: Ask, begins: float, ends: float) -> bool:
        """Return whether a request was delivered once more in a time, or perhaps at any time.

        It may be if a clock was set, if a delivery outlasts its lease, or if a failover loses one.
        """
        stored_at, mishaps = self.history.stored[ask.operation_id][0], self.story.mishaps
        is_redelivered = any(m.kind == "silent" or (m.kind == "failover" and stored_at < m.ends) for m in mishaps)
        is_duplicated = any(begins - EPS <= at <= ends + EPS for at in self.story.duplicates)
        return bool(self.story.steps) or is_redelivered or is_duplicated

    def delivered(self, reader: str, ask: Ask) -> list[Delivered]:
        """Return the deliveries of an outcome to a reader."""
        return [d for d in self.history.delivered if (d.reader, d.number) == (reader, ask.number)]

    @cached_property
    def readers(self) -> set[str]:
        """The names of the readers."""
        return {reader.name for reader in self.story.readers}

    @property
    def lease(self) -> float:
        """Seconds after which a request comes again whose delivery is not settled."""
        return 3 * self.story.request_timeout + 10.0

    @property
    def interval(self) -> float:
        """Seconds between two polls of a request, at most."""
        return self.story.every or 20.0

    @cached_property
    def is_single(self) -> bool:
        """Whether no request is with two workers at once."""
        return not (self.story.steps or self.story.duplicates or self.story.has("silent", "failover"))

    def is_lied_about(self, ask: Ask) -> bool:
        """Return whether answers about an operation are false, or late news."""
        payloads, faults = {a.payload for a in self.story.asks if a.operation_id == ask.operation_id}, self.story.faults
        is_late = any(isinstance(f, Lag) or (isinstance(f, Moved) and f.failure is None) for f in faults)
        return is_late or any(isinstance(f, Lies) and f.payload in payloads for f in faults)

    def is_well(self, ask: Ask, *but: str) -> bool:
        """Return whether nothing goes wrong for a request: faults concern others, and workers have room.

        It may have mishaps of the kinds in `but`.
        """
        own = [f for f in self.story.faults if getattr(f, "payload", None) in {None, ask.payload}]
        has_room = self.story.max_in_flight >= 8 and self.story.rate >= 1000.0 and not self.story.workers_begin
        return self.story.is_steady_but(*but) and has_room and all(isinstance(f, RoundTrips) for f in own)

    @cached_property
    def is_down(self) -> bool:
        """Return whether so many requests fail by themselves that the service seems to be down."""
        return sum(isinstance(fault, Outage) and fault.payload is not None for fault in self.story.faults) >= OPENS

    @cached_property
    def may_be_away(self) -> bool:
        """Return whether the service may seem to be down to a worker, or asked it for a pause."""
        return len(self.story.asks) >= OPENS or any(e.retry_after is not None for e in self.history.exchanges)

    def is_repeated(self, ask: Ask) -> bool:
        """Return whether a gateway sent a create twice: its 409 looks like that of another's operation."""
        return any(post.was_repeated for post in self.sent(ask, "POST"))

    def was_created(self, ask: Ask) -> bool:
        """Return whether a worker created the operation."""
        stored = self.history.operations.get(ask.operation_id)
        return stored is not None and stored.created_by > 0


def one_outcome(seen: Evidence) -> Iterator[Broken]:
    """Each request that was stored has one outcome, about itself; a submission that is repeated stores nothing."""
    for ask in seen.story.asks:
        results = [result for number, result in seen.history.submitted if number == ask.number]
        outcomes = [each for other, each in seen.decided if other is ask]
        if len(outcomes) != ("refused" not in results) or results.count("stored") > 1:
            yield ask, seen.history.ended_at, f"{results}, {len(outcomes)} outcomes"


def own_content(seen: Evidence) -> Iterator[Broken]:
    """An event is about its request."""
    for ask, each in seen.decided:
        expected = (ask.operation_id, USER, ask.external_user_id, hashlib.sha256(ask.payload.encode()).hexdigest())
        content = (each.event.operation_id, each.event.user_id, each.event.external_user_id, each.event.payload_sha256)
        if content != expected:
            yield ask, each.at, f"the event is about {content}"


def no_wrong_approval(seen: Evidence) -> Iterator[Broken]:
    """An approval is the user's, of this content, in answer to this request."""
    for ask, each in seen.decided:
        stored = seen.history.operations.get(ask.operation_id)
        is_asked = ask.phone or seen.was_created(ask)
        is_right = stored and is_asked and stored.payload == ask.payload and stored.approved_at <= each.at
        if each.event.outcome == "approved" and not is_right:
            yield ask, each.at, f"approved, and the service has {stored}"


def one_tap_pays_once(seen: Evidence) -> Iterator[Broken]:
    """Of the requests under one id, one is approved at most."""
    approved: set[str] = set()
    for ask, each in seen.decided:
        if each.event.outcome == "approved":
            if ask.operation_id in approved:
                yield ask, each.at, "approved once more"
            approved.add(ask.operation_id)


def left_to_the_phone(seen: Evidence) -> Iterator[Broken]:
    """A worker neither creates what the phone starts, nor tells the phone; and the user was asked."""
    phones = [ask for ask in seen.story.asks if ask.phone]
    for ask in phones:
        for post in seen.sent(ask, "POST"):
            yield ask, post.sent_at, "a POST"
        for told in seen.history.told:
            if told.operation_id == ask.operation_id:
                yield ask, told.at, "told"
    for ask, each in seen.decided:
        if ask.phone and each.event.outcome == "expired" and not each.event.asked:
            yield ask, each.at, "not asked"


def no_approval_lost(seen: Evidence) -> Iterator[Broken]:
    """A request expires after its deadline, and `answered` says whether a poll after the deadline was."""
    for ask, each in seen.decided:
        if each.event.outcome != "expired":
            continue
        deadline = seen.deadline(ask)
        polls = [e for e in seen.sent(ask, "GET", each.at + EPS) if seen.wall(e.sent_at) >= deadline - EPS]
        said = [e for e in polls if e.status in {200, 404} and e.client == each.by]
        stored = seen.history.operations.get(ask.operation_id)
        if not seen.story.steps and seen.wall(each.at) < deadline - EPS:
            yield ask, each.at, f"expired {deadline - seen.wall(each.at):.3f} s before its deadline"
        elif each.event.answered and not said:
            yield ask, each.at, "answered, and no poll after the deadline was"
        elif each.event.answered and stored and not seen.is_lied_about(ask) and stored.approved_at <= said[-1].sent_at:
            yield ask, each.at, f"expired, and approved at {stored.approved_at:.3f}"
        # A check right after a create in doubt is no poll: the operation that it finds is polled at the next delivery.
        checked = {(post.client, post.ended_at) for post in seen.sent(ask, "POST")}
        heard = any(_says(e, b'"state"') for e in polls if (e.client, e.sent_at) not in checked)
        if not each.event.answered and seen.story.is_steady and heard and not seen.is_lied_about(ask):
            yield ask, each.at, "not answered, and a poll after the deadline was"
        if seen.story.is_back_in_time and stored and seen.wall(stored.approved_at) < deadline:
            yield ask, each.at, f"expired, and approved at {stored.approved_at:.3f}"
        begins = max(deadline, seen.wall(seen.story.workers_begin))
        gave_up = begins + seen.story.grace - seen.wall(each.at)
        if not each.event.answered and not seen.story.steps and gave_up > EPS:
            yield ask, each.at, f"not answered, and given up {gave_up:.3f} s before the end of the grace"
        if not each.event.answered and seen.story.is_steady and not seen.may_be_away and len(polls) < REPEATED:
            yield ask, each.at, f"not answered, after {len(polls)} polls"


def truth_about_asking(seen: Evidence) -> Iterator[Broken]:
    """What an event says of whether the user was asked is true, and stays true."""
    for ask, each in seen.decided:
        event = each.event
        was_not = event.asked is False or event.reason in {"rejected", "conflict", "already_approved"}
        if was_not and seen.was_created(ask) and not (seen.is_lied_about(ask) or seen.is_repeated(ask)):
            yield ask, each.at, f"{event.outcome} {event.reason}, and the user was asked"
        is_asked = seen.sent(ask, "POST") or ask.earlier or ask.phone
        if event.asked and not is_asked and seen.story.is_steady:
            yield ask, each.at, "asked, and no POST was sent"


def asked_once(seen: Evidence) -> Iterator[Broken]:
    """A POST is sent for a request that is undecided and holds its id, once, after a poll found no operation."""
    for ask in seen.story.asks:
        posts, missing = seen.sent(ask, "POST"), [e for e in seen.sent(ask, "GET") if e.status == 404]
        before: dict[str, float] = {}
        confirmed = min((post.ended_at for post in posts if _says(post, b"success")), default=math.inf)
        for post in posts:
            is_claimed, is_decided = seen.history.asked[post.number]
            looked = [e.sent_at for e in missing if e.client == post.client and e.ended_at <= post.sent_at]
            if not is_claimed:
                yield ask, post.sent_at, "a POST before the claim"
            if is_decided:
                yield ask, post.sent_at, "a POST after the outcome"
            if not looked or (looked[-1] < before.get(post.client, -1.0) and seen.is_single):
                yield ask, post.sent_at, "a POST without a poll that found nothing"
            if seen.wall(post.sent_at) > seen.deadline(ask) + EPS:
                yield ask, post.sent_at, "a POST after the deadline"
            if post.sent_at > confirmed and seen.is_single and not seen.is_lied_about(ask):
                yield ask, post.sent_at, "a POST after one that was confirmed"
            before[post.client] = post.sent_at


def told_once(seen: Evidence) -> Iterator[Broken]:
    """The phone is told once, as soon as a worker knows that the operation is there, and for ten seconds at most."""
    for ask in seen.story.asks:
        told = [each for each in seen.history.told if each.operation_id == ask.operation_id]
        stored = seen.history.operations.get(ask.operation_id)
        for each in told:
            if (stored is None or stored.created_at > each.at) and not seen.is_lied_about(ask):
                yield ask, each.at, "told of what is not there"
            if each.ended_at > each.at + 10.0 + EPS:
                yield ask, each.at, f"told for {each.ended_at - each.at:.3f} s"
        # A gateway's 403 counts as an answer, and hides that no delivery has found the operation yet.
        is_hidden = seen.is_lied_about(ask) or any(e.status == 403 for e in seen.sent(ask, "GET"))
        if not seen.story.is_steady_but("forgets", "doubts") or is_hidden or not seen.was_created(ask):
            continue
        if len(told) > 1:
            yield ask, told[1].at, f"told {len(told)} times"
        known = [e.ended_at for e in seen.sent(ask, "POST") if _says(e, b"success")]
        if seen.story.is_steady:  # if a put-off is lost, no delivery knows whether an earlier one has told the phone
            known += [e.ended_at for e in seen.sent(ask, "GET") if _says(e, b'"pending"')]
        known_at = min(known, default=math.inf)
        has_room = seen.story.telling in {"", "raises"}
        if has_room and seen.wall(known_at) < seen.deadline(ask) and (not told or told[0].at > known_at + TOLD):
            yield ask, known_at, "known to be there, and not told at once"


def asked_soon(seen: Evidence) -> Iterator[Broken]:
    """Bad requests hold no good one up."""
    for ask, _ in seen.decided:
        stored_at = seen.history.stored[ask.operation_id][0]
        asked = seen.sent(ask, "GET" if ask.phone else "POST")
        first = min((exchange.sent_at for exchange in asked), default=math.inf)
        within = ASKED_BESIDE_BAD if seen.is_down else ASKED + ASKED * seen.story.has("rotation")
        if seen.is_well(ask) and not ask.earlier and first > stored_at + within:
            yield ask, stored_at, f"stored at {stored_at:.3f}, asked at {first:.3f}"


def noticed_soon(seen: Evidence) -> Iterator[Broken]:
    """Bad requests hold no approval up."""
    for ask, each in seen.decided if seen.is_down else ():
        stored = seen.history.operations.get(ask.operation_id)
        if seen.is_well(ask) and stored is not None and each.at > stored.approved_at + NOTICED_BESIDE_BAD:
            yield ask, each.at, f"approved at {stored.approved_at:.3f}"


def ends_in_time(seen: Evidence) -> Iterator[Broken]:
    """A request ends at its deadline; later if nobody answers, or if workers die or the clock is set."""
    story = seen.story
    trouble = sum(life.after + seen.lease for lives in story.workers for life in lives) + 2 * seen.lease + 60.0
    trouble += story.workers_begin
    trouble += sum(abs(seconds) + 210.0 for _, seconds in story.steps)
    away = [mishap.ends - mishap.begins for mishap in story.mishaps if mishap.kind == "away"]
    trouble += max(min(sum(away), ABSENT), *away, 0.0) + max(away, default=0.0)  # one that flaps delays none forever
    trouble += sum(m.ends - m.begins + seen.lease for m in story.mishaps if m.kind != "away")
    for ask, each in seen.decided:
        stored_at, wall, expires_at = seen.history.stored[ask.operation_id]
        late = each.at - (stored_at + expires_at - wall)
        if late > (SOON if seen.is_well(ask) else story.grace + trouble):
            yield ask, each.at, f"{late:.3f} s after its deadline"
        room = max((m.ends for m in story.mishaps), default=0.0)
        if seen.is_well(ask, "nearly full") and late > SOON and each.at > room + SOON:
            yield ask, each.at, f"{late:.3f} s after its deadline, and {each.at - room:.3f} s after there was room"


def back_soon(seen: Evidence) -> Iterator[Broken]:
    """Once the broker and the key are back, what was due meanwhile is done."""
    ends = max((m.ends + GIVEN_UP_AFTER * (m.kind == "vanishes") for m in seen.story.mishaps), default=math.inf)
    for ask, each in seen.decided if ends < math.inf else ():
        stored = seen.history.operations.get(ask.operation_id)
        due, grace = seen.deadline(ask) - seen.wall(0.0), seen.story.grace
        if each.event.outcome == "approved" and stored is not None:
            due, grace = stored.approved_at, 0.0
        if seen.is_well(ask, *AWAY) and each.at > max(due, ends) + grace + seen.lease + seen.interval + BACK:
            yield ask, each.at, f"due at {due:.3f}, and possible from {ends:.3f} on"


def follows_the_service(seen: Evidence) -> Iterator[Broken]:
    """If the service has moved to another host, nothing stays with the old one for long."""
    for moved in (fault for fault in seen.story.faults if isinstance(fault, Moved)):
        within = BACK + seen.interval if moved.failure is not None else seen.lease + 60.0
        for ask, each in seen.decided if seen.story.is_steady else ():
            stored = seen.history.operations.get(ask.operation_id)
            begins = max(moved.begins, seen.history.stored[ask.operation_id][0])
            if stored is None or stored.created_at > begins + within:
                yield ask, begins, "not created"
            elif each.at > max(stored.approved_at, begins) + within:
                yield ask, each.at, f"approved at {stored.approved_at:.3f}"


def not_held_up(seen: Evidence) -> Iterator[Broken]:
    """A clock that is set back holds no request up for long, although a step of the housekeeping fails."""
    ends = max((m.ends + HELD_UP for m in seen.story.mishaps if m.kind == "not corrected"), default=0.0)
    for ask, each in seen.decided:
        sent = [e.sent_at for e in seen.history.exchanges if e.operation_id == ask.operation_id]
        for first, second in pairwise([seen.history.stored[ask.operation_id][0], *sent, each.at]):
            if second > max(first + HELD_UP, ends) and seen.is_well(ask, "steps", "not cleaned", "not corrected"):
                yield ask, second, f"held up since {first:.3f}"


def problems_shown(seen: Evidence) -> Iterator[Broken]:
    """A worker shows what is wrong for long, and nothing once all is well."""
    story = seen.story
    # Until a request whose put-off failed is taken again.
    shown_after = dict.fromkeys(("full", "read-only", "vanishes"), seen.lease + BACK)
    shown_after |= dict.fromkeys(("not cleaned", "not corrected"), 80.0)
    for mishap in story.mishaps if story.is_steady_but("steps", *AWAY) else ():
        from_, stored = mishap.begins + shown_after.get(mishap.kind, math.inf), seen.history.stored
        wait = [stored[ask.operation_id][0] < mishap.begins < mishap.ends < each.at for ask, each in seen.decided]
        # A worker whose requests another one takes sees no failure.
        for look in seen.history.seen if not mishap.who and (any(wait) or mishap.kind.startswith("not c")) else ():
            if from_ < look.at < mishap.ends and not look.statistics.problems:
                yield story.asks[0], look.at, f"{look.by} shows no problem, and there is: {mishap.kind}"
    well_from = max((m.ends + FORGOTTEN[m.kind == "full"] for m in story.mishaps), default=STARTED)
    for look in seen.history.seen if all(seen.is_well(ask, "steps", *AWAY) for ask in story.asks) else ():
        if look.at > well_from and look.statistics.problems:
            yield story.asks[0], look.at, f"{look.by} shows {look.statistics.problems}, and all is well"


def unread_shown(seen: Evidence) -> Iterator[Broken]:
    """A worker shows how many outcomes are unread, and since when the oldest is."""
    if not seen.story.is_steady or any(reader.lives for reader in seen.story.readers):
        return
    for name in seen.readers:
        times = []
        for ask, each in seen.decided:
            handled = [d.ended_at for d in seen.delivered(name, ask) if d.result == "handled"]
            times.append((each.at, min(handled, default=math.inf)))
        for look in seen.history.seen:
            at, shown = look.at, look.statistics.fleet.unread.get(name, 0)
            surely = sum(begins < at - INSPECTED and ends > at for begins, ends in times)
            perhaps = sum(begins <= at and ends > at - INSPECTED for begins, ends in times)
            if not surely <= shown <= perhaps:
                yield seen.story.asks[0], at, f"{look.by} shows {shown} unread of {name}, not {surely} to {perhaps}"
            oldest = min((at - begins for begins, ends in times if begins < at - INSPECTED and ends > at), default=0.0)
            if look.statistics.fleet.oldest_unread_age.get(name, 0.0) < oldest - INSPECTED:
                yield seen.story.asks[0], at, f"{look.by} does not show that one of {name} is {oldest:.0f} s old"


def true_reason(seen: Evidence) -> Iterator[Broken]:
    """A request fails only for what the service said or had."""
    for ask, each in seen.decided:
        sent = [*seen.sent(ask, "GET", each.at), *seen.sent(ask, "POST", each.at)]
        refused = {e.method for e in sent if e.status in {400, 401, 403}}
        may_exist = any(e.method == "POST" and _is_in_doubt(e) for e in sent)
        is_lied_about = seen.is_lied_about(ask)
        stored = seen.history.operations.get(ask.operation_id)
        is_anothers = bool(ask.phone) and stored is not None and stored.payload != ask.payload
        allowed = {
            "conflict": ask.earlier or is_lied_about or seen.is_repeated(ask),
            "already_approved": ask.earlier == "the same",
            "rejected": "POST" in refused and not may_exist,
            "poll_refused": refused,
            "mismatch": is_lied_about or is_anothers,
        } | dict.fromkeys(("inconsistent", "unreadable"), is_lied_about)
        if each.event.outcome == "failed" and not allowed.get(str(each.event.reason)):
            yield ask, each.at, f"{each.event.reason}: {each.event.detail}"


def handled_once(seen: Evidence) -> Iterator[Broken]:
    """Each reader handles each outcome; one that is handled, or in other hands, is not delivered."""
    for ask, each in seen.decided:
        for reader in seen.readers:
            deliveries = seen.delivered(reader, ask)
            if not any(d.result in {"handled", "unknown"} and d.event == each.event for d in deliveries):
                yield ask, each.at, f"{reader} has not handled it"
            for number, (first, second) in enumerate(pairwise([] if seen.story.has("deleted") else deliveries)):
                due, pause = first.began_at + 30.0, min(2.0**number, LONGEST_PAUSE)
                if first.result in {"failed", "cancelled"}:
                    due = min(due, first.ended_at + pause)
                if first.result == "handled" and second.began_at > first.ended_at:
                    yield ask, second.began_at, f"{reader} got it again"
                if second.began_at < due - EPS and not seen.story.steps:
                    yield ask, second.began_at, f"{reader} got it again too soon"


def put_off(seen: Evidence) -> Iterator[Broken]:
    """An outcome whose body was cancelled comes again after its pause, and not only when it is taken for lost."""
    asks = {ask.number: ask for ask in seen.story.asks}
    for each in seen.history.delivered if not (seen.story.steps or seen.story.mishaps) else ():
        if each.put_off is not None and each.ended_at < each.began_at + 30.0 - EPS:
            seconds, deliveries = each.put_off
            if seconds > 2.0 ** (deliveries - 1) + EPS:
                yield asks[each.number], each.ended_at, f"{each.reader} gets it again in {seconds:.3f} s"


def read_soon(seen: Evidence) -> Iterator[Broken]:
    """An outcome that a reader fails to handle comes again after its pause, and holds up no other one."""
    is_quick = not any(reader.lives or set(reader.troubles) != {"fails"} for reader in seen.story.readers)
    for ask, each in seen.decided if is_quick and not (seen.story.steps or seen.story.mishaps) else ():
        for name in seen.readers:
            due = each.at
            for number, delivered in enumerate(seen.delivered(name, ask)):
                if delivered.began_at > due + 1.0:
                    yield ask, each.at, f"{name} got it {delivered.began_at - due:.3f} s late"
                due = delivered.ended_at + min(2.0**number, LONGEST_PAUSE)


def one_at_a_time(seen: Evidence) -> Iterator[Broken]:
    """A request is with one worker at a time, unless it was delivered once more meanwhile."""
    for ask in seen.story.asks:
        for first, second in pairwise(seen.deliveries(ask)):
            begins, again = first[0].sent_at, second[0].sent_at
            if again < first[-1].ended_at - EPS and not seen.is_delivered_twice(ask, begins, again):
                yield ask, again, f"the delivery of {begins:.3f} has not ended"


def paced(seen: Evidence) -> Iterator[Broken]:
    """After an answer, a schedule of fixed delays sets the next poll; a late delivery does not."""
    every = seen.story.every
    if every is None:
        return
    for ask in seen.story.asks:
        deadline = seen.deadline(ask)
        for first, second in pairwise(seen.deliveries(ask)):
            ended_at, again = first[-1].ended_at, second[0].sent_at
            is_scheduled = _says(first[-1], b'"pending"') or _says(first[-1], b"success")
            is_scheduled = is_scheduled or (bool(ask.phone) and first[-1].status == 404)
            is_excused = seen.is_delivered_twice(ask, first[0].sent_at, again) or seen.is_lied_about(ask)
            if is_scheduled and not is_excused and again < ended_at + every - EPS and seen.wall(again) < deadline - EPS:
                yield ask, again, f"{again - ended_at:.3f} s after an answer"
            is_well = seen.is_well(ask) and not seen.is_down
            if is_scheduled and is_well and again > ended_at + every + LATE:
                yield ask, again, f"{again - ended_at:.3f} s after an answer"


def few_polls(seen: Evidence) -> Iterator[Broken]:
    """One request is not polled in circles."""
    for ask in seen.story.asks if seen.is_single else ():
        polls = [e.sent_at for e in seen.sent(ask, "GET")]
        quick = [first for first, last in zip(polls, polls[8:], strict=False) if last < first + 0.9]
        if quick:
            yield ask, quick[0], "9 polls in less than a second"


def nothing_left(seen: Evidence) -> Iterator[Broken]:
    """The tables are empty in the end, and so is the event loop; no worker has given up."""
    left = [f"{rows} of {what}" for what, rows in seen.history.left.items() if rows]
    for problem in (*seen.history.problems, *left):
        yield seen.story.asks[0], seen.history.ended_at, problem


PROMISES: Final[tuple[Callable[[Evidence], Iterator[Broken]], ...]] = (
    *(
        one_outcome,
        own_content,
        no_wrong_approval,
        one_tap_pays_once,
        left_to_the_phone,
        no_approval_lost,
        truth_about_asking,
        asked_once,
        told_once,
        asked_soon,
    ),
    *(back_soon, follows_the_service, not_held_up, problems_shown, unread_shown),
    *(noticed_soon, ends_in_time, true_reason, handled_once, put_off, read_soon, one_at_a_time, paced, few_polls),
    nothing_left,
)
#: Those that hold for a request of which a failover lost something, too.
_LASTING: Final = (own_content, no_wrong_approval, nothing_left)


def check(story: Story, history: WorkerHistory) -> list[Violation]:
    """Return the promises that were broken, the earliest first."""
    seen = Evidence(story, history)
    broken = [
        Violation(promise.__name__.replace("_", " "), f"request {ask.number}", ask.operation_id, at, text)
        for promise in PROMISES
        for ask, at, text in promise(seen)
        if ask.operation_id not in history.torn or promise in _LASTING
    ]
    return sorted(broken, key=lambda violation: violation.at)


def _says(exchange: Exchange, text: bytes) -> bool:
    """Return whether an answer arrived that has such a text."""
    return exchange.status == 200 and text in exchange.body


def _is_in_doubt(post: Exchange) -> bool:
    """Return whether a create may have taken effect although its answer does not say so."""
    if post.status is None:
        return not post.was_refused
    return post.status == 408 or post.status >= 500 or (post.status == 200 and not _says(post, b"success"))
