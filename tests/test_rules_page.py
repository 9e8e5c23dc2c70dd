"""The numbers in docs/rules.md are the code's: `SENTENCES` makes the page's sentences of them, `OTHERS` are none."""

from __future__ import annotations

import re
from inspect import signature
from pathlib import Path
from unittest.mock import patch

from aiokeyless import KeylessClient, schedule
from aiokeyless._http import protocol
from aiokeyless._rules import backoff, budget, final, outcome, rate, slots, window
from aiokeyless._waits import holds, machine
from aiokeyless.errors import TRANSIENT_STATUSES
from aiokeyless.worker import ApprovalWorker, decisions, grace, processor, serving
from aiokeyless.worker.nats import StreamSettings, load_shedding

DOCS = Path(__file__).parents[1] / "docs"


def words(page: str) -> str:
    return " ".join((DOCS / page).read_text().replace("\u00d7", "x").split())


PAGE = words("rules.md")
WORDS = {0.5: "half", 2: "two", 3: "three", 5: "five", 6: "six", 8: "eight"}
NUMBER = re.compile(
    rf"\d+(?:\.\d+)?|\b(?:{'|'.join(WORDS.values())}|four|seven|nine|ten|dozen|twice|third|quarter)\b"
    r"|\b(?:an?|last|first|next) (?:second|minute|hour|day|week)\b"
)


def word(number: float) -> str:
    return "one" if number == 1 else WORDS.get(number, f"{number:g}")


def seconds(number: float) -> str:
    """Return what follows "a" or "the last"."""
    return "second" if number == 1 else f"{number:g} seconds"


def delays(failures: int) -> list[float]:
    """Return the shortest and the longest delay after so many failures."""
    delay = backoff.error_delay
    return [patch("random.uniform", end)(delay)(failures) for end in (min, max)]


def span(failures: int) -> str:
    return "{:g} to {:g} s".format(*delays(failures))


def most(max_in_flight: int, answered_at: float = 10.0) -> int:
    return slots.most_in_flight(max_in_flight, 10.0, answered_at=answered_at)


FINAL = final.FINAL_POLL_TIMEOUT
#: The least number of refusals that is over a third.
OVER_A_THIRD = "a third" if rate._MANY_REFUSED == rate._LAST // 3 + 1 else rate._MANY_REFUSED - 1
SENTENCES = [
    # Rules 1 to 9
    f"created the ticket less than a {seconds(machine.FRESH)} ago",
    f"the wait ends at most {word(FINAL)} seconds later.**",
    f"for more than {word(final.STOOD_STILL)} a second, or for all of the {word(FINAL)} seconds",
    f"The final poll gets these {word(FINAL)} seconds",
    f"it is retried, but not in the last {word(final._TOO_LATE)} second.",
    f"which may queue for {machine.EXPIRED_PATIENCE:g} s and",
    f"If it fails, it is retried for {word(FINAL)} seconds.",
    f"Transient are `TransportError`, {', '.join(map(str, sorted(TRANSIENT_STATUSES)))}, 5xx, and",
    f"After {outcome.UNEXPECTED_FOR:g} s of them, or of a failing key function",
    f"that a cache stored over a {seconds(protocol._MAX_AGE)} ago",
    f"nothing but 401s for {outcome.UNEXPECTED_FOR:g} s, unanswered",
    f"a ticket younger than {outcome.YOUNG:g} s.",
    # Holds
    f"The wait goes on for {holds.LEASE:g} s after its last hold",
    f"`aclose` ends these {holds.LEASE:g} s.",
    # What a failed create means
    f"in the first {processor.CREATES_FOR:g} s of the same delivery",
    # Where the engines differ
    f"| an unanswered final poll | is retried for {FINAL:g} s |",
    f"is retried for `grace` ({signature(ApprovalWorker).parameters['grace'].default:g} s)",
    f"then it is sent {word(1 + processor._LATE_REPEATS)} times",
    f"| lasts, but {span(backoff._MANY)} at most |",
    f"refused {word(1 + len(serving.KEY_CHECKS))} times within {word(sum(serving.KEY_CHECKS) / 60)} a minute",
    f"not be over {decisions._MUCH_OLDER.total_seconds() / 3600:g} hours older than the request",
    f"NATS forgets claims after {'a day' if StreamSettings().duplicate_window == 24 * 3600 else 'another time'}",
    f"would have made by now, at most {schedule._MAX_COUNTED}",
    f"a wait that began within a {seconds(machine.FRESH)} of its create",
    f"NATS stretches delays up to {load_shedding._MAX_FACTOR:g} times",
    # The grace of a worker
    f"took nothing for over {grace._TURN.total_seconds():g} s, being frozen or without its broker:",
    f"{grace._ABSENT.total_seconds():g} s in all, or one that is longer",
    # The rate
    f"`max_polls_per_second` ({signature(KeylessClient).parameters['max_polls_per_second'].default:g} by default)",
    f"a {seconds(rate._BURST)}'s worth of polls may start at once",
    f"half of the last {seconds(rate._COUNTED)}'s polls, and is back after {rate._RECOVERY:g} s.",
    # Failures
    f"returns it and adds {budget.GAIN}.",
    f"There are {word(budget.PER_WAIT)} tokens for each wait**, at least {budget.LEAST} and at most {budget.MOST}.",
    f"{word(budget.PER_SECOND).capitalize()} a second come by themselves, or {word(budget.PER_SECOND_LATER)} a second",
    f"only failures for {budget.LONG:g} s. A worker",
    f"only failures for {budget.FAILING_AFTER:g} s, or if there is no token.**",
    f"backs off**: {span(1)}, {span(2)}, at last {span(backoff._MANY)}.",
    f"For {backoff.SHORT:g} s after a good answer to any poll, {word(backoff.MOST_AT_FIRST)} failures at most count",
    f"or {word(backoff.MOST_AT_FIRST + 1)} from the {backoff.OFTEN}nd in a row on.",
    f"A new operation has {backoff.SHORT:g} s of its own.",
    f"pauses its own operation only**, for {span(backoff._MANY)} at most.",
    # Slots
    f"keeps its slot for its first {seconds(slots.SLOW)}**",
    f"At most {most(9) / 9:g} x `max_in_flight` ordinary polls are in flight**, but not over {most(200)}",
    f"or, if that is more, {most(900) / 900:g} x `max_in_flight`.",
    f"If no good answer came within the last {seconds(slots.SLOW)},",
    f"these are {most(10, 0.0) / 10:g} x, {most(200, 0.0)} and {most(900, 0.0) / 900:g} x.",
    f"Up to {slots.most_final_in_flight(9) / 9:g} x `max_in_flight` are in flight,",
    f"but not over {slots.most_final_in_flight(200)} or, if that is more, `max_in_flight`.",
    f"the quickest of {word(window._ROUND)} good answers takes",
    f"over {'twice' if window._TIMES_QUICKEST == 2 else window._TIMES_QUICKEST} the quickest ever",
    f"{window._SECONDS_MORE:g} s more, {window._LEFT:g} of the polls in flight remain, at least {word(window._LEAST)}.",
    f"since it began, {word(window._LEAST)} at a time remain;",
    f"After {budget.FAILING_AFTER:g} s of failures, {window._AFTER_OUTAGE:g} are the beginning.",
    # Refusals
    f"its `Retry-After` (at most {backoff.MAX_PAUSE:g} s)",
    f"over {OVER_A_THIRD} of the last {rate._LAST} polls were refused",
    f"over {word(rate._ONSET)} times as many refusals as among the {rate._LAST} polls before.",
]
#: The same of docs/explanation/failures.md, which is no page of rules.
OF_FAILURES = [
    f"pays for its own poll and {budget.GAIN} more.",
    f"{word(budget.PER_SECOND)} polls a second, and {word(budget.PER_SECOND_LATER)} a second after {budget.LONG:g} s,",
    f"lets {budget.GAIN} more polls start",
    f"of {budget.FAILING_AFTER:g} s or more, {window._AFTER_OUTAGE:g} are in flight at first",
    f"within {delays(backoff._MANY)[1]:g} s, by its own backoff",
    f"for a {seconds(budget.IN_DOUBT)}, one poll each {budget.RENEWS_EVERY:g} s uses a new connection.",
]
#: Patterns of numbers that no constant has, and why.
OTHERS = {
    r"\b\d\. \*\*|\brule \d|\bO\d\b": "they number the rules and the cases",
    r"\b(?:200|40[01349]|408|429|503|[235]xx)\b": "HTTP statuses",
    r"SHA-256": "a name",
}


def check(page: str, sentences: list[str], others: dict[str, str]) -> tuple[list[str], list[str]]:
    """Return the sentences that the page lacks, and each number that neither they nor the others have, in its place."""
    missing = [sentence for sentence in sentences if sentence not in page]
    explained = "|".join([*map(re.escape, sentences), *others])
    rest = re.sub(explained, "", page)
    return missing, [rest[max(0, found.start() - 40) : found.end() + 20] for found in NUMBER.finditer(rest)]


def test_the_numbers_of_the_rules_are_those_of_the_code() -> None:
    missing, unexplained = check(PAGE, SENTENCES, OTHERS)
    assert not missing, "docs/rules.md lacks what the code's constants make: " + " / ".join(missing)
    assert not unexplained, "docs/rules.md has numbers that SENTENCES and OTHERS lack: " + " / ".join(unexplained)


def test_the_page_about_failures_has_the_numbers_of_the_code() -> None:
    page = words("explanation/failures.md")
    assert [sentence for sentence in OF_FAILURES if sentence not in page] == []


def test_each_exception_is_needed() -> None:
    assert [pattern for pattern in OTHERS if not re.search(pattern, PAGE)] == []


def test_a_number_that_changes_is_reported() -> None:
    page = "1. **A poll gets 2 s, and twice.**"
    assert check(page, ["gets 2 s, and twice"], OTHERS) == ([], [])
    assert check(page, ["gets 3 s, and twice"], OTHERS) == (
        ["gets 3 s, and twice"],
        ["A poll gets 2 s, and twice.**"] * 2,
    )
